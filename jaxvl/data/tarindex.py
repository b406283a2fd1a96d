"""The index of a tar shard: where the parts of every sample lie, in columns.

An index file is a header, a ROW for each sample that has an image, a BAD for each that cannot be used, the reasons of
the shard's own damage, and all keys end to end. It takes about 60 bytes a sample, and no Python object until a row is
read. The header has a digest of itself, which is checked when a run starts, and one of all that follows, which is
checked when the shard is opened.
"""

import itertools
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxvl.data.kept import SIZE, digest_of, write_whole
from jaxvl.data.nottar import kind_of
from jaxvl.data.reasons import REASONS
from jaxvl.data.targroup import group
from jaxvl.data.tarjoin import SLOTS, UNCAPTIONED, Sample
from jaxvl.data.tarwalk import BLOCK, walk

MAGIC = b"jaxvlidx"
VERSION = 2
# magic, version, the shard's stamp (two), pairs, images, bad, damages, bytes of keys, digest of what follows the header
HEADER = struct.Struct(f"<8sQQQQQQQQ{SIZE}s")
LEAST = 10 * 1024  # bytes of zeros that tar writes where it has no member; more of them are a file that was never filled
WORDS = tuple(REASONS)

ROW = np.dtype([(f"{slot}_at", "<u8") for slot in SLOTS] + [(f"{slot}_size", "<u4") for slot in SLOTS] + [("key_end", "<u4")])
BAD = np.dtype([("key_end", "<u4"), ("reason", "<u4")])


class Index(NamedTuple):
    """The samples of one shard.

    rows: ROW [images], in file order, those with a caption (`pairs` of them) before those without. bad: BAD [bad].
    keys: bytes of all keys end to end, rows then bad; `key_end` is where each ends. damage: reasons of stretches that
    are no tar. stamp: size and version of the shard that was indexed (cache.stamp).
    """

    rows: np.ndarray
    bad: np.ndarray
    keys: np.ndarray
    damage: tuple[str, ...]
    pairs: int
    stamp: tuple[int, int]

    @property
    def summary(self) -> "Summary":
        """What the index file's head holds."""
        return Summary(self.stamp, self.pairs, len(self.rows), len(self.bad), len(self.damage))

    def key(self, row: int) -> str:
        """The key of sample `row`."""
        return _text(self.keys[int(self.rows["key_end"][row - 1]) if row else 0 : int(self.rows["key_end"][row])])

    def bad_keys(self) -> list[tuple[str, str]]:
        """(key, reason) of every bad sample."""
        start = int(self.rows["key_end"][-1]) if len(self.rows) else 0
        spans = _spans(self.bad["key_end"], start)
        return [(_text(self.keys[a:b]), WORDS[r]) for (a, b), r in zip(spans, self.bad["reason"], strict=True)]


class Summary(NamedTuple):
    """The head of an index file: enough to order samples without opening the columns."""

    stamp: tuple[int, int]
    pairs: int
    images: int
    bad: int
    damages: int


class DamagedIndex(ValueError):
    """An index file is not what was written."""


def build_index(fd: int, version: tuple[int, int], torn: bool = False) -> Index:
    """Index the tar open at `fd`, whose shard is at stamp `version`. torn: it came out of a damaged compressed stream."""
    length, head = os.fstat(fd).st_size, os.pread(fd, BLOCK, 0)
    samples, damage = group(walk(fd, length))
    damage += ("torn",) * torn
    if samples:
        return _index(samples, damage, version)
    if damage:
        return empty_index("torn" if torn else kind_of(head) or "nottar", version)
    return empty_index("hollow" if head.strip(b"\0") or BLOCK <= length <= LEAST else "empty", version)


def empty_index(reason: str, version: tuple[int, int]) -> Index:
    """The index of a shard that holds nothing, and why."""
    return _index([], (reason,), version)


