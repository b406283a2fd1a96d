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
        (str(tmp_path / "bare"), "part and size are for glyphs", {"size": 3}),
        ("glyphs", "shards of 1000", {"per_shard": 5}),
    ):
        with pytest.raises(ValueError, match=message):
            tools.make(what, tmp_path / "out", **more)
