"""Damage at random places of a list of captions: shards of whole captions, or one sentence that names the list, and nothing written."""

import csv
import io
import json
import random
import shutil
import tarfile
import time

import pytest
from PIL import Image

from jaxvl.data.layouts import make_classes
from jaxvl.data.make import make_annotated, make_shards
from jaxvl.data.text import clean_caption

LIMIT = 20.0  # seconds
ROWS = [("0.png", "a red, door"), ("./1.png", 'a "so" caf\u00e9'), ("deep\\2.png", "two\nlines"), ("0.png", "another")]
PIECES = [
    *(
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\t",
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"null",
        b"{}",
        b"[",
        b"1e999",
        b"\xe9",
        b"\\",
        b"\xed\xa0\x80",
    ),
    *(b"\xe2\x80\xa8", b"\\ud800", b"9" * 50, b"[" * 3000, b'"image": '),
]


def table(delimiter):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([("image", "caption"), *ROWS])
    return out.getvalue().encode()


def as_json(value):
    return json.dumps(value, ensure_ascii=False).encode()


LISTS = {
    "metadata.jsonl": b"\n".join(as_json({"image": name, "caption": text}) for name, text in ROWS),
    "captions.csv": table(","),
    "captions.tsv": table("\t"),
    "captions.txt": table(","),
    "list.json": as_json([{"image": name, "caption": [text]} for name, text in ROWS]),
    "karpathy.json": as_json({"images": [{"filename": n, "split": "x", "sentences": [{"raw": t}]} for n, t in ROWS]}),
    "coco.json": as_json(
        {
            "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(ROWS)],
            "annotations": [{"image_id": i, "caption": text} for i, (_, text) in enumerate(ROWS)],
        }
    ),
    "Ebay_train.txt": b"image_id class_id super_class_id path\n1 2 3 0.png\n2 3 4 deep/2.png\n",
}


def damaged(data, rng):
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data = data[:at] + rng.randbytes(1) + data[at + 1 :]
            case 1:
                data = data[:at] + rng.choice(PIECES) + data[at:]
            case 2:
                data = data[:at] + data[at + rng.randint(1, 8) :]
            case _:
                data = data[:at] if rng.random() < 0.3 else data[:at] + data[rng.randrange(len(data) + 1) :][:30] + data[at:]
    return data.decode("latin-1").encode(rng.choice(("utf-16", "utf-16-le", "utf-32"))) if rng.random() < 0.1 else data


@pytest.mark.parametrize("seeds", [pytest.param(range(60), id="share"), pytest.param(range(60, 3_000), id="rest", marks=pytest.mark.long)])
def test_damaged_lists(tmp_path, seeds, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    (pictures / "deep").mkdir(parents=True)
    for name in ("0.png", "1.png", "deep/2.png"):
        Image.new("RGB", (4, 4)).save(pictures / name)
    made = 0
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(list(LISTS))
        file = (tmp_path if name.endswith(".json") else pictures) / name
        file.write_bytes(damaged(LISTS[name], rng))
        begin = time.monotonic()
        try:
            if name.endswith(".json"):
                make_annotated(file, pictures, out, 2)
            elif name.startswith("Ebay"):
                make_classes("sop", pictures, out, "train", 2)
            else:
                make_shards(pictures, out, 2)
        except ValueError as error:
            assert str(file) in str(error) or "of layout 'sop'" in str(error), (seed, error)
            assert not out.exists(), seed
        else:
            made += 1
            for shard in out.glob("*.tar"):
                with tarfile.open(shard) as tar:
                    texts = [tar.extractfile(m).read() for m in tar if m.name.endswith(".txt")]
                assert all(clean_caption(text) for text in texts), seed
            shutil.rmtree(out)
        assert time.monotonic() - begin < LIMIT, seed
        file.unlink()
    assert 0 < made < len(seeds)
