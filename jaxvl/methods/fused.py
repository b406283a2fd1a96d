"""The trunk of the ALBEF family: two towers, fusion layers, momentum teachers, queues, and the losses that all of it share.

Li et al., Align before Fuse: Vision and Language Representation Learning with Momentum Distillation, NeurIPS 2021,
https://arxiv.org/abs/2107.07651. A vision transformer; a BERT whose lower layers read a caption and whose upper ones, the
fusion layers, also read the image tokens; projections of both class tokens into one space; a head that tells whether image
and caption match (ITM) and one that tells hidden words (MLM). A teacher, the moving average of all but the ITM head, sees a second view of
each image; what it makes of earlier batches is kept in two queues. A method on this trunk (`tcl.py`, `codis.py`) adds its
alignment losses.

    params = {"image": Vit, "text": Text, "fusion": Fusion, "image_proj", "text_proj", "itm": {"kernel", "bias"}, "mlm": MlmHead,
              "temperature": float32 []}
    memory = {"teacher": params without itm and temperature, "image_queue", "text_queue": float32 [Q, D], "id_queue": int32 [Q],
              "pointer", "filled", "step": int32 []}

A leaf exists only where the options use it. With microbatches (`accumulate.py`), `encode` holds the activations of the
student's towers for one microbatch at a time; the teacher and the fusion passes belong to the objective, which sees all rows
because its negatives come from all of them, and holds their activations for one of `chunks` parts of the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxvl.losses import matching as pairs, mlm as words
from jaxvl.losses.exchange import at_home, fetch
from jaxvl.losses.mlm import Masked, WordLosses
from jaxvl.losses.momentum import Candidates, average, enqueue
from jaxvl.losses.pairs import dot
from jaxvl.methods.fused_options import HIGH, LOW, TrunkOptions, check
from jaxvl.methods.method import Batch, Method, PairScore, Term, in_sequence, split_key, unit
from jaxvl.models import text as texts, vit as vits
from jaxvl.models.flops import block_flops, text_flops, vit_flops
from jaxvl.models.fusion import Fusion, MlmHead, image_keys_values
from jaxvl.models.rules import RULES
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.rows import grouped, groups, part_by_part

UNKNOWN = -100  # the id of a queue entry whose image nobody knows


class Draws(NamedTuple):
    """What is random in a step, besides dropout; None for what is to be drawn. The negatives are int [B], within a row's group."""

    negative_image: jax.Array | None = None
    negative_text: jax.Array | None = None
    masked: Masked | None = None


class Views(NamedTuple):
    """A batch as student and teacher see it: unit features float32 [B, D], v of images and t of captions, _m the teacher's."""

    v: jax.Array
    t: jax.Array
    v_m: jax.Array
    t_m: jax.Array
    image_m: jax.Array  # [B, token, width], the teacher's image tokens
    text_m: jax.Array  # [B, L, width], and its text states
    teacher: dict  # as updated at the start of this step
    mask: jax.Array  # bool [B, L], True for words
    temperature: jax.Array
    alpha: jax.Array
    groups: int


class Trunk(NamedTuple):
    """Pure functions; `params` may be the student's or, for what it has, the teacher's.

    init: (key, batch_spec) -> (params, memory). encode: (params, batch, key) -> {"image", "text"}, the student's tokens and states.
    image_tokens: (params, images, key) -> [b, token, width], class token first. text_states: (params, tokens, mask, key) ->
    [b, L, width], [CLS] first. project: (params, "image" | "text", states [..., width]) -> unit float32 [..., D].
    keys_values: (params, image tokens) -> what the fusion layers read of images. fuse: (params, states, mask, keys_values,
    source | None, key) -> [rows, L, width], see `models/fusion.py`. match: (params, fused) -> float32 [rows, 2], column 1 for a match.
    words: (params, fused at some positions [b, k, width]) -> float32 [b, k, vocab]. temperature: (params) -> float32 [], within bounds.
    views: (params, memory, encoded, batch, key) -> Views. candidates: (memory, views, batch) -> (of images, of captions).
    pair_losses: (params, views, encoded, batch, key, draws) -> (scalars, what was computed on the way).
    remember: (memory, views, batch) -> memory of the next step. constrain: (params) -> params with the temperature cut to its bounds.
    flops: (batch_spec) -> forward FLOPs of one example by part, a teacher's forward pass counting a third since it has no backward pass.
    """

    image: VitOptions
    text: TextOptions
    options: TrunkOptions
    init: Callable[[jax.Array, dict], tuple[dict, dict]]
    encode: Callable[[dict, Batch, jax.Array | None], dict[str, jax.Array]]
    image_tokens: Callable[[dict, jax.Array, jax.Array | None], jax.Array]
    text_states: Callable[[dict, jax.Array, jax.Array, jax.Array | None], jax.Array]
    project: Callable[[dict, str, jax.Array], jax.Array]
    keys_values: Callable[[dict, jax.Array], Any]
    fuse: Callable[..., jax.Array]
    match: Callable[[dict, jax.Array], jax.Array]
    words: Callable[[dict, jax.Array], jax.Array]
    temperature: Callable[[dict], jax.Array]
    views: Callable[[dict, dict, dict, Batch, jax.Array | None], Views]
    candidates: Callable[[dict, Views, Batch], tuple[Candidates, Candidates]]
    pair_losses: Callable[..., tuple[dict, dict]]
    remember: Callable[[dict, Views, Batch], dict]
    constrain: Callable[[dict], dict]
    embed_image: Callable[[dict, jax.Array], jax.Array]
    embed_text: Callable[[dict, jax.Array], jax.Array]
    score_pair: PairScore
    flops: Callable[[dict], dict[str, float]]
    rules: tuple[tuple[str, P], ...]


