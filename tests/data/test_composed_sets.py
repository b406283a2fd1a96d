"""The published folders of Fashion-200k, Fashion-IQ and UT-Zap50k, as small as they can be, through shards to triplets."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from jaxvl.data import composed_sets, tools, triplets
from jaxvl.data.dataset import DataOptions, open_data, read_samples
from jaxvl.data.source import Record, Want
from jaxvl.evals import composed


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(out, "JPEG")
    path.write_bytes(out.getvalue())


def opened(folder, part, **options):
    return open_data(DataOptions(source=f"{folder}/{part}-*.tar", indexes=f"{folder}/index", image_size=8, **options))


def test_fashion200k(tmp_path, capsys):
    captions = {
        "women/dresses/1/a_0.jpeg": "black lace dress",
        "women/dresses/2/b_0.jpeg": "white lace dress",
        "women/dresses/3/c_0.jpeg": "red no. top",
        "gone.jpeg": "red top",
    }
    for i, name in enumerate(captions):
        if name != "gone.jpeg":
            picture(tmp_path / "raw" / name, i)
    (tmp_path / "raw" / "labels").mkdir()
    for part in ("train", "test"):
        (tmp_path / "raw/labels" / f"dress_{part}_detect_all.txt").write_text("".join(f"{k}\t0.9\t{v}\n" for k, v in captions.items()))
    first, second, *_ = captions
    (tmp_path / "raw/test_queries.txt").write_text(f"{first} {second}\n{second} gone.jpeg\n")
    for part in ("train", "test"):
        assert tools.make(f"fashion200k:{tmp_path}/raw", tmp_path / "out", part=part) == 0
    assert "1 images are missing" in capsys.readouterr().out
    assert (tmp_path / "out/test-missing.txt").read_text() == "gone\n" and not (tmp_path / "out/train-triplets.jsonl").exists()
    train = opened(tmp_path / "out", "train", triplets="siblings")
    assert [r.captions[0] for r in read_samples(train, range(3))] == ["black lace dress", "white lace dress", "red nodotmark top"]
    assert train.triplets.number == 2 and train.epoch == 3
    test = opened(tmp_path / "out", "test", triplets="beside")
    assert test.triplets.draw(0, np.zeros(triplets.LANES)) == (0, 1, "replace black with white")
    assert [bad.key for bad in test.bad] == ["gone"]
    with pytest.raises(FileExistsError, match="holds shards of 'test' already"):
        tools.make(f"fashion200k:{tmp_path}/raw", tmp_path / "out", part="test")


def test_fashioniq(tmp_path):
    raw = tmp_path / "raw"
    for folder in ("image_splits", "captions", "image_attributes"):
        (raw / folder).mkdir(parents=True)
    for i, category in enumerate(("dress", "shirt", "toptee")):
        keys = [f"B{i}{n}" for n in range(3)]
        (raw / f"image_splits/split.{category}.val.json").write_text(json.dumps(keys))
        pairs = [
            {"candidate": keys[0], "target": keys[1], "captions": ["is longer", "is red"]},
            {"candidate": keys[1], "target": keys[2], "captions": ["x", "y"]},
        ]
        (raw / f"captions/cap.{category}.val.json").write_text(json.dumps(pairs))
        (raw / f"image_attributes/asin2attr.{category}.val.json").write_text(json.dumps({keys[0]: [["Long Sleeve", "red"], [], ["Red"]]}))
        for n, key in enumerate(keys[: 2 if category == "shirt" else 3]):
            picture(raw / "images" / f"{key}.jpg", 3 * i + n)
    assert tools.make(f"fashioniq:{raw}", tmp_path / "out", part="val") == 0
    data = opened(tmp_path / "out", "val", triplets="beside", captions="optional", triplet_text="single")
    assert len(data) == 8 and [b.key for b in data.bad] == ["B12"]
    assert data.triplets.number == 2 * 5
    texts = [r.captions if isinstance(r, Record) else r.reason for r in read_samples(data, range(8))]
    assert sorted(map(str, texts)) == ["('long sleeve red',)"] * 3 + ["blank"] * 5, "an image without tags has no text"
    assert {r.meta["category"] for r in read_samples(data, range(8), Want(captions=False))} == {"dress", "shirt", "toptee"}
    assert all(r.meta["categories"] == [r.meta["category"]] for r in read_samples(data, range(8), Want(captions=False)))
    assert composed_sets.tag_text([f"w{i}" for i in range(30)] + ["w3"]).split() == [f"w{i}" for i in range(10, 30)]


def test_an_image_of_several_categories_is_in_the_gallery_of_each(tmp_path):
    raw = tmp_path / "raw"
    for folder in ("image_splits", "captions"):
        (raw / folder).mkdir(parents=True)
    splits = {"dress": ["A", "B"], "shirt": ["B", "C"], "toptee": ["D", "B", "A"]}
    for i, (category, keys) in enumerate(splits.items()):
        (raw / f"image_splits/split.{category}.val.json").write_text(json.dumps(keys))
        pair = {"candidate": keys[0], "target": keys[1], "captions": ["x", "y"]}
        (raw / f"captions/cap.{category}.val.json").write_text(json.dumps([pair]))
        (raw / f"asin2attr.{category}.val.json").write_text(json.dumps({"B": [[f"tag {i}"]]}))
    for n, key in enumerate("ABCD"):
        picture(raw / "images" / f"{key}.jpg", n)
    assert tools.make(f"fashioniq:{raw}", tmp_path / "out", part="val") == 0
    data = opened(tmp_path / "out", "val", captions="none")
    of_image = composed.categories_of(data, list(splits))
    keys = [r.key for r in read_samples(data, range(4), Want(captions=False))]
    assert {c: sorted(k for k, some in zip(keys, of_image, strict=True) if c in some) for c in splits} == {
        c: sorted(members) for c, members in splits.items()
    }
    (told,) = [
        r.captions[0] for r in read_samples(opened(tmp_path / "out", "val", captions="optional", triplets="beside"), [keys.index("B")])
    ]
    assert told == "tag 0 1 2"


def test_utzap50k(tmp_path):
    raw = tmp_path / "raw"
    (raw / "ut-zap50k-data").mkdir(parents=True)
    rows = ["CID,Category,SubCategory,HeelHeight,Insole,Closure,Gender,Material,ToeStyle"]
    for i in range(60):
        cid, category, closure = f"{1000 + i}-{i}", ("Shoes", "Boots")[i % 2], ("Lace up", "Zipper;Buckle")[i // 2 % 2]
        rows.append(f"{cid},{category},Ankle,,,{closure},Men,Leather,Round")
        picture(raw / "ut-zap50k-images" / category / "Ankle" / f"{cid}.jpg", i)
    (raw / "ut-zap50k-data/meta-data.csv").write_text("\n".join(rows))
    for part in ("train", "test"):
        assert tools.make(f"utzap50k:{raw}", tmp_path / "out", part=part) == 0
    train, test = (opened(tmp_path / "out", part) for part in ("train", "test"))
    keys = [{r.key for r in read_samples(d, range(len(d)))} for d in (train, test)]
    assert len(keys[0]) + len(keys[1]) == 60 and not keys[0] & keys[1] and 0.6 < len(keys[0]) / 60 < 0.95
    record = next(iter(read_samples(train, [0])))
    assert " ".join(record.meta[name] for name in composed_sets.ZAP) == record.captions[0]
    lines = [json.loads(line) for line in (tmp_path / "out/test-triplets.jsonl").read_text().splitlines()]
    meta = {r.key: r.meta for r in read_samples(test, range(len(test)))}
    assert len(lines) == len(keys[1])
    for line in lines:
        a, b = (meta[line[k]] for k in ("reference", "target"))
        (name,) = [n for n in composed_sets.ZAP if a[n] != b[n]]
        assert line["modification"] == f"replace {a[name]} with {b[name]}"
    drawn = opened(tmp_path / "out", "train", triplets="attributes", attributes=composed_sets.ZAP)
    assert drawn.triplets.number == len(train)
    with pytest.raises(ValueError, match="utzap50k: .* is not laid out as the set is published"):
        tools.make(f"utzap50k:{tmp_path}", tmp_path / "none", part="test")
