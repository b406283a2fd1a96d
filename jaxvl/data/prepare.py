"""From sample numbers to arrays: read, decode, tokenise; a function of the numbers and the seed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data import decode, keyed
from jaxvl.data.dataset import Dataset, decode_options, read, rows_of, source_of
from jaxvl.data.guard import BadData, table
from jaxvl.data.labels import label_of
from jaxvl.data.places import Places, sample_places
from jaxvl.data.source import Bad, Record, Want

CROPS, CAPTION = 5, 6  # what a key is for; order.py and mixing.py have the others
ATTEMPTS = 16  # substitutes tried for one bad sample


class Batch(NamedTuple):
    """Host arrays by name, each [b, ...]; ids int64 [b], rows of the dataset; bad, what was met and left out."""

    arrays: dict[str, np.ndarray]
    ids: np.ndarray
    bad: tuple[Bad, ...]


class Prepare:
    """Sample numbers to a Batch of prepared samples; a copy of it works in every worker."""

    def __init__(self, dataset: Dataset, tokenizer: Any, want: Want) -> None:
        self.dataset, self.tokenizer, self.want = dataset, tokenizer, want
        self.how = decode_options(dataset.options)
        self.classes = {name: place for place, name in enumerate(dataset.classes)}

    def load(self, shard: int, row: int, pixels: Callable[[bytes], Any]) -> tuple[Record, Any, int] | Bad:
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

    def arrays(self, number: int, size: int) -> dict[str, np.ndarray]:
        """Zeros for images of `size` pixels a side, and the labels if asked for, of so many samples."""
        arrays = {"image": np.zeros((number, size, size, 3), np.uint8)}
        return arrays | ({"label": np.zeros(number, np.int32)} if self.dataset.options.label else {})


class Train(Prepare):
    """For training: random crops, a choice of captions, substitutes for bad samples."""

    def __init__(self, dataset: Dataset, tokenizer: Any, seed: int) -> None:
        options = dataset.options
        alternates = options.captions in ("random", "longest")
        super().__init__(
            dataset,
            tokenizer,
            Want(captions=options.captions != "none", alternates=alternates, fields=bool(options.label)),
        )
        self.seed = seed
        self.on_device = options.resize == "device"

    @functools.cached_property
    def places(self) -> Places:
        return sample_places(self.dataset, self.seed)

    def __call__(self, n: np.ndarray) -> Batch:
        crops = keyed.uniforms(keyed.mix(self.seed, CROPS, n), decode.UNIFORMS)
        picks = keyed.uniforms(keyed.mix(self.seed, CAPTION, n), 1)[:, 0]
        shards, rows = self.places.at(n)
        arrays = self.arrays(len(n), decode.canvas_side(self.how) if self.on_device else self.how.size)
        if self.on_device:
            arrays["frame"] = np.zeros((len(n), 6), np.float32)
        ids = np.empty(len(n), np.int64)
        texts: list[str] = []
        bad: list[Bad] = []
        for i in range(len(n)):
            shard, row = int(shards[i]), int(rows[i])
            cut = functools.partial(decode.decode_canvas if self.on_device else decode.decode_train, options=self.how, uniforms=crops[i])
            sample = self.load(shard, row, cut)
            for attempt in range(ATTEMPTS):
                if not isinstance(sample, Bad):
                    break
                bad.append(sample)
                shard, row = self.places.replace(int(n[i]), attempt)
                sample = self.load(shard, row, cut)
            if isinstance(sample, Bad):
                raise BadData(
                    f"sample {n[i]:,} and {ATTEMPTS} substitutes for it cannot be used:\n"
                    f"{table([*bad[-ATTEMPTS:], sample])}"
                )
            record, image, label = sample
            if self.on_device:
                arrays["image"][i], arrays["frame"][i] = image
            else:
                arrays["image"][i] = image
            if "label" in arrays:
                arrays["label"][i] = label
            ids[i] = self.dataset.starts[shard] + row
            if self.want.captions:
                texts.append(_choose(record.captions, self.dataset.options.captions, picks[i]))
        if self.want.captions:
            arrays["tokens"] = self.tokenizer.encode_batch(texts)
        return Batch(arrays, ids, tuple(bad))


class Eval(Prepare):
    """For evaluation: sample numbers are rows of the dataset, bad ones stay empty; at most `most` captions each."""

    def __init__(self, dataset: Dataset, tokenizer: Any, most: int) -> None:
        super().__init__(
            dataset,
            tokenizer,
            Want(captions=dataset.options.captions != "none", alternates=most > 1, fields=bool(dataset.options.label)),
        )
        self.most = most

    def __call__(self, n: np.ndarray) -> Batch:
        arrays, ids, counts = self.arrays(len(n), self.how.size), np.full(len(n), -1), np.zeros(len(n), np.int32)
        texts: list[str] = []
        bad: list[Bad] = []
        cut = functools.partial(decode.decode_eval, options=self.how)
        for i, (shard, row) in enumerate(zip(*rows_of(self.dataset, n[n < len(self.dataset)]), strict=True)):
            sample = self.load(int(shard), int(row), cut)
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
