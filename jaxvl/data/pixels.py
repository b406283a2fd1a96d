"""Image bytes, of any honest format and any dishonest content, to upright 8-bit RGB.

The format is read from the content, never from a name. JPEG goes through libjpeg-turbo in strict mode, so an image with a
grey lower half never passes; everything else, and the rare JPEG that libjpeg-turbo cannot lay out, goes through Pillow,
without its metadata. Sizes, and what decoding will take, are checked in the header, before any pixel is decoded. EXIF
orientation is applied, transparency is composed on white, 16 bits a channel are scaled to 8, and an animation gives its
first frame.
"""

import io
import struct
from typing import Any, NamedTuple, NoReturn

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from jaxvl.data import jpeg, orientation
from jaxvl.data.containers import Bare, bare
from jaxvl.data.formats import UNREAD, Undecodable, sniff, told
from jaxvl.data.resize import Box, scratch

BACKGROUND = 255  # transparent pixels are composed on white
MEMORY, EACH = 1 << 29, 8  # bytes that decoding an image may take, its pixels included: in all, or for each of max_pixels if that is more
RESULT = 3  # bytes of a decoded pixel
PIXEL = {"WEBP": 16, "AVIF": 14}  # bytes of working memory that Pillow and the format's library take for a pixel, as measured
PLAIN = 4  # the same of any other format
SCANS, VISITS = 1 << 22, 32  # blocks that the scans of a JPEG may visit, in all or each of its own; encoders visit each some six times
PYTHON = {"ppm", "ppm_plain", "bmp_rle"}  # Pillow's decoders that are written in Python, a microsecond for a byte
SLOW = 1 << 22  # bytes and pixels that these may have
BAND = 1 << 20  # pixels that are converted at a time

# EXIF orientation -> (swap x and y, mirror x, mirror y): how an upright position is found in the stored image.
ORIENTATIONS = {1: (0, 0, 0), 2: (0, 1, 0), 3: (0, 1, 1), 4: (0, 0, 1), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}


