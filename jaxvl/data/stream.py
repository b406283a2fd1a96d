"""The stream of batches: decoded, tokenised, in an order that depends on the seed and the sample number alone.

Sample n of a run is the same sample, with the same crop and the same caption, on any number of hosts, worker processes and
threads; so a run resumes exactly from a count, and on another number of hosts its global batches are the same.

A sample found bad when it is decoded is replaced by another one, drawn by a key of (seed, n, attempt), and reported with
the batch. Samples that the index knows to be bad are not in the order at all.
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data import decode, keyed
from jaxvl.data.ahead import fetch_ahead
from jaxvl.data.dataset import (
    DataOptions,
    Dataset,
    captions,
    decode_options,
    open_data,
    read,
    read_samples,
    rows_of,
    source_of,
)
from jaxvl.data.guard import BadData, table, watched
from jaxvl.data.indexing import cores
from jaxvl.data.labels import label_of
from jaxvl.data.mixing import BLOCK, mixture
from jaxvl.data.order import sample_order
from jaxvl.data.source import Bad, Record, Want

__all__ = ["BadData", "Batch", "DataOptions", "Dataset", "captions", "eval_batches", "open_data", "read_samples", "train_batches"]

CROPS, CAPTION = 5, 6  # what a key is for; order.py and mixing.py have the others
ATTEMPTS = 16  # substitutes tried for one bad sample
SHARED_FROM = 1 << 16  # bytes from which an array comes from a worker through shared memory and not through a pipe
ENDLESS = 2**48  # batches; longer than any run


class Batch(NamedTuple):
    """Host arrays by name, each [b, ...]; ids int64 [b], the samples' rows in the dataset; bad, what was met and left out."""

    arrays: dict[str, np.ndarray]
    ids: np.ndarray
    bad: tuple[Bad, ...]


def train_batches(
    dataset: Dataset, tokenizer: Any, *, seed: int, start: int, batch_size: int, rows: tuple[int, int] | None = None
) -> Iterator[Batch]:
    """Endless batches from global sample `start` on: this process's rows [lo, hi) of every global batch of `batch_size`.

    arrays: "image" uint8 [b, S, S, 3]; "tokens" int32 [b, L] unless data.captions is "none"; "label" int32 [b] where data.label
    names a field. b is hi - lo. Close the iterator to stop its threads and processes.
    Raises ValueError for rows outside the batch; from the iterator, BadData when too many samples cannot be used and OSError
    when a shard cannot be read.
    """
    low, high = rows or (0, batch_size)
    if not 0 <= low < high <= batch_size or start < 0:
        raise ValueError(f"rows {low} to {high} of a global batch of {batch_size} from sample {start} are none")
    batches = _batches(dataset.options, _Train(dataset, tokenizer, seed), start, ENDLESS, batch_size, low, high)
    if any(source.fetch for source in dataset.sources):
        batches = fetch_ahead(batches, dataset, sample_places(dataset, seed).near, start, batch_size)
    return watched(batches, dataset.options.max_bad_rate)


