"""Shards on local disk: copies of remote and compressed ones, in a folder of bounded size.

Several processes of a host share the folder: a copy is made once, under a lock, and appears under its name only when
whole. The lock file says how long the copy is and whether its compressed stream was whole; a copy of another length is
made again.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl.data.tarwalk import BLOCK
from jaxvl.data.unpack import packing, unpack

STEP = 1 << 22  # bytes copied at a time
# What fsspec needs for a scheme, by the name that pip knows.
CLIENTS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
           "hdfs": "pyarrow", "hf": "huggingface_hub", "ssh": "paramiko", "sftp": "paramiko", "oci": "ocifs", "oss": "ossfs"}  # fmt: skip
RATIO, SMALL = 100, 1 << 28  # times its size that a shard may unpack to, and bytes that any may
ABANDONED = 3600  # seconds without a byte after which a copy in the making is nobody's
# What stores call that which changes with a file, in small letters, the surest first.
VERSIONS = (
    "etag", "versionid", "generation", "md5hash", "contentmd5", "sha256", "sha", "blobid", "crc32c", "digest",
    "mtime", "lastmodified", "modificationtime", "modify", "updated", "created",
)  # fmt: skip


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
    """The fsspec file system of `url`, or of a local path, and the path in it. Raises ValueError where there is none for such a URL."""
    import fsspec

    scheme = re.split("::|://", url)[0] if is_remote(url) else "file"
    if scheme.startswith("pipe:"):
        raise ValueError(f"data.source {url!r}: commands are not run; write the URL itself, such as s3://bucket/{{0000..0127}}.tar")
    with reached(url):
        if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:
            raise ValueError(f"data.source {url!r}: {scheme}:// is no store that is known; gs://, s3:// and https:// are, among others")
        return fsspec.core.url_to_fs(url)


@contextlib.contextmanager
def reached(url: str) -> Iterator[None]:
    """What a store says in its own words becomes an OSError, or where a package is missing a ValueError, that names the URL."""
    try:
        yield
    except ImportError as error:
        schemes = re.split("::|://", url)[:-1]
        scheme = next((s for s in schemes if s in CLIENTS), schemes[0])
        package = CLIENTS.get(scheme, error.name)
        told = f"{scheme}:// needs {package}, which is not installed: pip install {package}" if package else str(error)
        raise ValueError(f"data.source {url!r}: {told}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"data.source {url!r}: not found") from None
    except ValueError:
        raise
    except Exception as error:
        raise OSError(f"{url} cannot be read: {str(error).strip() or 'no reason was given'} ({type(error).__name__})") from error


def stamp(shard: str, fresh: bool = False) -> tuple[int, int]:
    """(size in bytes, version) of a shard: mtime in ns, or a hash of what a store tells of the version.

    fresh: as the store has it now, whatever listing of it is remembered.
    """
    if not is_remote(shard):
        stat = os.stat(shard)
        return stat.st_size, stat.st_mtime_ns
    store, path = filesystem(shard)
    with reached(shard):
        if fresh:
            store.invalidate_cache(path)
        info = store.info(path)
    told = {key.lower().replace("-", "").replace("_", ""): value for key, value in info.items()}
    version = next((str(told[key]) for key in VERSIONS if told.get(key)), "")
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


class Uncached(OSError):
    """A shard, unpacked, is larger than the cache may hold, or than any shard of images."""


class Opened(NamedTuple):
    """A descriptor of a plain tar, the stamp of the shard it is of, and whether that was a damaged compressed stream."""

    fd: int
    stamp: tuple[int, int]
    torn: bool = False


def open_shard(shard: str, cache: Cache) -> int:
    """The descriptor that `opened` gives."""
    return opened(shard, cache).fd


def opened(shard: str, cache: Cache) -> Opened:
    """Open the plain tar in `shard`, in place or as a copy in the cache; the descriptor outlives the copy.

    Raises OSError where the shard cannot be read, or the disk or the cache is too small for its copy.
    """
    if not is_remote(shard):
        fd = os.open(shard, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not keep the reader waiting
        if packing(os.pread(fd, BLOCK, 0)) is None:
            return Opened(fd, (os.fstat(fd).st_size, os.fstat(fd).st_mtime_ns))
        os.close(fd)
    version = stamp(shard, fresh=True)
    path = Path(cache.folder) / "shards" / f"{digest(f'{shard} {version[0]} {version[1]}')}.tar"
    while True:
        if copy := _copied(path, version):
            return copy
        with locked(path.with_suffix(".lock")):
            if copy := _copied(path, version):
                return copy
            _copy(shard, version, path, cache.limit)


def _copied(path: Path, version: tuple[int, int]) -> Opened | None:
    """The copy at `path` where there is one that is as long as it was made."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    note = path.with_suffix(".lock")
    length, _, state = (note.read_text() if note.exists() else "").partition(" ")
    if length != str(os.fstat(fd).st_size):
        os.close(fd)
        return None
    os.utime(fd)  # the time of last use
    return Opened(fd, version, state == "torn")


def _copy(shard: str, version: tuple[int, int], path: Path, limit: int) -> None:
    partial, size = path.with_suffix(".partial"), version[0]
    store, remote = filesystem(shard)

    def read() -> bytes:
        with reached(shard):
            return source.read(STEP)

    def write(data: bytes) -> None:
        length = target.tell() + len(data)
        if length > limit:
            raise Uncached(f"it has more bytes than the cache may hold ({limit:,}): raise data.cache_gb")
        if size and length > max(SMALL, RATIO * size):
            raise Uncached(f"it unpacks to more than {RATIO} times its {size:,} bytes, as no shard of images does")
        target.write(data)

    try:
        with reached(shard):
            source = store.open(remote, "rb")
        with source, open(partial, "wb") as target:
            whole = unpack(iter(read, b""), write)
            if size and source.tell() != size:
                raise OSError(f"its store gave {source.tell():,} bytes of {size:,}")
            taken = target.tell()
        if stamp(shard, fresh=True) != version:
            raise OSError("it changed meanwhile; start again")
        with locked(path.parent / "room.lock"):
            path.unlink(missing_ok=True)
            _make_room(path.parent, limit - taken)
            path.with_suffix(".lock").write_text(f"{taken} {'whole' if whole else 'torn'}")
            os.replace(partial, path)
    except OSError as error:
        kind = Uncached if isinstance(error, Uncached) else OSError
        raise kind(f"cannot copy shard {shard} into {path.parent}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


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
