"""Keyed randomness without state: every number is a pure function of integers, vectorised over arrays.

A sample's crop, caption and place in the epoch follow from (seed, sample number) alone, so they are the same on any
number of hosts, workers and threads, and seeking costs nothing. The mixer is the finaliser of SplitMix64 (Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 8
LEAST_BITS = 6  # on a smaller domain the network cannot reach all permutations evenly


def _finalise(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix(*parts: np.ndarray | int) -> np.ndarray:
    """uint64 hash of integer `parts`, which broadcast; the order of the parts matters."""
    h = np.zeros(1, np.uint64)
    for part in parts:
        part = np.atleast_1d(np.asarray(part)).astype(np.uint64)
        h = _finalise((h + GOLDEN) ^ _finalise(part + GOLDEN))
    return h


def uniforms(key: np.ndarray, lanes: int) -> np.ndarray:
    """float64 [b, lanes] in [0, 1) from a uint64 `key` [b]; every (key, lane) is its own draw."""
    steps = np.arange(1, lanes + 1, dtype=np.uint64) * GOLDEN
    return (_finalise(key[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def permute(x: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Image of `x` under a permutation of [0, size) chosen by `key`, elementwise.

    x: int64 [b], each in [0, size). size: int64 [b], at least 1. key: uint64 [b]. Returns int64 [b]. An alternating
    Feistel network permutes the next power of two, at least 64; values that land outside walk on along their cycle
    until they are inside (above 64, fewer than two steps on average), which keeps the map a bijection of [0, size).
    """
    x, size, key = np.broadcast_arrays(np.asarray(x, np.uint64), np.asarray(size, np.uint64), np.asarray(key, np.uint64))
    out = x.copy()
    bits = np.maximum(np.ceil(np.log2(np.maximum(size, np.uint64(2)).astype(np.float64))), LEAST_BITS).astype(np.uint64)
    todo = np.flatnonzero(size > np.uint64(1))
    while todo.size:
        walked = _feistel(out[todo], bits[todo], key[todo])
        out[todo] = walked
        todo = todo[walked >= size[todo]]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    one = np.uint64(1)
    low_bits = bits >> one
    low_mask, high_mask = (one << low_bits) - one, (one << (bits - low_bits)) - one
    low, high = x & low_mask, x >> low_bits
    for i in range(ROUNDS):
        step = key + np.uint64((i + 1) * int(GOLDEN) % 2**64)
        if i % 2:
            low = low ^ (_finalise(_finalise(high + step) ^ step) & low_mask)
        else:
            high = high ^ (_finalise(_finalise(low + step) ^ step) & high_mask)
    return (high << low_bits) | low
