"""The order: a bijection of every epoch, a pure function of the sample number, at no cost to seek."""

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxvl.data.indexing import index_path
from jaxvl.data.keyed import mix, permute, uniforms
from jaxvl.data.mixing import BLOCK, mixture, quotas
from jaxvl.data.order import sample_order
from jaxvl.data.stream import open_data, train_batches
from tests.data.shards import Letters, members, options, tar_bytes

counts_of = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    image = permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(image.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 5, 24, 100])
def test_permute_is_uniform_over_keys(size: int) -> None:
    """Every element lands everywhere equally often, and so does every pair of neighbours (chi-square, five sigma)."""
    keys = mix(7, np.arange(20_000))
    for place in {0, size // 2, size - 1}:
        seen = np.bincount(permute(np.full(len(keys), place), np.full(len(keys), size), keys), minlength=size)
        expected = len(keys) / size
        assert ((seen - expected) ** 2 / expected).sum() < size - 1 + 5 * np.sqrt(2 * size) + 5
    step = permute(np.full(len(keys), 1), np.full(len(keys), size), keys) - permute(np.full(len(keys), 0), np.full(len(keys), size), keys)
    assert abs((step > 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(len(keys))


def test_uniforms_are_uniform_and_independent_of_the_batch() -> None:
    key = mix(3, 5, np.arange(40_000))
    draws = uniforms(key, 3)
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 5 / np.sqrt(12 * len(key))
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 5 / np.sqrt(len(key))
    np.testing.assert_array_equal(uniforms(key[100:101], 3)[0], draws[100])


def test_mix_depends_on_every_part_and_their_order() -> None:
    keys = [int(mix(*parts)[0]) for parts in itertools.product(range(6), repeat=3)]
    assert len(set(keys)) == len(keys)


@given(counts_of, st.integers(0, 13), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_every_epoch_has_every_sample_once(counts: list[int], group: int, seed: int) -> None:
    total, order = sum(counts), sample_order(seed, np.array(counts), group)
    every = sorted((s, r) for s, c in enumerate(counts) for r in range(c))
    for epoch in (0, 1, 1000):
        shard, row = order.at(np.arange(epoch * total, (epoch + 1) * total))
        assert sorted(zip(shard.tolist(), row.tolist(), strict=True)) == every


@given(counts_of, st.integers(0, 13), st.lists(st.integers(0, 10**15), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_a_place_depends_on_its_number_alone(counts: list[int], group: int, numbers: list[int]) -> None:
    order = sample_order(3, np.array(counts), group)
    together = np.stack(order.at(np.array(numbers)))
    alone = np.concatenate([np.stack(order.at(np.array([n]))) for n in numbers], 1)
    np.testing.assert_array_equal(together, alone)


@given(counts_of, st.integers(1, 5), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_groups_are_read_one_after_the_other(counts: list[int], group: int, seed: int) -> None:
    order, n = sample_order(seed, np.array(counts), group), 0
    while n < 2 * sum(counts):
        shards, after = order.group(n)
        assert 1 <= len(shards) <= group and after > n
        shard, _ = order.at(np.arange(n, after))
        assert set(shard.tolist()) == {s for s in shards.tolist() if counts[s]}
        n = after


def test_epochs_and_seeds_differ() -> None:
    counts = np.full(8, 50)
    orders = [np.stack(sample_order(seed, counts, 4).at(np.arange(400) + 400 * epoch)) for seed in (0, 1) for epoch in (0, 1)]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).all(0).mean() < 0.05


@given(counts_of, st.integers(0, 5), st.integers(0, 10**12), st.integers(0, 15))
@settings(max_examples=40, deadline=None)
def test_substitutes_are_samples(counts: list[int], group: int, n: int, attempt: int) -> None:
    order = sample_order(0, np.array(counts), group)
    shard, row = order.replace(n, attempt)
    assert 0 <= row < counts[shard]
    assert (shard, row) == order.replace(n, attempt)
    if attempt < 8:
        assert shard in order.group(n)[0]


def test_substitutes_spread() -> None:
    order = sample_order(0, np.array([100, 100, 0, 100]), 1)
    near = {order.replace(5, attempt)[1] for attempt in range(8)}
    far = {order.replace(n, 12)[0] for n in range(40)}
    assert len(near) > 5 and far == {0, 1, 3}


@pytest.mark.parametrize(
    ("counts", "group", "message"),
    [([], 1, "at least one"), ([0, 0], 1, "at least one"), ([3], -1, "group_shards is -1")],
)
def test_orders_that_cannot_be(counts: list[int], group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_order(0, np.array(counts, np.int64), group)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(0, 2**32), st.integers(0, 10**12))
@settings(max_examples=40, deadline=None)
def test_mixture_keeps_shares_and_order(weights: list[float], seed: int, first: int) -> None:
    quota = quotas(weights)
    assert sum(quota) == BLOCK
    assert np.abs(np.array(quota) - np.array(weights) / sum(weights) * BLOCK).max() < 1
    at, first = mixture(seed, quota), first // BLOCK * BLOCK
    source, number = at(np.arange(first, first + 2 * BLOCK))
    for s, q in enumerate(quota):
        np.testing.assert_array_equal(number[source == s], np.arange(first // BLOCK * q, first // BLOCK * q + 2 * q))
        assert (source[:BLOCK] == s).sum() == q
    middle = at(np.arange(first + 777, first + 1333))
    np.testing.assert_array_equal(middle, (source[777:1333], number[777:1333]))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf")), (1.0, 1e-5)])
def test_weights_that_cannot_be(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"data\.weights"):
        quotas(weights)


def test_the_end_of_ten_million_samples_in_two_seconds(tmp_path: Path) -> None:
    """2,000 shards of 5,000 samples, hard links of one, opened and read from the end of the epoch on."""
    import grain  # noqa: F401 (its import is no part of seeking)

    first = tmp_path / "shards" / "0000.tar"
    first.parent.mkdir()
    one = members(1)
    first.write_bytes(tar_bytes([(f"{n:05d}{name[6:]}", data) for n in range(5000) for name, data in one[:2]]))
    dataset = open_data(options(str(first), tmp_path, indexes=str(tmp_path / "index")))
    assert len(dataset) == 5000
    built = index_path(str(first), str(tmp_path / "index"))
    for shard in range(1, 2000):
        path = str(first.parent / f"{shard:04d}.tar")
        os.link(first, path)
        os.link(built, index_path(path, str(tmp_path / "index")))
    began = time.perf_counter()
    dataset = open_data(options(str(first.parent), tmp_path, indexes=str(tmp_path / "index"), group_shards=16))
    batches = train_batches(dataset, Letters(), seed=0, start=len(dataset) - 64, batch_size=128)
    batch = next(batches)
    took = time.perf_counter() - began
    batches.close()
    assert len(dataset) == 10_000_000 and len(np.unique(batch.ids)) == 128
    assert took < 2, f"{took:.2f} s"
