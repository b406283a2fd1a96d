"""The segments of a JPEG (ITU-T T.81, annex B): its size, metadata and scans, without decoding.

Segments are walked by their lengths, so bytes inside one are never taken for a marker; behind a scan's header the walk goes
on at the next marker, as a decoder does.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from jaxvl.data.formats import Undecodable

SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame, of any coding
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
BARE = (*range(0xD0, 0xD8), 0x01)  # markers without a length
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in coded data: neither a stuffed byte nor a restart
FILL = re.compile(rb"\xff*")
PARTS = 1 << 18  # segments of a file
LONGEST = 1 << 20  # bytes of EXIF that are put together from its pieces
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
TRAILER = re.compile(rb"SEFH.{4}(.{4})", re.DOTALL)  # of Samsung's phones; its directory is the file's last
BLOCKS = 1 << 10  # of such a trailer


class Segment(NamedTuple):
    """marker: its second byte. start: where its FF is. body: what it holds, without the length."""

    marker: int
    start: int
    body: bytes


class Jpeg(NamedTuple):
    """width, height: pixels, 0 where no frame is told. blocks: of each component, 8 x 8 samples, by its id. exif, xmp: as stored.

    buffered: the coefficients of the whole image are held while it is decoded, since it has several scans. progressive: whether
    later scans refine earlier ones.
    """

    width: int
    height: int
    blocks: dict[int, int]
    exif: bytes
    xmp: bytes
    buffered: bool
    progressive: bool


def segments(image: bytes) -> Iterator[Segment]:
    """The segments of a JPEG up to its end mark, or the start of another, or as far as they are whole. Raises Undecodable for too many."""
    at = 2
    for _ in range(PARTS):
        if image[at : at + 2] == b"\xff\xff":
            at = FILL.match(image, at).end() - 1  # type: ignore[union-attr]
        if image[at : at + 1] != b"\xff" or at + 2 > len(image):
            found = MARKER.search(image, at)  # a stretch that is no segment; decoders skip it with a warning
            if found is None:
                return
            at = found.start()
        marker = image[at + 1]
        if marker in (SOI, EOI):  # of the next image where this one's end mark is missing
            yield Segment(marker, at, b"")
            return
        if marker in BARE:
            yield Segment(marker, at, b"")
            at += 2
            continue
        if at + 4 > len(image):
            return
        length = int.from_bytes(image[at + 2 : at + 4])
        yield Segment(marker, at, image[at + 4 : at + 2 + max(length, 2)])
        at += 2 + max(length, 2)
        if marker == SOS:
            found = MARKER.search(image, at)
            if found is None:
                return
            at = found.start()
    raise Undecodable("bomb", f"it has more than {PARTS:,} segments")


def look(image: bytes) -> Jpeg:
    """What the segments in front of the first scan say."""
    width = height = 0
    blocks: dict[int, int] = {}
    exif = xmp = b""
    progressive = False
    for marker, _, body in segments(image):
        if marker in FRAMES and len(body) >= 6 and not width:
            progressive = marker in PROGRESSIVE
            height, width, number = struct.unpack_from(">HHB", body, 1)
            sizes = [(body[i], body[i + 1] >> 4, body[i + 1] & 15) for i in range(6, min(6 + 3 * number, len(body) - 2), 3)]
            most = max((h for _, h, _ in sizes), default=1) or 1, max((v for _, _, v in sizes), default=1) or 1
            for component, h, v in sizes:
                blocks[component] = -(-width * h // (8 * most[0])) * -(-height * v // (8 * most[1]))
        elif marker == 0xE1 and body.startswith(EXIF) and len(exif) < LONGEST:
            exif += body[len(EXIF) :] if exif else body  # a block above 64 KiB comes in pieces
        elif marker == 0xE1 and body.startswith(XMP):
            xmp = body[len(XMP) :]
        elif marker == SOS:
            several = progressive or body[:1] != bytes([len(blocks)])
            return Jpeg(width, height, blocks, exif, xmp, several, progressive)
    return Jpeg(width, height, blocks, exif, xmp, progressive, progressive)


def scans(image: bytes) -> Iterator[tuple[list[int], int, int, int]]:
    """(component ids, first and last coefficient, the lowest bit that is sent of them) of every scan."""
    for marker, _, body in segments(image):
        if marker == SOS and body and len(body) >= 4 + 2 * body[0]:
            number = body[0]
            first, last, bits = body[1 + 2 * number : 4 + 2 * number]
            yield list(body[1 : 1 + 2 * number : 2]), first, last, bits & 15


def work(image: bytes, found: Jpeg) -> int:
    """Blocks that decoding visits, all scans together."""
    return sum(found.blocks.get(component, 0) for components, *_ in scans(image) for component in components)


def has_end(image: bytes) -> bool:
    """Whether an end mark follows the last scan."""
    return any(segment.marker == EOI for segment in segments(image))


def ended(image: bytes) -> bytes | None:
    """`image` with its end mark right behind its coded data, where padding or a phone's trailer stands there instead.

    None where all that can be told is that something is missing: nothing follows the scans that is known to be none of them, or
    scans are missing that would refine the picture. Whether its lines are whole is for the decoder to say.
    """
    last = [segment for segment in segments(image) if segment.marker == SOS]
    if not last:
        return None
    start = last[-1].start + 4 + len(last[-1].body)
    found = MARKER.search(image, start)
    if found is not None and found[0][-1] not in (EOI, SOI):
        found = None  # of a trailer that is no JPEG
    end = min(found.start() if found else len(image), _trailer(image))
    coded = image[start:end].rstrip(b"\xff" if found else b"").rstrip(b"\0")
    if coded.endswith(b"\xff"):
        coded += b"\0"  # which is stuffed, and no padding
    if look(image).progressive and not _refined(image):
        return None
    return image[:start] + coded + b"\xff\xd9"


def _trailer(image: bytes) -> int:
    """Where a Samsung trailer begins: its directory tells how far in front of it the first of its blocks is."""
    if not image.rstrip(b"\0").endswith(b"SEFT"):
        return len(image)
    at = image.rfind(b"SEFH")
    found = TRAILER.match(image, at) if at >= 0 else None
    if found is None:
        return len(image)
    number = int.from_bytes(found[1], "little")
    back = [int.from_bytes(image[i + 4 : i + 8], "little") for i in range(at + 12, min(at + 12 + 12 * min(number, BLOCKS), len(image)), 12)]
    return max(0, at - max(back, default=0))


def _refined(image: bytes) -> bool:
    """Whether the scans of a progressive JPEG send every bit of every coefficient."""
    missing = {(component, k) for component in look(image).blocks for k in range(64)}
    for components, first, last, low in scans(image):
        if not low:
            missing -= {(component, k) for component in components for k in range(first, last + 1)}
    return not missing
