"""Parts of samples that are named apart: joined by one rule for a shard, never one by one."""

import pytest

from tests.data.shards import members, picture, tar_bytes
from tests.data.test_tarindex import index_of


def found(*names: str) -> tuple[list[str], list[tuple[str, str]], tuple[str, ...]]:
    """Of a tar of these members, each holding its own name, "image < text, json, cls" of each pair, what is bad, the words."""
    tar = tar_bytes([(name, name.encode()) for name in names])
    index = index_of(tar)
    held = lambda row, slot: tar[int(row[f"{slot}_at"]) :][: int(row[f"{slot}_size"])].decode()
    pairs = [" ".join(filter(None, (held(row, slot) for slot in ("image", "text", "json", "cls")))) for row in index.rows[: index.pairs]]
    bare = [(index.key(r), "nocaption") for r in range(index.pairs, len(index.rows))]
    return pairs, sorted([*index.bad_keys(), *bare]), index.damage


@pytest.mark.parametrize(
    ("names", "bad"),
    [
        (("cats/6.jpg", "dogs/6.txt"), [("6", "nocaption"), ("6", "noimage")]),
        (("a/6.jpg", "b/7.txt", "b/6.txt"), [("6", "nocaption"), ("6", "noimage"), ("7", "noimage")]),
        (("images/cats/6.jpg", "captions/dogs/6.txt"), [("6", "nocaption"), ("6", "noimage")]),
        (("images/6.jpg", "images/7.jpg", "images/7.txt", "captions/6.txt"), [("6", "nocaption"), ("6", "noimage")]),
        (("images/6.jpg", "photos/6.jpg", "captions/6.txt"), [("6", "nocaption")] * 2 + [("6", "noimage")]),
        (("images/6.jpg", "captions/6.txt", "texts/6.txt"), [("6", "nocaption")] + [("6", "noimage")] * 2),
        (("images/6.1.jpg", "captions/6.2.txt"), [("6", "nocaption"), ("6", "noimage")]),
        (("img.1.jpg", "img.2.txt"), [("img", "nocaption"), ("img", "noimage")]),
        (("img.1.jpg", "img.1.txt", "img.2.jpg", "img.3.txt"), [("img", "nocaption"), ("img", "noimage")]),
        (("img.1.jpg", "img.txt"), [("img", "nocaption"), ("img", "noimage")]),
        (("0.raw.jpg", "0.raw.txt", "1.raw.jpg", "1.txt"), [("1", "nocaption"), ("1", "noimage")]),
        (("0.raw.jpg", "0.en.txt"), [("0", "nocaption"), ("0", "noimage")]),
        (("0.jpg", "0.txt", "0.depth.png", "1.depth.png", "1.txt"), [("1", "nocaption"), ("1", "noimage")]),
        (
            ("6.jpg", "6.jpg", "6.txt", "6.raw.txt", "7.jpg", "7.raw.txt"),
            [(k, r) for k in "67" for r in ("duplicate", "nocaption", "noimage")[k == "7" :]],
        ),
        (("images/6.jpg", "images/6.jpg", "captions/6.txt"), [("6", "duplicate"), ("6", "nocaption"), ("6", "noimage")]),
        (("6.a.jpg", "6.b.jpg", "6.txt"), [("6", "ambiguous")]),
        (("6.a.jpg", "6.b.jpg", "6.txt", "6.json", "7.a.jpg", "7.b.jpg", "7.txt"), [("6", "ambiguous"), ("7", "ambiguous")]),
        (("6.a.jpg", "6.b.jpg", "6.cls"), [("6", "ambiguous")]),
        (("6.a.jpg", "6.b.jpg"), [("6", "nocaption")] * 2),
        (("6.jpg", "6.en.txt", "6.de.txt"), [("6", "nocaption"), ("6", "noimage"), ("6", "noimage")]),
    ],
)
def test_lone_parts_are_bad_samples(names: tuple[str, ...], bad: list[tuple[str, str]]) -> None:
    pairs, told, words = found(*names)
    assert told == bad and not words
    assert all(
        pair.split(".")[0] == pair.split()[-1].split(".")[0] and len({p.rpartition(".")[0] for p in pair.split()}) == 1 for pair in pairs
    )


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("images/6.jpg", "captions/6.txt", "images/7.jpg"), ["images/6.jpg captions/6.txt"]),
        (("set/JPEGImages/6.1.jpg", "set/Annotations/6.1.txt"), ["set/JPEGImages/6.1.jpg set/Annotations/6.1.txt"]),
        (("imgs/cats/6.jpg", "imgs/dogs/6.jpg", "txts/dogs/6.txt"), ["imgs/dogs/6.jpg txts/dogs/6.txt"]),
        (("images/6.jpg", "captions/6.txt", "labels/6.cls", "meta/6.json"), ["images/6.jpg captions/6.txt meta/6.json labels/6.cls"]),
        (("6.photo.jpg", "6.txt", "7.txt", "7.photo.jpg", "8.txt"), ["6.photo.jpg 6.txt", "7.photo.jpg 7.txt"]),
        (("0.jpg", "0.txt", "1.raw.jpg", "1.txt", "1.json"), ["0.jpg 0.txt", "1.raw.jpg 1.txt 1.json"]),
        (("6.jpg", "6.cap.txt", "6.depth.png", "7.jpg", "7.cap.txt", "readme.txt"), ["6.jpg 6.cap.txt", "7.jpg 7.cap.txt"]),
        (("6.jpg", "6.txt", "6.meta.json", "7.jpg", "7.txt", "7.meta.json"), ["6.jpg 6.txt 6.meta.json", "7.jpg 7.txt 7.meta.json"]),
    ],
)
def test_a_rule_of_the_whole_shard_joins_and_is_told(names: tuple[str, ...], pairs: list[str]) -> None:
    assert found(*names)[::2] == (pairs, ("joined",))


def test_stems_with_dots() -> None:
    """Pairs of one stem are samples; what lies beside a plain image is left aside."""
    pairs, bad, words = found(
        *(name for key in ("a.1", "a.2", "b") for name in (f"{key}.png", f"{key}.txt", f"{key}.json")),
        "b.depth.png",
        "b.en.txt",
        "b.clip.npy",
    )
    assert pairs == [f"{key}.png {key}.txt {key}.json" for key in ("a.1", "a.2", "b")] and not bad and not words


def test_images_by_content_need_to_be_one() -> None:
    both = [("0.left", picture(1)), ("0.right", picture(2)), ("0.txt", b"which?")]
    assert index_of(tar_bytes(both)).bad_keys() == [("0", "ambiguous")]
    index = index_of(tar_bytes([*both, ("0.png", picture(3)), *members(4)]))
    assert index.pairs == 2 and not len(index.bad) and index.rows["image_size"][0] == len(picture(3))
