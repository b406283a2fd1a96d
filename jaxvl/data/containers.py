"""What the files of each format say of themselves before a decoder sees them, and the part of them that a decoder needs.

Metadata can be large, hostile or damaged where the pixels are sound, so it is left out of what Pillow is given: of a PNG the
ancillary chunks, of a GIF the comments and later frames, of a TIFF all tags but those on how pixels are stored. What would be
decoded as soon as a file is opened (ICO), or at another size than the header's (TIFF tiles, JPEG 2000), is sized here.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from jaxvl.data import avif, orientation
from jaxvl.data.formats import Undecodable, told

PARTS = 1 << 18  # chunks or blocks of a file; the pieces of a large image are some 10,000, and metadata can add to them
TEXT = 1 << 20  # bytes of a text chunk that are searched for an orientation
TABLES = 1 << 20  # bytes of TIFF tags, of which Pillow makes Python numbers
EXIF_TEXT, XMP_TEXT = b"Raw profile type exif", b"XML:com.adobe.xmp"  # keys of PNG text chunks

COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")
TOKEN = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*+(\d{1,9})(?=\s)")  # the next number of a PPM, past spaces and comments

# How the pixels of a TIFF are stored: sizes, compression and its options, samples, places of strips and tiles, colours.
STORED = {
    256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 336, 338, 339, 347,
    512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 50674,
}  # fmt: skip
WIDTH, HEIGHT, BITS, COMPRESSION, STRIP_ROWS, SAMPLES, PLANES, TILE_WIDTH, TILE_HEIGHT, XMP = (
    256,
    257,
    258,
    259,
    278,
    277,
    284,
    322,
    323,
    700,
)
REDUCED, WHITE, PAGES_WITHIN, DNG = 254, 262, 330, 50706


class Bare(NamedTuple):
    """A file without what its pixels do not need.

    orientation: 1 to 8, or 0 where Pillow finds it. size: width and height where they have to be known before Pillow opens it, else (0, 0). extra: bytes that decoding takes besides
    those that every pixel of the format does. coded: pixels that are decoded, where they can be more than those of the size.
    """

    data: bytes
    format: str
    orientation: int = 0
    size: tuple[int, int] = (0, 0)
    extra: int = 0
    coded: int = 0


def bare(image: bytes, kind: str) -> Bare:
    """The file `image` of format `kind`. Raises Undecodable for what its structure gives away."""
    return READERS[kind](image) if kind in READERS else Bare(image, kind)


def _png(image: bytes) -> Bare:
    kept, exif, xmp, profile, size, extra = [b"\x89PNG\r\n\x1a\n"], b"", b"", b"", (0, 0), 0
    at, whole = 8, memoryview(image)
    for _ in range(PARTS):
        if at + 12 > len(image):
            break
        length, name = struct.unpack_from(">L4s", image, at)
        body, end = whole[at + 8 : at + 8 + length], at + 12 + length
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            if end > len(image):
                raise Undecodable("truncated", f"its chunk {name.decode()} ends beyond the file")
            if zlib.crc32(whole[at + 4 : end - 4]) != int.from_bytes(image[end - 4 : end]):
                raise Undecodable("corrupt", f"the checksum of its chunk {name.decode()} is wrong")
            if name == b"IHDR" and length >= 10:
                size = struct.unpack(">LL", body[:8])
                extra = 2 * size[0] * 4 * body[8] // 8  # two rows
            kept.append(image[at:end])
        elif name == b"IEND":
            break
        elif name == b"eXIf":
            exif = bytes(body)
        elif name in (b"tEXt", b"zTXt", b"iTXt") and body[:22] == EXIF_TEXT + b"\0":
            profile = _text(name, bytes(body))
        elif name == b"iTXt" and body[:18] == XMP_TEXT + b"\0":
            xmp = _text(name, bytes(body))
        at = end
    else:
        raise Undecodable("bomb", f"it has more than {PARTS:,} chunks")
    if len(kept) == 1:
        raise Undecodable("truncated", "nothing of it is a PNG but its first bytes")
    if profile and not exif:
        digits = b"".join(profile.split(b"\n")[3:])
        exif = bytes.fromhex(digits.decode("ascii")) if re.fullmatch(rb"(?:[0-9a-fA-F]{2})*", digits) else b""
    kept.append(b"\0\0\0\0IEND\xaeB`\x82")
    return Bare(b"".join(kept), "PNG", orientation.read(exif, xmp), size, extra)


def _text(name: bytes, body: bytes) -> bytes:
    """The first megabyte of the text of a PNG chunk; empty where it cannot be inflated."""
    _, _, text = body.partition(b"\0")
    packed = name == b"zTXt"
    if packed:
        text = text[1:]
    elif name == b"iTXt":
        packed = text[:1] == b"\1"
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return zlib.decompressobj().decompress(text, TEXT) if packed else text[:TEXT]
    except zlib.error:
        return b""


def _gif(image: bytes) -> Bare:
    """The first frame, with the last graphic control extension in front of it."""
    at = 13 + (3 << (image[10] & 7) + 1 if len(image) > 10 and image[10] & 0x80 else 0)
    screen, control = image[:at], b""
    for _ in range(PARTS):
        if at >= len(image):
            break
        if image[at] == 0x2C:
            begin = at
            flags = image[at + 9] if at + 9 < len(image) else 0
            at = _blocks_end(image, at + 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
            return Bare(screen + control + image[begin:at] + (b";" if at <= len(image) else b""), "GIF")
        if image[at] == 0x21:
            begin, at = at, _blocks_end(image, at + 2)
            control = image[begin:at] if image[begin + 1 : begin + 2] == b"\xf9" else control
        elif image[at] == 0x3B:
            break
        else:  # a byte that begins no block; Pillow goes on to the next that does
            found = re.compile(rb"[,!;]").search(image, at)
            at = found.start() if found else len(image)
    raise Undecodable("truncated", "it has no frame")


def _blocks_end(image: bytes, at: int) -> int:
    """Where the data blocks that begin at `at` end; beyond the file where they do not."""
    while at < len(image) and image[at]:
        at += 1 + image[at]
    return at + 1


def _webp(image: bytes) -> Bare:
    size, exif, xmp, at = (0, 0), b"", b"", 12
    for _ in range(PARTS):
        if at + 8 > len(image):
            break
        name, length = struct.unpack_from("<4sL", image, at)
        body = image[at + 8 : at + 8 + length] if name in (b"EXIF", b"XMP ") else image[at + 8 : at + 8 + min(length, 16)]
        if name == b"VP8X" and len(body) >= 10:
            size = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        elif name == b"VP8 " and len(body) >= 10 and not size[0]:
            size = int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
        elif name == b"VP8L" and len(body) >= 5 and not size[0]:
            packed = int.from_bytes(body[1:5], "little")
            size = 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
        elif name == b"EXIF":
            exif = exif or body
        elif name == b"XMP ":
            xmp = xmp or body
        at += 8 + length + (length & 1)
    if not all(size):
        raise Undecodable("corrupt", "it has no chunk that tells its size")
    return Bare(image, "WEBP", orientation.read(exif, xmp), size)


def _ico(image: bytes) -> Bare:
    """The largest picture of an icon, of those the one of fewest colours, as Pillow takes it; its own size is read, not the list's."""
    found = []
    for number in range(int.from_bytes(image[4:6], "little")):
        entry = image[6 + 16 * number : 22 + 16 * number]
        if len(entry) < 16:
            break
        width, height, colours, _, _, bits, size, at = struct.unpack("<BBBBHHLL", entry)
        depth = bits or ((colours - 1).bit_length() if colours else 0) or 256
        found.append((-(width or 256) * (height or 256), depth, number, entry, at, size))
    if not found:
        raise Undecodable("truncated", "it lists no picture")
    *_, entry, at, size = min(found)
    picture = image[at : at + size]
    if picture.startswith(b"\x89PNG"):
        return _png(picture)
    if len(picture) < 16:
        raise Undecodable("truncated", "its picture lies beyond the file")
    width, height = struct.unpack_from("<ll", picture, 4)
    if picture[16:20] in (b"\1\0\0\0", b"\2\0\0\0"):
        raise Undecodable("corrupt", "its picture is a bitmap in run lengths, which icons cannot have")
    single = struct.pack("<HHH", 0, 1, 1) + entry[:12] + struct.pack("<L", 22) + picture
    return Bare(single, "ICO", 1, (abs(width), abs(height) // 2))


def _tiff(image: bytes) -> Bare:
    """The first page, its directory written anew with the tags in STORED alone."""
    order, big = orientation.layout(image)
    (start,) = struct.unpack_from(order + ("Q" if big else "L"), image, 8 if big else 4)
    (listed,) = struct.unpack_from(order + ("Q" if big else "H"), image, start)
    entries = list(orientation.entries(image))
    found = {entry.tag: entry for entry in entries}
    kept = {tag: entry for tag, entry in sorted(found.items()) if tag in STORED}
    if sum(entry.size for entry in kept.values()) > TABLES:
        raise Undecodable("bomb", f"its tags hold more than {TABLES:,} bytes")
    if len(entries) < listed or any(e.at + e.size > len(image) for e in entries if e.tag in (*STORED, XMP)):
        raise Undecodable("truncated", "its directory ends beyond the file")  # of which Pillow would take what there is
    number = lambda tag, default: (orientation.first(image, found[tag]) if tag in found else None) or default
    if DNG in found or (number(REDUCED, 0) & 1 and PAGES_WITHIN in found):  # the first page is a preview of a camera's raw data
        raise Undecodable("raw", told("raw"))
    if WHITE in found and not number(WHITE, 0) and number(BITS, 1) > 8:
        raise Undecodable("corrupt", "its 16-bit levels count from white, which Pillow would show inverted")
    width, height, samples = number(WIDTH, 0), number(HEIGHT, 0), number(SAMPLES, 1)
    piece = (
        number(TILE_WIDTH, 0) * number(TILE_HEIGHT, 0)
        if TILE_WIDTH in found or TILE_HEIGHT in found
        else width * min(number(STRIP_ROWS, height), height)
    )
    deep = max(4, (1 if number(PLANES, 1) == 2 else samples) * number(BITS, 1) // 8)
    extra = piece * deep if number(COMPRESSION, 1) > 1 else 0  # what is not compressed is read as it lies
    # The directory goes where the old one was: behind the file it would stand in for pixels that are cut off.
    table = struct.pack(order + ("Q" if big else "H"), len(kept)) + b"".join(e.raw for e in kept.values()) + bytes(8 if big else 4)
    clean = image[:start] + table + image[start + len(table) :]
    packet = image[found[XMP].at : found[XMP].at + found[XMP].size] if XMP in found else b""
    return Bare(clean, "TIFF", orientation.read(image, packet), (width, height), extra)


def _jpeg2000(image: bytes) -> Bare:
    """The size and the tiles of the codestream itself (ISO/IEC 15444-1, A.5.1), whatever the boxes around it say."""
    boxes = avif.boxes(image, 0, len(image)) if image[:1] == b"\0" else iter([(b"jp2c", 0, 0)])
    at = next((begin for kind, begin, _ in boxes if kind == b"jp2c"), len(image))
    if image[at : at + 4] != b"\xff\x4f\xff\x51":
        raise Undecodable("truncated" if at >= len(image) else "corrupt", "it has no codestream")
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, samples = struct.unpack_from(">8LH", image, at + 8)
    width, height = right - left, bottom - top
    if min(width, height, tile_width, tile_height, samples) < 1 or samples > 4:
        raise Undecodable("corrupt", f"{samples} components of {width} x {height} in tiles of {tile_width} x {tile_height}")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    each = 8 + max(_density(image, at), default=0.0)
    return Bare(image, "JPEG2000", size=(width, height), extra=tiles * (6000 + 1200 * samples) + int(each * samples * width * height))


def _density(image: bytes, at: int) -> Iterator[float]:
    """Bytes a sample that the code-blocks and precincts of a JPEG 2000 codestream at `at` take, for each of its coding styles (A.6.1, A.6.2)."""
    at, end = at + 2, len(image)
    for _ in range(PARTS):
        marker, length = struct.unpack_from(">HH", image, at) if at + 4 <= len(image) else (0, 0)
        if marker == 0xFF93:  # the tile's data
            at = end
            continue
        if marker == 0xFF90:  # a tile
            (size,) = struct.unpack_from(">L", image, at + 6)
            end = max(at + size, at + 12) if size else len(image)
        if marker in (0xFF52, 0xFF53):
            body = image[at + 4 : at + 2 + length]
            styled, rest = (body[0], body[5:]) if marker == 0xFF52 else (body[1], body[2:])
            blocks = 1 / (1 << (rest[1] & 15) + 2 + (rest[2] & 15) + 2)
            sizes = rest[5 : 6 + rest[0]] if styled & 1 else b""
            precincts = sum(0.25**i / (1 << (size & 15) + (size >> 4)) for i, size in enumerate(reversed(sizes)))
            yield 4 / 3 * 400 * blocks + 1650 * precincts
        if not 0xFF4F < marker < 0xFFD9:
            return
        at += 2 + length


def _avif(image: bytes) -> Bare:
    return Bare(image, "AVIF", coded=avif.coded(image))


def _ppm(image: bytes) -> Bare:
    """The numbers without the comments between them, which Pillow reads a byte at a time, or copies all that follows for each."""
    at, numbers = 2, [image[:2]]
    while len(numbers) < (3 if image[:2] in (b"P1", b"P4") else 4):
        found = TOKEN.match(image, at)
        if found is None:
            raise Undecodable("corrupt", "no numbers stand in front of its pixels")
        numbers.append(found[1])
        at = found.end()
    width, height = int(numbers[1]), int(numbers[2])
    pixels = COMMENT.sub(b"", image[at:]) if image[:2] in (b"P1", b"P2", b"P3") else image[at:]
    return Bare(b"\n".join(numbers) + pixels, "PPM", 1, (width, height))


READERS = {"PNG": _png, "GIF": _gif, "WEBP": _webp, "ICO": _ico, "TIFF": _tiff, "JPEG2000": _jpeg2000, "AVIF": _avif, "PPM": _ppm}
