r"""LexVLA: Li, Wang, Fu, Ru, Zhang and He, Unified Lexical Representation for Interpretable Visual-Language Alignment, NeurIPS 2024,
https://arxiv.org/abs/2407.17827.

Images and captions become vectors with a coordinate for each of V words (section 3.1; `models/lexical.py`). A decoder that is asked for
the important words of a caption answers with the state :math:`z_\text{txt}` from which it would predict the next word; an adapter
:math:`g` on a frozen image tower makes :math:`z_1 \dots z_n` of its tokens:

.. math::
    s_\text{txt} = \frac{\sigma(z_\text{txt} Z_\text{txt}^\top)}{\|\cdot\|} \qquad
    s_\text{img} = \frac{\max_i \sigma(z_i Z_\text{img}^\top)}{\|\cdot\|} \qquad \sigma = \text{elu} + 1

:math:`Z_\text{txt}` is the decoder's output matrix, frozen; :math:`Z_\text{img}` starts as a copy of it and is trained. With
:math:`\alpha = \min(e^t, 100)` and weights that grow for 2,000 steps (equations 5, 7 and 8; `losses/lexical.py`):

.. math::
    L = \ell_\text{i2t} + \ell_\text{t2i} + \lambda_I \ell_\text{overuse}(s_\text{img}) + \lambda_T \ell_\text{overuse}(s_\text{txt})

The authors have published no code. What the paper leaves open is an option here: which tokens take part in the maximum (`pool`), the adapter
(`adapter`), the penalty's scope, weight and batch, how the scale is bounded (`clip`), and the words (config.tokenizer.lexicon).
A decoder that starts from random numbers knows no words, and its rows :math:`Z_\text{txt}` mean nothing: `word_weight` teaches it those of its
captions and `text_codebook` lets the rows train, which no part of the paper does.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxvl.losses import lexical as losses
from jaxvl.methods.method import Batch, Method, Run, in_sequence, split_key, unit
from jaxvl.models import lexical, sparse, text as texts, vit as vits
from jaxvl.models.flops import text_flops, vit_flops
from jaxvl.models.lexical import Activation, Adapter, AdapterOptions, Layout
from jaxvl.models.rules import RULES
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions

ROWS = 128  # codebooks are filled up with rows of no word to a multiple of this, so that they split evenly over devices
Penalty = Literal["overuse", "flops", "none"]
PLAIN: dict[str, dict[str, Any]] = {
    "fused mapper": {"fused": False},
    "shared prompt prefix": {"shared_prefix": False},
}  # cheap equivalents, and their switches


class LexvlaOptions(NamedTuple):
    """The keys of the `method` section for LexVLA.

    entries: V; 0 for as many words as the tokenizer keeps, another number is compared with that. activation: σ. pool: "all" tokens take part in the
    maximum, as in equation 4, or "patches" alone. adapter: "block_mlp", one attention layer and two perceptrons, or "attn_mlp", one and one; mlp2 is 0
    for the width with which that comes to the paper's size. frozen_image: no gradient for the image tower; its features are computed once a step
    however the batch is cut. fused: whether the maximum is streamed, see `models/lexical.py`. shared_prefix: what all prompts begin with is
    read once a step. word_weight: of the cross entropy of the decoder's words against those of the caption. text_codebook: Z_txt is "frozen" as in the
    paper, for a decoder that has read; "trained" like Z_img; or "tied", the unit rows of the decoder's embeddings of the words, as they are in each step.

    temperature: initial e^-t. max_scale: bound of e^t; clip: "forward" in the logits, beyond which t has no gradient, or "param", t itself before
    every step. reduce: "sum" of both directions or "mean". impl: see `losses/infonce.py`. penalty: of both sides, on the unit vectors;
    image_weight, text_weight: λ; penalty_warmup: steps in which they grow from 0. penalty_scope: the "global" batch, or "local", the mean over the
    parts that devices hold. stop_weight_grad: the overuse penalty's weights are constants.

    words, prefix, tail, head: ids of the words, ids that every prompt begins with, number of ids in which every prompt ends, number of ids in front
    of a caption; the tokenizer's.
    """

    name: Literal["lexvla"] = "lexvla"
    entries: int = 0
    activation: Activation = "elu1p"
    pool: Literal["all", "patches"] = "all"
    adapter: Layout = "block_mlp"
    adapter_heads: int = 12
    mlp1: int = 3072
    mlp2: int = 0
    frozen_image: bool = True
    fused: bool = True
    shared_prefix: bool = True
    word_weight: float = 0.0
    text_codebook: Literal["frozen", "trained", "tied"] = "frozen"
    temperature: float = 0.07
    max_scale: float = 100.0
    clip: Literal["forward", "param"] = "forward"
    reduce: Literal["sum", "mean"] = "sum"
    impl: Literal["global", "ring"] = "global"
    penalty: Penalty = "overuse"
    image_weight: float = 5e-4
    text_weight: float = 1e-3
    penalty_warmup: int = 2000
    penalty_scope: Literal["global", "local"] = "global"
    stop_weight_grad: bool = False
    words: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    tail: int = 0
    head: int = 0


def complete(options: LexvlaOptions, run: Run) -> LexvlaOptions:
    """Options with what the run's tokenizer knows: its words and the ends of its prompt. Raises ValueError where it keeps another number of words."""
    if run.words and options.entries not in (0, len(run.words)):
        raise ValueError(
            f"config.method.entries is {options.entries}, but the tokenizer keeps {len(run.words)} words; see config.tokenizer.lexicon"
        )
    known = {key: getattr(run, key) for key in ("words", "prefix", "tail", "head") if getattr(run, key)}
    return options._replace(**known, entries=options.entries or len(run.words))