class Header(NamedTuple):
    """width, height: as stored, before `orientation` (EXIF) is applied. jpeg: its colour space, "" where Pillow decodes."""

    width: int
    height: int
    orientation: int
    jpeg: str
    picture: Any  # the opened Pillow image where Pillow decodes, which is done once

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) as shown."""
        return (self.height, self.width) if ORIENTATIONS[self.orientation][0] else (self.width, self.height)


def read_header(image: bytes, min_side: int, max_pixels: int) -> Header:
    """Size, orientation and route of an image; nothing is decoded. Raises Undecodable."""
    if not image:
        raise Undecodable("empty")
    kind = sniff(image)
    if kind in UNREAD:
        raise Undecodable(kind, told(kind))
    if not kind:
        raise Undecodable("notimage", f"it starts with {image[:16]!r}")
    check = lambda size, memory: _check(size, memory, min_side, max_pixels)
    try:
        return _jpeg_header(image, check) if kind == "JPEG" else _pillow_header(bare(image, kind), check)
    except Undecodable:
        raise
    except struct.error as error:
        raise Undecodable("truncated", f"its {kind} header ends beyond the file") from error
    except Exception as error:  # whatever hostile bytes make a parser raise
        _refuse(error)


def decode(image: bytes, header: Header, factor: int = 1, smooth: bool = True) -> np.ndarray:
    """The stored image, before orientation, as uint8 [ceil(height / factor), ceil(width / factor), 3].

    `factor` is 1, or for a JPEG 2 or 4: other scales have no fast inverse DCT and take longer than full size. `smooth`
    interpolates subsampled colour, which is seen (47 dB) unless the image is shrunk afterwards (50 dB at 1.2, 52 dB at 1.5).
    The memory is the next call's of this thread again. Raises Undecodable.
    """
    try:
        return _turbo_pixels(image, header, factor, smooth) if header.jpeg else _pillow_pixels(header.picture)
    except Undecodable:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        if header.jpeg and (mended := jpeg.ended(image)):
            try:
                return _turbo_pixels(mended, header, factor, smooth)
            except ValueError as second:  # mostly more than the end mark is missing, as the first error says
                if "extraneous" in str(second) and not jpeg.has_end(image):
                    raise Undecodable("trailing", "its lines could be followed or overwritten by the bytes behind them") from error
        _refuse(error)


def notice(image: bytes) -> str:
    """What is odd about an image that is used all the same, a word of REASONS, or ""."""
    return "noend" if sniff(image) == "JPEG" and not jpeg.has_end(image) else ""


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


def _check(size: tuple[int, int], memory: int, min_side: int, max_pixels: int) -> None:
    """Refuse an image that is too large, too small, or takes more than the budget to decode."""
    width, height = size
    if width * height > max_pixels:
        raise Undecodable("bomb", f"{width} x {height} pixels are more than max_pixels, {max_pixels}")
    budget = max(MEMORY, EACH * max_pixels)
    if memory > budget:
        raise Undecodable("bomb", f"decoding its {width} x {height} pixels would take {memory >> 20} MiB, more than {budget >> 20} MiB")
    if min(width, height) < min_side:
        raise Undecodable("tiny", f"{width} x {height} pixels, and min_side is {min_side}")


def _jpeg_header(image: bytes, check: Any) -> Header:
    found = jpeg.look(image)
    turned = orientation.read(found.exif, found.xmp)
    inks = len(found.blocks) > 3
    memory = (RESULT + 4 * inks) * found.width * found.height + 128 * found.buffered * sum(found.blocks.values())
    if found.width and found.height:
        check((found.width, found.height), memory)
    blocks = sum(found.blocks.values())
    if found.buffered and jpeg.work(image, found) > max(SCANS, VISITS * blocks):
        raise Undecodable("bomb", f"its scans visit each of {blocks:,} blocks more than {VISITS} times")
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(image, strict=False)
    except (ValueError, KeyError):  # broken, or an unusual subsampling; Pillow tells which
        return _pillow_header(Bare(image, "JPEG", turned), check)
    check((width, height), memory)
    return Header(width, height, turned, space, None)


def _pillow_header(file: Bare, check: Any) -> Header:
    rate = PIXEL.get(file.format, PLAIN) + RESULT
    memory = lambda size: max(size[0] * size[1], file.coded) * rate + file.extra
    if any(file.size):
        check(file.size, memory(file.size))
    try:
        picture = Image.open(io.BytesIO(file.data), formats=(file.format,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Undecodable("bomb", str(error)) from error
    except UnidentifiedImageError as error:
        raise Undecodable("corrupt", f"no {file.format} that can be read, though it starts with {file.data[:16]!r}") from error
    if any(file.size) and picture.size != file.size:
        raise Undecodable(
            "corrupt", f"its header says {picture.size[0]} x {picture.size[1]} pixels, its content {file.size[0]} x {file.size[1]}"
        )
    check(picture.size, memory(picture.size))
    slow = PYTHON & {tile[0] for tile in getattr(picture, "tile", ())}
    if slow and max(picture.size[0] * picture.size[1], len(file.data)) > SLOW:
        raise Undecodable("bomb", f"a {file.format} of this kind is decoded slowly, and only up to {SLOW:,} bytes and pixels")
    turned = file.orientation or orientation.read(picture.info.get("exif", b""), picture.info.get("xmp", b""))
    return Header(*picture.size, turned, "", picture)


def _refuse(error: Exception) -> NoReturn:
    detail = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        raise Undecodable("bomb", "there is not enough memory to decode it") from error
    cut = "truncated" in detail.lower() or "premature end" in detail.lower()
    raise Undecodable("truncated" if cut else "corrupt", detail) from error


def _turbo_pixels(image: bytes, header: Header, factor: int, smooth: bool) -> np.ndarray:
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
    return _in_bands(height, width, lambda rows: _without_inks(pixels[rows])) if inks else pixels


def _without_inks(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 4] of cyan, magenta, yellow and black, stored inverted as Adobe writes them (255 is no ink), as RGB."""
    return ((pixels[..., :3].astype(np.uint16) * pixels[..., 3:] + 127) // 255).astype(np.uint8)


def _in_bands(height: int, width: int, convert: Any) -> np.ndarray:
    """uint8 [height, width, 3] from convert(slice of rows), some rows at a time, so that nothing between takes the room of an image."""
    step = max(1, BAND // width)
    if height <= step:
        return convert(slice(0, height))
    out = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        out[rows] = convert(rows)
    return out


def _pillow_pixels(picture: Image.Image) -> np.ndarray:
    picture.load()
    width, height = picture.size
    band = lambda rows: picture if rows == slice(0, height) else picture.crop((0, rows.start, width, rows.stop))
    try:
        return _in_bands(height, width, lambda rows: _rgb(band(rows)))
    finally:
        picture.close()  # its pixels are as large as the result


def _rgb(picture: Image.Image) -> np.ndarray:
    mode = picture.mode
    if mode.startswith("I"):  # 16 bits, which Pillow would clip
        deep = np.asarray(picture)
        if deep.min() < 0 or deep.max() > 65535:
            raise Undecodable("corrupt", "32-bit pixels have no agreed range")
        gray = ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if isinstance(clear := picture.info.get("transparency"), int):
            gray[deep == clear] = BACKGROUND
        return np.repeat(gray[..., None], 3, axis=2)
    if mode == "F":
        raise Undecodable("corrupt", "floating-point pixels have no agreed range")
    if "transparency" in picture.info or mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        canvas = Image.new("RGBA", picture.size, (BACKGROUND,) * 3 + (255,))
        picture = Image.alpha_composite(canvas, picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"))
