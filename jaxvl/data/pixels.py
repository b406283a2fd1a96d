"""Image bytes, of any honest format and any dishonest content, to upright 8-bit RGB.

The format is read from the content, never from a name. JPEG goes through libjpeg-turbo in strict mode, so an image with a
grey lower half never passes; everything else, and the rare JPEG that libjpeg-turbo cannot lay out, goes through Pillow.
Sizes are checked in the header, before any pixel is decoded. EXIF orientation is applied, transparency is composed on white,
16 bits a channel are scaled to 8, and an animation gives its first frame.
"""

import functools
import io
from typing import Any, NamedTuple, NoReturn

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from jaxvl.data.resize import Box, scratch

FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG", "JPEG2000", "PPM", "ICO")  # as far as this Pillow has them
MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")  # of a broken image, rather than of none
BACKGROUND = 255  # transparent pixels are composed on white

# EXIF orientation -> (swap x and y, mirror x, mirror y): how an upright position is found in the stored image.
ORIENTATIONS = {1: (0, 0, 0), 2: (0, 1, 0), 3: (0, 1, 1), 4: (0, 0, 1), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}


class Undecodable(ValueError):
    """An image that must not be used. `reason`: empty, notimage, truncated, corrupt, bomb or tiny."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Header(NamedTuple):
    """width, height: as stored, before `orientation` (EXIF) is applied. jpeg: its colour space, "" where Pillow decodes."""

    width: int
    height: int
    orientation: int
    jpeg: str
    picture: Any  # the opened Pillow image where Pillow decodes

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) as shown."""
        return (self.height, self.width) if ORIENTATIONS[self.orientation][0] else (self.width, self.height)


def read_header(image: bytes, min_side: int, max_pixels: int) -> Header:
    """Size, orientation and route of an image; nothing is decoded. Raises Undecodable."""
    if not image:
        raise Undecodable("empty")
    header = _jpeg_header(image) or _pillow_header(image)
    if header.width * header.height > max_pixels:
        raise Undecodable("bomb", f"{header.width} x {header.height} pixels are more than max_pixels, {max_pixels}")
    if min(header.width, header.height) < min_side:
        raise Undecodable("tiny", f"{header.width} x {header.height} pixels, and min_side is {min_side}")
    return header


def decode(image: bytes, header: Header, factor: int = 1, smooth: bool = True) -> np.ndarray:
    """The stored image, before orientation, as uint8 [ceil(height / factor), ceil(width / factor), 3].

    `factor` is 1, or for a JPEG 2 or 4: other scales have no fast inverse DCT and take longer than full size. `smooth`
    interpolates subsampled colour, which is seen (47 dB) unless the image is shrunk afterwards (50 dB at 1.2, 52 dB at 1.5).
    The memory is the next call's of this thread again. Raises Undecodable.
    """
    try:
        if not header.jpeg:
            return _pillow_pixels(header.picture)
        height, width = -(-header.height // factor), -(-header.width // factor)
        inks = header.jpeg in ("CMYK", "YCCK")
        pixels = simplejpeg.decode_jpeg(
            image,
            "CMYK" if inks else "RGB",
            fastupsample=not smooth,
            min_height=height if factor > 1 else 0,
            min_width=width if factor > 1 else 0,
            buffer=scratch("pixels", (height, width, 4 if inks else 3), np.uint8),
        )
    except Undecodable:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        _refuse(error)
    if inks:  # stored inverted, as Adobe writes them: 255 is no ink
        return ((pixels[..., :3].astype(np.uint16) * pixels[..., 3:] + 127) // 255).astype(np.uint8)
    return pixels


def upright(pixels: np.ndarray, header: Header) -> np.ndarray:
    """A view of [height, width, 3] turned as its EXIF orientation says."""
    swap, mirror_x, mirror_y = ORIENTATIONS[header.orientation]
    pixels = pixels[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
    return pixels.transpose(1, 0, 2) if swap else pixels


def stored(box: Box, header: Header) -> Box:
    """A box of the upright image in the coordinates of the stored one."""
    swap, mirror_x, mirror_y = ORIENTATIONS[header.orientation]
    left, top, right, bottom = box
    if swap:
        left, top, right, bottom = top, left, bottom, right
    if mirror_x:
        left, right = header.width - right, header.width - left
    if mirror_y:
        top, bottom = header.height - bottom, header.height - top
    return left, top, right, bottom


def shown(box: Box, header: Header) -> Box:
    """A box of the stored image in the coordinates of the upright one."""
    swap, mirror_x, mirror_y = ORIENTATIONS[header.orientation]
    left, top, right, bottom = box
    if mirror_x:
        left, right = header.width - right, header.width - left
    if mirror_y:
        top, bottom = header.height - bottom, header.height - top
    return (top, left, bottom, right) if swap else (left, top, right, bottom)


def _jpeg_header(image: bytes) -> Header | None:
    if image[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(image, strict=False)
    except (ValueError, KeyError):  # broken, or an unusual subsampling; Pillow tells which
        return None
    orientation = 1
    if image.find(b"Exif\0\0", 0, image.find(b"\xff\xda")) > 0:
        try:
            orientation = _orientation(Image.open(io.BytesIO(image), formats=("JPEG",)))
        except Exception:  # an unreadable EXIF block says nothing, and the pixels are judged by their own decoder
            orientation = 1
    return Header(width, height, orientation, space, None)


def _pillow_header(image: bytes) -> Header:
    try:
        picture = Image.open(io.BytesIO(image), formats=_formats())
        return Header(*picture.size, _orientation(picture), "", picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Undecodable("bomb", str(error)) from error
    except UnidentifiedImageError as error:
        raise Undecodable("corrupt" if image.startswith(MAGIC) else "notimage", f"it starts with {image[:16]!r}") from error
    except Exception as error:
        _refuse(error)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def _orientation(picture: Image.Image) -> int:
    if "exif" not in picture.info and picture.format != "TIFF":
        return 1
    value = picture.getexif().get(0x0112, 1)
    return value if value in ORIENTATIONS else 1


def _refuse(error: Exception) -> NoReturn:
    detail = str(error) or type(error).__name__
    cut = "truncated" in detail.lower() or "premature end" in detail.lower()
    raise Undecodable("truncated" if cut else "corrupt", detail) from error


def _pillow_pixels(picture: Image.Image) -> np.ndarray:
    picture.load()
    mode = picture.mode
    if mode.startswith("I"):  # 16 bits, which Pillow would clip
        deep = np.asarray(picture)
        if deep.min() < 0 or deep.max() > 65535:
            raise Undecodable("corrupt", "32-bit pixels have no agreed range")
        return np.repeat(((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if mode == "F":
        raise Undecodable("corrupt", "floating-point pixels have no agreed range")
    if "transparency" in picture.info or mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        canvas = Image.new("RGBA", picture.size, (BACKGROUND,) * 3 + (255,))
        picture = Image.alpha_composite(canvas, picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"))
