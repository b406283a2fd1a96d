"""Several sources in fixed shares: which source sample n comes from, and which of that source's samples it is.

Samples come in blocks of BLOCK. Every block holds the same whole number of samples of each source, in an order keyed
by the block, so a share is exact after each block and the answer for any n costs one block, however far into the run
it is.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from jaxvl.data.keyed import mix

BLOCK = 1000
MIX = 4  # what a key is for; order.py has the others


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each source in a block, by largest remainder; they sum to BLOCK.

    Raises ValueError for weights that are not positive, or whose share is below 1 in BLOCK.
    """
    if not all(np.isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"data.weights is {tuple(weights)}; every weight must be above 0 and finite")
    exact = np.array(weights, np.float64) * BLOCK / np.sum(weights)
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: BLOCK - whole.sum()]] += 1
    if not whole.all():
        raise ValueError(f"data.weights is {tuple(weights)}; the smallest share must be at least 1 in {BLOCK}")
    return tuple(int(q) for q in whole)


def mixture(seed: int, quota: Sequence[int]) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A function of sample numbers int64 [b] to (source, number within that source), each int64 [b].

    The numbers of one source run 0, 1, 2 ... in the order of n.
    """
    if len(quota) == 1:
        return lambda n: (np.zeros_like(n), n)
    share, block = np.array(quota, np.int64), sum(quota)

    @functools.lru_cache(maxsize=16)
    def layout(number: int) -> tuple[np.ndarray, np.ndarray]:
        slots = np.argsort(mix(seed, MIX, number, np.arange(block)), kind="stable")
        source = np.repeat(np.arange(len(share)), share)[slots]
        rank = np.empty(block, np.int64)
        rank[np.argsort(source, kind="stable")] = np.concatenate([np.arange(q) for q in quota])
        return source, rank

    def at(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = np.asarray(n, np.int64)
        source, rank = np.empty_like(n), np.empty_like(n)
        for number in np.unique(n // block):
            here = np.flatnonzero(n // block == number)
            of, place = layout(int(number))
            source[here] = of[n[here] % block]
            rank[here] = number * share[source[here]] + place[n[here] % block]
        return source, rank

    return at
