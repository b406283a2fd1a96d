"""RandAugment (Cubuk et al., 2020) on a batch, with the ten operations and the strengths that ALBEF and TCL train with.

Operations work on levels 0 to 255 and give whole levels, as they do on 8-bit images: table operations exactly as Pillow
does, the others to within one level of OpenCV. Each row has its own operations, so each kind is computed for all rows and
one is kept: one table look-up, one affine warp and one sharpening for all ten.

The code that ALBEF and TCL trained with subtracts in unsigned bytes in its AutoContrast, so that every channel whose least
level is above 0 comes out all white. Autocontrast "fixed" is what was meant, "ref_bug" what was done.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

OPERATIONS = (
    "Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness",
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
)  # fmt: skip
Autocontrast = Literal["fixed", "ref_bug"]
_AT = {name: i for i, name in enumerate(OPERATIONS)}
FILL = 128.0  # what a warp brings in from outside the image


def randaugment(x: jax.Array, keys: jax.Array, count: int, level: float, probability: float, contrast: Autocontrast = "fixed") -> jax.Array:
    """`count` operations on each row of levels [batch, height, width, 3], each with its probability, else none."""
    x = jnp.round(jnp.clip(x, 0, 255))
    for i in range(count):
        chosen = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, i), 3))(keys)  # noqa: B023
        operation = jax.vmap(lambda k: jax.random.randint(k, (), 0, len(OPERATIONS)))(chosen[:, 0])
        use = jax.vmap(jax.random.uniform)(chosen[:, 1]) < probability
        sign = jnp.where(jax.vmap(jax.random.bernoulli)(chosen[:, 2]), 1.0, -1.0)
        x = apply(x, jnp.where(use, operation, _AT["Identity"]), sign, level, contrast)
    return x


def apply(x: jax.Array, operation: jax.Array, sign: jax.Array, level: float, contrast: Autocontrast = "fixed") -> jax.Array:
    """Row i by OPERATIONS[operation[i]], warps in the direction of sign[i]; x: whole levels, float32 [batch, height, width, 3]."""
    factor = 0.1 + 1.8 * level / 10
    tables = jnp.where((operation == _AT["AutoContrast"])[:, None, None], autocontrast(x, contrast), jnp.arange(256.0))
    tables = jnp.where((operation == _AT["Equalize"])[:, None, None], equalize(x), tables)
    brighter = np.floor(np.clip(np.arange(256) * factor, 0, 255)).astype(np.float32)
    tables = jnp.where((operation == _AT["Brightness"])[:, None, None], brighter, tables)  # [batch, channel, level]
    kind = operation[:, None, None, None]
    out = jnp.where(kind >= _AT["ShearX"], warp(x, _matrices(operation, sign, level, x.shape)), look_up(x, tables))
    return jnp.where(kind == _AT["Sharpness"], sharpen(x, factor), out)


def look_up(x: jax.Array, tables: jax.Array) -> jax.Array:
    """tables [batch, channel, 256] at the levels of x [batch, height, width, channel]."""
    flat = x.astype(jnp.int32).reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2)  # [batch, channel, pixel]
    return jnp.take_along_axis(tables, flat, axis=2).swapaxes(1, 2).reshape(x.shape)


def autocontrast(x: jax.Array, contrast: Autocontrast = "fixed") -> jax.Array:
    """Tables [batch, channel, 256] that stretch each channel's range to all levels."""
    low, high = x.min((1, 2)).astype(jnp.int32)[..., None], x.max((1, 2)).astype(jnp.int32)[..., None]
    levels = jnp.arange(256)
    stretched = jnp.clip(255 * (levels - low) // jnp.maximum(high - low, 1), 0, 255)
    byte = jnp.asarray(_rounded_down())[low, high, levels // 8]
    stretched -= (byte >> (7 - levels % 8)) & 1
    if contrast == "ref_bug":
        stretched = jnp.where(low > 0, 255, stretched)
    return jnp.where(high > low, stretched, levels).astype(x.dtype)


@functools.cache
def _rounded_down() -> np.ndarray:
    """Bits uint8 [low, high, level / 8] of the levels where Pillow's double arithmetic ends just below a whole level."""
    low, high, level = np.ogrid[:256, :256, :256]
    scale = 255.0 / np.maximum(high - low, 1)
    pillow = np.clip(level * scale - low * scale, 0, 255).astype(np.uint8)
    return np.packbits(pillow < np.clip(255 * (level - low) // np.maximum(high - low, 1), 0, 255), axis=-1)


def equalize(x: jax.Array) -> jax.Array:
    """Tables [batch, channel, 256] that spread each channel's levels evenly, as Pillow's ImageOps.equalize does."""
    levels = jnp.arange(256)
    pixels = x.astype(jnp.int32).reshape(x.shape[0], -1, x.shape[-1])
    count = jax.vmap(functools.partial(jnp.bincount, length=256), -1)
    histogram = jax.vmap(count)(pixels)  # [batch, channel, level]
    last = jnp.take_along_axis(histogram, x.max((1, 2)).astype(jnp.int32)[..., None], axis=2)
    step = (histogram.sum(2, keepdims=True) - last) // 255
    below = jnp.cumsum(histogram, 2) - histogram
    table = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, table, levels).astype(x.dtype)


def sharpen(x: jax.Array, factor: float) -> jax.Array:
    """Away from a 3 x 3 smoothing by `factor`; the border pixels stay."""
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    inner = x[:, 1:-1, 1:-1]
    smooth = jnp.round((rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner) / 13)
    return x.at[:, 1:-1, 1:-1].set(jnp.floor(jnp.clip(smooth + factor * (inner - smooth), 0, 255)))


def _matrices(operation: jax.Array, sign: jax.Array, level: float, shape: tuple[int, ...]) -> jax.Array:
    """float32 [batch, 2, 3]: where in the image each pixel (x, y, 1) of the result comes from."""
    shear, move, turn = 0.3 * level / 10, level, math.radians(30 * level / 10)
    c, s = math.cos(turn), math.sin(turn)
    x, y = shape[2] / 2, shape[1] / 2
    change = {
        "ShearX": [[0, -shear, 0], [0, 0, 0]],
        "ShearY": [[0, 0, 0], [-shear, 0, 0]],
        "TranslateX": [[0, 0, move], [0, 0, 0]],
        "TranslateY": [[0, 0, 0], [0, 0, move]],
        "Rotate": [[0, -s, s * y], [s, 0, -s * x]],  # the odd part; the even part does not change sign
    }
    even = np.tile(np.eye(2, 3, dtype=np.float32), (len(OPERATIONS), 1, 1))
    odd = np.stack([np.asarray(change.get(name, np.zeros((2, 3))), np.float32) for name in OPERATIONS])
    even[_AT["Rotate"]] = [[c, 0, x - c * x], [0, c, y - c * y]]
    return jnp.asarray(even)[operation] + sign[:, None, None] * jnp.asarray(odd)[operation]


def warp(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """Bilinear sampling of [batch, height, width, 3] at matrices [batch, 2, 3] times (x, y, 1), FILL outside, whole levels."""
    _, height, width, _ = x.shape
    ys, xs = jnp.mgrid[:height, :width].astype(jnp.float32)

    def one(image: jax.Array, m: jax.Array) -> jax.Array:
        u = m[0, 0] * xs + m[0, 1] * ys + m[0, 2]
        v = m[1, 0] * xs + m[1, 1] * ys + m[1, 2]
        left, top = jnp.floor(u), jnp.floor(v)
        right, down = (u - left)[..., None], (v - top)[..., None]

        def at(dy: int, dx: int) -> jax.Array:
            row, column = (top + dy).astype(jnp.int32), (left + dx).astype(jnp.int32)
            return image.at[jnp.where(row < 0, height, row), jnp.where(column < 0, width, column)].get(mode="fill", fill_value=FILL)

        upper = at(0, 0) * (1 - right) + at(0, 1) * right
        lower = at(1, 0) * (1 - right) + at(1, 1) * right
        return jnp.round(upper * (1 - down) + lower * down)

    return jax.vmap(one)(x, matrices)
