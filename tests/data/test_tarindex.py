"""The walk and the index: the same as tarfile on healthy tars, and on damaged ones whatever is still whole."""

import io
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxvl.data.cache import Cache, stamp
from jaxvl.data.indexing import ensure_indexes, index_path
from jaxvl.data.reasons import LOST, REASONS
from jaxvl.data.tarindex import build_index, exclude, load_index, read_summary, save_index
from jaxvl.data.tarwalk import Member, walk
from tests.data.broken_tars import BLOCK, header_at, with_size
from tests.data.shards import members, tar_bytes, write_shards


def index_of(data: bytes):
    """The index of a tar in memory."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return build_index(file.fileno(), (len(data), 0))


def walk_of(data: bytes) -> list:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return list(walk(file.fileno(), len(data)))


def good_keys(index) -> list[str]:
    return [index.key(row) for row in range(index.pairs)]


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=150)
paths = st.lists(names.filter(lambda n: n not in (".", "..")), min_size=1, max_size=3).map("/".join).filter(lambda n: not n.endswith("/"))


@given(
    st.lists(st.tuples(paths, st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=60, deadline=None)
def test_walk_is_tarfile_on_healthy_tars(entries: list[tuple[str, bytes]], kind: int) -> None:
    data = tar_bytes(entries, kind)
    found = walk_of(data)
    assert all(isinstance(m, Member) and m.kind == "file" and not m.truncated for m in found)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name.decode(), m.offset, m.size) for m in found] == [(m.name, m.offset_data, m.size) for m in tar]
    assert [data[m.offset : m.offset + m.size] for m in found] == [content for _, content in entries]


WHOLE = tar_bytes([m for n in range(6) for m in members(n)])
ENDS = {n: header_at(WHOLE, f"{n:06d}.json") + 2 * BLOCK for n in range(6)}


@given(st.integers(0, len(WHOLE)))
@settings(max_examples=100, deadline=None)
def test_a_tar_cut_anywhere_keeps_what_comes_before(cut: int) -> None:
    index = index_of(WHOLE[:cut])
    good = set(good_keys(index))
    assert {f"{n:06d}" for n, end in ENDS.items() if end <= cut} <= good
    for row in index.rows[: index.pairs]:
        assert row["image_at"] + row["image_size"] <= cut and row["text_at"] + row["text_size"] <= cut


@given(st.integers(0, ENDS[5] - 1), st.integers(0, 2000), st.binary(max_size=1500))
@settings(max_examples=150, deadline=None)
def test_damage_costs_only_the_samples_it_touches(at: int, lost: int, put: bytes) -> None:
    """Any stretch replaced by any other, of another length too: all samples outside it are found."""
    data = WHOLE[:at] + put + WHOLE[at + lost :]
    index = index_of(data)
    found = {index.key(r): index.rows[r] for r in range(index.pairs)}
    starts = {n: header_at(WHOLE, f"{n:06d}.png") for n in ENDS}
    for n, end in ENDS.items():
        if end <= at or starts[n] >= at + lost:
            key = f"{n:06d}"
            assert key in found, (at, lost, put, index.damage)
            assert data[int(found[key]["text_at"]) :].startswith(b"number %d" % n)


@given(st.binary(max_size=4000))
@settings(max_examples=60, deadline=None)
def test_noise_is_no_tar_and_does_no_harm(noise: bytes) -> None:
    index = index_of(noise)
    assert len(index.rows) == 0 and index.damage[0] in LOST and len(index.damage) == 1


def test_interleaved_far_apart_and_nested_members() -> None:
    entries = [m for n in range(3) for m in members(n)]
    inner = tar_bytes(members(9))
    index = index_of(tar_bytes([*entries[::3], ("000007.tar", inner), *entries[1::3], *entries[2::3]]))
    assert good_keys(index) == ["000000", "000001", "000002"]
    assert index.bad_keys() == [("000007", "noimage")]


def test_the_first_of_duplicates_is_used_and_the_others_count() -> None:
    tar = tar_bytes([*members(1), ("000001.png", b"2nd"), ("000001.txt", b"two"), ("000001.png", b"3rd")])
    index = index_of(tar)
    assert index.bad_keys() == [("000001", "duplicate")] * 2
    row = index.rows[0]
    assert tar[int(row["text_at"]) :].startswith(b"number 1") and index.pairs == 1


def test_images_without_captions_follow_the_pairs() -> None:
    index = index_of(
        tar_bytes([("a.jpg", b"\xff\xd8\xff"), *members(1), ("b.jpg", b"x"), ("b.txt", b""), ("c.jpg", b"x"), ("c.cls", b"3")])
    )
    assert index.pairs == 1 and [index.key(r) for r in range(len(index.rows))] == ["000001", "a", "b", "c"]
    assert index.rows["cls_size"].tolist() == [0, 0, 0, 1]


def test_large_sizes_are_refused_not_read() -> None:
    tar = with_size(tar_bytes([*members(1), *members(2)]), "000001.txt", b"00020000001\0")
    assert good_keys(index_of(tar)) == ["000002"]


def test_save_load_exclude(tmp_path: Path) -> None:
    data = tar_bytes([*members(1), ("lone.png", b"x"), *members(2), ("only.txt", b"x"), *members(3)])
    index = index_of(data)
    path = tmp_path / "x" / "i.idx"
    save_index(index, path)
    loaded = load_index(path)
    for a, b in zip(index, loaded, strict=True):
        np.testing.assert_array_equal(a, b)
    fewer = exclude(loaded, {0: "corrupt", 2: "blank"})
    save_index(fewer, path)
    fewer = load_index(path)
    assert good_keys(fewer) == ["000002"] and [fewer.key(r) for r in range(2)] == ["000002", "lone"]
    assert fewer.bad_keys() == [("only", "noimage"), ("000001", "corrupt"), ("000003", "blank")]
    assert fewer.rows[0] == _with_end(index.rows[1], fewer.rows[0]["key_end"])


def _with_end(row: np.void, end: int) -> np.void:
    row = row.copy()
    row["key_end"] = end
    return row


def test_stale_and_broken_index_files_are_built_again(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [3, 2])
    shards, cache = [str(p) for p in sorted((tmp_path / "s").iterdir())], Cache(str(tmp_path / "cache"), 1 << 30)
    folder = str(tmp_path / "index")
    assert [s.pairs for s in ensure_indexes(shards, folder, cache)] == [3, 2]
    first, second = (Path(index_path(s, folder)) for s in shards)
    times = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    ensure_indexes(shards, folder, cache)
    assert times == (first.stat().st_mtime_ns, second.stat().st_mtime_ns), "a good index is left alone"
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"")
    assert read_summary(first) is None and read_summary(second) is None
    with pytest.warns(UserWarning, match="2 of 2 indexes, .* are damaged"):
        assert [s.pairs for s in ensure_indexes(shards, folder, cache)] == [3, 2]
    Path(shards[0]).write_bytes(tar_bytes(members(7)))
    os.utime(shards[1], (1, 1))
    assert [s.pairs for s in ensure_indexes(shards, folder, cache)] == [1, 2]
    assert [s.stamp for s in ensure_indexes(shards, folder, cache)] == [stamp(s) for s in shards]
    assert not list(Path(folder).glob(".*")), "no partial files stay"


def test_reasons_are_one_word_each() -> None:
    assert all(word.isalpha() and word.islower() and meaning for word, meaning in REASONS.items())


def test_processes_build_the_same_indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxvl.data.indexing.PROCESSES_FROM", 0)
    monkeypatch.setattr("jaxvl.data.indexing.cores", lambda: 2)
    write_shards(tmp_path / "s", [3, 2, 4])
    shards, cache = [str(p) for p in sorted((tmp_path / "s").iterdir())], Cache(str(tmp_path / "cache"), 1 << 30)
    assert [s.pairs for s in ensure_indexes(shards, str(tmp_path / "index"), cache)] == [3, 2, 4]
