"""From sample numbers to arrays: read, decode, tokenise; a function of the numbers and the seed."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from jaxvl.data import decode, keyed
from jaxvl.data.dataset import OWN, DataOptions, Dataset, decode_options, read, rows_of, source_of
from jaxvl.data.guard import BadData, table
from jaxvl.data.labels import label_of
from jaxvl.data.places import Places, sample_places
from jaxvl.data.source import Bad, Record, Want

CROPS, CAPTION, SECOND = 5, 6, 7  # what a key is for; order.py and mixing.py have the others
SIDES = re.compile(r"\b(?:left|right)\b", re.IGNORECASE)  # a caption with one of these is wrong of the mirrored image
FIELDS = {"label": "unlabelled", "id": "unidentified"}  # numbers from fields of the samples, and why a sample without one is bad
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
        places = lambda names: {name: place for place, name in enumerate(names)}
        asked = {"label": (dataset.options.label, dataset.classes), "id": (dataset.options.id, dataset.ids)}
        self.fields = {k: (field, places(names)) for k, (field, names) in asked.items() if field}

    def load(self, shard: int, row: int, pixels: Callable[[bytes], Any]) -> tuple[Record, Any, dict[str, int]] | Bad:
        """A sample with its decoded image and the numbers asked for (its label, its id), or why there is none."""
        record = self.read(shard, row)
        if isinstance(record, Bad):
            return record
        numbers: dict[str, int | None] = {k: label_of(record.meta, *wanted) for k, wanted in self.fields.items() if wanted[0] != OWN}
        reason = next((FIELDS[k] for k, value in numbers.items() if value is None), "")
        if self.dataset.options.id == OWN:
            numbers["id"] = int(self.dataset.starts[shard]) + row
        if not reason:
            try:
                return record, pixels(record.image), cast(dict[str, int], numbers)
            except decode.Undecodable as error:
                reason = error.reason
        source, shard = source_of(self.dataset, shard)
        return Bad(source.shards[shard], record.key, reason)

    def read(self, shard: int, row: int) -> Record | Bad:
        """What is wanted of a sample."""
        return read(self.dataset, shard, row, self.want)

    def arrays(self, number: int, size: int) -> dict[str, np.ndarray]:
        """Zeros for images of `size` pixels a side, and the labels and ids if asked for, of so many samples."""
        return {"image": np.zeros((number, size, size, 3), np.uint8)} | {k: np.zeros(number, np.int32) for k in self.fields}


class Train(Prepare):
    """For training: random crops, a choice of captions, substitutes for bad samples.

    views: crops of each image, 1 or 2, the second as "image_aug" (with "frame_aug"). sides: deliver "sided", whether
    the caption says left or right.
    """

    def __init__(self, dataset: Dataset, tokenizer: Any, seed: int, views: int = 1, sides: bool = False) -> None:
        options = dataset.options
        alternates = options.captions in ("random", "longest")
        super().__init__(
            dataset,
            tokenizer,
            Want(captions=options.captions != "none", alternates=alternates, fields=_reads_fields(options)),
        )
        self.seed, self.views, self.sides = seed, views, sides and self.want.captions
        self.on_device = options.resize == "device"

    @functools.cached_property
    def places(self) -> Places:
        return sample_places(self.dataset, self.seed)

    def __call__(self, n: np.ndarray) -> Batch:
        crops = np.stack([keyed.uniforms(keyed.mix(self.seed, what, n), decode.UNIFORMS) for what in (CROPS, SECOND)[: self.views]], 1)
        picks = keyed.uniforms(keyed.mix(self.seed, CAPTION, n), 1)[:, 0]
        shards, rows = self.places.at(n)
        arrays = self.arrays(len(n), decode.canvas_side(self.how) if self.on_device else self.how.size)
        suffixes = ("", "_aug")[: self.views]
        for suffix in suffixes:
            arrays[f"image{suffix}"] = np.zeros_like(arrays["image"])
            if self.on_device:
                arrays[f"frame{suffix}"] = np.zeros((len(n), 6), np.float32)
        ids = np.empty(len(n), np.int64)
        texts: list[str] = []
        bad: list[Bad] = []
        for i in range(len(n)):
            shard, row = int(shards[i]), int(rows[i])
            cut = functools.partial(decode.canvas_views if self.on_device else decode.decode_views, options=self.how, uniforms=crops[i])
            sample = self.load(shard, row, cut)
            for attempt in range(ATTEMPTS):
                if not isinstance(sample, Bad):
                    break
                bad.append(sample)
                shard, row = self.places.replace(int(n[i]), attempt)
                sample = self.load(shard, row, cut)
            if isinstance(sample, Bad):
                raise BadData(f"sample {n[i]:,} and {ATTEMPTS} substitutes for it cannot be used:\n{table([*bad[-ATTEMPTS:], sample])}")
            record, images, numbers = sample
            for suffix, image in zip(suffixes, images, strict=True):
                if self.on_device:
                    arrays[f"image{suffix}"][i], arrays[f"frame{suffix}"][i] = image
                else:
                    arrays[f"image{suffix}"][i] = image
            for k, number in numbers.items():
                arrays[k][i] = number
            ids[i] = self.dataset.starts[shard] + row
            if self.want.captions:
                texts.append(choose(record.captions, self.dataset.options.captions, picks[i]))
        if self.want.captions:
            arrays["tokens"] = self.tokenizer.encode_batch(texts)
        if self.sides:
            arrays["sided"] = np.array([bool(SIDES.search(text)) for text in texts])
        return Batch(arrays, ids, tuple(bad))


class Eval(Prepare):
    """For evaluation: sample numbers are rows of the dataset, bad ones stay empty; at most `most` captions each."""

    def __init__(self, dataset: Dataset, tokenizer: Any, most: int) -> None:
        super().__init__(
            dataset,
            tokenizer,
            Want(captions=dataset.options.captions != "none", alternates=most > 1, fields=_reads_fields(dataset.options)),
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
            record, arrays["image"][i], numbers = sample
            for k, number in numbers.items():
                arrays[k][i] = number
            ids[i], counts[i] = n[i], min(self.most, len(record.captions))
            texts += record.captions[: self.most]
        arrays["valid"] = ids >= 0
        if self.want.captions:
            arrays["captions"] = counts
            arrays["tokens"] = np.zeros((len(n), self.most, self.tokenizer.context_length), np.int32)
            if texts:
                arrays["tokens"][np.arange(self.most) < counts[:, None]] = self.tokenizer.encode_batch(texts)
        return Batch(arrays, ids, tuple(bad))


def _reads_fields(options: DataOptions) -> bool:
    return bool(options.label) or options.id not in ("", OWN)


def choose(captions: Sequence[str], how: str, pick: float) -> str:
    """The caption that data.captions means; `pick` is in [0, 1)."""
    if how == "random":
        return captions[int(pick * len(captions))]
    return max(captions, key=len) if how == "longest" else captions[0]
