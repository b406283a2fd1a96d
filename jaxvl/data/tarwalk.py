"""Walk over the members of a tar shard, by headers alone, past any damage.

Reads ustar, GNU long names and pax (path and size overrides, sparse files). Nothing is extracted and no link is
followed: a member is a name, a place and a size. Where a header does not hold, the walk searches onward for the next
that does, so that the members behind a damaged one are still found. It takes time in proportion to the file's length,
whatever is in it.

| in the file                                       | what the walk makes of it                                  |
|---------------------------------------------------|------------------------------------------------------------|
| zero blocks in the middle, tars put end to end    | "gap"; members after them count                            |
| no zero block at the end                          | damage "unended": a tar cut between members looks the same |
| more zeros at the end than tar fills up with      | "gap": a file whose end was never written looks the same   |
| header with a wrong checksum, garbage             | damage "garbage"; search for the next header               |
| size past the end of the file (truncated, giant)  | member marked truncated; search inside what it claimed     |
| size that swallows later headers                  | found where the next header does not hold: the same        |
| pax header that is none, numbers beyond any file  | damage "garbage"; what it says of a member is not used     |
| symlink, hard link                                | kind "link", never followed                                |
| FIFO, device                                      | kind "device", never opened                                |
| sparse file (GNU or pax)                          | kind "sparse", its holes are not filled                    |
| directory, volume label, unknown type             | skipped                                                    |
| absolute names, "..", NULs, any bytes             | the name is a label only                                   |
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

BLOCK = 512
HEAD = 64  # bytes of a member's data by which its format is told
WINDOW = 4096  # one read: a caption's header, its text and the next header mostly share a page
NAME_LIMIT = 1 << 16  # a longer name is damage
LIMITS = {b"L": NAME_LIMIT, b"K": NAME_LIMIT} | dict.fromkeys(
    (b"x", b"X", b"g"), 1 << 26
)  # of headers that describe; pax ones hold resource forks too
DIGITS = 20  # of the largest number that can be meant
RECORD = re.compile(rb"(\d{1,20}) (?:(path|size|GNU\.sparse\.[a-z.]+)=)?")  # of a pax header: its length, and the key where it matters
FEW = 8  # candidates, of which one at a time is faster than all at once
FILLING = 22 * BLOCK  # bytes of zeros at most that tar ends with: two blocks, and up to the next 10 KiB
LOOKS = 2  # times the file's length that may be looked over again, for headers that a wrong size has hidden
MAGIC = 257  # where a header says ustar
ASCII = bytes(range(128))
ZERO = bytes(BLOCK)
KINDS = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"6": "device",
    b"S": "sparse",
}


class Member(NamedTuple):
    """One entry of a tar: raw name, kind (file, link, device, sparse), place and size of the data, whether cut."""

    name: bytes
    kind: str
    offset: int
    size: int
    truncated: bool
    head: bytes  # the first bytes of the data, for telling images from the rest


class Damage(NamedTuple):
    """A stretch that is no tar: `reason` is one word, `offset` where it was noticed."""

    reason: str
    offset: int


class _Header(NamedTuple):
    name: bytes
    kind: bytes
    size: int
    extended: bool


def walk(fd: int, length: int) -> Iterator[Member | Damage]:
    """Members of the tar of `length` bytes open at `fd`, in file order, with the damage met on the way."""
    read = _reader(fd)
    position = looked = 0  # looked: bytes passed over in searches, zeros and pax headers
    last: Member | None = None  # its end is proven only by the next header
    inside: int | None = None  # where the data of the last header begin
    pending: dict[str, Any] = {}  # what long-name and pax headers say of the next member
    ended = True  # by zeros, or damage that has been told
    zeros = 0  # bytes of them before `position`
    while position < length:
        block = read(position, BLOCK)
        if block == ZERO:
            begin, position = position, _zeros_end(fd, position, length)
            looked, ended, zeros = looked + position - begin, True, position - begin
            continue
        if zeros:
            yield Damage("gap", position - zeros)
            zeros = 0
        header = _parse(block)
        if header is None:
            if block.strip(b"\0"):
                yield Damage("garbage" if len(block) == BLOCK else "truncated", position)
                ended = True
            # The size that led here may be the lie, so the search begins inside what was last.
            begin = position + 1 if inside is None or looked > LOOKS * length else inside
            found = _search(fd, begin, length)
            if last is not None:
                yield last._replace(truncated=found < last.offset + last.size)
            looked, position, last, inside, pending = looked + found - begin, found, None, None, {}
            continue
        if last is not None:
            yield last
        data = inside = position + BLOCK
        last, ended = None, False
        if header.kind in LIMITS:
            if header.size > LIMITS[header.kind] or data + header.size > length:
                yield Damage("garbage" if header.size > LIMITS[header.kind] else "truncated", position)
                position, inside, pending, ended = _search(fd, data, length), None, {}, True
                continue
            if not _override(pending, header.kind, read(data, header.size)):
                yield Damage("garbage", position)
            looked, position = looked + header.size, data + _padded(header.size)
            continue
        while header.extended and data < length:  # the hole map of a GNU sparse file goes on in blocks of its own
            header = header._replace(extended=read(data, BLOCK)[504:505] == b"\1")
            data = inside = data + BLOCK
        size = 0 if header.kind in b"123456" else pending.get("size", header.size)
        name = pending.get("name", header.name)
        kind = "sparse" if "sparse" in pending else KINDS.get(header.kind)
        if kind == "file" and name.endswith(b"/"):
            kind = None  # directories of old tars carry the type of a file
        pending = {}
        member = Member(name, kind, data, size, data + size > length, read(data, HEAD)) if kind else None
        if data + size > length:
            yield Damage("truncated", position)
            if member:
                yield member
            position, inside, ended = _search(fd, data, length), None, True
        else:
            last, position = member, data + _padded(size)
    if last is not None:
        yield last
    if not ended or (zeros and length % BLOCK):  # tars are whole blocks
        yield Damage("unended", length)
    if zeros > FILLING and zeros < length:
        yield Damage("gap", length - zeros)


def is_header(block: bytes) -> bool:
    """Whether a tar may begin with these 512 bytes."""
    return _parse(block) is not None


def _reader(fd: int) -> Callable[[int, int], bytes]:
    start, window = 0, b""

    def read(position: int, size: int) -> bytes:
        nonlocal start, window
        if not start <= position <= position + size <= start + len(window):
            start, window = position, os.pread(fd, max(size, WINDOW), position)
        return window[position - start : position - start + size]

    return read


def _parse(block: bytes) -> _Header | None:
    """The header in `block`, or None if its checksum or its numbers do not hold."""
    stored, size = _number(block[148:156]), _number(block[124:136])
    if stored is None or size is None or len(block) < BLOCK:
        return None
    rest = block[:148] + block[156:]
    total = sum(rest) + 256
    if stored != total and stored != total - 256 * len(rest.translate(None, ASCII)):  # signed bytes of old tars
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345:346] != b"\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _Header(name, block[156:157], size, block[156:157] == b"S" and block[482:483] == b"\1")


def _number(field: bytes) -> int | None:
    """An octal field, or the base-256 form of GNU tar for large sizes; None where it is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ") or b"0"
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None


