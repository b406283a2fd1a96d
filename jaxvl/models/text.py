"""Text transformer: the text towers of CLIP and SigLIP, BERT and Llama by options."""

from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvl.models import parts
from jaxvl.models.attention import Rope, rope_tables
from jaxvl.models.tower import Tower, check_sizes, sized
from jaxvl.models.vit import project

# eos: first eos_id; argmax: largest id (CLIP's first rule); last: last token that is not padding; end: last position,
# padding included (SigLIP); first: BERT's [CLS]; mean: over tokens that are not padding; map: learned query.
Pool = Literal["eos", "argmax", "last", "end", "first", "mean", "map"]
Position = Literal["learned", "rope"]


class TextOptions(NamedTuple):
    """The keys of the `text` section."""

    variant: str = "M"  # a SIZES name; "" where every size is given
    vocab_size: int = 0  # rows of the embedding table; at least the tokenizer's size
    width: int = 0  # sizes that are 0 are the variant's
    depth: int = 0
    heads: int = 0
    mlp_dim: int = 0
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width // heads
    causal: bool = True
    pad_id: int = 0  # never attended to in a bidirectional tower; after the caption in a causal one
    mask_padding: bool = True  # False: SigLIP, which reads its padding
    pool: Pool = "eos"
    eos_id: int = 0  # the tokenizer's end-of-text id, where pool is eos
    mask_id: int = 0  # the id that stands for a word to be predicted; 0: the tokenizer's, if it has one
    position: Position = "learned"
    positions: int = 0  # rows of the learned table; 0: as many as the tokens seen at init
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, ...] = ()  # Llama 3: factor, low_freq_factor, high_freq_factor, original length
    token_types: int = 0  # BERT's segment embedding
    embed_norm: bool = False  # BERT: norm of the embedding
    final_norm: bool = True
    post_norm: bool = False
    norm: parts.Norm = "layer"
    eps: float = 1e-5
    pooler: int = 0  # width of BERT's tanh(dense(pooled)); 0: none
    head: int = 0  # width of a final projection of the pooled state; 0: none
    head_bias: bool = False
    act: parts.Act = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    layer_scale: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    init_std: float = 0.0
    scan: bool = True
    remat: parts.Remat = "none"
    attention: parts.Kernel = "auto"
    dtype: parts.Dtype = "bfloat16"
    kind: Literal["transformer"] = "transformer"


def resolve(options: TextOptions, section: str = "text") -> TextOptions:
    """Options with every size filled in and every value checked. Raises ValueError naming key, value and remedy."""
    if options.kind != "transformer":
        raise ValueError(f"config.{section}.kind is {options.kind!r}, but what is asked for takes a 'transformer'")
    check_sizes(options, section)
    o = sized(options, options.variant, section)._replace(variant="")
    if o.vocab_size < 2:
        raise ValueError(f"{section}.vocab_size={o.vocab_size}: set it to the size of the tokenizer")
    for key, value, legal in (("pool", o.pool, Pool), ("position", o.position, Position)):
        if value not in get_args(legal):
            raise ValueError(f"{section}.{key}={value!r} is none of {', '.join(get_args(legal))}")
    if o.pool == "eos" and not 0 < o.eos_id < o.vocab_size:
        raise ValueError(
            f"{section}.pool='eos' needs {section}.eos_id between 1 and {o.vocab_size - 1}, the tokenizer's end-of-text id, not {o.eos_id}"
        )
    if not 0 <= o.mask_id < o.vocab_size:
        raise ValueError(f"{section}.mask_id={o.mask_id} is no id of a vocabulary of {o.vocab_size}")
    block = block_options(o)
    parts.check_block(block, section)
    if len(o.rope_scaling) not in (0, 4):
        raise ValueError(
            f"{section}.rope_scaling={o.rope_scaling} must be empty or (factor, low_freq_factor, high_freq_factor, original length)"
        )
    if o.position == "rope" and block.head_width % 2:
        raise ValueError(f"{section}.position='rope' needs heads of an even width, not {block.head_width}")
    return o


def block_options(o: TextOptions) -> parts.BlockOptions:
    shared = set(parts.BlockOptions._fields) & set(TextOptions._fields)
    return parts.BlockOptions(**{key: getattr(o, key) for key in shared})


