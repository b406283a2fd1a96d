"""Triplets as training samples: the order contract, pairs among them, missing images, texts of one change, and drawn siblings."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxvl.data import triplets
from jaxvl.data.dataset import DataOptions, open_data, read_samples
from jaxvl.data.source import Want
from jaxvl.data.stream import query_batches, train_batches

GLYPHS = DataOptions(source="glyphs://train?size=256", triplets="beside", image_size=16, chunk=4, threads=1, workers=0)


def encode(texts):
    """Eight ids of a text, from its letters."""
    out = np.zeros((len(texts), 8), np.int32)
    for row, text in zip(out, texts, strict=True):
        letters = [ord(c) for c in text][-8:]
        row[: len(letters)] = letters
    return out


TOKENS = SimpleNamespace(context_length=8, encode_batch=encode)


@pytest.fixture(scope="module")
def glyphs():
    return open_data(GLYPHS)


def take(dataset, batches, **how):
    stream = train_batches(dataset, TOKENS, seed=3, **how)
    found = [next(stream).arrays for _ in range(batches)]
    stream.close()
    return {k: np.concatenate([f[k] for f in found]) for k in found[0]}


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)


def test_a_sample_is_a_function_of_seed_and_number(glyphs):
    """Any cut of the batch over hosts, any start and any number of threads give the same rows."""
    whole = take(glyphs, 4, start=0, batch_size=12)
    halves = [take(glyphs, 4, start=0, batch_size=12, rows=rows) for rows in ((0, 5), (5, 12))]
    same(
        whole,
        {
            k: np.concatenate([np.concatenate([halves[0][k][5 * i : 5 * i + 5], halves[1][k][7 * i : 7 * i + 7]]) for i in range(4)])
            for k in whole
        },
    )
    same({k: v[24:] for k, v in whole.items()}, take(glyphs, 2, start=24, batch_size=12))
    threaded = open_data(GLYPHS._replace(threads=3, chunk=5))
    same(whole, take(threaded, 4, start=0, batch_size=12))
    assert (take(glyphs, 4, start=0, batch_size=12)["id"] == whole["id"]).all()


def test_an_epoch_is_every_triplet_and_every_image_in_none(glyphs):
    keys = {key: i for i, key in enumerate(r.key for r in read_samples(glyphs, np.arange(len(glyphs)), Want(image=False, captions=False)))}
    path = triplets.files_beside(glyphs.sources[0].shards)[0]
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    listed = sorted((keys[t["reference"]], keys[t["target"]]) for t in lines)
    used = {i for pair in listed for i in pair}
    assert glyphs.epoch == len(lines) + 256 - len(used) and len(used) < 256
    batch = take(glyphs, 1, start=0, batch_size=glyphs.epoch)
    triplet = batch["id_reference"] >= 0
    assert sorted(zip(batch["id_reference"][triplet].tolist(), batch["id"][triplet].tolist(), strict=True)) == listed
    assert sorted(batch["id"][~triplet].tolist()) == sorted(set(range(256)) - used)
    for k in ("image_reference", "tokens_reference", "tokens_modification"):
        assert not batch[k][~triplet].any(), "a pair has no reference and no modification"
    assert batch["tokens"].any(1).all() and batch["tokens_modification"][triplet].any(1).all()
    assert open_data(GLYPHS._replace(pairs=False)).epoch == len(lines)


def test_missing_images_are_listed_and_not_fatal(glyphs, tmp_path):
    keys = [r.key for r in read_samples(glyphs, np.arange(6), Want(image=False, captions=False))]
    lines = [{"reference": keys[0], "target": keys[1], "modification": ["is longer", "has dots"]}, {"reference": "gone", "target": keys[2], "modification": "x"},
             {"reference": keys[3], "target": "gone", "modification": "x"}, {"reference": "gone too", "target": "gone", "modification": "x"}]  # fmt: skip
    path = tmp_path / "train-triplets.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = open_data(GLYPHS._replace(triplets=str(path)))
    assert found.triplets.number == 1
    assert sorted((b.shard, b.key, b.reason) for b in found.bad) == [(str(path), "gone", "missing"), (str(path), "gone too", "missing")]
    texts = {
        how: open_data(GLYPHS._replace(triplets=str(path), triplet_text=how)).triplets for how in ("single", "joined", "joined_random")
    }
    draw = lambda how, m, u: texts[how].draw(m, np.full(triplets.LANES, u))[2]
    assert [draw("single", m, 0.0) for m in (0, 1)] == ["is longer", "has dots"] and texts["single"].number == 2
    assert draw("joined", 0, 0.0) == draw("joined_random", 0, 0.9) == "is longer <and> has dots"
    assert draw("joined_random", 0, 0.1) == "has dots <and> is longer"
    path.write_text(json.dumps(lines[0] | {"modification": ["\ufeffIs  longer, ", "has\xa0dots!"]}))
    for cleaning, text in (("plain", "Is longer, <and> has dots!"), ("albef", "is longer <and> has dots")):
        assert open_data(GLYPHS._replace(triplets=str(path), cleaning=cleaning)).triplets.draw(0, np.zeros(triplets.LANES))[2] == text
    path.write_text(json.dumps(lines[1]))
    with pytest.raises(ValueError, match=r"none of the 1 triplets .* has both its images in the shards \(missing: gone\)"):
        open_data(GLYPHS._replace(triplets=str(path)))
    path.write_text(json.dumps(lines[0]) + "\n" + '{"reference": "a", "target": 3, "modification": "x"}')
    with pytest.raises(ValueError, match="triplets.jsonl:2: .* is no triplet"):
        open_data(GLYPHS._replace(triplets=str(path)))
    with pytest.raises(ValueError, match="data.triplets: .*nowhere.jsonl cannot be read"):
        open_data(GLYPHS._replace(triplets=str(tmp_path / "nowhere.jsonl")))


def test_siblings_are_drawn_from_captions():
    captions = [
        "black lace dress",
        "white lace dress",
        "red top",
        "red red top",
        "blue jacket",
        None,
        "white lace dress",
        "dress lace white",
    ]
    found = triplets.of_captions(captions, "substring", 2)
    assert found.number == 2 * 3 and found.alone.tolist() == [2, 3, 4, 5, 7], "the same words are no change"
    grid = np.random.default_rng(0).uniform(size=(40, triplets.LANES))
    seen = {found.draw(m, u) for m in range(6) for u in grid}
    assert seen == {
        (0, 1, "replace black with white"),
        (0, 6, "replace black with white"),
        (1, 0, "replace white with black"),
        (6, 0, "replace white with black"),
    }
    assert set(found.texts) == {"replace black with white", "replace white with black"}
    boots = [("boots", "black"), ("boots", "brown"), ("shoes", "black"), ("hat", "green"), None]
    found = triplets.of_attributes(boots, 1)
    assert {found.draw(m, u) for m in range(found.number) for u in grid} == {
        (0, 1, "replace black with brown"), (1, 0, "replace brown with black"), (0, 2, "replace boots with shoes"), (2, 0, "replace shoes with boots"),
    }  # fmt: skip
    with pytest.raises(ValueError, match="data.attributes"):
        open_data(GLYPHS._replace(triplets="attributes"))
    drawn = open_data(GLYPHS._replace(triplets="attributes", attributes=("class", "style", "weight", "slant")))
    batch = take(drawn, 2, start=0, batch_size=16)
    meta = [r.meta for r in read_samples(drawn, np.arange(256), Want(image=False, captions=False))]
    for reference, target in zip(batch["id_reference"], batch["id"], strict=True):
        if reference >= 0:
            assert sum(meta[reference][f] != meta[target][f] for f in ("class", "style", "weight", "slant")) == 1


def test_queries_come_in_order(glyphs):
    images, texts = np.array([5, 2, 5]), ["a", "bb", "ccc"]
    batches = [b.arrays for b in query_batches(glyphs, TOKENS, images, texts, batch_size=2)]
    assert [b["valid"].tolist() for b in batches] == [[True, True], [True, False]]
    np.testing.assert_array_equal(batches[0]["image"][0], batches[1]["image"][0])
    np.testing.assert_array_equal(np.concatenate([b["tokens"][:, 0] for b in batches])[:3], encode(texts))
