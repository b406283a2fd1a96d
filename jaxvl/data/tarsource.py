"""Samples of indexed tar shards: a row of the index to the bytes it points at."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data.cache import Cache, digest, is_remote, open_shard, opened
from jaxvl.data.indexing import ensure_indexes, index_path, mend
from jaxvl.data.reasons import NOTES
from jaxvl.data.source import Bad, Place, Record, Source, Want
from jaxvl.data.tarindex import DamagedIndex, Index, Summary, load_index
from jaxvl.data.text import INVISIBLE, LONGEST, Cleaning, Uncaptioned, clean_caption

OPEN_SHARDS = 64  # of a process; a few groups of the order


class TarFiles(NamedTuple):
    """Shards with their index files; `faulty` are those whose index has anything bad. text: a sample needs KEY.txt.

    field: the field of KEY.json that has the captions, "" for KEY.txt with "captions" as further ones.
    """

    shards: tuple[str, ...]
    indexes: tuple[str, ...]
    summaries: tuple[Summary, ...]
    faulty: tuple[int, ...]
    text: bool
    field: str
    cache: Cache
    cleaning: Cleaning

    def at(self, shard: int) -> tuple[str, str, Summary, Cache]:
        """Name, index file and summary of a shard, and the cache."""
        return self.shards[shard], self.indexes[shard], self.summaries[shard], self.cache


def tar_source(name: str, shards: Sequence[str], place: Place) -> Source:
    """The source of these tar shards."""
    index, cache = place.indexes, place.cache
    summaries = ensure_indexes(shards, index, cache, place.rebuild)
    text = place.captions and not place.caption_field
    counts = np.array([s.pairs if text else s.images for s in summaries], np.int64)
    bad = np.array([s.images + s.bad for s in summaries], np.int64) - counts
    faulty = tuple(i for i, s in enumerate(summaries) if bad[i] or s.damages)
    files = TarFiles(
        tuple(shards),
        tuple(index_path(s, index) for s in shards),
        tuple(summaries),
        faulty,
        text,
        place.caption_field,
        cache,
        place.cleaning,
    )
    fetch = functools.partial(_fetch, files) if any(map(is_remote, shards)) else None
    version = digest(repr([(shard, s.stamp, s.images) for shard, s in zip(shards, summaries, strict=True)]))
    return Source(
        name,
        version,
        files.shards,
        counts,
        bad,
        functools.partial(_read, files),
        functools.partial(_known, files),
        fetch,
        _faults(files),
    )


def _faults(files: TarFiles) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found: dict[str, list[int]] = {}
    for shard in files.faulty:
        if files.summaries[shard].damages:
            for word in set(_index(*files.at(shard)).damage):
                found.setdefault(word, []).append(shard)
    return tuple((word, tuple(shards)) for word, shards in sorted(found.items()))


class _Cut(OSError):
    """An open shard is shorter than it was."""


class _Shard:
    """An open shard and its index; the file is closed when the last reader lets go."""

    def __init__(self, fd: int, index: Index) -> None:
        self.fd, self.index = fd, index

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound here: at the end of the process `os` may be gone
        close(self.fd)


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open(name: str, path: str, summary: Summary, cache: Cache) -> _Shard:
    fd, version, _ = opened(name, cache)
    try:
        if version != summary.stamp:
            raise OSError(f"shard {name} has changed since it was indexed; start again, and it is indexed anew")
        return _Shard(fd, _index(name, path, summary, cache))
    except BaseException:
        os.close(fd)
        raise


def _index(name: str, path: str, summary: Summary, cache: Cache) -> Index:
    """The index of a shard, built again where its file turns out to be damaged."""
    try:
        index = load_index(Path(path))
    except DamagedIndex:
        mend(name, summary.stamp, Path(path), cache)
        index = load_index(Path(path))
    if index.summary != summary:
        raise OSError(f"the index of shard {name} has been built anew since the data were opened; open them again")
    return index


def _fetch(files: TarFiles, shard: int) -> None:
    os.close(open_shard(files.shards[shard], files.cache))


def _read(files: TarFiles, shard: int, row: int, want: Want) -> Record | Bad:
    try:
        return _record(files, shard, row, want)
    except _Cut:
        _open.cache_clear()  # a copy in the cache that was cut is fetched again when it is opened
        return _record(files, shard, row, want)


def _record(files: TarFiles, shard: int, row: int, want: Want) -> Record | Bad:
    name = files.shards[shard]
    opened = _open(*files.at(shard))
    image_at, text_at, json_at, cls_at, image_size, text_size, json_size, cls_size, _ = opened.index.rows[row].item()
    key = opened.index.key(row)

    def member(at: int, size: int) -> bytes:
        data = os.pread(opened.fd, size, at)
        if len(data) != size:
            raise _Cut(f"shard {name} ends inside sample {key!r}: it has changed since it was indexed")
        return data

    meta: dict[str, Any] = {}
    if json_at and (want.fields or (want.captions and (want.alternates or files.field))):
        meta = _fields(member(json_at, json_size))
    if cls_at and want.fields:
        with contextlib.suppress(UnicodeDecodeError):  # what cannot be read names no class
            meta["cls"] = " ".join(member(cls_at, cls_size).decode().translate(INVISIBLE).split())
    try:
        main = [clean_caption(member(text_at, min(text_size, LONGEST)), files.cleaning)] if want.captions and not files.field else []
    except Uncaptioned as error:
        return Bad(name, key, error.reason)
    others = _good(meta.get(files.field or "captions"), files.cleaning) if want.captions and (want.alternates or files.field) else []
    captions = tuple(dict.fromkeys(main + others))
    if want.captions and not captions:
        return Bad(name, key, "nocaption")
    return Record(key, member(image_at, image_size) if want.image else b"", captions, meta)


def _good(value: Any, cleaning: Cleaning) -> list[str]:
    """The captions in a field, a text or a list of texts, that can be used."""
    good = []
    for caption in value if isinstance(value, list) else [value]:
        if isinstance(caption, str):
            with contextlib.suppress(Uncaptioned):
                good.append(clean_caption(caption, cleaning))
    return good


def _fields(data: bytes) -> dict[str, Any]:
    """The json of a sample; {} where it is none, since image and text may be whole."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _known(files: TarFiles) -> Iterator[Bad]:
    for shard in files.faulty:
        index = _index(*files.at(shard))
        found = [("", reason) for reason in index.damage if reason not in NOTES] + index.bad_keys()
        if files.text:
            found += [
                (index.key(row), "blank" if index.rows["text_at"][row] else "nocaption") for row in range(index.pairs, len(index.rows))
            ]
        yield from (Bad(files.shards[shard], key, reason) for key, reason in found)
