"""From the bytes of an image to the uint8 pixels of a batch: which part of it, at which size.

All randomness comes in as numbers, so the same bytes and numbers give the same pixels on any host, worker and thread.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from jaxvl.data import pixels
from jaxvl.data.formats import Undecodable
from jaxvl.data.pixels import Header, read_header
from jaxvl.data.resize import Box, resize

__all__ = [
    "UNIFORMS",
    "DecodeOptions",
    "Undecodable",
    "canvas_side",
    "canvas_views",
    "check",
    "decode_canvas",
    "decode_eval",
    "decode_full",
    "decode_train",
    "decode_views",
    "probe",
    "random_box",
]

# Pixels to one of the result below which an evaluation shrinks neither by the inverse DCT nor by averages: within a level (rms) of a resize
# of the whole image, as image processors elsewhere do it, also for hard edges, where training's 0.7 and 3 are off by up to 20.
EVAL_MARGIN, EVAL_SPARE = 8.0, 4
UNIFORMS = 22  # of decode_train, each in [0, 1): ten tries of (area, ratio), then the offsets x and y
LONGEST = 64  # pixels that one of a result is weighed from, along a side much longer than the other; more are averaged first


class DecodeOptions(NamedTuple):
    """What decode_train and decode_eval return, and what they refuse.

    size: pixels a side of the result. crop: the random crop of training. "area": crop_scale is the range of its area as a share of
    the image's, and crop_ratio of its width over its height. "side": a square anywhere, whose side is that share of the image's shorter
    side, as if that had been resized to size / share pixels and a square of `size` cut out. fit: for evaluation, "crop" takes the
    largest centred square and "squash" the whole image.
    dct_margin: in training, a JPEG is decoded at 1/2 or 1/4 size where the crop still has dct_margin * size pixels a side: half
    the pixels of the result by default. 1 never enlarges what was decoded, evaluation keeps EVAL_MARGIN; infinity always decodes
    in full. min_side, max_pixels: smaller and larger images are refused, and those that take more than 512 MiB to decode, or than
    8 bytes for each of max_pixels where that is more.
    """

    size: int = 224
    crop: Literal["area", "side"] = "area"
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    fit: Literal["crop", "squash"] = "crop"
    dct_margin: float = 0.7
    min_side: int = 2
    max_pixels: int = 1 << 26


def check(options: DecodeOptions) -> None:
    """Raise ValueError for a value that cannot be meant."""
    low, high = options.crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(
            f"crop_scale is {options.crop_scale}; it takes two shares of the image's area or shorter side, 0 < low <= high <= 1"
        )
    if options.crop not in ("area", "side"):
        raise ValueError(f"crop is {options.crop!r}; it takes 'area' or 'side'")
    if options.crop == "side" and options.fit != "crop":
        raise ValueError(
            f"fit is {options.fit!r} with crop 'side', whose squares squash nothing; set it to 'crop', so that evaluation sees the like"
        )
    low, high = options.crop_ratio
    if not 0 < low <= high:
        raise ValueError(f"crop_ratio is {options.crop_ratio}; it takes two ratios of width to height, 0 < low <= high")
    if options.fit not in ("crop", "squash"):
        raise ValueError(f"fit is {options.fit!r}; it takes 'crop' or 'squash'")
    if not options.dct_margin > 0:
        raise ValueError(f"dct_margin is {options.dct_margin}; it takes a positive number, 1 to never enlarge")
    for name in ("size", "min_side", "max_pixels"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it takes a positive number of pixels")


def probe(image: bytes, options: DecodeOptions) -> tuple[int, int]:
    """(width, height) of the upright image, from its header alone; raises Undecodable for what the header gives away."""
    return read_header(image, options.min_side, options.max_pixels).upright


def decode_full(image: bytes, options: DecodeOptions) -> np.ndarray:
    """The whole upright image, uint8 [height, width, 3]; raises Undecodable."""
    header = read_header(image, options.min_side, options.max_pixels)
    return pixels.upright(pixels.decode(image, header), header).copy()


def decode_train(image: bytes, options: DecodeOptions, uniforms: np.ndarray) -> np.ndarray:
    """A random resized crop, uint8 [size, size, 3], from float64 [UNIFORMS] in [0, 1); raises Undecodable."""
    return decode_views(image, options, uniforms[None])[0]


def decode_views(image: bytes, options: DecodeOptions, uniforms: np.ndarray) -> list[np.ndarray]:
    """Independent crops from one decoding, each as decode_train's, from float64 [view, UNIFORMS]; raises Undecodable.

    A JPEG is decoded at the scale that the smallest of the crops needs.
    """
    header, boxes = _random_boxes(image, options, uniforms)
    found, factor = _decoded(image, header, boxes, options.size, options.dct_margin)
    return [_cut(found, factor, header, box, options.size) for box in boxes]


def decode_canvas(image: bytes, options: DecodeOptions, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The crop of decode_train before its resize, which augment.resize does on the device.

    Returns uint8 [side, side, 3] with side = canvas_side(options), the crop in its upper left corner and zeros elsewhere; and
    float32 [6]: left, top, right and bottom of the crop in it, then the width and height that hold pixels. Raises Undecodable.
    """
    return canvas_views(image, options, uniforms[None])[0]


