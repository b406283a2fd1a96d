"""Pixels on the device: uint8 images to normalised floats, with random augmentation in training.

Everything runs inside the jitted step on the whole batch. The draws of row i come from fold_in(key, i) with the row's place
in the global batch, and nothing mixes rows, so the result does not depend on how the batch is sharded. Between the first
and the last operation an image is float32 in levels 0 to 255.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxvl.data.randaugment import Autocontrast, randaugment

Pair = tuple[float, float]
Triple = tuple[float, float, float]
Hflip = Literal["all", "unsided"]


class AugmentOptions(NamedTuple):
    """Operations in the order they are applied; a probability of 0 leaves one out of the compiled program.

    jitter: largest change of brightness, contrast and saturation (as a share) and of hue (as a share of the colour circle).
    jitter_prob, grayscale, blur, flip, randaugment_prob: probabilities, the last for each operation of RandAugment.
    blur_sigma: range of the Gaussian's width in pixels. hflip: whether any image may be flipped, or none whose caption says
    left or right. randaugment: number of operations. randaugment_level: 0 to 10. autocontrast: ref_bug is what ALBEF and
    TCL trained with, see randaugment.py. views: 2 gives the method a second, independent view of each image, "image_aug",
    from another crop and other draws of the same operations.
    mean, std: of the channels, as shares of white; by default those of CLIP.
    """

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_prob: float = 0.8
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: Pair = (0.1, 2.0)
    flip: float = 0.0
    hflip: Hflip = "all"
    randaugment: int = 0
    randaugment_level: float = 7.0
    randaugment_prob: float = 0.5
    autocontrast: Autocontrast = "fixed"
    views: Literal[1, 2] = 1
    mean: Triple = (0.48145466, 0.4578275, 0.40821073)
    std: Triple = (0.26862954, 0.26130258, 0.27577711)


def check(options: AugmentOptions) -> None:
    """Raise ValueError for a value that cannot be meant."""
    for name in ("jitter_prob", "grayscale", "blur", "flip", "randaugment_prob"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"augment.{name} is {getattr(options, name)}; it takes a probability, from 0 to 1")
    if len(options.jitter) != 4 or min(options.jitter) < 0 or options.jitter[3] > 0.5:
        raise ValueError(
            f"augment.jitter is {options.jitter}; it takes (brightness, contrast, saturation, hue), 0 or more, hue at most 0.5"
        )
    low, high = options.blur_sigma
    if not 0 < low <= high:
        raise ValueError(f"augment.blur_sigma is {options.blur_sigma}; it takes two widths in pixels, 0 < low <= high")
    if options.randaugment < 0 or not 0 <= options.randaugment_level <= 10:
        raise ValueError(
            f"augment.randaugment is {options.randaugment} at level {options.randaugment_level}; it takes 0 or more operations at a level from 0 to 10"
        )
    for name, value, legal in (("hflip", options.hflip, Hflip), ("autocontrast", options.autocontrast, Autocontrast)):
        if value not in get_args(legal):
            raise ValueError(f"augment.{name} is {value!r}; it takes {' or '.join(get_args(legal))}")
    if options.views not in (1, 2):
        raise ValueError(f"augment.views is {options.views}; it takes 1 or 2")
    if len(options.mean) != 3 or len(options.std) != 3 or min(options.std) <= 0:
        raise ValueError(f"augment.mean and augment.std are {options.mean} and {options.std}; each takes three channels, std above 0")


def preprocess(images: jax.Array, key: jax.Array | None, options: AugmentOptions, sided: jax.Array | None = None) -> jax.Array:
    """Levels [batch, height, width, 3], uint8 or float, to normalised float32; `key` None is evaluation, which only normalises.

    sided: bool [batch], rows that are not flipped whatever is drawn; None for none.
    """
    x = images.astype(jnp.float32)
    if key is not None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0]))  # [batch]
        x = augment(x, keys, options, sided)
    scale = 1 / (255 * jnp.asarray(options.std, jnp.float32))
    return x * scale - jnp.asarray(options.mean, jnp.float32) / jnp.asarray(options.std, jnp.float32)


def resize(canvas: jax.Array, frame: jax.Array, size: int) -> jax.Array:
    """Antialiased bicubic crops [batch, size, size, 3], float32 levels, of canvases uint8 [batch, side, side, 3].

    frame: float32 [batch, 6], left, top, right and bottom of the crop, then the width and height that hold pixels
    (decode.decode_canvas). The same arithmetic as the host's resize, as two matrix products an image.
    """

    def matrix(low: jax.Array, high: jax.Array, length: jax.Array) -> jax.Array:
        """float32 [batch, size, side]; Keys' cubic with a = -1/2, stretched by the scale, over the pixels there are."""
        pixel = jnp.arange(canvas.shape[1], dtype=jnp.float32)
        scale = ((high - low) / size)[:, None, None]
        centre = low[:, None, None] + scale * (jnp.arange(size, dtype=jnp.float32)[:, None] + 0.5)
        x = jnp.abs(pixel + 0.5 - centre) / jnp.maximum(scale, 1)
        p, q = jnp.maximum(2 - x, 0), jnp.maximum(1 - x, 0)
        weights = jnp.where(pixel < length[:, None, None], p * p * (p - 1) / 2 + q * q * (1 - 2 * q), 0)
        return weights / weights.sum(2, keepdims=True)

    left, top, right, bottom, width, height = frame.T
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("byh,bhwc->bywc", matrix(top, bottom, height), canvas.astype(jnp.float32), precision=exact)
    return jnp.clip(jnp.einsum("bxw,bywc->byxc", matrix(left, right, width), x, precision=exact), 0, 255)


