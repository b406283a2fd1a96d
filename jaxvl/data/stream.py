"""The stream of batches: decoded, tokenised, in an order that depends on the seed and the sample number alone.

Sample n of a run is the same sample, with the same crop and the same caption, on any number of hosts, worker
processes and threads; so a run resumes exactly from a count, and on another number of hosts its global batches are
the same.

A sample found bad when it is decoded is replaced by another one, drawn by a key of (seed, n, attempt), and reported
with the batch. Samples that the index knows to be bad are not in the order at all.
"""

import functools
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data.ahead import fetch_ahead
from jaxvl.data.composed import Queries, Trios
from jaxvl.data.dataset import DataOptions, Dataset, open_data, read_samples, rows_of
from jaxvl.data.guard import BadData, watched
from jaxvl.data.indexing import cores
from jaxvl.data.places import sample_places
from jaxvl.data.prepare import Batch, Eval, Train
from jaxvl.data.source import Bad, Want

__all__ = [
    "Bad",
    "BadData",
    "Batch",
    "DataOptions",
    "Dataset",
    "Want",
    "eval_batches",
    "open_data",
    "query_batches",
    "read_samples",
    "train_batches",
]

SHARED_FROM = 1 << 16  # bytes from which an array comes from a worker through shared memory and not through a pipe
ENDLESS = 2**48  # batches; longer than any run


def train_batches(
    dataset: Dataset,
    tokenizer: Any,
    *,
    seed: int,
    start: int,
    batch_size: int,
    rows: tuple[int, int] | None = None,
    views: int = 1,
    sides: bool = False,
) -> Generator[Batch]:
    """Endless batches from global sample `start` on: this process's rows [lo, hi) of each global batch.

    arrays: "image" uint8 [b, S, S, 3], with `views` 2 "image_aug" too, another crop; "tokens" int32 [b, L] unless
    data.captions is "none"; "label" and "id" int32 [b] where data.label and data.id ask for them; with `sides` "sided"
    bool [b], whether the caption says left or right. With data.triplets the samples are triplets, see composed.Trios. b is hi - lo. Close the iterator to stop its threads and processes. Raises ValueError
    for rows outside the batch; from the iterator, BadData when too many samples cannot be used and OSError when a
    shard cannot be read.
    """
    low, high = rows or (0, batch_size)
    if not 0 <= low < high <= batch_size or start < 0:
        raise ValueError(f"rows {low} to {high} of a global batch of {batch_size} from sample {start} are none")
    if dataset.options.per_class and batch_size % dataset.options.per_class:
        raise ValueError(f"data.per_class is {dataset.options.per_class}; it must divide the batch of {batch_size}")
    prepare: Any = Trios(dataset, tokenizer, seed) if dataset.triplets else Train(dataset, tokenizer, seed, views, sides)
    near = (
        (lambda _: range(len(dataset.counts))) if dataset.triplets else sample_places(dataset, seed).near
    )  # a triplet's images may be in any shard
    batches = _batches(dataset.options, prepare, _Rows(start, ENDLESS, batch_size, low, high))
    batches = fetch_ahead(batches, dataset, near, start, batch_size)
    return watched(batches, dataset.options.max_bad_rate)


