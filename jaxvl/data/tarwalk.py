"""Walk over the members of a tar shard, by headers alone, past any damage.

Reads ustar, GNU long names and pax (path and size overrides, sparse files). Nothing is extracted and no link is
followed: a member is a name, a place and a size. Where a header does not hold, the walk searches onward for the next
that does, so that the members behind a damaged one are still found.

| in the file                                       | what the walk makes of it                                  |
|---------------------------------------------------|------------------------------------------------------------|
| zero blocks in the middle, tars put end to end    | skipped; members after them count                          |
| no end-of-archive blocks                          | fine                                                       |
| header with a wrong checksum, garbage             | damage "garbage"; search for the next header               |
| size past the end of the file (truncated, giant)  | member marked truncated; search inside what it claimed     |
| size that swallows later headers                  | found where the next header does not hold: the same        |
| symlink, hard link                                | kind "link", never followed                                |
| FIFO, device                                      | kind "device", never opened                                |
| sparse file (GNU or pax)                          | kind "sparse", its holes are not filled                    |
| directory, volume label, unknown type             | skipped                                                    |
| absolute names, "..", NULs, any bytes             | the name is a label only                                   |
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

BLOCK = 512
HEAD = 64  # bytes of a member's data by which its format is told
WINDOW = 4096  # one read: a caption's header, its text and the next header mostly share a page
NAME_LIMIT = 1 << 16  # a longer GNU name or pax record is damage, not a name
MAGIC = 257  # where a header says ustar
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
    position = 0
    last: Member | None = None  # its end is proven only by the next header
    pending: dict[str, Any] = {}  # what long-name and pax headers say of the next member
    while position < length:
        block = read(position, BLOCK)
        if block == ZERO:
            position = _zeros_end(fd, position, length)
            continue
        header = _parse(block)
        if header is None:
            if block.strip(b"\0"):
                yield Damage("garbage" if len(block) == BLOCK else "truncated", position)
            # The size that led here may be the lie, so the search begins inside the last member.
            found = _search(fd, last.offset if last else position + 1, length)
            if last is not None:
                yield last._replace(truncated=found < last.offset + last.size)
            position, last, pending = found, None, {}
            continue
        if last is not None:
            yield last
            last = None
        data = position + BLOCK
        if header.kind in b"LKxXg":
            if header.size > NAME_LIMIT:
                yield Damage("garbage", position)
                position = _search(fd, data, length)
            else:
                _override(pending, header.kind, read(data, header.size))
                position = data + _padded(header.size)
            continue
        while header.extended and data < length:  # the hole map of a GNU sparse file goes on in blocks of its own
            header = header._replace(extended=read(data, BLOCK)[504:505] == b"\1")
            data += BLOCK
        name = pending.get("name", header.name)
        kind = "sparse" if "sparse" in pending else KINDS.get(header.kind)
        if kind == "file" and name.endswith(b"/"):
            kind = None  # directories of old tars carry the type of a file
        size = 0 if header.kind in b"123456" else pending.get("size", header.size)
        pending = {}
        member = Member(name, kind, data, size, data + size > length, read(data, HEAD)) if kind else None
        if data + size > length:
            yield Damage("truncated", position)
            if member:
                yield member
            position = _search(fd, data, length)
        else:
            last, position = member, data + _padded(size)
    if last is not None:
        yield last


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
    total = sum(block) - sum(block[148:156]) + 256
    if stored != total and stored != total - 256 * sum(b > 127 for b in block[:148] + block[156:]):  # signed bytes of old tars
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


def _override(pending: dict, kind: bytes, data: bytes) -> None:
    """Take what a GNU long name or a pax header says about the next member."""
    if kind == b"L":
        pending["name"] = data.split(b"\0", 1)[0]
    elif kind in b"xX":
        while data:
            length, _, rest = data.partition(b" ")
            if not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
                return
            key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
            data = data[int(length) :]
            if key in (b"path", b"GNU.sparse.name"):
                pending["name"] = value
            elif key == b"size" and value.isdigit():
                pending["size"] = int(value)
            if key.startswith(b"GNU.sparse."):
                pending["sparse"] = True


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _zeros_end(fd: int, position: int, length: int) -> int:
    """The first block from `position` on that is not all zeros; `length` if there is none."""
    while position < length:
        chunk = os.pread(fd, 1 << 20, position)
        rest = chunk.lstrip(b"\0")
        if rest or not chunk:
            return position + (len(chunk) - len(rest)) // BLOCK * BLOCK if rest else length
        position += len(chunk)
    return length


def _search(fd: int, position: int, length: int) -> int:
    """The next byte from `position` on where a header with the ustar magic holds; `length` if none does.

    Any byte, not only whole blocks: behind bytes that were lost or put in, a tar goes on out of step.
    """
    step = WINDOW
    while position < length:
        chunk = os.pread(fd, step + BLOCK, position)
        at = chunk.find(b"ustar", MAGIC)
        while 0 <= at < step + MAGIC:
            block = chunk[at - MAGIC : at - MAGIC + BLOCK]
            if _parse(block) is not None:
                return position + at - MAGIC
            at = chunk.find(b"ustar", at + 1)
        position += step
        step = min(2 * step, 1 << 20)
    return length
