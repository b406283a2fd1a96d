"""What a set of samples is to the stream: names, counts, and a way to read one row."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data.cache import Cache
from jaxvl.data.text import Cleaning


class Record(NamedTuple):
    """One sample: encoded image, cleaned captions, the main one first, and the fields of KEY.json and KEY.cls."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    meta: dict[str, Any]


class Bad(NamedTuple):
    """A sample that cannot be used, or with an empty key a fault of the shard; `reason` is a word of reasons.py."""

    shard: str
    key: str
    reason: str


class Want(NamedTuple):
    """What of a sample is read. captions: one without is bad; alternates: further captions too; fields: its meta."""

    image: bool = True
    captions: bool = True
    alternates: bool = True
    fields: bool = True


class Place(NamedTuple):
    """How a source is opened.

    indexes: folder of the shards' indexes, built anew with `rebuild`. captions: whether samples need one.
    caption_field: the field that has them, "" for the usual place. cleaning: what becomes of them.
    """

    indexes: str
    cache: Cache
    captions: bool = True
    caption_field: str = ""
    rebuild: bool = False
    cleaning: Cleaning = Cleaning()


class Source(NamedTuple):
    """Shards and how to read them. `version` stands for all their contents.

    counts: int64 [shard] usable samples, bad: int64 [shard] samples known to be bad. read(shard, row, want) gives one
    sample. known() gives the samples known to be bad and the faults of shards. fetch(shard) brings a remote shard
    near. faults: words of reasons.py, each with the shards that it is true of as a whole.
    """

    name: str
    version: str
    shards: tuple[str, ...]
    counts: np.ndarray
    bad: np.ndarray
    read: Callable[[int, int, Want], Record | Bad]
    known: Callable[[], Iterator[Bad]]
    fetch: Callable[[int], None] | None = None
    faults: tuple[tuple[str, tuple[int, ...]], ...] = ()
