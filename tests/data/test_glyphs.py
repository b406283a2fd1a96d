"""The embedded set: same bytes every time, disjoint parts, whole and true pictures, captions that say what is drawn."""

import io
import itertools
import json
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from PIL import Image

from jaxvl.data import glyphs


def samples(paths: list[Path]) -> dict[str, dict]:
    """{key: {"png": bytes, "txt": str, "json": dict}}, in order."""
    out: dict[str, dict] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                data = tar.extractfile(member).read()
                out.setdefault(key, {})[suffix] = json.loads(data) if suffix == "json" else data.decode() if suffix == "txt" else data
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict]]:
    sizes = {"train": 1500, "val": 200, "val-seen": 100}
    return {part: samples(glyphs.write_shards(tmp_path_factory.mktemp(part), part, size)) for part, size in sizes.items()}


@pytest.fixture(scope="module")
def every() -> dict[str, list[glyphs.Glyph]]:
    out: dict[str, list[glyphs.Glyph]] = {part: [] for part in glyphs.PARTS}
    for part, glyph in glyphs.drawn():
        out[part].append(glyph)
    return out


def test_samples_have_the_layout_of_a_webdataset(written: dict) -> None:
    fields = {
        "set",
        "class",
        "hierarchy",
        "captions",
        "codepoint",
        "font",
        "style",
        "weight",
        "slant",
        "licence",
        "credit",
        "source",
        "width",
        "height",
    }
    for key, sample in (item for part in written.values() for item in part.items()):
        assert list(sample) == ["png", "txt", "json"] and "." not in key
        meta = sample["json"]
        assert meta.keys() == fields
        assert meta["captions"][0] == sample["txt"] and meta["captions"][1] == meta["class"] == meta["hierarchy"][-1]
        assert unicodedata.lookup(meta["class"]) == chr(int(meta["codepoint"][2:], 16))
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.format == "PNG" and image.size == (meta["width"], meta["height"]) == (40, 40)
        assert len(meta["hierarchy"]) == 4 and all(meta["hierarchy"])


def test_same_arguments_same_bytes_and_a_seed_makes_another_set(tmp_path: Path) -> None:
    write = lambda name, **kw: {
        p.name: p.read_bytes() for p in (tmp_path / name, glyphs.write_shards(tmp_path / name, "val", 60, **kw))[0].iterdir()
    }
    assert write("a") == write("b")
    assert set(write("a")) == {"val-0000.tar", "val-triplets.jsonl"}
    assert write("a") != write("c", seed=1) and write("a") != write("d", pixels=32)


def test_no_picture_is_drawn_twice_and_20000_can_be(every: dict) -> None:
    pictures = [g.picture for part in every.values() for g in part]
    assert len(set(pictures)) == len(pictures)
    keys = [g.key for part in every.values() for g in part]
    assert len(set(keys)) == len(keys)
    assert len(every["train"]) >= 20_000


def test_val_shows_unseen_letters_and_val_seen_unseen_faces_of_seen_characters(every: dict) -> None:
    letters = {part: {glyphs.letter(g.char) for g in every[part]} for part in every}
    assert not letters["val"] & (letters["train"] | letters["val-seen"])
    assert letters["val-seen"] <= letters["train"]
    first = list(itertools.islice(every["train"], glyphs.PARTS["train"]))
    seen = every["val-seen"][: glyphs.PARTS["val-seen"]]
    assert len({g.char for g in seen}) == len(seen) and {g.char for g in seen} <= {g.char for g in first}
    assert not {(g.char, g.face) for g in seen} & {(g.char, g.face) for g in every["train"]}
    assert min(Counter(g.char for g in first if g.char in {s.char for s in seen}).values()) >= 2


def test_a_smaller_part_is_contained_in_a_larger_one(tmp_path: Path) -> None:
    small = samples(glyphs.write_shards(tmp_path / "small", "val", 40))
    large = samples(glyphs.write_shards(tmp_path / "large", "val", 90))
    assert small.items() <= large.items()


