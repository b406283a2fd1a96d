"""Compressed shards: gzip, bzip2 and xz, unpacked as they are read."""

import bz2
import collections
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator

from jaxvl.data.tarwalk import is_header

STEP = 1 << 22  # bytes unpacked at a time
MEMORY = 1 << 28  # bytes that the dictionary of an xz stream may take; `xz -9` needs 65 MiB


class _Gzip:
    """zlib with the face of bz2 and lzma."""

    def __init__(self) -> None:
        self._zlib, self.needs_input = zlib.decompressobj(31), True

    def decompress(self, data: bytes, most: int) -> bytes:
        out = self._zlib.decompress(self._zlib.unconsumed_tail + data, most)
        self.needs_input = not self._zlib.unconsumed_tail and len(out) < most
        return out

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


Stream = _Gzip | bz2.BZ2Decompressor | lzma.LZMADecompressor
PACKINGS: dict[bytes, Callable[[], Stream]] = {
    b"\x1f\x8b": _Gzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, MEMORY),
}


def packing(head: bytes) -> Callable[[], Stream] | None:
    """What unpacks a file that begins with `head`, its first block; None for a plain one."""
    found = next((make for sign, make in PACKINGS.items() if head.startswith(sign)), None)
    return None if found is None or is_header(head) else found


def unpack(chunks: Iterator[bytes], write: Callable[[bytes], object]) -> bool:
    """Write `chunks`, unpacked where they are packed. False for a stream that is damaged or lacks its end: what comes before is written."""
    first = next(chunks, b"")
    chunks, make = itertools.chain((first,), chunks), packing(first[:512])
    if make is None:
        for chunk in chunks:
            write(chunk)
        return True
    stream: Stream | None = None
    for data in chunks:
        while True:
            if stream is None:
                data = data.lstrip(b"\0")  # padding
                if not data:
                    break
                stream = make()  # one stream may follow another
            try:
                out = stream.decompress(data, STEP)
            except (zlib.error, lzma.LZMAError, OSError, EOFError):
                collections.deque(chunks, 0)  # so that the length of the file is known
                return False
            write(out)
            if stream.eof:
                data, stream = stream.unused_data, None
            elif stream.needs_input:
                break
            else:
                data = b""
    return stream is None
