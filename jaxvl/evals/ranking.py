"""Ranks of the best right answer and the numbers made of them: exact, on a whole score matrix, in float64.

Equal scores have no order of their own, so a rank is given under three rules:
- optimistic: the wrong items with a greater score than the best right item;
- pessimistic: the wrong items with a greater or equal score;
- stable: the wrong items before it after sorting by (-score, item index). Reported numbers use this one.
Ranks are 0-based; a query without a right item has rank -1 under every rule and is left out of every average.
"""

import functools
import itertools
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


class Ranks(NamedTuple):
    """Ranks of the best right item of each query under each rule, int64 [query]."""

    optimistic: np.ndarray
    pessimistic: np.ndarray
    stable: np.ndarray


def exact_ranks(scores: np.ndarray, right: np.ndarray, valid: np.ndarray | None = None) -> Ranks:
    """Ranks from `scores` [query, item] and `right` bool [query, item]; items where `valid` is False do not exist.

    Raises ValueError for a NaN score: it is neither above nor below anything, so every rank would be perfect.
    """
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {scores.size} scores are NaN; ranks are not defined")
    valid = np.ones_like(right) if valid is None else valid
    right, wrong = right & valid, ~right & valid
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)  # [query, 1]
    above = (wrong & (scores > best)).sum(1)
    level = wrong & (scores == best)
    first = (right & (scores == best)).argmax(1)
    before = (level & (np.arange(scores.shape[1]) < first[:, None])).sum(1)
    return finish(np.asarray(right.any(1)), above, level.sum(1), before)


def in_common(query_group: Any, item_group: Any) -> Any:
    """bool [query, item], whether a group is shared; each int [rows] or, where a row has several filled up with -1, [rows, group].

    Of NumPy's arrays or JAX's; nothing has an axis of queries, of items and of groups.
    """
    mine, theirs = (x.reshape(len(x), -1) for x in (query_group, item_group))
    pairs = [(a == b[:, None]) & (a >= 0) for a, b in itertools.product(theirs.T, mine.T)]
    return functools.reduce(operator.or_, pairs)


def finish(answered: np.ndarray, above: np.ndarray, level: np.ndarray, before: np.ndarray) -> Ranks:
    """Ranks from counts per query: wrong items above the best right one, level with it, and level but earlier."""
    counts = (above, above + level, above + before)
    return Ranks(*(np.where(answered, c, -1).astype(np.int64) for c in counts))


def recall_at(ranks: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """R@K for each K: the share of queries with rank < K, float64 [k]; NaN where no query has a right item."""
    known = ranks[ranks >= 0]
    return np.array([np.mean(known < k) if known.size else np.nan for k in ks])


def median_rank(ranks: np.ndarray) -> float:
    """The 1-based median rank; NaN where no query has a right item."""
    known = ranks[ranks >= 0]
    return float(np.median(known)) + 1 if known.size else float("nan")


def both_ways(image_to_text: Ranks, text_to_image: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The numbers of image-text retrieval under the stable rule; warns where the order of equal scores matters to them.

    Recalls are fractions; `rsum` is the sum of all of them in percent; median ranks are 1-based.
    """
    out: dict[str, float] = {}
    for way, ranks in ("i2t", image_to_text), ("t2i", text_to_image):
        recalls = [recall_at(r, ks) for r in ranks]
        if not np.array_equal(recalls[0], recalls[1], equal_nan=True):
            shown = ", ".join(f"R@{k} {hi:.4f} or {lo:.4f}" for k, hi, lo in zip(ks, *recalls[:2], strict=True) if hi != lo)
            warnings.warn(f"{way}: equal scores make recall a matter of order ({shown}); the lowest index goes first", stacklevel=2)
        out |= {f"{way}/r@{k}": float(r) for k, r in zip(ks, recalls[2], strict=True)}
        out[f"{way}/median_rank"] = median_rank(ranks.stable)
    out["rsum"] = 100 * sum(v for k, v in out.items() if "r@" in k)
    return out


def folds(text_owner: np.ndarray, images: int, count: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Cuts an image-text set into `count` consecutive blocks of images, each ranked alone (COCO 1K is five of 1,000).

    text_owner: int [text], the image of each text. Yields (images, texts, their owners inside the block) per block.
    """
    if count < 1 or images % count:
        raise ValueError(f"folds={count} does not divide {images} images")
    size = images // count
    for start in range(0, images, size):
        texts = np.flatnonzero((text_owner >= start) & (text_owner < start + size))
        yield slice(start, start + size), texts, text_owner[texts] - start


def mean(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each number over folds."""
    return {k: float(np.mean([r[k] for r in results])) for k in results[0]}