def test_shards_are_cut_and_a_larger_old_part_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "SHARD", 20)
    paths = glyphs.write_shards(tmp_path, "val", 50)
    assert [p.name for p in paths] == ["val-0000.tar", "val-0001.tar", "val-0002.tar"]
    assert [len(samples([p])) for p in paths] == [20, 20, 10]
    with pytest.raises(FileExistsError, match=r"holds val-0002.tar of a larger 'val'"):
        glyphs.write_shards(tmp_path, "val", 40)


def test_every_face_has_a_glyph_for_what_it_draws(every: dict) -> None:
    has = {face: FT2Font(str(glyphs._path(face.file))).get_charmap() for face in glyphs.FACES}
    drawn = [g for part in every.values() for g in part]
    assert all(has[g.face].get(ord(g.char), 0) > 0 for g in drawn)
    boxes = {glyphs.draw("\U0010fffd", face, 40) for face in glyphs.FACES}  # what a face shows for a code it lacks
    assert boxes != {None} and not boxes & {g.picture for g in drawn}


@pytest.mark.parametrize("pixels", [16, 40, 64])
def test_nothing_is_cut_off_and_letters_keep_one_baseline(pixels: int) -> None:
    face = glyphs.FACES[0]
    ink = lambda char: 255 - np.frombuffer(glyphs.draw(char, face, pixels), np.uint8).reshape(pixels, pixels)
    for char in "ÅgǗ@W‱Ǆ⣿―":
        picture = ink(char)
        assert not (picture[0].any() or picture[-1].any() or picture[:, 0].any() or picture[:, -1].any()), char
    foot = lambda char: np.flatnonzero(ink(char).max(1) > 100)[-1]
    assert foot("x") == foot("H") == foot("i") < foot("p")
    columns = np.flatnonzero(ink("H").any(0))
    assert abs((columns[0] + columns[-1]) / 2 - (pixels - 1) / 2) <= 1
    assert glyphs.draw("\u2800", face, pixels) is None  # the blank of Braille


def test_names_and_forms() -> None:
    assert [glyphs.letter(c) for c in "ÁªøⅧ𝐀Ж★"] == ["a", "a", "o", "v", "a", "ж", "★"]
    assert [glyphs.base_name(c) for c in "òøΆ→"] == ["latin small letter o"] * 2 + ["greek capital letter alpha", "rightwards arrow"]
    assert [glyphs.script(c) for c in "aЖ7;→ʰ"] == ["latin", "cyrillic", "number", "punctuation", "symbol", "letter"]


def test_triplets_change_what_they_say(tmp_path: Path) -> None:
    paths = glyphs.write_shards(tmp_path, "train", 1500)
    meta = {key: sample["json"] for key, sample in samples(paths).items()}
    lines = [json.loads(line) for line in (tmp_path / "train-triplets.jsonl").read_text().splitlines()]
    assert len({tuple(t.values()) for t in lines}) == len(lines) > 1500
    kinds = Counter(t["kind"] for t in lines)
    assert set(kinds) == {"case", "accent", "weight", "slant", "family"} and min(kinds.values()) > 20
    style = ("style", "weight", "slant")
    for triplet in lines:
        assert list(triplet) == ["reference", "modification", "target", "kind"]
        a, b = meta[triplet["reference"]], meta[triplet["target"]]
        differ = [f for f in style if a[f] != b[f]]
        words = triplet["modification"]
        if triplet["kind"] in ("weight", "slant", "family"):
            assert a["class"] == b["class"] and differ == [{"family": "style"}.get(triplet["kind"], triplet["kind"])]
            assert b[differ[0]] in words
        else:
            assert not differ and a["class"] != b["class"]
        if triplet["kind"] == "case":
            assert words.split()[-2] in b["class"] and a["class"].replace("small", "capital") == b["class"].replace("small", "capital")
        if words == "remove the accents":
            assert a["hierarchy"][2] == b["class"]
        elif triplet["kind"] == "accent":
            assert b["class"] == f"{a['class']} with {words.removeprefix('add ')}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test",), "no part 'test': choose one of train, val, val-seen"),
        (("val", 0), "size=0 must be at least 1"),
        (("val", 99_999), r"size=99999 is more than the \d+ pictures of part 'val'"),
        (("val", 5, 8), "pixels=8 must lie between 16 and 512"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs.write_shards(tmp_path, *arguments)