def _override(pending: dict, kind: bytes, data: bytes) -> bool:
    """Take what a GNU long name or a pax header says about the next member; False where it is damaged."""
    if kind == b"L":
        pending["name"] = data.split(b"\0", 1)[0]
    if kind not in b"xX":
        return True
    at = 0
    while at < len(data) and data[at]:  # some writers fill up with zeros
        record = RECORD.match(data, at)
        if record is None or not record.end() < (end := at + int(record[1])) <= len(data):
            return False
        key, at = record[2], end
        if key is None:
            continue
        value = data[record.end() : min(end - 1, record.end() + NAME_LIMIT)]
        if key == b"size":
            if not value.isdigit() or len(value) > DIGITS:
                return False
            pending["size"] = int(value)
        elif key in (b"path", b"GNU.sparse.name") and value:
            pending["name"] = value
        if key.startswith(b"GNU.sparse."):
            pending["sparse"] = True
    return True


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _zeros_end(fd: int, position: int, length: int) -> int:
    """The first block from `position` on that is not all zeros; `length` if there is none."""
    step = WINDOW
    while position < length:
        chunk = os.pread(fd, step, position)
        rest = chunk.lstrip(b"\0")
        if rest or not chunk:
            return position + (len(chunk) - len(rest)) // BLOCK * BLOCK if rest else length
        position, step = position + len(chunk), min(2 * step, 1 << 20)
        try:
            position += max(0, os.lseek(fd, position, os.SEEK_DATA) - position) // BLOCK * BLOCK  # over the holes of a sparse file
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return length
    return min(position, length)


def _search(fd: int, position: int, length: int) -> int:
    """The next byte from `position` on where a header with the ustar magic holds; `length` if none does.

    Any byte, not only whole blocks: behind bytes that were lost or put in, a tar goes on out of step.
    """
    step = BLOCK  # mostly the next header is right here
    while position < length:
        chunk = os.pread(fd, step + BLOCK, position)
        starts = [m.start() - MAGIC for m in re.finditer(b"ustar", chunk)]
        starts = [s for s in starts if 0 <= s <= min(step, len(chunk) - BLOCK)]
        for at in starts if len(starts) <= FEW else _sums_hold(chunk, np.array(starts)):
            if _parse(chunk[at : at + BLOCK]) is not None:
                return position + at
        position += step
        step = min(2 * step, 1 << 20)
    return length


def _sums_hold(chunk: bytes, starts: np.ndarray) -> list[int]:
    """Of `starts`, int64 [n] offsets of blocks in `chunk`, those whose checksum may hold; all at once, since a file can be full of them."""
    data = np.frombuffer(chunk, np.uint8)
    stored, unread = np.zeros(len(starts), np.int64), np.ones(len(starts), bool)
    for place in range(148, 156):  # octal digits, with spaces before or behind, up to a NUL
        letter = data[starts + place]
        unread &= letter != 0
        stored = np.where(unread & (letter >= 48) & (letter < 56), stored * 8 + letter - 48, stored)
    over = lambda values: (lambda c: c[starts + BLOCK] - c[starts] - c[starts + 156] + c[starts + 148])(
        np.append(0, np.cumsum(values, dtype=np.int64))
    )
    total = over(data) + 256
    return starts[(stored == total) | (stored == total - 256 * over(data > 127))].tolist()
