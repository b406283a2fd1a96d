"""Published layouts as tiny made-up trees: what is written, what is missing, and that it can be trained on."""

import json

import pytest
from shards import number_of, options, picture

from jaxvl.cli import main
from jaxvl.data.layouts import make_classes
from jaxvl.data.stream import Want, eval_batches, open_data, read_samples


def put(root, files):
    for n, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(n))


def written(root, out, layout, part="train"):
    """(fields of every sample, missing images)."""
    _, missing = make_classes(layout, root, out, part, 3)
    dataset = open_data(options(str(out), out, captions="none", label="class", classes="all"))
    fields = [r.meta for r in read_samples(dataset, range(len(dataset)), Want(captions=False))]
    batch = next(iter(eval_batches(dataset, None, batch_size=len(dataset))))
    assert [dataset.classes[l] for l in batch.arrays["label"]] == [f["class"] for f in fields]
    assert [(root / f["file"]).read_bytes() for f in fields] == [picture(number_of(p)) for p in batch.arrays["image"]]
    return [(f["file"], f["class"], f["hierarchy"]) for f in fields], missing


def test_in_shop(tmp_path):
    root = tmp_path / "inshop"
    files = ["img/WOMEN/Dresses/id_1/a.jpg", "img/WOMEN/Dresses/id_1/b.jpg", "img/MEN/Pants/id_2/c.jpg", "img/MEN/Pants/id_2/d.jpg"]
    put(root, files[:3])
    (root / "Eval").mkdir()
    rows = [f"{f}   {f.split('/')[3]}   {part}" for f, part in zip(files, ("train", "query", "query", "gallery"), strict=True)]
    (root / "Eval/list_eval_partition.txt").write_text("\n".join(["4", "image_name item_id evaluation_status", *rows]))
    assert written(root, tmp_path / "train", "inshop") == ([(files[0], "id_1", ["WOMEN", "Dresses", "id_1"])], [])
    queries, missing = written(root, tmp_path / "query", "inshop", "query")
    assert [q[1] for q in queries] == ["id_1", "id_2"] and missing == []
    with pytest.raises(ValueError, match="none of the 1 images of part 'gallery'"):
        written(root, tmp_path / "gallery", "inshop", "gallery")
    with pytest.raises(ValueError, match="part 'val' is none of train, query, gallery"):
        written(root, tmp_path / "val", "inshop", "val")


def test_inaturalist_with_and_without_its_taxonomy(tmp_path, capsys):
    root = tmp_path / "inat"
    files = ["train_val2018/Aves/12/a.jpg", "train_val2018/Plantae/7/b.jpg", "train_val2018/Plantae/7/c.jpg"]
    put(root, files[:2])
    (root / "Inaturalist_train_set1.txt").write_text("\n".join(files))
    rows, missing = written(root, tmp_path / "one", "inaturalist")
    assert rows == [(files[0], "12", ["Aves", "12"]), (files[1], "7", ["Plantae", "7"])] and missing == [files[2]]
    ranks = ("kingdom", "phylum", "class", "order", "family", "genus")
    (root / "categories.json").write_text(json.dumps([{"id": i, "name": "?"} | {r: f"{r}{i}" for r in ranks} for i in (7, 12)]))
    assert written(root, tmp_path / "two", "inaturalist")[0][0][2] == [*(f"{r}12" for r in ranks), "12"]
    assert main(["data", "make", str(root), "--layout=inaturalist", f"--out={tmp_path / 'three'}"]) == 0
    assert f"left out, missing: {files[2]}" in capsys.readouterr().out
    (root / "test.txt").write_text("flat.jpg")
    with pytest.raises(ValueError, match=r"test.txt:1: 'flat.jpg' is not"):
        written(root, tmp_path / "four", "inaturalist", "test")


def test_products_and_folders(tmp_path):
    root = tmp_path / "sop"
    put(root, ["bicycle_final/1_0.JPG", "chair_final/2_0.JPG"])
    (root / "Ebay_test.txt").write_text(
        "image_id class_id super_class_id path\n1 11319 1 bicycle_final/1_0.JPG\n2 11320 4 chair_final/2_0.JPG\n"
    )
    assert [r[1:] for r in written(root, tmp_path / "test", "sop", "test")[0]] == [
        ("11319", ["bicycle", "11319"]),
        ("11320", ["chair", "11320"]),
    ]
    tree = tmp_path / "birds"
    put(tree, ["gulls/001.A/x.jpg", "gulls/002.B/y.png", "owls/001.A/z.jpg", "loose.jpg"])
    rows, _ = written(tree, tmp_path / "birds_out", "folders")
    assert [r[1:] for r in rows] == [
        ("gulls/001.A", ["gulls", "gulls/001.A"]),
        ("gulls/002.B", ["gulls", "gulls/002.B"]),
        ("owls/001.A", ["owls", "owls/001.A"]),
    ]
    for words, call in (
        ("layout 'cub' is none of", lambda: make_classes("cub", tree, tmp_path / "x", "train", 3)),
        ("is written whole", lambda: make_classes("folders", tree, tmp_path / "x", "second", 3)),
        ("has no Ebay_train.txt", lambda: make_classes("sop", tree, tmp_path / "x", "train", 3)),
    ):
        with pytest.raises(ValueError, match=words):
            call()