def canvas_views(image: bytes, options: DecodeOptions, uniforms: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """decode_canvas of independent crops from one decoding, float64 [view, UNIFORMS]; raises Undecodable.

    Every crop has a canvas of its own: one that held them all at the scale of the smallest would be larger than all of theirs.
    """
    header, boxes = _random_boxes(image, options, uniforms)
    found, factor = _decoded(image, header, boxes, options.size, options.dct_margin)
    return [_laid_out(found, factor, header, box, options) for box in boxes]


def canvas_side(options: DecodeOptions) -> int:
    """Pixels a side of the canvas that holds the crop of any JPEG as dct_margin has it decoded."""
    widest = max(options.crop_ratio[1], 1 / options.crop_ratio[0]) if options.crop == "area" else 1.0
    return math.ceil(2 * min(options.dct_margin, 1.0) * widest * options.size) + 2


def decode_eval(image: bytes, options: DecodeOptions) -> np.ndarray:
    """The centred square of whole pixels, or the whole image squashed (`options.fit`), as uint8 [size, size, 3]; raises Undecodable.

    An odd pixel is left at the right or at the bottom, as image processors elsewhere do.
    """
    header = read_header(image, options.min_side, options.max_pixels)
    width, height = header.upright
    x = y = 0
    if options.fit == "crop":
        side = min(width, height)
        x, y = (width - side) // 2, (height - side) // 2
        width = height = side
    box = pixels.stored((x, y, x + width, y + height), header)
    found, factor = _decoded(image, header, [box], options.size, EVAL_MARGIN, smooth=True)
    return _cut(found, factor, header, box, options.size, EVAL_SPARE)


def random_box(width: int, height: int, options: DecodeOptions, uniforms: np.ndarray) -> Box:
    """The random crop of training, whole pixels: for "side" a square anywhere; for "area" the random resized crop of Inception training
    (Szegedy et al., 2015), of ten tries the first that fits.

    Area is uniform in crop_scale and the logarithm of the ratio in that of crop_ratio. Where no try fits, the largest
    centred box with the nearest allowed ratio.
    """
    u = uniforms.tolist()
    (small, large), (narrow, broad) = options.crop_scale, options.crop_ratio
    if options.crop == "side":
        side = max(1, round(min(width, height) * (small + (large - small) * u[0])))
        x, y = int(u[20] * (width - side + 1)), int(u[21] * (height - side + 1))
        return x, y, x + side, y + side
    for i in range(0, 20, 2):
        area = width * height * (small + (large - small) * u[i])
        ratio = narrow * (broad / narrow) ** u[i + 1]
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1))
            return x, y, x + w, y + h
    w = min(width, max(1, round(height * broad)))
    h = min(height, max(1, round(width / narrow)))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _random_boxes(image: bytes, options: DecodeOptions, uniforms: np.ndarray) -> tuple[Header, list[Box]]:
    """A random crop of the stored image for each row of `uniforms`."""
    header = read_header(image, options.min_side, options.max_pixels)
    return header, [pixels.stored(random_box(*header.upright, options, u), header) for u in uniforms]


def _decoded(image: bytes, header: Header, boxes: list[Box], size: int, margin: float, smooth: bool = False) -> tuple[np.ndarray, int]:
    """The stored image at the scale nearest to what cuts of these boxes to `size` pixels need, and the factor it is smaller by."""
    side = min(min(right - left, bottom - top) for left, top, right, bottom in boxes)
    factor = next((f for f in (4, 2) if header.jpeg and side >= f * margin * size), 1)
    return pixels.decode(image, header, factor, smooth=smooth or side < 1.2 * size), factor


def _near(found: np.ndarray, factor: int, box: Box, size: int, longest: float = math.inf, spare: int = 3) -> tuple[np.ndarray, Box]:
    """The decoded image, averaged where it is much larger than a cut of `size` pixels needs, and the box there, no side above `longest`."""
    left, top, right, bottom = box
    side, long = sorted((right - left, bottom - top))
    rough = max(int(side / (factor * spare * size)), math.ceil(long / (factor * longest)))
    across, down = (max(1, rough, int(length / (factor * LONGEST * size))) for length in (right - left, bottom - top))
    if across > 1 or down > 1:  # a box average; it leaves the bicubic kernel `spare` pixels a side or more for each of its own
        found = _averaged(found, across, down)
    across, down = factor * across, factor * down
    return found, (left / across, top / down, right / across, bottom / down)


def _averaged(found: np.ndarray, across: int, down: int) -> np.ndarray:
    """The averages of boxes of so many pixels, rows by rows: Pillow's copy of all of them would be larger than they are."""
    step = down * max(1, (1 << 22) // (found.shape[1] * down))
    parts = [np.asarray(Image.fromarray(found[top : top + step]).reduce((across, down))) for top in range(0, len(found), step)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _cut(found: np.ndarray, factor: int, header: Header, box: Box, size: int, spare: int = 3) -> np.ndarray:
    """The box of the stored image, resized to uint8 [size, size, 3] and upright.

    The stored image is cut and the small result turned, which moves fewer pixels than turning first.
    """
    cut = resize(*_near(found, factor, box, size, spare=spare), size, size)
    return cut if header.orientation == 1 else np.ascontiguousarray(pixels.upright(cut, header))


def _laid_out(found: np.ndarray, factor: int, header: Header, box: Box, options: DecodeOptions) -> tuple[np.ndarray, np.ndarray]:
    side = canvas_side(options)
    found, (left, top, right, bottom) = _near(found, factor, box, options.size, side - 1)
    x, y = math.floor(left), math.floor(top)
    found = found[y : math.ceil(bottom), x : math.ceil(right)]
    small = header._replace(width=found.shape[1], height=found.shape[0])
    found = pixels.upright(found, small)
    canvas = np.zeros((side, side, 3), np.uint8)
    canvas[: found.shape[0], : found.shape[1]] = found
    edges = pixels.shown((left - x, top - y, right - x, bottom - y), small)
    return canvas, np.array((*edges, found.shape[1], found.shape[0]), np.float32)