def build(image: VitOptions, text: TextOptions, options: LexvlaOptions = LexvlaOptions()) -> Method:
    """LexVLA with params {"image", "adapter", "image_codebook", "text", "text_codebook" unless it is tied, "t"} and the step in memory.

    Embeddings are float32 [b, V]: not negative, of unit norm. Raises ValueError for options that cannot be.
    """
    o, image, text = resolve(image, text, options)
    V, d = o.entries, text.width
    rows = -(-V // ROWS) * ROWS
    f_img: Any = vits.Vit(image)
    f_txt: Any = texts.Text(text)
    g_img: Any = Adapter(AdapterOptions(o.adapter, image.width, d, o.adapter_heads, o.mlp1, o.mlp2, image.dtype))
    shared = o.prefix if o.shared_prefix else ()
    penalty = {"overuse": losses.overuse, "flops": losses.flops, "none": lambda s, entries: jnp.zeros(())}[o.penalty]
    how = {"entries": V} | ({"stop_weight_grad": o.stop_weight_grad} if o.penalty == "overuse" else {})
    column = np.full(text.vocab_size, -1, np.int32)  # of an id that is a word
    column[list(o.words)] = np.arange(len(o.words))

    def init(key: jax.Array, batch_spec: dict) -> tuple[dict, dict]:
        keys = jax.random.split(key, 4)
        images = jnp.zeros((1, *batch_spec["image"].shape[1:]))
        decoder = f_txt.init(keys[1], jnp.zeros((1, batch_spec["tokens"].shape[1]), jnp.int32))["params"]
        # Of a decoder that has no output matrix, the directions in which it reads the words.
        Z = rows_of(decoder) if o.words else unit(jax.random.normal(keys[3], (rows, d)))
        t = -jnp.log(jnp.float32(o.temperature))
        adapter = g_img.init(keys[2], jnp.zeros((1, 2, image.width)))["params"]
        params = {
            "image": f_img.init(keys[0], images)["params"],
            "adapter": adapter,
            "text": decoder,
            "image_codebook": Z,
            "t": t,
        }
        if o.text_codebook != "tied":
            params["text_codebook"] = Z
        return params, {"step": jnp.int32(0)}

    def rows_of(decoder: dict) -> jax.Array:
        """The directions in which a decoder reads the words, [rows, d]; rows of no word are zero."""
        Z = unit(decoder["embed"][jnp.asarray(o.words, jnp.int32)].astype(jnp.float32))
        return jnp.pad(Z, ((0, rows - V), (0, 0)))

    def text_codebook(params: dict) -> jax.Array:
        """Z_txt."""
        if o.text_codebook == "tied":
            return rows_of(params["text"])
        return lax.stop_gradient(params["text_codebook"]) if o.text_codebook == "frozen" else params["text_codebook"]

    def features(params: dict, batch: Batch) -> Batch:
        """f_img of the batch, as the batch has it where `encode` should not compute it again."""
        return {"features": lax.stop_gradient(tokens_of(params, batch["image"], None))}

    def tokens_of(params: dict, images: jax.Array, key: jax.Array | None) -> jax.Array:
        x = f_img.apply({"params": params["image"]}, images, rngs=None if key is None else {"dropout": key}).tokens
        front = image.class_tokens + image.registers
        return x[:, front:] if o.pool == "patches" else jnp.concatenate([x[:, : image.class_tokens], x[:, front:]], 1)

    def image_logits(params: dict, x: jax.Array) -> jax.Array:
        z, Z_img = g_img.apply({"params": params["adapter"]}, x), params["image_codebook"]
        return lexical.max_logits(z, Z_img) if o.fused else jnp.max(lexical.logits(z, Z_img), 1)

    def text_logits(params: dict, tokens: jax.Array, key: jax.Array | None) -> jax.Array:
        decoder, kept = {"params": params["text"]}, None
        if shared:
            # A causal decoder makes the same of them whatever follows; their gradient is the sum over the captions.
            kept = f_txt.apply(decoder, jnp.asarray([shared], jnp.int32), keys_values=True).keys_values
            tokens = tokens[:, len(shared) :]
        z_txt = f_txt.apply(decoder, tokens, prefix=kept, rngs=None if key is None else {"dropout": key}).pooled
        return lexical.logits(z_txt, text_codebook(params))

    s = lambda logits: lexical.vectors(logits, o.activation, V)

    def encode(params: dict, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
        key_image, key_text = split_key(key)
        x = (
            batch["features"]
            if "features" in batch
            else features(params, batch)["features"]
            if o.frozen_image
            else tokens_of(params, batch["image"], key_image)
        )
        logits = text_logits(params, batch["tokens"], key_text)
        taught = {"words": words_loss(logits, batch["tokens"])} if o.word_weight else {}
        return {"image": s(image_logits(params, x)), "text": s(logits), **taught}

    def embed_patches(params: dict, images: jax.Array) -> jax.Array:
        """The mapper without the maximum: s of each patch (section 3.1), with what attention in the adapter tells it of the others."""
        z = g_img.apply({"params": params["adapter"]}, tokens_of(params, images, None))
        z = z[:, image.class_tokens :] if o.pool == "all" else z
        return s(lexical.logits(z, params["image_codebook"]))[..., :V].reshape(len(z), *vits.grid(image, *images.shape[1:3]), V)

    def embed_words(params: dict, columns: jax.Array) -> jax.Array:
        """s of words alone: the row of a word takes the place of z_txt."""
        Z_txt = text_codebook(params)
        return s(lexical.logits(Z_txt[columns], Z_txt))[:, :V]

    def words_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
        """Cross entropy of the words that the decoder would say next and those of each caption; float32 [B], 0 for a caption of no words."""
        place, end = jnp.arange(tokens.shape[1]), jnp.sum(tokens != text.pad_id, 1, keepdims=True) - o.tail
        at = jnp.asarray(column)[tokens]
        counts = (at >= 0) & (place >= o.head) & (place < end)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(jnp.where(jnp.arange(rows) < V, logits, -jnp.inf)), jnp.maximum(at, 0), 1)
        return -jnp.sum(jnp.where(counts, log_p, 0), 1) / jnp.maximum(jnp.sum(counts, 1), 1)

    def objective(params: dict, memory: dict, embeddings: dict, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict]:
        del batch, key
        s_img, s_txt = embeddings["image"], embeddings["text"]
        alpha = jnp.exp(params["t"])
        alpha = jnp.minimum(alpha, o.max_scale) if o.clip == "forward" else alpha
        l_con = losses.contrastive(s_img, s_txt, alpha, reduce=o.reduce, impl=o.impl)
        loss, aux = l_con, {"loss_contrastive": l_con, "logit_scale": alpha}
        for side, s, weight in (("image", s_img, o.image_weight), ("text", s_txt, o.text_weight)):
            term = losses.by_parts(penalty, s, shards(), **how) if o.penalty_scope == "local" else penalty(s, **how)
            loss += losses.growing(memory["step"], weight, o.penalty_warmup) * term
            aux |= usage(side, lax.stop_gradient(s))
        if o.word_weight:
            aux["loss_words"] = jnp.mean(embeddings["words"])
            loss += o.word_weight * aux["loss_words"]
        return loss, aux

    def usage(side: str, s: jax.Array) -> dict[str, jax.Array]:
        """How a batch uses the words, whichever penalty is in the loss; active is above 1/√V."""
        on = s > sparse.default_threshold(V)
        return {
            f"{side}_overuse": losses.overuse(s, V), f"{side}_flops": losses.flops(s), f"{side}_active": jnp.mean(jnp.sum(on, 1, dtype=jnp.float32)),
            f"{side}_words_used": jnp.sum(jnp.any(on, 0), dtype=jnp.float32) / V, f"{side}_most_used": jnp.max(jnp.mean(on, 0, dtype=jnp.float32)),
        }  # fmt: skip

    def flops(batch_spec: dict) -> float:
        (batch, height, wide, _), (_, length) = batch_spec["image"].shape, batch_spec["tokens"].shape
        n, w = math.prod(vits.grid(image, height, wide)) + (image.class_tokens if o.pool == "all" else 0), image.width
        adapter = 2.0 * n * (4 * w * w + 2 * n * w + (2 * w * o.mlp1 if o.adapter == "block_mlp" else 0) + o.mlp2 * (w + d))
        heads = 2.0 * (n + 1) * V * d + 2.0 * batch * V
        frozen = vit_flops(image, height, wide, train=True) / (3 if o.frozen_image else 1)  # counted three times, and passed once
        return frozen + adapter + heads + text_flops(text, length - len(shared))

    return Method(
        init=init,
        encode=encode,
        objective=objective,
        loss=in_sequence(encode, objective),
        update=lambda memory, params, aux: {"step": memory["step"] + 1},
        embed_image=lambda params, images: s(image_logits(params, tokens_of(params, images, None)))[:, :V],
        embed_text=lambda params, tokens: s(text_logits(params, tokens, None))[:, :V],
        embed_patches=embed_patches,
        embed_words=embed_words,
        flops=flops,
        rules=((r"(^|/)(t|step)$", P()), *lexical.RULES, *RULES),
        constrain=(lambda params: {**params, "t": jnp.minimum(params["t"], math.log(o.max_scale))}) if o.clip == "param" else None,
        features=features if o.frozen_image else None,
        waits=(("penalty_warmup", o.penalty_warmup),) if o.penalty != "none" and o.image_weight + o.text_weight else (),
        constant="|".join(["^text_codebook$"] * (o.text_codebook == "frozen") + ["^image/"] * o.frozen_image),
    )


def resolve(image: VitOptions, text: TextOptions, o: LexvlaOptions) -> tuple[LexvlaOptions, VitOptions, TextOptions]:
    """Options with what follows from others filled in. Raises ValueError naming key, value and what would be right."""
    image, text = vits.resolve(image), texts.resolve(text)
    for section, tower in (("image", image), ("text", text)):
        if tower.head or tower.pooler:
            raise ValueError(
                f"config.{section}.head is {tower.head} and .pooler {tower.pooler}; LexVLA reads the tower's states as they are: set both to 0"
            )
    if o.entries < 1:
        raise ValueError(
            "config.method.entries is 0 and the tokenizer keeps no words; set config.tokenizer.lexicon, such as 'ascii_lower_len2'"
        )
    if o.words and (len(o.words) != o.entries or max(o.words) >= text.vocab_size):
        raise ValueError(
            f"config.method.words are {len(o.words)} ids up to {max(o.words)}, for {o.entries} entries of {text.vocab_size} tokens"
        )
    if o.prefix and o.shared_prefix and not text.causal:
        raise ValueError(
            "config.method.shared_prefix is True, but what a bidirectional text tower makes of a prompt depends on all of it; set it to False"
        )
    for key in ("image_weight", "text_weight", "word_weight", "penalty_warmup", "tail", "head"):
        if getattr(o, key) < 0:
            raise ValueError(f"config.method.{key} is {getattr(o, key)}; it must be at least 0")
    for key, asked in (("word_weight", o.word_weight), ("text_codebook", o.text_codebook == "tied")):
        if asked and not o.words:
            raise ValueError(
                f"config.method.{key} is {getattr(o, key)!r}, which needs the words of a tokenizer; set config.tokenizer.lexicon"
            )
    for key, legal in (("activation", Activation), ("penalty", Penalty)):
        if getattr(o, key) not in get_args(legal):
            raise ValueError(f"config.method.{key} is {getattr(o, key)!r}; it must be one of {', '.join(get_args(legal))}")
    if o.temperature <= 0 or o.max_scale * o.temperature < 1:
        raise ValueError(
            f"config.method: an initial scale of 1 / temperature ({o.temperature}) must lie between 0 and max_scale ({o.max_scale})"
        )
    o = o._replace(mlp2=o.mlp2 or (2048 if o.adapter == "block_mlp" else 3072))
    lexical.check_adapter(AdapterOptions(o.adapter, image.width, text.width, o.adapter_heads, o.mlp1, o.mlp2), "config.method")
    return o, image, text


def shards() -> int:
    """Into how many parts the mesh of the context cuts a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