class Text(nn.Module):
    """tokens int [batch, token] -> Tower."""

    options: TextOptions

    @nn.compact
    def __call__(self, tokens, mask=None, types=None, prefix=None, *, hidden: bool = False, keys_values: bool = False) -> Tower:
        """mask: bool [batch, token], True for tokens that count (default: tokens != pad_id); types: int [batch, token]
        segments; prefix: keys and values, each [depth, 1 | batch, prefix, kv_head, head_width], of tokens before these."""
        o = resolve(self.options)
        block = block_options(o)
        small = nn.initializers.normal(o.init_std or 0.02)
        length = tokens.shape[1]
        # Padding after a causal caption is seen by nothing that is read, so only a mask that was given is applied there.
        attended = mask if mask is not None or o.causal or not o.mask_padding else tokens != o.pad_id
        counted = (tokens != o.pad_id) if mask is None else mask.astype(bool)

        dtype = jnp.dtype(o.dtype)
        x = parts.look_up(self.param("embed", small, (o.vocab_size, o.width), jnp.float32), tokens, dtype)
        before = 0 if prefix is None else prefix[0].shape[2]
        rope = None
        if o.position == "rope":
            index = jnp.arange(length)[None] if mask is None else jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
            rope = rope_tables(Rope(o.rope_theta, *o.rope_scaling), jnp.broadcast_to(index + before, tokens.shape), block.head_width)
        else:
            x = x + self.positions(o, before + length)[before : before + length].astype(dtype)
        if o.token_types:
            types = jnp.zeros_like(tokens) if types is None else types
            x = x + parts.look_up(self.param("types", small, (o.token_types, o.width), jnp.float32), types, dtype)
        if o.embed_norm:
            x = parts.norm(block, "embed_norm")(x)
        x = nn.Dropout(o.dropout)(x, deterministic=not self.has_rng("dropout"))

        if attended is not None:
            attended = attended.astype(bool)
            if before:
                attended = jnp.pad(attended, ((0, 0), (before, 0)), constant_values=True)
            attended = attended[:, None, None]
        embedded = x = parts.batch_sharded(x)
        layers = parts.stack(block, "blocks", hidden=hidden, keys_values=keys_values)
        x, outputs = layers(x, parts.Context(mask=attended, rope=rope), prefix, None)
        states = parts.norm(block, "norm")(x) if o.final_norm else x
        if o.pool == "map":
            pooled = parts.MapPool(block, name="map")(states, counted[:, None, None] if o.mask_padding else None)
        else:
            pooled = pool(o, states, tokens, counted)
        pooled = project(o, block, pooled)
        every = jnp.concatenate([embedded[None], outputs.hidden]) if hidden else None
        return Tower(pooled, states, every, outputs.keys_values)

    def positions(self, o: TextOptions, wanted: int) -> jax.Array:
        have = self.get_variable("params", "pos").shape[0] if self.has_variable("params", "pos") else o.positions or wanted
        if wanted > have:
            raise ValueError(f"captions of {wanted} tokens are longer than the {have} learned positions of the text tower")
        return self.param("pos", nn.initializers.normal(o.init_std or 0.01), (have, o.width), jnp.float32)


def pool(o: TextOptions, states: jax.Array, tokens: jax.Array, counted: jax.Array) -> jax.Array:
    """One state a caption; states [batch, token, width], counted bool [batch, token] -> [batch, width]."""
    if o.pool == "mean":
        share = counted / jnp.maximum(counted.sum(1, keepdims=True), 1)  # an empty caption pools to zero
        return jnp.einsum("btd,bt->bd", states, share.astype(states.dtype))
    if o.pool == "first":
        return states[:, 0]
    if o.pool == "end":
        return states[:, -1]
    index = {
        "eos": lambda: jnp.argmax(tokens == o.eos_id, axis=1),
        "argmax": lambda: jnp.argmax(tokens, axis=1),
        "last": lambda: tokens.shape[1] - 1 - jnp.argmax(counted[:, ::-1], axis=1),
    }[o.pool]()
    return jnp.take_along_axis(states, index[:, None, None], axis=1)[:, 0]
