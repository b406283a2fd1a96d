r"""The lexical head: features to vectors with a coordinate for each word of a vocabulary.

With a codebook Z [V, d], a row for each word, and an activation σ that is never negative, a text feature z and image tokens
:math:`z_1 \dots z_n` become (Li et al. 2024, https://arxiv.org/abs/2407.17827, equations 2 and 4)

.. math::
    s_\text{txt} = \frac{\sigma(z Z^\top)}{\|\cdot\|} \qquad
    s_\text{img} = \frac{\max_i \sigma(z_i Z^\top)}{\|\cdot\|} = \frac{\sigma(\max_i z_i Z^\top)}{\|\cdot\|}

since σ never falls. `max_logits` forms the inner maximum a few rows of Z at a time and keeps of each word only the maximum and the
token that won it: V numbers an image instead of n V. Products with one-hot blocks stand for gather and scatter in the backward
pass, which matrix units do faster.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxvl.models import parts

# Of exp(x) the branch that is not taken must not overflow, or it makes the gradient NaN.
ACTIVATIONS = {
    "elu1p": lambda x: jnp.where(x >= 0, x + 1, jnp.exp(jnp.minimum(x, 0))),
    "log1p_relu": lambda x: jnp.log1p(jax.nn.relu(x)),
    "relu": jax.nn.relu,
}
Activation = Literal["elu1p", "log1p_relu", "relu"]
Layout = Literal["block_mlp", "attn_mlp"]
BATCH = ("data", "fsdp")
ELEMENTS = 1 << 23  # of a block of logits on one device
OPEN = 64  # images that blocks are made for where the batch size is open, as in an exported program


def vectors(logits: jax.Array, activation: str = "elu1p", entries: int = 0) -> jax.Array:
    """σ(logits) divided by its norm; [..., rows] -> float32 at least, zero in columns beyond `entries` (0: all are words).

    A row whose activations are all zero stays zero.
    """
    x = ACTIVATIONS[activation](logits.astype(jnp.promote_types(jnp.float32, logits.dtype)))
    if entries and entries < x.shape[-1]:
        x = jnp.where(jnp.arange(x.shape[-1]) < entries, x, 0)
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.where(square > 0, square, 1))


def logits(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """z [..., d] by each row of the codebook [V, d]; float32 [..., V] at least."""
    wide = jnp.promote_types(jnp.float32, z.dtype)
    return jnp.einsum("...d,vd->...v", z, codebook.astype(z.dtype), precision=_precision(z), preferred_element_type=wide)


@jax.custom_vjp
def max_logits(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """The maximum over the tokens of z [b, n, d] of `logits`; float32 [b, V] at least. Of equal tokens the first has the gradient.

    On a mesh the images are split over its batch axes and the words over "tensor", where they divide.
    """
    return _forward(z, codebook)[0]


def winners(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """The token of z [b, n, d] that gives each word its `max_logits`, the first of equal ones; int [b, V]."""
    return _forward(z, codebook)[1][2]


def _forward(z: jax.Array, codebook: jax.Array) -> tuple:
    (B, n, d), V = z.shape, len(codebook)
    batch, words = _splits(B, V)
    z, Z = _pin(z, BATCH), _pin(codebook, "tensor").reshape(words, V // words, d)
    count, rows = _blocks(V // words, (B // batch if isinstance(B, int) else OPEN) * n)
    wide = jnp.promote_types(jnp.float32, z.dtype)

    def block(i: jax.Array, found: tuple) -> tuple:
        at = jnp.minimum(i * rows, V // words - rows)  # the last block may cover rows of the one before again
        some = lax.dynamic_slice_in_dim(Z, at, rows, 1).astype(z.dtype)
        x = jnp.einsum("bnd,wrd->bnwr", z, some, precision=_precision(z), preferred_element_type=wide)
        found = (jnp.max(x, 1), found[0]), (jnp.argmax(x, 1).astype(found[1].dtype), found[1])
        return tuple(_pin(lax.dynamic_update_slice_in_dim(whole, part, at, 2), BATCH, "tensor") for part, whole in found)

    shape = (B, words, V // words)
    start = jnp.zeros(shape, wide), jnp.zeros(shape, jnp.int16 if n < 1 << 15 else jnp.int32)
    most, winner = (_pin(x.reshape(B, V), BATCH, "tensor") for x in lax.fori_loop(0, count, block, start))
    return most, (z, codebook, winner)


def _backward(kept: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    z, codebook, winner = kept
    (B, n, d), V = z.shape, len(codebook)
    batch, words = _splits(B, V)
    Z, precision = _pin(codebook, "tensor"), _precision(z)
    wide = jnp.promote_types(jnp.float32, z.dtype)

    def routed(g: jax.Array, winner: jax.Array, axis: int) -> jax.Array:
        """The gradient of every logit: that of the maximum for the token that won it; tokens are a new axis."""
        token = jnp.arange(n).reshape(-1, *(1,) * (g.ndim - axis))
        return jnp.where(jnp.expand_dims(winner, axis) == token, jnp.expand_dims(g, axis), 0).astype(z.dtype)

    # The gradient of the codebook, a block of words at a time and all images.
    g_words, won = (x.reshape(B, words, V // words) for x in (g, winner))
    count, rows = _blocks(V // words, B // batch * n)

    def of_words(i: jax.Array, dZ: jax.Array) -> jax.Array:
        at = jnp.minimum(i * rows, V // words - rows)
        g_some, won_some = (lax.dynamic_slice_in_dim(x, at, rows, 2) for x in (g_words, won))
        part = jnp.einsum("bnwr,bnd->wrd", routed(g_some, won_some, 1), z, precision=precision, preferred_element_type=wide)
        return _pin(lax.dynamic_update_slice_in_dim(dZ, part.astype(dZ.dtype), at, 1), "tensor")

    dZ = lax.fori_loop(0, count, of_words, jnp.zeros((words, V // words, d), codebook.dtype)).reshape(V, d)

    # The gradient of the tokens, a few images at a time and all words.
    g_images, won = (x.reshape(batch, B // batch, V) for x in (g, winner))
    images, few = _blocks(B // batch, V // words * n)

    def of_images(i: jax.Array, dz: jax.Array) -> jax.Array:
        at = jnp.minimum(i * few, B // batch - few)
        g_some, won_some = (lax.dynamic_slice_in_dim(x, at, few, 1) for x in (g_images, won))
        part = jnp.einsum("abnv,vd->abnd", routed(g_some, won_some, 2), Z.astype(z.dtype), precision=precision, preferred_element_type=wide)
        return _pin(lax.dynamic_update_slice_in_dim(dz, part.astype(dz.dtype), at, 1), BATCH)

    dz = lax.fori_loop(0, images, of_images, jnp.zeros((batch, B // batch, n, d), z.dtype)).reshape(B, n, d)
    return _pin(dz, BATCH), dZ


max_logits.defvjp(_forward, _backward)


def _splits(B: int, V: int) -> tuple[int, int]:
    """Into how many parts the mesh of the context cuts a batch of B images and a codebook of V words."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1, 1
    batch, words = math.prod(mesh.shape[axis] for axis in BATCH), mesh.shape["tensor"]
    return 1 if B % batch else batch, 1 if V % words else words


