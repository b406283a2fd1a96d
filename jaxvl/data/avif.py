"""How large the coded frames of an AVIF are, whatever its boxes say: decoders take a frame whole and scale it to the box's size.

Boxes are those of ISO/IEC 14496-12 and 23008-12 (where items and samples lie), frames those of the AV1 bitstream specification,
5.3 to 5.5: of each the sequence header is read up to its greatest frame size.
"""

import struct
from collections.abc import Iterator

CONTAINERS = (b"meta", b"moov", b"trak", b"mdia", b"minf", b"stbl")
SEQUENCE = 1  # type of the open bitstream unit that tells the size
UNITS = 8  # of a frame, in which the sequence header is looked for
PLACES = 1 << 12  # boxes, items and frames that are looked at; a grid of tiles has some hundreds


def coded(image: bytes) -> int:
    """Pixels of the largest coded frame, 0 where none is found. Raises what damage makes of it: struct.error, IndexError, ValueError."""
    sizes = (_size(image, place) for place, _ in zip(_places(image, 0, len(image)), range(PLACES), strict=False))
    return max((width * height for width, height in sizes), default=0)


def boxes(image: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start and end of what it holds) of the boxes in a stretch."""
    for _ in range(PLACES):
        if at + 8 > end:
            return
        size, kind = struct.unpack_from(">L4s", image, at)
        begin = at + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", image, begin)
            begin += 8
        stop = end if size == 0 else at + size
        if stop < begin:
            return
        yield kind, begin, min(stop, end)
        at = stop


def _places(image: bytes, at: int, end: int) -> Iterator[int]:
    """Where coded items and samples begin."""
    inner = list(boxes(image, at, end))
    data = next((begin for kind, begin, _ in inner if kind == b"idat"), 0)
    for kind, begin, stop in inner:
        if kind in CONTAINERS:
            yield from _places(image, begin + 4 * (kind == b"meta"), stop)
        elif kind == b"iloc":
            yield from _items(image, begin, stop, data)
        elif kind in (b"stco", b"co64") and stop >= begin + 16:
            yield struct.unpack_from(">L" if kind == b"stco" else ">Q", image, begin + 8)[0]


def _items(image: bytes, at: int, end: int, data: int) -> Iterator[int]:
    """Where the first extents of the items in an item location box begin; `data` is where an item data box has its own."""
    version, sizes, more = image[at], image[at + 4], image[at + 5]
    offset, length, base, index = sizes >> 4, sizes & 15, more >> 4, (more & 15) * (version > 0)
    wide = 4 if version == 2 else 2
    at += 6 + wide
    for _ in range(PLACES):
        if at >= end:
            return
        at += wide
        method = int.from_bytes(image[at : at + 2]) & 15 if version else 0
        at += (2 if version else 0) + 2
        start = int.from_bytes(image[at : at + base])
        extents = int.from_bytes(image[at + base : at + base + 2])
        at += base + 2
        start += int.from_bytes(image[at + index : at + index + offset])
        if extents:
            yield start + (data if method == 1 else 0)
        at += extents * (index + offset + length)


class _Bits:
    """The bits of a stretch, first the highest."""

    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data), 8 * len(data)

    def take(self, number: int) -> int:
        if number > self.left:
            raise ValueError("a sequence header ends too early")
        self.left -= number
        return self.value >> self.left & (1 << number) - 1


def _size(image: bytes, at: int) -> tuple[int, int]:
    """The greatest frame size of the sequence that begins at `at`, (0, 0) where none does."""
    for _ in range(UNITS):
        if at >= len(image) or image[at] & 0x80:
            break
        kind, extended, sized = image[at] >> 3 & 15, image[at] >> 2 & 1, image[at] >> 1 & 1
        at += 1 + extended
        size = shift = 0
        while sized:
            size |= (image[at] & 127) << shift
            shift, sized, at = shift + 7, image[at] >> 7 if shift < 49 else 0, at + 1
        if kind == SEQUENCE:
            return _sequence(_Bits(image[at : at + 64]))
        at += size
    return 0, 0


def _sequence(bits: _Bits) -> tuple[int, int]:
    bits.take(4)
    if bits.take(1):  # reduced, of a still picture
        bits.take(5)
    else:
        delay = _timing(bits) if bits.take(1) else 0
        displayed = bits.take(1)
        for _ in range(bits.take(5) + 1):
            bits.take(12)
            if bits.take(5) > 7:
                bits.take(1)
            if delay and bits.take(1):
                bits.take(2 * delay + 1)
            if displayed and bits.take(1):
                bits.take(4)
    width, height = bits.take(4) + 1, bits.take(4) + 1
    return bits.take(width) + 1, bits.take(height) + 1


def _timing(bits: _Bits) -> int:
    """Read past the timing; the bits of a buffer delay, 0 where there is no decoder model."""
    bits.take(64)
    if bits.take(1):
        zeros = 0
        while not bits.take(1):
            zeros += 1
        bits.take(zeros)
    if not bits.take(1):
        return 0
    delay = bits.take(5) + 1
    bits.take(42)
    return delay
