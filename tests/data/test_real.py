"""Small real sets, where JAXVL_DATA_DIR has them: folders of tar shards, with PART-triplets.jsonl beside some."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxvl.data.dataset import DataOptions, captions, open_data, read_samples
from jaxvl.data.source import Record, Want
from jaxvl.data.stream import eval_batches, train_batches
from jaxvl.data.text import TokenizerOptions, train_tokenizer

FOLDER = os.environ.get("JAXVL_DATA_DIR")
SETS = sorted({tar.parent for tar in Path(FOLDER).glob("*/*.tar")}) if FOLDER else []
pytestmark = pytest.mark.skipif(not SETS, reason="JAXVL_DATA_DIR names no folder of sets with tar shards")


def dataset(folder: Path, pattern: str = "*.tar", **options):
    return open_data(DataOptions(source=str(folder / pattern), image_size=48, workers=0, threads=2, **options))


@pytest.mark.parametrize("folder", SETS, ids=lambda f: f.name)
def test_every_sample_is_delivered_once_with_its_captions(folder):
    data = dataset(folder, captions="random")
    tokenizer = train_tokenizer(captions(data), TokenizerOptions(vocab_size=600, context_length=12))
    batches = list(eval_batches(data, tokenizer, batch_size=256, captions=2))
    assert not [b for batch in batches for b in batch.bad] and not list(data.bad)
    ids = np.concatenate([batch.ids[batch.arrays["valid"]] for batch in batches])
    np.testing.assert_array_equal(ids, np.arange(len(data)))
    for batch in batches:
        pixels = batch.arrays["image"][batch.arrays["valid"]].reshape(batch.arrays["valid"].sum(), -1)
        assert (pixels.std(1) > 0).mean() > 0.99  # pictures, not blanks
        assert (batch.arrays["tokens"][batch.arrays["valid"], 0, 0] == tokenizer.bos).all()


@pytest.mark.parametrize("folder", SETS, ids=lambda f: f.name)
def test_the_stream_is_the_same_for_two_hosts_and_any_start(folder):
    data = dataset(folder, captions="first")
    tokenizer = train_tokenizer(captions(data, 500), TokenizerOptions(vocab_size=600, context_length=12))
    of = lambda start, rows: next(train_batches(data, tokenizer, seed=5, start=start, batch_size=32, rows=rows))
    whole, halves = of(64, (0, 32)), [of(64, (0, 16)), of(64, (16, 32))]
    for name, value in whole.arrays.items():
        np.testing.assert_array_equal(value, np.concatenate([h.arrays[name] for h in halves]))
    np.testing.assert_array_equal(whole.ids, np.concatenate([h.ids for h in halves]))


@pytest.mark.parametrize("folder", SETS, ids=lambda f: f.name)
def test_triplets_name_samples_of_their_part(folder):
    for file in folder.glob("*-triplets.jsonl"):
        data = dataset(folder, f"{file.name.removesuffix('-triplets.jsonl')}-0*.tar")
        keys = {r.key for r in read_samples(data, np.arange(len(data)), Want(image=False)) if isinstance(r, Record)}
        triplets = [json.loads(line) for line in file.read_text().splitlines()]
        assert triplets and all({t["reference"], t["target"]} <= keys and t["modification"] for t in triplets)