def _pin(x: jax.Array, *spec: Any) -> jax.Array:
    """x laid out over the mesh of the context, but for axes that do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    size = lambda axes: math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
    return lax.with_sharding_constraint(x, jax.P(*(axes if n % size(axes) == 0 else None for n, axes in zip(x.shape, spec, strict=False))))


def _blocks(total: int, others: int) -> tuple[int, int]:
    """(how many, how large): blocks of `total` rows of `others` elements that stay within ELEMENTS."""
    size = max(1, min(total, ELEMENTS // max(others, 1)))
    return -(-total // size), size


def _precision(z: jax.Array) -> str | None:
    return None if z.dtype == jnp.bfloat16 else "highest"


class AdapterOptions(NamedTuple):
    """What lies between the frozen image tower and the codebook. width: of the tower; out: of the codebook; mlp1, mlp2: hidden widths."""

    layout: Layout
    width: int
    out: int
    heads: int = 12
    mlp1: int = 3072
    mlp2: int = 2048
    dtype: parts.Dtype = "bfloat16"


def check_adapter(o: AdapterOptions, section: str) -> None:
    """Raises ValueError naming `section`, the key, its value and what would be right."""
    if o.layout not in get_args(Layout):
        raise ValueError(f"{section}.adapter is {o.layout!r}; it must be one of {', '.join(get_args(Layout))}")
    for key, value in (("adapter_heads", o.heads), ("mlp1", o.mlp1), ("mlp2", o.mlp2)):
        if value < 1:
            raise ValueError(f"{section}.{key} is {value}; it must be at least 1")
    if o.width % o.heads:
        raise ValueError(f"{section}.adapter_heads is {o.heads}, which does not divide the image tower's width {o.width}")


class Adapter(nn.Module):
    """x [batch, token, width] -> [batch, token, out], one attention layer and one or two perceptrons with biases.

    block_mlp: x += attention(LN(x)); x += MLP1(LN(x)); MLP2(LN(x)). attn_mlp: the same without MLP1.
    """

    options: AdapterOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        o = self.options
        block = parts.BlockOptions(o.width, o.heads, o.mlp1, eps=1e-6, dtype=o.dtype)

        def mlp(name: str, x: jax.Array, hidden: int, out: int) -> jax.Array:
            x = parts.dense(block, hidden, x.shape[-1], True, f"{name}_up")(x)
            return parts.dense(block, out, hidden, True, f"{name}_down")(parts.ACTIVATIONS["gelu"](x))

        x = parts.batch_sharded(x.astype(jnp.dtype(o.dtype)))
        x = x + parts.Attention(block, name="attn")(parts.norm(block, "attn_norm")(x))[0]
        if o.layout == "block_mlp":
            x = x + mlp("mlp1", parts.norm(block, "mlp1_norm")(x), o.mlp1, o.width)
        return mlp("mlp2", parts.norm(block, "mlp2_norm")(x), o.mlp2, o.out)


# The words of a codebook are split over all that splits parameters; a step gathers them over fsdp alone.
RULES: tuple[tuple[str, jax.P], ...] = (
    (r"(?:^|/)(?:text|image)_codebook$", jax.P(("fsdp", "tensor"), None)),
    (r"(?:^|/)adapter/(?:attn/[qkv]|mlp\d_up)/kernel$", jax.P("fsdp", "tensor")),
    (r"(?:^|/)adapter/(?:attn/[qkv]|mlp\d_up)/bias$", jax.P("tensor")),
    (r"(?:^|/)adapter/(?:attn/out|mlp\d_down)/kernel$", jax.P("tensor", "fsdp")),
    (r"(?:^|/)adapter/(?:attn/out|mlp\d_down)/bias$", jax.P()),
    (r"(?:^|/)adapter/\w+_norm/(?:scale|bias)$", jax.P()),
)
