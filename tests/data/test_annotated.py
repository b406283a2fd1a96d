"""Annotation files to shards: Karpathy's splits and lists of pairs, one sample an image, every caption and id kept."""

import json

import numpy as np
import pytest
from shards import Letters, number_of, options, picture

from jaxvl.data.dataset import read_samples
from jaxvl.data.make import make_annotated
from jaxvl.data.stream import open_data, train_batches
from jaxvl.data.tools import make


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for i in range(5):
        path = folder / "val2014" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return folder


def karpathy(tmp_path):
    splits = ("train", "restval", "val", "train", "test")
    entries = [
        {
            "filepath": "val2014",
            "filename": f"{i}.png",
            "split": split,
            "cocoid": 900 + i,
            "imgid": i,
            "sentences": [{"raw": f"Image {i}."}, {"raw": f"It is {i}"}],
        }
        for i, split in enumerate(splits)
    ]
    entries[3]["sentences"] = [{"raw": " "}]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return path


def test_karpathys_splits(tmp_path, images, capsys):
    file = karpathy(tmp_path)
    assert make(str(file), tmp_path / "train", images=str(images), split="train,restval", per_shard=1) == 0
    assert "val2014/3.png" in capsys.readouterr().out  # it has no caption
    dataset = open_data(options(str(tmp_path / "train"), tmp_path, id="image_id", captions="random", cleaning="albef"))
    found = list(read_samples(dataset, range(len(dataset))))
    assert [r.meta["image_id"] for r in found] == [900, 901] and [len(r.captions) for r in found] == [2, 2]
    assert found[1].captions == ("image 1", "it is 1") and found[1].meta["captions"] == ["Image 1.", "It is 1"]
    batch = next(train_batches(dataset, Letters(), seed=0, start=0, batch_size=4))
    np.testing.assert_array_equal(batch.arrays["id"], [900 + number_of(x) for x in batch.arrays["image"]])


def test_a_list_of_pairs_is_grouped_by_image(tmp_path, images):
    file = tmp_path / "coco_train.json"
    pairs = [("1", "one", "coco_1"), ("0", ["zero", "nought"], "coco_0"), ("1", "a one", "coco_1"), ("1", "one", "coco_1")]
    file.write_text(json.dumps([{"image": f"val2014/{i}.png", "caption": c, "image_id": name} for i, c, name in pairs]))
    shards, left_out = make_annotated(file, images, tmp_path / "out", 10)
    assert len(shards) == 1 and not left_out
    dataset = open_data(options(str(tmp_path / "out"), tmp_path, id="image_id", captions="random"))
    assert [r.captions for r in read_samples(dataset, [0, 1])] == [("one", "a one"), ("zero", "nought")]
    batch = next(train_batches(dataset, Letters(), seed=0, start=0, batch_size=4))
    np.testing.assert_array_equal(batch.arrays["id"], [number_of(x) for x in batch.arrays["image"]])  # coco_0 and coco_1 in order


def test_what_is_wrong_is_told_before_anything_is_written(tmp_path, images):
    file = karpathy(tmp_path)
    for words, call in (
        ("has no split 'dev'; it has restval, test, train, val", lambda: make_annotated(file, images, tmp_path / "out", 5, ("dev",))),
        ("4 of 4 images .* val2014/0.png is the first", lambda: make_annotated(file, tmp_path, tmp_path / "out", 5)),
        ("--split is not for .* takes --per-shard, --layout", lambda: make(str(images), tmp_path / "out", split="train")),
        ("--size is not for .* takes --images, --split, --per-shard", lambda: make(str(file), tmp_path / "out", size=3)),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    for content, words in (
        ("[1, 2]", "is no annotation file"),
        ('{"images": [{"split": "train"}]}', "has no filename"),
        ("[", "is no annotation file"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=words):
            make_annotated(file, images, tmp_path / "out", 5)
    assert not (tmp_path / "out").exists()