def _index(samples: list[Sample], damage: tuple[str, ...], stamp: tuple[int, int]) -> Index:
    judged = [(s, s.reason()) for s in samples]
    pairs = [s for s, reason in judged if reason is None]
    images = pairs + [s for s, reason in judged if reason in UNCAPTIONED]
    bad = [(s, reason) for s, reason in judged if reason is not None and reason not in UNCAPTIONED]
    keys = [s.key for s in images] + [s.key for s, _ in bad]
    ends = np.cumsum([len(key) for key in keys], dtype=np.uint32)
    rows, bads = np.zeros(len(images), ROW), np.zeros(len(bad), BAD)
    for slot in SLOTS:
        places = np.array([s.members.get(slot, (0, 0)) for s in images], np.uint64).reshape(-1, 2)
        rows[f"{slot}_at"], rows[f"{slot}_size"] = places.T
    rows["key_end"], bads["key_end"] = ends[: len(rows)], ends[len(rows) :]
    bads["reason"] = [WORDS.index(reason) for _, reason in bad]
    return Index(rows, bads, np.frombuffer(b"".join(keys), np.uint8), damage, len(pairs), stamp)


def exclude(index: Index, failures: dict[int, str]) -> Index:
    """`index` with the rows of `failures` (row -> reason) moved to its bad samples."""
    order = [r for r in range(len(index.rows)) if r not in failures]
    keys = [bytes(index.keys[a:b]) for a, b in _spans(index.rows["key_end"], 0)]
    old = [bytes(index.keys[a:b]) for a, b in _spans(index.bad["key_end"], sum(map(len, keys)))]
    gone = sorted(failures)
    kept, bad = index.rows[order].copy(), np.zeros(len(index.bad) + len(gone), BAD)
    names = [keys[r] for r in order] + old + [keys[r] for r in gone]
    ends = np.cumsum([len(n) for n in names], dtype=np.uint32)
    kept["key_end"], bad["key_end"] = ends[: len(kept)], ends[len(kept) :]
    bad["reason"] = np.append(index.bad["reason"], [WORDS.index(failures[r]) for r in gone])
    pairs = index.pairs - sum(r < index.pairs for r in gone)
    return index._replace(rows=kept, bad=bad, keys=np.frombuffer(b"".join(names), np.uint8), pairs=pairs)


def save_index(index: Index, path: Path) -> None:
    """Write `index` at `path` in one step, so that no reader ever sees a part of it."""
    damage = np.array([WORDS.index(d) for d in index.damage], "<u4")
    body = [part.tobytes() for part in (index.rows, index.bad, damage, index.keys)]
    counts = index.pairs, len(index.rows), len(index.bad), len(damage), len(index.keys)
    head = HEADER.pack(MAGIC, VERSION, *index.stamp, *counts, digest_of(*body))
    write_whole(path, (head, digest_of(head), *body))


class _Head(NamedTuple):
    summary: Summary
    keys: int
    digest: bytes


def read_summary(path: Path) -> Summary | None:
    """The head of the index file at `path`; None where it is absent, of another version or not whole."""
    head = _read_head(path)
    return head and head.summary


def _read_head(path: Path) -> _Head | None:
    try:
        with open(path, "rb") as file:
            head, seal, length = file.read(HEADER.size), file.read(SIZE), os.fstat(file.fileno()).st_size
        magic, version, size, mtime, pairs, images, bad, damages, keys, body = HEADER.unpack(head)
    except (FileNotFoundError, struct.error):
        return None
    whole = HEADER.size + SIZE + images * ROW.itemsize + bad * BAD.itemsize + 4 * damages + keys
    if magic != MAGIC or version != VERSION or seal != digest_of(head) or length != whole:
        return None
    return _Head(Summary((size, mtime), pairs, images, bad, damages), keys, body)


def load_index(path: Path) -> Index:
    """The index file at `path`. Raises DamagedIndex if it is not what was written."""
    head = _read_head(path)
    body = path.read_bytes()[HEADER.size + SIZE :] if head else b""
    if head is None or digest_of(body) != head.digest:
        raise DamagedIndex(f"{path} is damaged, or of another version; `jaxvl data index --rebuild` makes it anew")
    data, at, parts = np.frombuffer(body, np.uint8), 0, []
    for dtype, count in ((ROW, head.summary.images), (BAD, head.summary.bad), (np.dtype("<u4"), head.summary.damages)):
        parts.append(data[at : at + count * dtype.itemsize].view(dtype))
        at += count * dtype.itemsize
    rows, bad, damage = parts
    return Index(rows, bad, data[at:], tuple(WORDS[d] for d in damage), head.summary.pairs, head.summary.stamp)


def _spans(ends: np.ndarray, start: int) -> list[tuple[int, int]]:
    bounds = [start, *ends.tolist()]
    return list(itertools.pairwise(bounds))


def _text(key: np.ndarray) -> str:
    return bytes(key).decode("utf-8", "backslashreplace")