def eval_batches(
    dataset: Dataset, tokenizer: Any, *, batch_size: int, rows: tuple[int, int] | None = None, captions: int = 1
) -> Generator[Batch]:
    """Every usable sample once, in the order of the index: this process's rows [lo, hi) of every global batch.

    arrays: "image" uint8 [b, S, S, 3], the centre (data.fit); "valid" bool [b]; "tokens" int32 [b, captions, L] and
    "captions" int32 [b], how many of them are real, the main one first, unless data.captions is "none"; "label" and
    "id" int32 [b] where data.label and data.id ask for them. Rows that cannot be used, and those that fill up the last batch, are zero,
    with valid False and id -1.
    """
    low, high = rows or (0, batch_size)
    if not 0 <= low < high <= batch_size or captions < 1:
        raise ValueError(f"rows {low} to {high} of a global batch of {batch_size} with {captions} captions are none")
    asked = _Rows(0, -(-len(dataset) // batch_size), batch_size, low, high)
    batches = _batches(dataset.options, Eval(dataset, tokenizer, captions), asked)

    def near(n: int) -> range:
        first, last = rows_of(dataset, np.array([n, min(n + batch_size, len(dataset) - 1)]))[0]
        return range(first, min(last + 2, len(dataset.counts)))

    return fetch_ahead(batches, dataset, near, 0, batch_size)


def query_batches(
    dataset: Dataset, tokenizer: Any, images: np.ndarray, texts: list[str], *, batch_size: int, rows: tuple[int, int] | None = None
) -> Generator[Batch]:
    """Composed queries in order, image `images[i]` (an id) with text i: this process's rows [lo, hi) of every global batch.

    arrays: see composed.Queries; rows that cannot be used and those that fill up the last batch have valid False.
    """
    low, high = rows or (0, batch_size)
    asked = _Rows(0, -(-len(images) // batch_size), batch_size, low, high)
    batches = _batches(dataset.options, Queries(dataset, tokenizer, images, texts), asked)
    return fetch_ahead(batches, dataset, lambda _: range(len(dataset.counts)), 0, batch_size)


class _Rows(NamedTuple):
    """Rows [low, high) of each of `batches` global batches from sample `start` on."""

    start: int
    batches: int
    batch_size: int
    low: int
    high: int


class _Pieces:
    """Element i is piece i % pieces of the rows of batch i // pieces, whoever asks for it."""

    def __init__(self, prepare: Callable[[np.ndarray], Batch], rows: _Rows, pieces: int) -> None:
        self.prepare, self.rows, self.pieces = prepare, rows, pieces

    def __len__(self) -> int:
        return self.rows.batches * self.pieces

    def __getitem__(self, i: int) -> Batch:
        start, _, batch_size, low, high = self.rows
        batch, piece = divmod(i, self.pieces)
        first, last = ((high - low) * p // self.pieces for p in (piece, piece + 1))
        return self.prepare(np.arange(first, last) + start + batch * batch_size + low)


def _batches(options: DataOptions, prepare: Callable[[np.ndarray], Batch], rows: _Rows) -> Generator[Batch]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # workers read grain's flags, which only a program begun through absl has parsed
    pieces = -(-(rows.high - rows.low) // options.chunk)
    workers = options.workers if options.workers >= 0 else cores() // 4 if cores() >= 8 else 0
    threads = options.threads or (4 if workers else cores())
    ahead = -(-options.prefetch * pieces // max(workers, 1))
    pipeline = grain.MapDataset.source(_Pieces(prepare, rows, pieces))
    pipeline = pipeline.to_iter_dataset(grain.ReadOptions(threads, max(ahead, threads)))
    if workers:
        pipeline = pipeline.mp_prefetch(grain.MultiprocessingOptions(workers, ahead), functools.partial(_begin_worker, os.getpid()))
        shared = grain.experimental.DatasetOptions(min_shm_size=SHARED_FROM)
        pipeline = grain.experimental.WithOptionsIterDataset(pipeline, shared)
    chunks = iter(pipeline)
    try:
        for _ in range(rows.batches):
            yield _join([next(chunks) for _ in range(pieces)])
    finally:
        chunks.close()
        if workers:
            del chunks, pipeline
            gc.collect()  # grain's iterators are cycles that hold shared memory, which would outlive this process


def _begin_worker(parent: int, number: int, of: int) -> None:
    """Leave signals to the parent, which saves on SIGTERM and still needs batches then, and do not outlive it."""
    del number, of
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _join(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    arrays = {k: np.concatenate([p.arrays[k] for p in parts]) for k in parts[0].arrays}
    return Batch(arrays, np.concatenate([p.ids for p in parts]), tuple(b for p in parts for b in p.bad))