_START = r"(?:^|/)"
TRUNK_RULES = (
    (_START + r"(?:image_proj|text_proj|itm)/kernel$", P("fsdp", None)),
    (_START + r"(?:image_proj|text_proj|itm)/bias$", P()),
    (_START + r"(?:image|text|id)_queue$", P(("data", "fsdp"))),
    (_START + r"(?:temperature|pointer|filled|step)$", P()),
    *RULES,
)


def trunk(image: VitOptions, text: TextOptions, options: TrunkOptions) -> Trunk:
    """The functions of two towers and options. Raises ValueError for what cannot be, naming the key."""
    o = options
    image, text = vits.resolve(image), texts.resolve(text)
    check(image, text, o)
    upper = text._replace(depth=o.fusion_depth)
    vit: Any = vits.Vit(image)
    bert: Any = texts.Text(text)
    fusion: Any = Fusion(upper)
    head: Any = MlmHead(text)
    taught = ("image", "text", "image_proj", "text_proj", *(("fusion", "mlm") if o.mlm else ()))

    def init(key: jax.Array, batch_spec: dict) -> tuple[dict, dict]:
        key, *keys = jax.random.split(key, 9)
        pixels = jnp.zeros((1, *batch_spec["image"].shape[1:]), jnp.float32)
        tokens = jnp.zeros((1, *batch_spec["tokens"].shape[1:]), jnp.int32)
        states = jnp.zeros((1, 1, text.width))
        params = {
            "image": vit.init(keys[0], pixels)["params"],
            "text": bert.init(keys[1], tokens)["params"],
            "fusion": fusion.init(keys[2], states, None, jnp.zeros((1, 1, image.width)))["params"],
            "image_proj": _linear(keys[3], image.width, o.width),
            "text_proj": _linear(keys[4], text.width, o.width),
            "itm": _linear(keys[5], text.width, 2),
            "temperature": jnp.float32(o.temperature),
        }
        if o.mlm:
            params["mlm"] = head.init(keys[6], states, params["text"]["embed"])["params"]
        noise = lambda key: unit(jax.random.normal(key, (o.queue, o.width)))
        memory = {
            "teacher": jax.tree.map(jnp.copy, {name: params[name] for name in taught}),
            **dict(zip(("image_queue", "text_queue"), map(noise, jax.random.split(keys[7])), strict=True)),
            **{name: jnp.zeros((), jnp.int32) for name in ("pointer", "step", *(("filled",) if o.unfilled == "mask" else ()))},
            **({"id_queue": jnp.full(o.queue, UNKNOWN, jnp.int32)} if o.ids else {}),
        }
        return params, memory

    def image_tokens(params: dict, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return vit.apply({"params": params["image"]}, images, rngs=_dropout(key)).tokens

    def text_states(params: dict, tokens: jax.Array, mask: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return bert.apply({"params": params["text"]}, tokens, mask, rngs=_dropout(key)).tokens

    def project(params: dict, kind: str, states: jax.Array) -> jax.Array:
        return unit(_dense(params[f"{kind}_proj"], states))

    def keys_values(params: dict, tokens: jax.Array) -> Any:
        return image_keys_values(upper, params["fusion"], tokens)

    def fuse(
        params: dict, states: jax.Array, mask: jax.Array, keys_values: Any, source: Any = None, key: jax.Array | None = None
    ) -> jax.Array:
        return fusion.apply({"params": params["fusion"]}, states, mask, None, keys_values=keys_values, source=source, rngs=_dropout(key))[0]

    def tell_words(params: dict, states: jax.Array) -> jax.Array:
        return head.apply({"params": params["mlm"]}, states, params["text"]["embed"])

    def encode(params: dict, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
        key_image, key_text = split_key(key)
        mask = batch["tokens"] != text.pad_id
        return {"image": image_tokens(params, batch["image"], key_image), "text": text_states(params, batch["tokens"], mask, key_text)}

    def temperature(params: dict) -> jax.Array:
        # The stored parameter is cut back at the start of a step, so the gradient is that of the cut value, not of the cut.
        raw = params["temperature"]
        return raw + lax.stop_gradient(jnp.clip(raw, LOW, HIGH) - raw)

    def views(params: dict, memory: dict, encoded: dict, batch: Batch, key: jax.Array | None) -> Views:
        # The teacher is updated before it is used, with the student as it is at the start of the step.
        teacher = average(memory["teacher"], params, o.momentum)
        second = {"image": batch.get("image_aug", batch["image"]), "tokens": batch["tokens"]}
        seen = lax.stop_gradient(part_by_part(lambda rows, key: encode(teacher, rows, key), o.chunks, second, key))
        first = lambda p, kind, z: project(p, kind, z[kind][:, 0])
        step = memory["step"].astype(jnp.float32)
        return Views(
            v=first(params, "image", encoded), t=first(params, "text", encoded),
            v_m=first(teacher, "image", seen), t_m=first(teacher, "text", seen), image_m=seen["image"], text_m=seen["text"],
            teacher=teacher, mask=batch["tokens"] != text.pad_id, temperature=temperature(params),
            alpha=o.alpha * jnp.minimum(1.0, step / o.alpha_steps if o.alpha_steps else 1.0),
            groups=_groups(len(batch["tokens"]), o),
        )  # fmt: skip

    def candidates(memory: dict, now: Views, batch: Batch) -> tuple[Candidates, Candidates]:
        both = {
            "ids": _ids(batch) if o.ids else None,
            "queue_ids": memory["id_queue"] if o.ids else None,
            "valid": jnp.arange(o.queue) < memory["filled"] if o.unfilled == "mask" else None,
        }
        return Candidates(now.v_m, memory["image_queue"], **both), Candidates(now.t_m, memory["text_queue"], **both)

    def pair_losses(
        params: dict, now: Views, encoded: dict, batch: Batch, key: jax.Array | None, draws: Draws = Draws()
    ) -> tuple[dict, dict]:
        G, B = now.groups, len(now.v)
        if (B // G) % o.chunks:
            raise ValueError(f"config.method.chunks is {o.chunks}; it must divide the {B // G} rows among which negatives are drawn")
        # A call without randomness still needs negatives and hidden words; it draws the same ones every time.
        key_draws = jax.random.fold_in(key, 0) if key is not None else jax.random.key(0)
        key_image, key_text, key_words = jax.random.split(key_draws, 3)
        similarity = lambda a, b: dot(grouped(a, G), jnp.swapaxes(grouped(b, G), 1, 2)) / now.temperature
        ids = grouped(_ids(batch), G) if o.ids else None
        choose = lambda given, key, a, b: pairs.hard_negatives(key, similarity(a, b), ids) if given is None else grouped(given, G)
        negative_image = choose(draws.negative_image, key_image, now.t, now.v_m)
        negative_text = choose(draws.negative_text, key_text, now.v, now.t_m)
        states, mask = encoded["text"], now.mask
        rows: dict[str, Any] = {
            "states": jnp.stack([states, states, fetch(states, negative_text)], 1),  # [B, 3, L, width]
            "mask": jnp.stack([mask, mask, fetch(mask, negative_text)], 1),
        }
        # Which image each of a row's pairs reads: its own, the negative, its own.
        if at_home(G, B):
            kept = keys_values(params, encoded["image"])  # made once for every image, whoever of its group reads them
            own = jnp.broadcast_to(jnp.arange(B // G), (G, B // G))
            rows["source"] = jnp.stack([x.reshape(-1) for x in (own, negative_image, own)], 1)
        else:
            kept = None  # tokens travel, since keys and values of all layers are twelve times as much and quickly made of them
            rows["image"] = jnp.stack([encoded["image"], fetch(encoded["image"], negative_image)], 1)  # [B, 2, token, width]
            rows["source"] = jnp.broadcast_to(jnp.array([0, 1, 0]), (B, 3))
        if o.mlm:
            masked = draws.masked or hide(key_words, batch["tokens"])
            rows |= {"masked": masked, "words": now.mask, "image_m": now.image_m}

        def some(rows: dict, key: jax.Array | None) -> dict:
            key_words, key_fuse, key_teacher = (None,) * 3 if key is None else jax.random.split(key, 3)
            if o.mlm:
                with_words = {
                    "states": text_states(params, rows["masked"].tokens, rows["words"], key_words),
                    "mask": rows["words"],
                    "source": rows["source"][:, 0],
                }
                rows = rows | {name: jnp.concatenate([rows[name], x[:, None]], 1) for name, x in with_words.items()}
            flat = lambda x: x.reshape(-1, *x.shape[2:])
            images, source = (kept, rows["source"].reshape(G, -1)) if kept else (keys_values(params, flat(rows["image"])), rows["source"])
            fused = fuse(params, flat(rows["states"]), flat(rows["mask"]), images, source, key_fuse)
            fused = fused.reshape(rows["states"].shape)  # [b, 3 or 4, L, width]
            out: dict[str, Any] = {"itm": _dense(params["itm"], fused[:, :3, 0])}
            if o.mlm:
                told, taught = tell(params, fused[:, 3], rows["masked"]), teach(now.teacher, rows, key_teacher)
                axis = -1 if o.mlm_distill_axis == "vocab" else 1
                out["words"] = words.word_losses(told, taught, rows["masked"].labels, rows["masked"].counted, axis=axis)
            return out

        out = part_by_part(some, o.chunks, rows, None if key is None else jax.random.fold_in(key, 1))
        scalars = {"loss_itm": pairs.matching(out["itm"], G)}
        if o.mlm:
            mlm = words.masked_words(WordLosses(*out["words"]), now.alpha, G)
            scalars |= dict(zip(("loss_mlm", "loss_mlm_hard", "loss_mlm_soft"), mlm, strict=True))
        return scalars, {"itm_logits": out["itm"]}

    def hide(key: jax.Array, tokens: jax.Array) -> Masked:
        maskable = (tokens != text.pad_id).at[:, 0].set(False)  # everything but [CLS]
        most = tokens.shape[1] if o.mlm_distill_axis == "seq_legacy" else min(o.mlm_cap or tokens.shape[1], tokens.shape[1])
        hidden = words.mask_words(key, tokens, maskable, vocab_size=text.vocab_size, mask_id=text.mask_id, rate=o.mlm_rate, most=most)
        if o.mlm_distill_axis == "vocab":
            return hidden
        # Along the sequence every position takes part, and in order.
        order = jnp.argsort(hidden.positions, 1)
        return Masked(hidden.tokens, *(jnp.take_along_axis(x, order, 1) for x in hidden[1:]))

    def tell(params: dict, fused: jax.Array, masked: Masked) -> jax.Array:
        return tell_words(params, jnp.take_along_axis(fused, masked.positions[..., None], 1))

    def teach(teacher: dict, rows: dict, key: jax.Array | None) -> jax.Array:
        """The teacher's words for the same hidden ones, from its own view of the image."""
        key_text, key_fuse = split_key(key)
        states = text_states(teacher, rows["masked"].tokens, rows["words"], key_text)
        return tell(teacher, fuse(teacher, states, rows["words"], keys_values(teacher, rows["image_m"]), None, key_fuse), rows["masked"])

    def remember(memory: dict, now: Views, batch: Batch) -> dict:
        B, pointer = len(now.v_m), memory["pointer"]
        after = {
            "teacher": now.teacher,
            "image_queue": enqueue(memory["image_queue"], pointer, now.v_m),
            "text_queue": enqueue(memory["text_queue"], pointer, now.t_m),
            "pointer": (pointer + B) % o.queue,
            "step": memory["step"] + 1,
        }
        if o.ids:
            after["id_queue"] = enqueue(memory["id_queue"], pointer, _ids(batch))
        if o.unfilled == "mask":
            after["filled"] = jnp.minimum(memory["filled"] + B, o.queue)
        return after

    mask_of = lambda tokens: tokens != text.pad_id

    def text_side(params: dict, tokens: jax.Array) -> dict[str, jax.Array]:
        return {"states": text_states(params, tokens, mask_of(tokens)), "mask": mask_of(tokens)}

    def score(params: dict, images: Any, side: dict[str, jax.Array], source: jax.Array) -> jax.Array:
        """The match logit, as the published code ranks by; similarity is not added."""
        return _dense(params["itm"], fuse(params, side["states"], side["mask"], images, source)[:, 0])[:, 1]

    def pair_flops(height: int, wide: int, length: int) -> dict[str, float]:
        rows, columns = vits.grid(image, height, wide)
        patches = rows * columns + image.class_tokens + image.registers
        block = texts.block_options(upper)._replace(cross=True)
        keys = 4.0 * patches * image.width * block.key_heads * block.head_width * o.fusion_depth
        pair = o.fusion_depth * block_flops(block, length, patches, image.width) - keys + 4.0 * text.width
        return {"image_tower": vit_flops(image, height, wide), "keys_values": keys, "text_tower": text_flops(text, length), "pair": pair}

    def flops(batch_spec: dict) -> dict[str, float]:
        (_, height, wide, _), (_, length) = batch_spec["image"].shape, batch_spec["tokens"].shape
        one = pair_flops(height, wide, length)
        seen = vit_flops(image, height, wide, train=True)
        most = min(o.mlm_cap or length, length) if o.mlm_distill_axis == "vocab" else length
        told = one["text_tower"] + one["pair"] + 2.0 * most * text.width * (text.width + text.vocab_size)
        return {
            "image tower": seen,
            "text tower": one["text_tower"],
            "teacher towers": (seen + one["text_tower"]) / 3,
            "projections": 2.0 * (image.width + text.width) * o.width * 4 / 3,
            "itm": one["keys_values"] + 3 * one["pair"],
            **({"mlm": told, "mlm teacher": (told + one["keys_values"]) / 3} if o.mlm else {}),
        }

    return Trunk(
        image=image, text=text, options=o, init=init, encode=encode, image_tokens=image_tokens, text_states=text_states, project=project,
        keys_values=keys_values, fuse=fuse, match=lambda params, fused: _dense(params["itm"], fused[:, 0]), words=tell_words,
        temperature=temperature, views=views, candidates=candidates, pair_losses=pair_losses, remember=remember,
        constrain=lambda params: {**params, "temperature": jnp.clip(params["temperature"], LOW, HIGH)},
        embed_image=lambda params, images: project(params, "image", image_tokens(params, images)[:, 0]),
        embed_text=lambda params, tokens: project(params, "text", text_states(params, tokens, mask_of(tokens))[:, 0]),
        score_pair=PairScore(lambda params, images: keys_values(params, image_tokens(params, images)), text_side, score, pair_flops, temperature),
        flops=flops, rules=TRUNK_RULES,
    )  # fmt: skip


def on_trunk(base: Trunk, terms: Callable, flops: Callable[[dict], dict[str, float]], programs: Callable[[dict], dict]) -> Method:
    """The method on this trunk with a loss of its own.

    terms: (params, memory, encoded, batch, key) -> (loss, aux, what was computed on the way), aux["memory"] that of the next step.
    flops: (batch_spec) -> forward FLOPs of one example by term. programs: (batch_spec) -> (run, shapes) of the terms that can be run
    apart, see `Term`.
    """

    def objective(params: dict, memory: dict, encoded: dict, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict]:
        return terms(params, memory, encoded, batch, key)[:2]

    def weighed(batch_spec: dict) -> dict[str, Term]:
        run = programs(batch_spec)
        return {name: Term(share, *run.get(name, ())) for name, share in flops(batch_spec).items()}

    return Method(
        init=base.init,
        encode=base.encode,
        objective=objective,
        loss=in_sequence(base.encode, objective),
        update=lambda memory, params, aux: aux["memory"],
        embed_image=base.embed_image,
        embed_text=base.embed_text,
        flops=lambda batch_spec: sum(flops(batch_spec).values()),
        rules=base.rules,
        score_pair=base.score_pair,
        constrain=base.constrain,
        terms=weighed,
        waits=(("alpha_steps", base.options.alpha_steps),) if base.options.alpha else (),
    )


def _linear(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    return {"kernel": jax.random.normal(key, (inputs, outputs)) * inputs**-0.5, "bias": jnp.zeros(outputs)}


def _dense(params: dict, x: jax.Array) -> jax.Array:
    """float32 [..., out] of x [..., in] in any dtype."""
    kernel = params["kernel"].astype(x.dtype)
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32) + params["bias"]


def _dropout(key: jax.Array | None) -> dict[str, jax.Array] | None:
    return None if key is None else {"dropout": key}


def _groups(batch: int, o: TrunkOptions) -> int:
    return 1 if o.scope == "global" else groups(batch, o.group_size)


def _ids(batch: Batch) -> jax.Array:
    if "id" not in batch:
        raise ValueError(f"config.method.ids is True, but the batch has no image ids, only {', '.join(sorted(batch))}")
    return batch["id"]
