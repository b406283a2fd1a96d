"""What stands in place of a shard: told by its first bytes, as a word of reasons.py."""

import re

SIGNS = {
    "pointer": (b"version https://git-lfs", b"version https://hawser", b"/annex/objects/", b"../.git/annex/", b"# xet version"),
    "zstd": (b"\x28\xb5\x2f\xfd",),
    "packed": (b"\x04\x22\x4d\x18", b"LZIP\x01", b"\x5d\x00\x00", b"\x1f\x9d", b"\xff\x06\x00\x00sNaPpY", b"\x89LZO\0"),
    "archive": (b"PK\x03\x04", b"PK\x05\x06", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"PAR1", b"\x89HDF\r\n", b"ARROW1"),
}
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a frame that may precede those of zstd and lz4
# HTML, XML or JSON
PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*[<{\[]")


def kind_of(head: bytes) -> str:
    """What a file that begins with `head` is, though no tar; "" for what is unknown."""
    if SKIPPABLE.match(head):
        return "zstd"
    return next((word for word, signs in SIGNS.items() if head.startswith(signs)), "page" if PAGE.match(head) else "")
