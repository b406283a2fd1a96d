"""Patterns: what they name, in which order, and what is said where they name nothing or one shard twice."""

import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from jaxvl.data.cache import Cache
from jaxvl.data.sources import braces, expand
from jaxvl.data.stream import open_data, read_samples
from tests.data.shards import options, write_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "s", [1] * 12)
    (tmp_path / "s" / "notes.txt").write_text("no shard")
    return tmp_path / "s"


def names(pattern: str) -> list[str]:
    return [os.path.basename(s) for s in expand(pattern, Cache("", 0))]


def test_paths_folders_globs_and_ranges(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [f"{n:04d}.tar" for n in range(12)]
    assert names(str(folder)) == names(f"{folder}/*.tar") == names(f"{folder}/{{0000..0011}}.tar") == every
    assert names(f"{folder}/0003.tar") == ["0003.tar"]
    assert names(f"{folder}/00{{11,03,07}}.tar") == ["0011.tar", "0003.tar", "0007.tar"]
    assert names(f"{folder}/000[2-4].tar") == ["0002.tar", "0003.tar", "0004.tar"]
    assert names(f"file://{folder}/0001.tar") == ["0001.tar"]
    monkeypatch.chdir(folder.parent)
    assert expand("s", Cache("", 0)) == expand(str(folder), Cache("", 0)), "shards are named by their full paths"


def test_a_folder_has_compressed_shards_too_but_none_twice(folder: Path) -> None:
    for name in ("1.tar.gz", "2.tgz", "3.tar.zst", "4.tsv", "5.tar.txt"):
        (folder / name).write_bytes(b"")
    assert names(str(folder)) == [*(f"{n:04d}.tar" for n in range(12)), "1.tar.gz", "2.tgz", "3.tar.zst"]
    (folder / "0003.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0003\.tar plain and compressed"):
        names(str(folder))


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 5))
def test_ranges_count_with_the_width_of_their_start(first: int, more: int, width: int) -> None:
    assert list(braces(f"a{{{first:0{width}d}..{first + more}}}b")) == [f"a{n:0{width}d}b" for n in range(first, first + more + 1)]


def test_braces_nest_and_multiply() -> None:
    assert list(braces("{a,b{1..2}}-{x,y}")) == ["a-x", "a-y", "b1-x", "b1-y", "b2-x", "b2-y"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/none-*.tar", "matches no file"),
        ("{folder}/{{0010..0012}}.tar", r"0012\.tar' matches no file"),
        ("{folder}/../", "is a folder without"),
        ("{folder}/{{0000,0001,0000}}.tar", r"names .*0000\.tar more than once"),
        ("{folder}/{{0003..0001}}.tar", "ends before it begins"),
        ("{folder}/{{oops}}.tar", "neither a range"),
        ("{folder}/{{1,2.tar", "a brace is not closed"),
        ("glyphs://nothing", r"glyphs://train\|val"),
        ("glyphs://train?sise=3", "write glyphs://"),
        ("glyphs://train?size=many", "write glyphs://"),
    ],
)
def test_patterns_that_name_nothing(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(pattern.format(folder=folder), Cache(str(folder / "cache"), 0))


def test_glyphs_are_rendered_once(tmp_path: Path) -> None:
    dataset = open_data(options("glyphs://val?size=12", tmp_path))
    assert len(dataset) == 12
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "glyphs").rglob("*.tar")}
    assert times
    again = open_data(options("glyphs://val?size=12", tmp_path))
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "glyphs").rglob("*.tar")}
    assert list(read_samples(dataset, range(12))) == list(read_samples(again, range(12)))
    assert len(open_data(options("glyphs://val?size=9", tmp_path))) == 9
    every = list(read_samples(again, range(12)))
    os.truncate(next(iter(times)), 3000)
    assert list(read_samples(open_data(options("glyphs://val?size=12", tmp_path)), range(12))) == every, "rendered again"
