"""Shards on local disk: copies of remote and compressed ones, in a folder of bounded size.

Several processes of a host share the folder: a copy is made once, under a lock, and appears under its name only when
whole.
"""

import collections
import contextlib
import fcntl
import hashlib
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STEP = 1 << 22  # bytes copied at a time
ABANDONED = 3600  # seconds without a byte after which a copy in the making is nobody's
GZIP = b"\x1f\x8b"
VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "mtime", "LastModified", "last_modified", "updated", "created")


class Cache(NamedTuple):
    """A folder and the bytes that copies of shards may take in it."""

    folder: str
    limit: int


def cache_folder(folder: str = "") -> Path:
    """`folder`, or $JAXVL_CACHE, or ~/.cache/jaxvl."""
    return Path(folder or os.environ.get("JAXVL_CACHE", "") or "~/.cache/jaxvl").expanduser()


def is_remote(shard: str) -> bool:
    """Whether `shard` is a URL that fsspec must fetch."""
    return "://" in shard


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path in it."""
    import fsspec

    return fsspec.core.url_to_fs(url)


def stamp(shard: str) -> tuple[int, int]:
    """(size in bytes, version) of a shard: mtime in ns, or a hash of what a store tells of the version."""
    if not is_remote(shard):
        stat = os.stat(shard)
        return stat.st_size, stat.st_mtime_ns
    store, path = filesystem(shard)
    info = store.info(path)
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return int(info["size"] or 0), int(digest(version), 16) >> 1


def digest(text: str) -> str:
    """16 hex digits that stand for `text`."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against other processes and threads; a process that dies lets it go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_shard(shard: str, cache: Cache) -> int:
    """A descriptor of the plain tar in `shard`, in place or of a copy in the cache; it outlives the copy.

    Raises OSError where the shard cannot be read, or the disk or the cache is too small for its copy.
    """
    if not is_remote(shard):
        fd = os.open(shard, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not keep the reader waiting
        if os.pread(fd, len(GZIP), 0) != GZIP:
            return fd
        os.close(fd)
    size, version = stamp(shard)
    folder = Path(cache.folder) / "shards"
    path = folder / f"{digest(f'{shard} {size} {version}')}.tar"
    while True:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.utime(fd)  # the time of last use
            return fd
        with locked(folder / f"{path.stem}.lock"):
            if not path.exists():
                _copy(shard, size, path, cache.limit)


def _copy(shard: str, size: int, path: Path, limit: int) -> None:
    partial = path.with_suffix(".partial")
    store, remote = filesystem(shard)
    try:
        with store.open(remote, "rb") as source, open(partial, "wb") as target:
            for data in _unpacked(iter(lambda: source.read(STEP), b"")):
                if target.tell() + len(data) > limit:
                    raise OSError(f"it has more bytes than the cache may hold ({limit:,}): raise data.cache_gb")
                target.write(data)
            if size and source.tell() != size:
                raise OSError(f"its store gave {source.tell():,} bytes of {size:,}")
            taken = target.tell()
        with locked(path.parent / "room.lock"):
            _make_room(path.parent, limit - taken)
            os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot copy shard {shard} into {path.parent}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _unpacked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """`chunks`, out of gzip if they are in it; a damaged gzip gives what comes before the damage, a tar cut short."""
    inflate = None
    for number, chunk in enumerate(chunks):
        if number == 0 and chunk.startswith(GZIP):
            inflate = zlib.decompressobj(31)
        if inflate is None:
            yield chunk
        try:
            while inflate and chunk:
                yield inflate.decompress(chunk, STEP)
                chunk = inflate.unconsumed_tail
                if inflate.eof:  # one gzip may follow another
                    chunk, inflate = inflate.unused_data, zlib.decompressobj(31)
        except zlib.error:
            collections.deque(chunks, 0)
            return


def _make_room(folder: Path, limit: int) -> None:
    """Drop what killed processes left, then the least recently used copies until at most `limit` bytes are left."""
    for file in folder.glob("*.partial"):
        if file.stat().st_mtime < time.time() - ABANDONED:
            file.unlink(missing_ok=True)
    held = sorted((f.stat().st_mtime_ns, f.stat().st_size, f) for f in folder.glob("*.tar"))
    total = sum(size for _, size, _ in held)
    for _, size, file in held:
        if total <= limit:
            return
        file.unlink(missing_ok=True)
        total -= size
