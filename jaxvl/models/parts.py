"""The pieces every encoder is made of: attention, MLP, norms, one block, a stack of blocks, and the MAP pooling head.

A tower (`vit.py`, `text.py`) chooses sizes and switches in a `BlockOptions`; nothing here knows which published model it is
part of. Parameters are float32, matrix products run in `BlockOptions.dtype`, norms and softmax in float32.
A forward pass that is given a `dropout` key is a training pass; without one nothing is random.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxvl.models.attention import Kernel, attend, rotate

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
}

# What a rematerialised block keeps from the forward pass; everything else is computed again in the backward pass.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "branches": jax.checkpoint_policies.save_only_these_names("branch"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

Act = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
Remat = Literal["none", "full", "branches", "dots"]
Norm = Literal["layer", "rms"]
Dtype = Literal["bfloat16", "float32"]


class BlockOptions(NamedTuple):
    """One transformer block. Zero means "absent", or the value named in the comment."""

    width: int
    heads: int
    mlp_dim: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width // heads
    norm: Norm = "layer"
    eps: float = 1e-6
    post_norm: bool = False  # BERT: norm after the residual sum instead of before the branch
    act: Act = "gelu"
    gated: bool = False  # SwiGLU-style: down(act(gate(x)) * up(x))
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    layer_scale: float = 0.0  # initial value of a learned factor per channel of each branch
    cross: bool = False  # cross-attention to context tokens between self-attention and MLP
    causal: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # share of the samples of a batch that skip a branch (stochastic depth)
    init_std: float = 0.0  # 0: CLIP's width- and depth-scaled normals
    depth: int = 1
    scan: bool = True  # False unrolls the loop over layers; parameters are the same
    remat: Remat = "none"
    attention: Kernel = "auto"
    dtype: Dtype = "bfloat16"

    @property
    def head_width(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads


class Context(NamedTuple):
    """What every layer of a stack shares."""

    mask: jax.Array | None = None  # bool [batch, 1, query | 1, key]; True takes part
    rope: tuple[jax.Array, jax.Array] | None = None  # cos, sin, each float32 [batch, token, head_width]
    tokens: jax.Array | None = None  # [batch, context, any width], for cross-attention
    tokens_mask: jax.Array | None = None  # bool [batch, 1, 1, context]
    source: jax.Array | None = None  # int [group, row]: whose keys and values a row cross-attends to, within its group


class Layer(NamedTuple):
    """What a layer gives besides its output, stacked over layers; None where it was not asked for."""

    hidden: jax.Array | None = None  # [layer, batch, token, width]
    keys_values: tuple[jax.Array, jax.Array] | None = None  # each [layer, batch, token, kv_head, head_width]


def check_block(o: BlockOptions, section: str) -> None:
    """Raises ValueError naming `section.key`, its value and what would be right."""
    if min(o.width, o.heads, o.mlp_dim, o.depth) < 1:
        raise ValueError(f"{section}: width={o.width}, heads={o.heads}, mlp_dim={o.mlp_dim}, depth={o.depth}: all must be at least 1")
    if not o.head_dim and o.width % o.heads:
        raise ValueError(f"{section}.heads={o.heads} does not divide {section}.width={o.width}")
    if o.heads % o.key_heads:
        raise ValueError(f"{section}.kv_heads={o.kv_heads} does not divide {section}.heads={o.heads}")
    for key, value, legal in (
        ("norm", o.norm, Norm), ("act", o.act, Act), ("remat", o.remat, Remat), ("attention", o.attention, Kernel), ("dtype", o.dtype, Dtype),
    ):  # fmt: skip
        if value not in get_args(legal):
            raise ValueError(f"{section}.{key}={value!r} is none of {', '.join(get_args(legal))}")
    for key, rate in (("dropout", o.dropout), ("attention_dropout", o.attention_dropout), ("drop_path", o.drop_path)):
        if not 0 <= rate < 1:
            raise ValueError(f"{section}.{key}={rate} is not in [0, 1)")


def batch_sharded(x: jax.Array) -> jax.Array:
    """Pins activations [batch, ...] to the batch axes of the mesh in context, so that sharded weights are gathered
    instead of the activations following the weights. No effect without a mesh or where the batch does not divide
    (a key/value prefix is a batch of one)."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in ("data", "fsdp") if a in mesh.axis_names and a not in mesh.manual_axes)
    size = math.prod(mesh.shape[a] for a in axes)
    return x if size == 1 or x.shape[0] % size else jax.lax.with_sharding_constraint(x, jax.P(axes))


