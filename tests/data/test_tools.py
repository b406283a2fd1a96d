"""`jaxvl data`: tables that add up, records that later runs heed, shards made of folders."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxvl.data import tools
from jaxvl.data.stream import eval_batches, open_data, read_samples
from tests.data.shards import Letters, members, number_of, options, picture, tar_bytes, write_shards


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Two shards: one whole, with a repeated picture; one with two bad in the index and two that decoding finds."""
    write_shards(tmp_path / "s", [4])
    with_twin = [("000009.png", picture(2)), ("000009.txt", b"number 2")]
    (tmp_path / "s" / "0000.tar").write_bytes(tar_bytes([*(m for n in range(4) for m in members(n)), *with_twin]))
    entries = [
        ("000008.png", b"<html>"),
        ("000008.txt", b"x"),
        *members(5),
        *members(6)[:1],
        ("000007.txt", b"x"),
        ("9.png", picture(9)),
        ("9.txt", b"\xff"),
    ]
    (tmp_path / "s" / "0001.tar").write_bytes(tar_bytes(entries))
    return str(tmp_path / "s")


def test_index_check_record(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    where = {"cache": str(tmp_path / "cache"), "json": True}
    assert tools.index([shards], **where) == 0
    index = json.loads(capsys.readouterr().out)
    assert (index["good"], index["bad"], index["reasons"]) == (8, 2, {"nocaption": 1, "noimage": 1})
    assert tools.check([shards], record=True, **where) == 0
    check = json.loads(capsys.readouterr().out)
    assert check["reasons"] == {"nocaption": 1, "noimage": 1, "notimage": 1, "undecodable": 1}
    totals = [[s["good"] + sum(map(len, s["bad"].values())) for s in report["shards"]] for report in (index, check)]
    assert totals == [[5, 5], [5, 5]]
    assert check["shards"][1]["bad"] == {
        "nocaption": ["000006"],
        "noimage": ["000007"],
        "notimage": ["000008"],
        "undecodable": ["9"],
    }
    dataset = open_data(options(shards, tmp_path, max_bad_rate=0.5))
    assert len(dataset) == 6 and [number_of(p) for b in eval_batches(dataset, Letters(), batch_size=6) for p in b.arrays["image"]] == [
        0,
        1,
        2,
        3,
        2,
        5,
    ]
    tools.index([shards], **where)
    assert json.loads(capsys.readouterr().out)["reasons"] == check["reasons"]
    tools.index([shards], rebuild=True, **where)
    assert json.loads(capsys.readouterr().out) == index, "a rebuilt index knows nothing of what was recorded"


def test_tables_for_people(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    tools.check([shards], cache=str(tmp_path / "cache"))
    out = capsys.readouterr().out
    assert "1 nocaption" in out and "the image is something else" in out
    sums = next(line for line in out.splitlines() if "│ all" in line)
    assert sums.replace("│", " ").split()[:4] == ["all", "10", "6", "4"]
    monkeypatch.setattr(tools, "SHOWN", 1)
    tools.index([shards], cache=str(tmp_path / "cache"))
    out = capsys.readouterr().out
    assert "0001.tar" in out and "0000.tar" not in out and "1 more" in out


def test_nothing_usable_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.tar").write_bytes(b"")
    assert tools.index([str(tmp_path / "x.tar")], cache=str(tmp_path / "cache")) == 1
    assert "1 empty" in capsys.readouterr().out
    assert tools.stats([str(tmp_path / "x.tar")], cache=str(tmp_path / "cache")) == 1
    assert "1 of 1 shards: the image, or the shard, holds nothing" in capsys.readouterr().out


def test_lost_shards_come_first_and_are_estimated(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s" / "0002.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    monkeypatch.setattr(tools, "SHOWN", 1)
    tools.check([shards], cache=str(tmp_path / "cache"))
    out = capsys.readouterr().out
    assert "0002.tar" in out and "lost shards lack some 5 samples" in out and "`git lfs pull`" in out
    tools.stats([shards], cache=str(tmp_path / "cache"), json=True)
    assert any("1 of 3 shards: a pointer" in sentence for sentence in json.loads(capsys.readouterr().out)["contents"])


def test_stats(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tools.stats([shards], cache=str(tmp_path / "cache"), json=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["bad"], report["shards"], report["looked at"]) == (8, 2, 2, 6)
    assert (report["repeated images"], report["repeated captions"]) == (1, 1)
    assert report["spread"]["width"] == dict.fromkeys(tools.QUANTILES, 12.0)
    assert report["spread"]["caption words"]["median"] == 2 and report["spread"]["captions a sample"]["most"] == 2
    tools.stats([shards], cache=str(tmp_path / "cache"))
    assert "caption words" in capsys.readouterr().out


@pytest.mark.parametrize("listing", ["texts", "metadata.jsonl", "captions.csv", "captions.txt"])
def test_make_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture, listing: str) -> None:
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    for n in range(5):
        (folder / f"p.{n}.PNG").write_bytes(picture(n))
    rows = [(f"deep/p.{n}.PNG", text) for n in range(4) for text in (f"number {n}", f'a "{n}", again')]
    if listing == "texts":
        for n in range(4):
            (folder / f"p.{n}.txt").write_text(f"number {n}")
    elif listing.endswith("jsonl"):
        lines = [json.dumps({"file_name": f, "text": t, "year": 1999}) for f, t in rows]
        (tmp_path / "pictures" / listing).write_text("\n".join(lines) + "\n")
    else:
        lines = ["image,caption,year"] + ['{},"{}",1999'.format(f, t.replace('"', '""')) for f, t in rows]
        (tmp_path / "pictures" / listing).write_text("\n".join(lines))
    assert tools.make(str(tmp_path / "pictures"), tmp_path / "out", per_shard=3) == 0
    assert "p.4.PNG" in capsys.readouterr().out
    dataset = open_data(options(str(tmp_path / "out"), tmp_path))
    assert dataset.counts.tolist() == [3, 1]
    records = list(read_samples(dataset, np.arange(4)))
    assert [r.image for r in records] == [picture(n) for n in range(4)]
    assert [r.captions[0] for r in records] == [f"number {n}" for n in range(4)]
    assert records[2].meta["file"] == "deep/p.2.PNG"
    if listing != "texts":
        assert records[2].captions == ("number 2", 'a "2", again') and str(records[2].meta["year"]) == "1999"
    with pytest.raises(FileExistsError, match="holds shards already"):
        tools.make(str(tmp_path / "pictures"), tmp_path / "out")


def test_make_glyphs_and_what_cannot_be_made(tmp_path: Path) -> None:
    tools.make("glyphs", tmp_path / "g", part="val", size=7)
    assert len(open_data(options(str(tmp_path / "g"), tmp_path))) == 7
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "x.png").write_bytes(picture(1))
    for what, message, more in (
        ("nowhere", "is not a folder", {}),
        (str(tmp_path / "bare"), "1 images, none with a NAME.txt", {}),
        (str(tmp_path / "bare"), "--size is not for", {"size": 3}),
        (str(tmp_path / "bare"), "--part is not for .* takes --per-shard, --layout", {"part": "test"}),
        ("glyphs", "--per-shard is not for 'glyphs', which takes --part, --size", {"per_shard": 5}),
        ("glyphs", "--layout is not for", {"layout": "sop"}),
        ("fashion200k:bare", "--images is not for", {"images": "x"}),
        ("x.csv", "--layout is not for", {"layout": "sop"}),
    ):
        with pytest.raises(ValueError, match=message):
            tools.make(what, tmp_path / "out", **more)


LABELLED = {
    "cls": lambda n: [("cls", b"%d\n" % (n % 3))],
    "class": lambda n: [("json", json.dumps({"class": f"c{n % 3}", "file": "x"}).encode())],
    "alt": lambda n: [("json", json.dumps({"alt": f"number {n}", "width": 3}).encode())],
    "captions": lambda n: [("json", json.dumps({"captions": [f"number {n}", "x"]}).encode())],
    "": lambda n: [("json", json.dumps({"width": 3}).encode())],
}


@pytest.mark.parametrize("field", LABELLED)
def test_sets_without_key_txt_are_read_as_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture, field: str) -> None:
    """Found by looking, or named; the image of every sample is decoded, and what is recorded leaves the others where they were."""
    entries = [(f"{n}.{e}", data) for n in range(8) for e, data in [("png", picture(n)), *LABELLED[field](n)]]
    entries[0] = ("0.png", b"<html>")
    empty = {"cls": b" \n", "class": b'{"class": ""}', "alt": b'{"alt": " "}', "captions": b'{"captions": []}'}.get(field)
    if empty is not None:
        entries[3] = (entries[3][0], empty)
    (tmp_path / "x.tar").write_bytes(tar_bytes(entries))
    where = {"cache": str(tmp_path / "cache"), "json": True}
    assert tools.index([str(tmp_path / "x.tar")], **where) == 0
    index = json.loads(capsys.readouterr().out)
    assert (index["good"], index["bad"]) == (8, 0) and (repr(field) if field else "width") in index["contents"][0]
    reason = "nocaption" if field in ("alt", "captions") else "unlabelled"
    expected = {"notimage": 1} | ({reason: 1} if field else {})
    named = {} if not field else {"caption_field": field} if reason == "nocaption" else {"label": field}
    for how in ({}, named, {"record": True}):
        assert tools.check([str(tmp_path / "x.tar")], **where, **how) == 0
        check = json.loads(capsys.readouterr().out)
        assert check["reasons"] == expected and check["good"] == 8 - len(expected), how
    tools.index([str(tmp_path / "x.tar")], **where)
    assert json.loads(capsys.readouterr().out)["reasons"] == {"notimage": 1}, "what hangs on a field is not recorded"
    tools.stats([str(tmp_path / "x.tar")], **where)
    report = json.loads(capsys.readouterr().out)
    captioned = reason == "nocaption"
    assert (report["samples"], report["looked at"]) == (7, 6 if captioned else 7)
    assert ("caption words" in report["spread"]) == captioned and (report.get("labels") == 3) == (field in ("cls", "class"))
    wanted = (
        {"captions": "none", "label": field}
        if reason == "unlabelled" and field
        else {"caption_field": field}
        if field
        else {"captions": "none"}
    )
    dataset = open_data(options(str(tmp_path / "x.tar"), tmp_path, max_bad_rate=0.5, **wanted))
    assert dataset.classes == {"class": ("c0", "c1", "c2")}.get(field, ())
    batches = list(eval_batches(dataset, Letters(), batch_size=7))
    assert sum(int(b.arrays["valid"].sum()) for b in batches) == (6 if field else 7)


def test_what_is_made_of_classes_is_good_and_folders_are_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for n in range(6):
        (tmp_path / "set" / f"c{n % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / f"c{n % 2}" / f"{n}.png").write_bytes(picture(n))
    tools.make(str(tmp_path / "set"), tmp_path / "out", layout="folders")
    capsys.readouterr()
    for source in (str(tmp_path / "out"), f"folder://{tmp_path / 'set'}"):
        for verb in (tools.index, tools.check, tools.stats):
            assert verb([source], cache=str(tmp_path / "cache"), json=True) == 0
            report = json.loads(capsys.readouterr().out)
            assert report.get("good", report.get("samples")) == 6 and not report["bad"], (source, verb)
    assert tools.check([str(tmp_path / "out")], cache=str(tmp_path / "cache")) == 0
    assert "labels are read from the field 'class'" in capsys.readouterr().out


def test_images_that_lost_their_captions_stay_bad(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([("1.png", picture(1)), ("2.png", picture(2))]))
    assert tools.check([str(tmp_path / "x.tar")], cache=str(tmp_path / "cache"), json=True) == 1
    assert json.loads(capsys.readouterr().out)["reasons"] == {"nocaption": 2}


def test_what_one_shard_raises_is_its_own(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = tools.decode.decode_eval
    monkeypatch.setattr(tools.decode, "decode_eval", lambda image, how: 1 // 0 if image == picture(1) else decode(image, how))
    with pytest.warns(UserWarning, match=r"the rest of shard .*0000\.tar cannot be read: .*zero"):
        tools.check([shards], cache=str(tmp_path / "cache"), json=True, record=True)
    first, second = json.loads(capsys.readouterr().out)["shards"]
    assert (first["good"], len(first["bad"]["unreadable"])) == (1, 4) and second["good"] == 1
    tools.index([shards], cache=str(tmp_path / "cache"), json=True)
    assert json.loads(capsys.readouterr().out)["shards"][0]["good"] == 5, "and is not recorded"
    probe = tools.decode.probe
    monkeypatch.setattr(tools.decode, "probe", lambda image, how: 1 // 0 if image == picture(1) else probe(image, how))
    with pytest.warns(UserWarning, match=r"the rest of shard .*0000\.tar cannot be read"):
        tools.stats([shards], cache=str(tmp_path / "cache"), json=True)
    assert json.loads(capsys.readouterr().out)["looked at"] == 2
