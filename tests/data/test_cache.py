"""Copies of shards: fetched once, whole or not at all, within their bound, with the shards' own samples."""

import gzip
import multiprocessing
import os
import time
from concurrent import futures
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jaxvl.data import cache
from jaxvl.data.ahead import fetch_ahead
from jaxvl.data.cache import Cache, open_shard
from jaxvl.data.stream import eval_batches, open_data, train_batches
from tests.data.shards import Letters, members, number_of, options, tar_bytes, write_shards


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Four shards of six samples in a store of fsspec."""
    memory, folder = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    for shard in range(4):
        memory.pipe(f"{folder}/{shard:04d}.tar", tar_bytes([m for n in range(6 * shard, 6 * shard + 6) for m in members(n)]))
    return f"memory:/{folder}"


def content(fd: int) -> bytes:
    try:
        return os.pread(fd, 1 << 30, 0)
    finally:
        os.close(fd)


def held(folder: Path) -> int:
    return sum(f.stat().st_size for f in (folder / "shards").glob("*.tar"))


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{0000..0003}.tar"])
def test_a_store_gives_the_samples_of_its_shards(store: str, tmp_path: Path, pattern: str) -> None:
    remote = open_data(options(store + pattern, tmp_path, group_shards=1))
    local = open_data(options(write_shards(tmp_path / "local", [6] * 4), tmp_path, group_shards=1))
    assert remote.counts.tolist() == [6] * 4 and all(s.startswith("memory://") for s in remote.sources[0].shards)
    here, there = (train_batches(d, Letters(), seed=0, start=0, batch_size=9) for d in (local, remote))
    for _ in range(5):
        a, b = next(here), next(there)
        np.testing.assert_array_equal(a.arrays["image"], b.arrays["image"])
        np.testing.assert_array_equal(a.ids, b.ids)
    here.close()
    there.close()


def test_a_small_cache_is_never_exceeded(store: str, tmp_path: Path) -> None:
    size = len(fsspec.filesystem("memory").cat(f"{store[8:]}/0000.tar"))
    dataset = open_data(options(store, tmp_path, cache_gb=2.5 * size / 2**30))
    numbers = [number_of(p) for b in eval_batches(dataset, Letters(), batch_size=6) for p in b.arrays["image"]]
    assert numbers == list(range(24))
    assert 0 < held(tmp_path / "cache") <= 2.5 * size
    with pytest.raises(OSError, match=r"cannot copy shard memory://.*raise data.cache_gb"):
        open_data(options(store, tmp_path / "other", cache_gb=0.5 * size / 2**30))


def test_the_least_recently_used_goes_first(store: str, tmp_path: Path) -> None:
    shards = [f"{store}/{n:04d}.tar" for n in range(3)]
    small = Cache(str(tmp_path), 2 * len(fsspec.filesystem("memory").cat(shards[0][8:])))
    for shard in (shards[0], shards[1], shards[0], shards[2]):
        os.close(open_shard(shard, small))
        time.sleep(0.02)
    names = {cache.digest(f"{s} {size} {version}") for s in (shards[0], shards[2]) for size, version in [cache.stamp(s)]}
    assert {f.stem for f in (tmp_path / "shards").glob("*.tar")} == names


def test_an_open_shard_outlives_its_copy(store: str, tmp_path: Path) -> None:
    fd = open_shard(f"{store}/0000.tar", Cache(str(tmp_path), 1 << 30))
    for copy in (tmp_path / "shards").glob("*.tar"):
        copy.unlink()
    assert content(fd) == fsspec.filesystem("memory").cat(f"{store[8:]}/0000.tar")


def test_a_changed_shard_is_fetched_again(store: str, tmp_path: Path) -> None:
    everything = Cache(str(tmp_path), 1 << 30)
    old = content(open_shard(f"{store}/0000.tar", everything))
    new = tar_bytes(members(77))
    fsspec.filesystem("memory").pipe(f"{store[8:]}/0000.tar", new)
    assert content(open_shard(f"{store}/0000.tar", everything)) == new != old


def test_a_failed_fetch_leaves_nothing(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "STEP", 1000)
    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "read", lambda *_: 1 / 0, raising=False)
    with pytest.raises(OSError, match="division by zero"):
        open_shard(f"{store}/0000.tar", Cache(str(tmp_path), 1 << 30))
    assert not list((tmp_path / "shards").glob("*.tar")) + list((tmp_path / "shards").glob("*.partial"))


def test_a_store_without_the_shard(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere\.tar"):
        open_data(options("memory://nowhere.tar", tmp_path))
    with pytest.raises(ValueError, match=r"'memory://none/\*\.tar' matches no file"):
        open_data(options("memory://none/*.tar", tmp_path))


def _fetch(job: tuple[str, str, int]) -> int:
    shard, folder, limit = job
    return len(content(open_shard(shard, Cache(folder, limit))))


def test_processes_share_one_copy(tmp_path: Path) -> None:
    """Two processes, twelve requests for three gzip shards, in a cache with room for two."""
    jobs = []
    for n in range(3):
        (tmp_path / f"{n}.tar").write_bytes(gzip.compress(tar_bytes([("x.bin", bytes([n]) * 300_000)])))
        jobs.append((str(tmp_path / f"{n}.tar"), str(tmp_path / "cache"), 700_000))
    with futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert set(pool.map(_fetch, jobs * 4)) == {len(tar_bytes([("x.bin", bytes(300_000))]))}
    assert held(tmp_path / "cache") <= 700_000
    assert not list((tmp_path / "cache" / "shards").glob("*.partial"))


def test_gzip_is_unpacked_within_the_bound(tmp_path: Path) -> None:
    tar = tar_bytes([m for n in range(5) for m in members(n)])
    (tmp_path / "two.tar").write_bytes(gzip.compress(tar[:9000]) + gzip.compress(tar[9000:]))
    assert content(open_shard(str(tmp_path / "two.tar"), Cache(str(tmp_path), 1 << 30))) == tar
    (tmp_path / "bomb.tar").write_bytes(gzip.compress(bytes(60_000_000)))
    with pytest.raises(OSError, match=r"raise data\.cache_gb"):
        open_shard(str(tmp_path / "bomb.tar"), Cache(str(tmp_path), 1 << 20))
    assert not list((tmp_path / "shards").glob("*.partial"))


def test_shards_are_fetched_ahead_of_the_reader(store: str, tmp_path: Path) -> None:
    dataset = open_data(options(store, tmp_path))
    asked: list[int] = []
    source = dataset.sources[0]._replace(fetch=asked.append)
    object.__setattr__(dataset, "sources", (source,))
    near = {0: (0, 1), 6: (0, 1), 12: (1, 2), 18: (2, 3)}
    batches = fetch_ahead((letter for letter in "abcd"), dataset, lambda n: near[n], 0, 6)
    got = [next(batches) for _ in range(4)]
    deadline = time.monotonic() + 5
    while len(asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert got == list("abcd") and sorted(asked) == [0, 1, 2, 3]