def look_up(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows [..., width] of an embedding table [row, width], not a number where an id is no row.

    The table is gathered whole, in `dtype`, like any sharded weight: left alone, XLA would look up a slice of the width
    for the whole batch on every device and then exchange activations.
    """
    table = table.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and not mesh.manual_axes:
        table = jax.lax.with_sharding_constraint(table, jax.P())
    return jnp.take(table, ids, axis=0, mode="fill")


def dense(o: BlockOptions, features: int, fan: float, bias: bool, name: str) -> nn.Dense:
    """A linear map whose kernel starts as N(0, 1/fan), or N(0, init_std) where the options set it."""
    init = nn.initializers.normal(o.init_std or fan**-0.5)
    return nn.Dense(features, use_bias=bias, dtype=jnp.dtype(o.dtype), kernel_init=init, name=name)


def norm(o: BlockOptions, name: str) -> nn.Module:
    """LayerNorm or RMSNorm over the last axis: statistics in float32, result in the compute dtype."""
    if o.norm == "rms":
        return nn.RMSNorm(epsilon=o.eps, dtype=jnp.dtype(o.dtype), name=name)
    # The one-pass variance loses digits where the mean is large against the spread, as in deep residual streams.
    return nn.LayerNorm(epsilon=o.eps, dtype=jnp.dtype(o.dtype), use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Multi-head attention of x [batch, query, width] over itself or over `context` [batch, key, any].

    Returns the projected output [batch, query, width] and the keys and values [batch, key, kv_head, head_width]
    (after rotary embedding, before the prefix is put in front of them). `keys_values` are those of a context that was
    projected before; without x only they are computed, and the output is None.
    """

    options: BlockOptions

    @nn.compact
    def __call__(self, x, context=None, mask=None, rope=None, prefix=None, causal=False, keys_values=None):
        o = self.options
        split = lambda y, heads: y.reshape(*y.shape[:-1], heads, o.head_width)
        if keys_values is None:
            source = x if context is None else context
            project = lambda name: split(dense(o, o.key_heads * o.head_width, source.shape[-1], o.qkv_bias, name)(source), o.key_heads)
            k, v = project("k"), project("v")
        else:
            k, v = keys_values
        if x is None:
            return None, (k, v)
        q = split(dense(o, o.heads * o.head_width, o.width, o.qkv_bias, "q")(x), o.heads)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        keys_values = (k, v)
        if prefix is not None:
            k, v = (jnp.concatenate([jnp.broadcast_to(p, (y.shape[0], *p.shape[-3:])).astype(y.dtype), y], axis=1)
                    for p, y in zip(prefix, keys_values, strict=True))  # fmt: skip
        rate = o.attention_dropout if self.has_rng("dropout") else 0.0
        y = attend(q, k, v, mask=mask, causal=causal, kernel=o.attention,
                   dropout=rate, key=self.make_rng("dropout") if rate else None)  # fmt: skip
        y = dense(o, o.width, o.width * 2 * o.depth, o.out_bias, "out")(y.reshape(*y.shape[:-2], -1))
        return y, keys_values


class Mlp(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) where gated; [..., width] -> [..., width]."""

    options: BlockOptions

    @nn.compact
    def __call__(self, x):
        o = self.options
        y = dense(o, o.mlp_dim, 2 * o.width, o.mlp_bias, "up")(x)
        if o.gated:
            y = y * ACTIVATIONS[o.act](dense(o, o.mlp_dim, 2 * o.width, o.mlp_bias, "gate")(x))
        else:
            y = ACTIVATIONS[o.act](y)
        return dense(o, o.width, o.width * 2 * o.depth, o.mlp_bias, "down")(y)


class Block(nn.Module):
    """One layer; the scan over layers carries x [batch, token, width]."""

    options: BlockOptions
    hidden: bool = False
    keys_values: bool = False

    @nn.compact
    def __call__(self, x, context: Context, prefix=None, cross_keys_values=None):
        o = self.options

        def residual(x, name, branch):
            y = branch(x if o.post_norm else norm(o, f"{name}_norm")(x))
            if o.layer_scale:
                gamma = self.param(f"{name}_scale", nn.initializers.constant(o.layer_scale), (o.width,), jnp.float32)
                y = y * gamma.astype(y.dtype)
            training = self.has_rng("dropout")
            y = nn.Dropout(o.dropout)(y, deterministic=not training)
            y = nn.Dropout(o.drop_path, broadcast_dims=(1, 2))(y, deterministic=not training)
            x = batch_sharded(x + checkpoint_name(y, "branch"))
            return norm(o, f"{name}_norm")(x) if o.post_norm else x

        kept = []

        def self_attention(y):
            y, keys_values = Attention(o, name="attn")(y, None, context.mask, context.rope, prefix, o.causal)
            kept.append(keys_values)
            return y

        x = residual(x, "attn", self_attention)
        if o.cross:
            projected = read_by_rows(cross_keys_values, context.source)
            x = residual(x, "cross", lambda y: Attention(o, name="cross")(y, context.tokens, context.tokens_mask, keys_values=projected)[0])
        x = residual(x, "mlp", Mlp(o, name="mlp"))
        return x, Layer(x if self.hidden else None, kept[0] if self.keys_values else None)


class CrossKeysValues(nn.Module):
    """The keys and values of a `Block`'s cross-attention alone, from its parameters; a scan over layers carries nothing."""

    options: BlockOptions

    @nn.compact
    def __call__(self, _, tokens):
        return None, Attention(self.options, name="cross")(None, tokens)[1]


def read_by_rows(keys_values: Any, source: jax.Array | None) -> Any:
    """Keys and values [batch, ...] in the order in which rows read them; source int [group, row], as in `Context`.

    The batch is cut in as many groups as `source` has, so that groups which lie on one device are read without any exchange.
    """
    if keys_values is None or source is None:
        return keys_values
    read = jax.vmap(lambda x, rows: jnp.take(x, rows, axis=0))
    return jax.tree.map(lambda x: read(x.reshape(len(source), -1, *x.shape[1:]), source).reshape(-1, *x.shape[1:]), keys_values)


def stack(o: BlockOptions, name: str, *, hidden: bool = False, keys_values: bool = False) -> nn.Module:
    """`depth` blocks as one module: (x, Context, prefix, cross_keys_values) -> (x, Layer).

    Parameters have a leading layer axis whether the loop is scanned or unrolled, so both read the same checkpoint.
    `prefix` is None or keys and values [layer, 1 | batch, prefix, kv_head, head_width] put in front of each layer's own,
    `cross_keys_values` None or those of the context tokens, projected before.
    """
    block: Any = Block
    if o.remat != "none":
        # Inside a scan XLA cannot merge the recomputation with the forward pass; unrolled it would.
        block = nn.remat(block, policy=REMAT[o.remat], prevent_cse=not o.scan)
    layers = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0, 0),
        length=o.depth,
        unroll=1 if o.scan else o.depth,
    )
    return layers(o, hidden, keys_values, name=name)


class MapPool(nn.Module):
    """Multi-head attention pooling with one learned query (SigLIP's head); [batch, token, width] -> [batch, width]."""

    options: BlockOptions

    @nn.compact
    def __call__(self, x, mask=None):
        o = self.options._replace(depth=1)
        probe = self.param("probe", nn.initializers.normal(o.init_std or o.width**-0.5), (1, o.width), jnp.float32)
        probe = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, o.width))
        y = Attention(o, name="attn")(probe, x, mask)[0]
        return (y + Mlp(o, name="mlp")(norm(o, "norm")(y)))[:, 0]
