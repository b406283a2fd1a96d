"""EXIF orientation out of metadata that nobody vouches for; what Pillow's ImageOps.exif_transpose would apply.

Only the one tag is read, in time and memory that do not depend on what the block says of itself.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

TAG = 0x0112
MOST = 1 << 16  # entries of a directory; a TIFF cannot have more, and a BigTIFF has no use for them
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # bytes of a TIFF type
NUMBERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q"}  # its whole numbers, as struct writes them
PREFIX = re.compile(rb"\A(?:Exif\0\0)*+")
XMP = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")


class Entry(NamedTuple):
    """An entry of an image file directory: `number` values of a TIFF `kind` that begin at byte `at` of the file."""

    tag: int
    kind: int
    number: int
    at: int
    raw: bytes  # the entry as it is stored

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return SIZES.get(self.kind, 0) * self.number


def layout(data: bytes) -> tuple[str, bool]:
    """The byte order of a TIFF, "<" or ">", and whether it is a BigTIFF. Raises ValueError where it is neither."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
    version = int.from_bytes(data[2:4], "little" if order == "<" else "big")
    if not order or version not in (42, 43):
        raise ValueError(f"no TIFF begins with {data[:4]!r}")
    return order, version == 43


def entries(data: bytes) -> Iterator[Entry]:
    """The entries of a TIFF's first directory, as far as it is whole. Raises ValueError for what is no TIFF."""
    order, big = layout(data)
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)
        (number,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    except (struct.error, OverflowError):
        return
    start += 8 if big else 2
    form, length, inline = (order + "HHQ", 20, 8) if big else (order + "HHL", 12, 4)
    for at in range(start, min(start + min(number, MOST) * length, len(data) - length + 1), length):
        tag, kind, count = struct.unpack_from(form, data, at)
        values = at + length - inline
        if SIZES.get(kind, 0) * count > inline:
            (values,) = struct.unpack_from(order + ("Q" if big else "L"), data, values)
        yield Entry(tag, kind, count, values, data[at : at + length])


def first(data: bytes, entry: Entry) -> int | None:
    """The first value of an entry of whole numbers; None where there is none."""
    kind = NUMBERS.get(entry.kind)
    if kind is None or entry.number < 1 or entry.at + SIZES[entry.kind] > len(data):
        return None
    return int(struct.unpack_from(layout(data)[0] + kind, data, entry.at)[0])


def of_exif(block: bytes) -> int | None:
    """The orientation in an EXIF block, None where it says nothing."""
    block = PREFIX.sub(b"", block)
    try:
        found = [entry for entry in entries(block) if entry.tag == TAG]
    except ValueError:
        return None
    return first(block, found[-1]) if found and found[-1].number == 1 else None


def of_xmp(packet: bytes) -> int | None:
    """The orientation in an XMP packet, None where it says nothing."""
    match = XMP.search(packet)
    return int(match[1]) if match else None


def read(exif: bytes, xmp: bytes) -> int:
    """1 to 8: what EXIF says, or, where it has no word on it, XMP. What is none of these is 1."""
    value = of_exif(exif) if exif else None
    value = of_xmp(xmp) if value is None and xmp else value
    return value if value is not None and 1 <= value <= 8 else 1