def eval_batches(
    dataset: Dataset, tokenizer: Any, *, batch_size: int, rows: tuple[int, int] | None = None, captions: int = 1
) -> Iterator[Batch]:
    """Every usable sample once, in the order of the index: this process's rows [lo, hi) of every global batch.

    arrays: "image" uint8 [b, S, S, 3], the centre (data.fit); "valid" bool [b]; "tokens" int32 [b, captions, L] and "captions"
    int32 [b], how many of them are real, the main one first, unless data.captions is "none"; "label" int32 [b] where data.label
    names a field. Rows that cannot be used, and those that fill up the last batch, are zero, with valid False and id -1.
    """
    low, high = rows or (0, batch_size)
    if not 0 <= low < high <= batch_size or captions < 1:
        raise ValueError(f"rows {low} to {high} of a global batch of {batch_size} with {captions} captions are none")
    batches = -(-len(dataset) // batch_size)
    return _batches(dataset.options, _Eval(dataset, tokenizer, captions), 0, batches, batch_size, low, high)


class _Prepare:
    """Sample numbers to a Batch of prepared samples; a copy of it works in every worker."""

    def __init__(self, dataset: Dataset, tokenizer: Any, want: Want) -> None:
        self.dataset, self.tokenizer, self.want = dataset, tokenizer, want
        self.how = decode_options(dataset.options)
        self.classes = {name: place for place, name in enumerate(dataset.classes)}

    def load(self, shard: int, row: int, pixels: Callable[[bytes], np.ndarray]) -> tuple[Record, np.ndarray, int] | Bad:
        """A sample with its decoded image and its label (0 where none is asked for), or why there is none."""
        record = read(self.dataset, shard, row, self.want)
        if isinstance(record, Bad):
            return record
        label: int | None = 0
        if self.dataset.options.label:
            label = label_of(record.meta, self.dataset.options.label, self.classes)
        reason = "unlabelled"
        if label is not None:
            try:
                return record, pixels(record.image), label
            except decode.Undecodable as error:
                reason = error.reason
        source, shard = source_of(self.dataset, shard)
        return Bad(source.shards[shard], record.key, reason)

    def arrays(self, number: int) -> dict[str, np.ndarray]:
        """Zeros for the images, and the labels if asked for, of so many samples."""
        size = self.dataset.options.image_size
        arrays = {"image": np.zeros((number, size, size, 3), np.uint8)}
        return arrays | ({"label": np.zeros(number, np.int32)} if self.dataset.options.label else {})


class _Train(_Prepare):
    def __init__(self, dataset: Dataset, tokenizer: Any, seed: int) -> None:
        options = dataset.options
        alternates = options.captions in ("random", "longest")
        super().__init__(dataset, tokenizer, Want(captions=options.captions != "none", alternates=alternates, fields=bool(options.label)))
        self.seed = seed

    @functools.cached_property
    def places(self) -> "Places":
        return sample_places(self.dataset, self.seed)

    def __call__(self, n: np.ndarray) -> Batch:
        crops = keyed.uniforms(keyed.mix(self.seed, CROPS, n), decode.UNIFORMS)
        picks = keyed.uniforms(keyed.mix(self.seed, CAPTION, n), 1)[:, 0]
        shards, rows = self.places.at(n)
        arrays, ids, texts, bad = self.arrays(len(n)), np.empty(len(n), np.int64), [], []
        for i in range(len(n)):
            shard, row, crop = int(shards[i]), int(rows[i]), crops[i]
            sample = self.load(shard, row, lambda image, crop=crop: decode.decode_train(image, self.how, crop))
            for attempt in range(ATTEMPTS):
                if not isinstance(sample, Bad):
                    break
                bad.append(sample)
                shard, row = self.places.replace(int(n[i]), attempt)
                sample = self.load(shard, row, lambda image, crop=crop: decode.decode_train(image, self.how, crop))
            if isinstance(sample, Bad):
                raise BadData(f"sample {n[i]:,} and {ATTEMPTS} substitutes for it cannot be used:\n{table([*bad[-ATTEMPTS:], sample])}")
            record, arrays["image"][i], label = sample
            if "label" in arrays:
                arrays["label"][i] = label
            ids[i] = self.dataset.starts[shard] + row
            if self.want.captions:
                texts.append(_choose(record.captions, self.dataset.options.captions, picks[i]))
        if self.want.captions:
            arrays["tokens"] = self.tokenizer.encode_batch(texts)
        return Batch(arrays, ids, tuple(bad))


class _Eval(_Prepare):
    def __init__(self, dataset: Dataset, tokenizer: Any, most: int) -> None:
        super().__init__(dataset, tokenizer, Want(captions=dataset.options.captions != "none", alternates=most > 1, fields=bool(dataset.options.label)))
        self.most = most

    def __call__(self, n: np.ndarray) -> Batch:
        arrays, ids, counts = self.arrays(len(n)), np.full(len(n), -1), np.zeros(len(n), np.int32)
        texts, bad = [], []
        for i, (shard, row) in enumerate(zip(*rows_of(self.dataset, n[n < len(self.dataset)]), strict=True)):
            sample = self.load(int(shard), int(row), lambda image: decode.decode_eval(image, self.how))
            if isinstance(sample, Bad):
                bad.append(sample)
                continue
            record, arrays["image"][i], label = sample
            if "label" in arrays:
                arrays["label"][i] = label
            ids[i], counts[i] = n[i], min(self.most, len(record.captions))
            texts += record.captions[: self.most]
        arrays["valid"] = ids >= 0
        if self.want.captions:
            arrays["captions"] = counts
            arrays["tokens"] = np.zeros((len(n), self.most, self.tokenizer.context_length), np.int32)
            if texts:
                arrays["tokens"][np.arange(self.most) < counts[:, None]] = self.tokenizer.encode_batch(texts)
        return Batch(arrays, ids, tuple(bad))


def _choose(captions: Sequence[str], how: str, pick: float) -> str:
    if how == "random":
        return captions[int(pick * len(captions))]
    return max(captions, key=len) if how == "longest" else captions[0]


class Places(NamedTuple):
    """at(n int64 [b]) -> shard, row of the dataset, int64 [b] each; replace(n, attempt) -> those of a substitute.

    near(n) -> the shards that samples soon after n are drawn from.
    """

    at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    replace: Callable[[int, int], tuple[int, int]]
    near: Callable[[int], tuple[int, ...]]


def sample_places(dataset: Dataset, seed: int) -> Places:
    """Where sample n lies: the mixture picks a part of the dataset, the part's own order the shard and the row."""
    part_of = mixture(seed, dataset.quota)
    firsts = np.array([first for first, _ in dataset.parts])
    orders = [
        sample_order(int(keyed.mix(seed, p)[0]), dataset.counts[first:last], dataset.options.group_shards)
        for p, (first, last) in enumerate(dataset.parts)
    ]

    def at(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part, m = part_of(n)
        shard, row = np.empty_like(n), np.empty_like(n)
        for p in np.unique(part):
            here = part == p
            shard[here], row[here] = orders[p].at(m[here])
        return shard + firsts[part], row

    def replace(n: int, attempt: int) -> tuple[int, int]:
        part, m = (int(x[0]) for x in part_of(np.array([n])))
        shard, row = orders[part].replace(m, attempt)
        return shard + int(firsts[part]), row

    def near(n: int) -> tuple[int, ...]:
        shards: list[int] = []
        for order, first, quota in zip(orders, firsts, dataset.quota, strict=True):
            group, after = order.group(n // BLOCK * quota)
            shards += (int(first + s) for s in (*group, *order.group(after)[0]))
        return tuple(shards)

    return Places(at, replace, near)


class _Pieces:
    """Element i is piece i % pieces of rows [low, high) of batch i // pieces, whoever asks for it."""

    def __init__(self, prepare: _Prepare, start: int, batches: int, batch_size: int, low: int, high: int, pieces: int) -> None:
        self.prepare, self.start, self.batches, self.batch_size = prepare, start, batches, batch_size
        self.low, self.rows, self.pieces = low, high - low, pieces

    def __len__(self) -> int:
        return self.batches * self.pieces

    def __getitem__(self, i: int) -> Batch:
        batch, piece = divmod(i, self.pieces)
        first = self.start + batch * self.batch_size + self.low
        return self.prepare(np.arange(first + piece * self.rows // self.pieces, first + (piece + 1) * self.rows // self.pieces))


def _batches(
    options: DataOptions, prepare: _Prepare, start: int, batches: int, batch_size: int, low: int, high: int
) -> Iterator[Batch]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # workers read grain's flags, which only a program that starts through absl has parsed
    pieces = -(-(high - low) // options.chunk)
    workers = options.workers if options.workers >= 0 else cores() // 4 if cores() >= 8 else 0
    threads = options.threads or (4 if workers else cores())
    ahead = -(-options.prefetch * pieces // max(workers, 1))
    pipeline = grain.MapDataset.source(_Pieces(prepare, start, batches, batch_size, low, high, pieces))
    pipeline = pipeline.to_iter_dataset(grain.ReadOptions(threads, max(ahead, threads)))
    if workers:
        pipeline = pipeline.mp_prefetch(grain.MultiprocessingOptions(workers, ahead))
        shared = grain.experimental.DatasetOptions(min_shm_size=SHARED_FROM)
        pipeline = grain.experimental.WithOptionsIterDataset(pipeline, shared)
    with contextlib.closing(iter(pipeline)) as chunks:
        for _ in range(batches):
            yield _join([next(chunks) for _ in range(pieces)])
    del chunks, pipeline
    gc.collect()  # grain's iterators are cycles that hold shared memory, which would outlive this process


def _join(parts: list[Batch]) -> Batch:
    arrays = {k: np.concatenate([p.arrays[k] for p in parts]) for k in parts[0].arrays}
    return Batch(arrays, np.concatenate([p.ids for p in parts]), tuple(b for p in parts for b in p.bad))
