"""Where the samples of a run lie: sample number to shard and row of the dataset."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxvl.data import keyed
from jaxvl.data.balanced import Balanced
from jaxvl.data.dataset import Dataset, rows_of
from jaxvl.data.mixing import BLOCK, mixture
from jaxvl.data.order import sample_order


class Places(NamedTuple):
    """at(n int64 [b]) -> shard, row of the dataset, int64 [b] each; replace(n, attempt) -> those of a substitute.

    near(n) -> the shards that samples soon after n are drawn from.
    """

    at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    replace: Callable[[int, int], tuple[int, int]]
    near: Callable[[int], tuple[int, ...]]


def sample_places(dataset: Dataset, seed: int) -> Places:
    """Where sample n lies: the mixture picks a part of the dataset, the part's own order the shard and the row.

    With data.per_class the classes take turns instead, and no shard can be told ahead.
    """
    if dataset.options.per_class and dataset.table is not None:
        balanced = Balanced(seed, dataset.table.labels, dataset.options.per_class)
        return Places(
            at=lambda n: rows_of(dataset, balanced.at(n)),
            replace=lambda n, attempt: tuple(int(x) for x in rows_of(dataset, balanced.replace(n, attempt))),  # type: ignore[arg-type, return-value]
            near=lambda n: (),
        )
    part_of = mixture(seed, dataset.quota)
    firsts = np.array([first for first, _ in dataset.parts])
    orders = [
        sample_order(int(keyed.mix(seed, p)[0]), dataset.counts[first:last], dataset.options.group_shards)
        for p, (first, last) in enumerate(dataset.parts)
    ]

    def at(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part, m = part_of(n)
        shard, row = np.empty_like(n), np.empty_like(n)
        for p in np.unique(part):
            here = part == p
            shard[here], row[here] = orders[p].at(m[here])
        return shard + firsts[part], row

    def replace(n: int, attempt: int) -> tuple[int, int]:
        part, m = (int(x[0]) for x in part_of(np.array([n])))
        shard, row = orders[part].replace(m, attempt)
        return shard + int(firsts[part]), row

    def near(n: int) -> tuple[int, ...]:
        shards: list[int] = []
        for order, first, quota in zip(orders, firsts, dataset.quota, strict=True):
            group, after = order.group(n // BLOCK * quota)
            shards += (int(first + s) for s in (*group, *order.group(after)[0]))
        return tuple(shards)

    return Places(at, replace, near)