def augment(x: jax.Array, keys: jax.Array, o: AugmentOptions, sided: jax.Array | None = None) -> jax.Array:
    """The random operations on float32 levels [batch, height, width, 3], one key a row; rows of `sided` are not flipped."""
    each = jax.vmap(lambda k: jax.random.split(k, 6))(keys)  # [batch, 6]
    if any(o.jitter) and o.jitter_prob:
        x = _sometimes(each[:, 0], o.jitter_prob, color_jitter, x, o.jitter)
    if o.grayscale:
        x = _sometimes(each[:, 1], o.grayscale, lambda _, x: jnp.broadcast_to(luma(x), x.shape), x)
    if o.blur:
        x = _sometimes(each[:, 2], o.blur, random_blur, x, o.blur_sigma)
    if o.flip:
        flipped = _sometimes(each[:, 3], o.flip, lambda _, x: x[:, :, ::-1], x)
        x = flipped if sided is None else jnp.where(sided[:, None, None, None], x, flipped)
    if o.randaugment:
        x = randaugment(x, each[:, 4], o.randaugment, o.randaugment_level, o.randaugment_prob, o.autocontrast)
    return x


def _sometimes(keys: jax.Array, probability: float, operation: Callable[..., jax.Array], x: jax.Array, *args: Any) -> jax.Array:
    """`operation(keys, x, *args)` on the rows whose draw falls below the probability."""
    keys = jax.vmap(jax.random.split)(keys)  # [batch, 2]
    chosen = jax.vmap(jax.random.uniform)(keys[:, 0]) < probability
    return jnp.where(chosen[:, None, None, None], operation(keys[:, 1], x, *args), x)


def luma(x: jax.Array) -> jax.Array:
    """ITU-R BT.601 luma of [..., 3] as [..., 1]; a sum, because a matrix product may round levels to bfloat16."""
    return (x * jnp.asarray([0.299, 0.587, 0.114], x.dtype)).sum(-1, keepdims=True)


def color_jitter(keys: jax.Array, x: jax.Array, strength: tuple[float, float, float, float]) -> jax.Array:
    """Brightness, contrast, saturation, then hue, each by a uniform draw.

    Always in this order: an order drawn for each row would cost four times the work in a batch.
    """
    u = jax.vmap(lambda k: jax.random.uniform(k, (4, 1, 1, 1), minval=-1.0))(keys)  # [batch, 4, 1, 1, 1]
    brightness, contrast, saturation = (jnp.maximum(1 + u[:, i] * strength[i], 0) for i in range(3))
    x = blend(x, 0.0, brightness)
    x = blend(x, luma(x).mean((1, 2), keepdims=True), contrast)
    x = blend(x, luma(x), saturation)
    return shift_hue(x, u[:, 3, ..., 0] * strength[3]) if strength[3] else x


def blend(x: jax.Array, other: jax.Array | float, factor: jax.Array) -> jax.Array:
    """`factor` of x and the rest of `other`, kept within the levels."""
    return jnp.clip(factor * x + (1 - factor) * other, 0, 255)


def shift_hue(x: jax.Array, turn: jax.Array) -> jax.Array:
    """Turn the HSV hue of [..., 3] by `turn` circles."""
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    value = x.max(-1)
    chroma = value - x.min(-1)
    safe = jnp.where(chroma == 0, 1, chroma)
    sextant = jnp.where(value == r, (g - b) / safe, jnp.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    k = (jnp.asarray([5.0, 3.0, 1.0]) + (sextant + 6 * turn)[..., None]) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def random_blur(keys: jax.Array, x: jax.Array, sigma: Pair) -> jax.Array:
    """A Gaussian blur of a width drawn from `sigma`, cut at three widths of the widest; the border pixels repeat outwards."""
    low, high = sigma
    width = jax.vmap(lambda k: jax.random.uniform(k, minval=low, maxval=high))(keys)
    return blur(x, width, int(3 * high + 0.5))


def blur(x: jax.Array, sigma: jax.Array, reach: int) -> jax.Array:
    """Gaussian blur of [batch, height, width, 3] by sigma [batch], with 2 * reach + 1 taps."""
    taps = jnp.exp(-0.5 * (jnp.arange(-reach, reach + 1) / sigma[:, None]) ** 2)
    taps = taps / taps.sum(1, keepdims=True)  # [batch, tap]
    for axis in (1, 2):
        size = x.shape[axis]
        padded = jnp.pad(x, [(reach, reach) if a == axis else (0, 0) for a in range(4)], "edge")
        shifted = (jax.lax.slice_in_dim(padded, t, t + size, axis=axis) for t in range(2 * reach + 1))
        x = functools.reduce(jnp.add, (taps[:, t, None, None, None] * s for t, s in enumerate(shifted)))
    return x
