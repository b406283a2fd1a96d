"""The order of samples: a pure function of (seed, global sample number), O(1) to seek, pure numpy.

Sample n of a run is in epoch n // N. Each epoch permutes the shards, cuts them in groups of `group_shards`, and
permutes the samples of each group: reads stay inside a few open shards, and nothing depends on hosts or workers.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxvl.data.keyed import mix, permute

SHARDS, SAMPLES, REPLACE = 1, 2, 3  # what a key is for, so that no two draws share one
NEAR_ATTEMPTS = 8  # replacements tried in the sample's own group before the whole set: remote shards at hand first


class Order(NamedTuple):
    """at(n int64 [b]) -> shard, row, int64 [b] each. replace(n, attempt) -> shard, row of a substitute for sample n.

    group(n) -> the shards of the group that sample n is drawn from, and the first sample after that group.
    """

    at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    replace: Callable[[int, int], tuple[int, int]]
    group: Callable[[int], tuple[np.ndarray, int]]


class _Epoch(NamedTuple):
    shards: np.ndarray  # int64 [shard], permuted
    ends: np.ndarray  # int64 [shard], samples up to and including each shard of `shards`
    group_ends: np.ndarray  # int64 [group]


def sample_order(seed: int, counts: np.ndarray, group_shards: int) -> Order:
    """The order over shards of `counts` samples. `group_shards` 0 puts all shards in one group (a full shuffle).

    Raises ValueError when there is no sample to order or a group size is negative.
    """
    counts = np.asarray(counts, np.int64)
    total = int(counts.sum())
    if total == 0:
        raise ValueError("the order needs at least one sample, got shards that hold none")
    if group_shards < 0:
        raise ValueError(f"data.group_shards is {group_shards}; it must be at least 1, or 0 for all shards")
    group = group_shards or len(counts)

    @functools.lru_cache(maxsize=4)
    def layout(epoch: int) -> _Epoch:
        shards = np.argsort(mix(seed, SHARDS, epoch, np.arange(len(counts))), kind="stable")
        ends = np.cumsum(counts[shards])
        return _Epoch(shards, ends, ends[np.minimum(np.arange(group, len(counts) + group, group), len(counts)) - 1])

    def locate(epoch: int, place: np.ndarray, rank: Callable) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of places in an epoch; rank(place in group, size of group, group) moves them in their group."""
        shards, ends, group_ends = layout(epoch)
        g = np.searchsorted(group_ends, place, side="right")
        start = np.where(g > 0, group_ends[g - 1], 0)
        place = start + rank(place - start, group_ends[g] - start, g)
        s = np.searchsorted(ends, place, side="right")
        return shards[s], place - (ends[s] - counts[shards[s]])

    def at(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = np.asarray(n, np.int64)
        shard, row = np.empty_like(n), np.empty_like(n)
        for epoch in np.unique(n // total):
            here = np.flatnonzero(n // total == epoch)
            shuffled = functools.partial(_shuffled, seed, epoch)
            shard[here], row[here] = locate(int(epoch), n[here] - epoch * total, shuffled)
        return shard, row

    def replace(n: int, attempt: int) -> tuple[int, int]:
        key = mix(seed, REPLACE, n, attempt)
        if attempt >= NEAR_ATTEMPTS:
            place = (key % np.uint64(total)).astype(np.int64)
            shard, row = locate(0, place, lambda place, size, g: place)
        else:
            drawn = lambda place, size, g: (key % size.astype(np.uint64)).astype(np.int64)
            shard, row = locate(n // total, np.array([n % total]), drawn)
        return int(shard[0]), int(row[0])

    def group_of(n: int) -> tuple[np.ndarray, int]:
        epoch, place = divmod(n, total)
        shards, _, group_ends = layout(epoch)
        g = int(np.searchsorted(group_ends, place, side="right"))
        return shards[g * group : (g + 1) * group], epoch * total + int(group_ends[g])

    return Order(at, replace, group_of)


def _shuffled(seed: int, epoch: int, place: np.ndarray, size: np.ndarray, g: np.ndarray) -> np.ndarray:
    return permute(place, size, mix(seed, SAMPLES, epoch, g))
