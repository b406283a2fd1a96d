"""From sample numbers to triplets of arrays, for training and as queries; a function of the numbers and the seed.

Sample n of a run is triplet m of epoch n // N by a keyed permutation of all N of them, so the order contract of the stream holds:
the same reference, target, text, crops and captions on any number of hosts, workers and threads.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxvl.data import decode, keyed
from jaxvl.data.dataset import Dataset, read, rows_of
from jaxvl.data.guard import BadData, table
from jaxvl.data.order import Order, sample_order
from jaxvl.data.prepare import ATTEMPTS, CAPTION, CROPS, SECOND, Batch, Prepare, choose
from jaxvl.data.source import Bad, Record, Want
from jaxvl.data.triplets import LANES, Triplets

TRIPLET = 8  # what a key is for; prepare.py, order.py and mixing.py have the others
UNCAPTIONED = ("nocaption", "blank", "undecodable")


class Trios(Prepare):
    """For training: "image" and "tokens" of the target, "image_reference" and "tokens_reference", and "tokens_modification".

    "id" and "id_reference" int32 [b] are the images' places in the dataset. An image in no triplet is a target whose reference is
    zero with id -1. A text that is not there is a row of padding.
    """

    def __init__(self, dataset: Dataset, tokenizer: Any, seed: int) -> None:
        how = dataset.options.captions
        super().__init__(dataset, tokenizer, Want(captions=how != "none", alternates=how in ("random", "longest"), fields=False))
        self.fields = {}
        self.seed, self.on_device = seed, dataset.options.resize == "device"

    @functools.cached_property
    def order(self) -> Order:
        return sample_order(self.seed, np.array([self.dataset.epoch]), 0)

    @property
    def triplets(self) -> Triplets:
        assert self.dataset.triplets is not None
        return self.dataset.triplets

    def __call__(self, n: np.ndarray) -> Batch:
        crops = [keyed.uniforms(keyed.mix(self.seed, what, n), decode.UNIFORMS) for what in (CROPS, SECOND)]
        picks = keyed.uniforms(keyed.mix(self.seed, CAPTION, n), 2)
        lanes = keyed.uniforms(keyed.mix(self.seed, TRIPLET, n), LANES)
        places = self.order.at(n)[1]
        arrays = self.arrays(len(n), decode.canvas_side(self.how) if self.on_device else self.how.size)
        arrays |= {
            "id": np.full(len(n), -1, np.int32),
            "id_reference": np.full(len(n), -1, np.int32),
            "image_reference": np.zeros_like(arrays["image"]),
        }
        if self.on_device:
            arrays |= {f"frame{suffix}": np.zeros((len(n), 6), np.float32) for suffix in ("", "_reference")}
        texts: dict[str, list[str]] = {"tokens": [], "tokens_reference": [], "tokens_modification": []}
        bad: list[Bad] = []
        for i in range(len(n)):
            trio = self.trio(int(places[i]), lanes[i], [c[i] for c in crops], bad)
            for attempt in range(ATTEMPTS):
                if trio is not None:
                    break
                trio = self.trio(self.order.replace(int(n[i]), attempt)[1], lanes[i], [c[i] for c in crops], bad)
            if trio is None:
                raise BadData(f"sample {n[i]:,} and {ATTEMPTS} substitutes for it cannot be used:\n{table(bad[-ATTEMPTS:])}")
            *sides, text = trio
            for side, pick, suffix in zip(sides, picks[i], ("", "_reference"), strict=True):
                caption = ""
                if side is not None:
                    arrays[f"id{suffix}"][i], record, image = side
                    if self.on_device:
                        arrays[f"image{suffix}"][i], arrays[f"frame{suffix}"][i] = image
                    else:
                        arrays[f"image{suffix}"][i] = image
                    caption = choose(record.captions, self.dataset.options.captions, pick) if record.captions else ""
                texts[f"tokens{suffix}"].append(caption)
            texts["tokens_modification"].append(text)
        arrays |= {name: encode(self.tokenizer, found) for name, found in texts.items()}
        return Batch(arrays, arrays["id"].astype(np.int64), tuple(bad))

    def trio(self, place: int, lanes: np.ndarray, crops: Sequence[np.ndarray], bad: list[Bad]) -> tuple[Any, Any, str] | None:
        """Target and reference, each (id, record, pixels), and the text at a place of the epoch; None where an image is bad."""
        triplets = self.triplets
        if place < triplets.number:
            reference, target, text = triplets.draw(place, lanes)
        else:
            reference, target, text = -1, int(triplets.alone[place - triplets.number]), ""
        found: list[Any] = []
        for image, uniforms in zip((target, reference), crops, strict=True):
            if image < 0:
                found.append(None)
                continue
            shard, row = (int(x[0]) for x in rows_of(self.dataset, np.array([image])))
            cut = functools.partial(decode.decode_canvas if self.on_device else decode.decode_train, options=self.how, uniforms=uniforms)
            side = self.load(shard, row, cut)
            if isinstance(side, Bad):
                bad.append(side)
                return None
            found.append((image, side[0], side[1]))
        return found[0], found[1], text

    def read(self, shard: int, row: int) -> Record | Bad:
        record = read(self.dataset, shard, row, self.want)
        if self.dataset.options.captions == "optional" and isinstance(record, Bad) and record.reason in UNCAPTIONED:
            return read(self.dataset, shard, row, self.want._replace(captions=False))
        return record


class Queries(Prepare):
    """For evaluation: number n is query n, its reference as "image" and its text as "tokens" int32 [b, 1, L]; "valid" bool [b]."""

    def __init__(self, dataset: Dataset, tokenizer: Any, images: np.ndarray, texts: Sequence[str]) -> None:
        super().__init__(dataset, tokenizer, Want(captions=False, alternates=False, fields=False))
        self.images, self.texts = images, texts
        self.fields = {}

    def __call__(self, n: np.ndarray) -> Batch:
        arrays, ids = self.arrays(len(n), self.how.size), np.full(len(n), -1)
        bad: list[Bad] = []
        cut = functools.partial(decode.decode_eval, options=self.how)
        real = n[n < len(self.images)]
        for i, (shard, row) in enumerate(zip(*rows_of(self.dataset, self.images[real]), strict=True)):
            sample = self.load(int(shard), int(row), cut)
            if isinstance(sample, Bad):
                bad.append(sample)
                continue
            arrays["image"][i] = sample[1]
            ids[i] = n[i]
        arrays["valid"] = ids >= 0
        arrays["tokens"] = np.zeros((len(n), 1, self.tokenizer.context_length), np.int32)
        if len(real):
            arrays["tokens"][: len(real), 0] = self.tokenizer.encode_batch([self.texts[m] for m in real])
        return Batch(arrays, ids, tuple(bad))


def encode(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """int32 [text, L], a row of padding for each empty text."""
    tokens = tokenizer.encode_batch(texts)
    tokens[[not text for text in texts]] = 0
    return tokens
