"""Small files that later runs take at their word: what was read of shards once, with a digest that tells damage."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

SIZE = 16  # bytes of a digest


def digest_of(*parts: bytes) -> bytes:
    """16 bytes that stand for `parts` end to end."""
    total = hashlib.blake2b(digest_size=SIZE)
    for part in parts:
        total.update(part)
    return total.digest()


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write `parts` at `path` in one step, so that no reader ever sees less."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.urandom(6).hex()}")  # hosts that share the folder may have one process number
    try:
        with open(partial, "wb") as file:
            file.writelines(parts)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def keep(path: Path, data: bytes) -> None:
    """Write `data` at `path` behind a digest of it and of the file's name, which says what it was made of."""
    write_whole(path, (digest_of(path.name.encode(), data), data))


def kept(path: Path) -> bytes | None:
    """What `keep` wrote at `path`; None where it is absent or damaged, and is to be made anew."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return content[SIZE:] if content[:SIZE] == digest_of(path.name.encode(), content[SIZE:]) else None
