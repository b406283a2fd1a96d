"""Metric-learning numbers: precision at R and average precision over rankings, k-means, and NMI / AMI of its clusters.

R-precision and MAP@R after Musgrave et al., "A Metric Learning Reality Check" (2020), sections 3.2 and 3.3; AMI after Vinh
et al., "Information Theoretic Measures for Clusterings Comparison" (2010), equation 24. Natural logarithms, float64.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxvl.evals.ranking import Ranks, exact_ranks


class Precisions(NamedTuple):
    """float64 [query], NaN for a query without a right item; equal scores are taken in index order."""

    at_1: np.ndarray
    r_precision: np.ndarray  # right items among the first R, over R, the number of right items
    ap_at_r: np.ndarray  # mean over the first R places of (precision there if it holds a right item, else 0)
    average_precision: np.ndarray  # mean precision at the places of all right items


def by_label(scores: np.ndarray, labels: np.ndarray, gallery_labels: np.ndarray | None = None) -> tuple[Ranks, Precisions]:
    """Ranks and precisions where an item is right if its label is that of the query.

    scores: [query, item]; labels: int [query]; gallery_labels: int [item], or None where the queries are their own
    gallery, in which case a query is not an item of its own (it is removed by index, not as the first hit).
    """
    own = gallery_labels is None
    gallery_labels = labels if gallery_labels is None else gallery_labels
    if scores.shape != (len(labels), len(gallery_labels)):
        raise ValueError(f"scores {scores.shape} do not fit {len(labels)} queries and {len(gallery_labels)} items")
    right = labels[:, None] == gallery_labels
    valid = ~np.eye(len(labels), dtype=bool) if own else np.ones_like(right)
    ranks = exact_ranks(scores, right, valid)

    order = np.argsort(np.where(valid, -scores, np.inf), axis=1, kind="stable")[:, : scores.shape[1] - own]
    hits = np.take_along_axis(right, order, 1)  # [query, place]
    total = hits.sum(1).astype(np.float64)  # R
    place = np.arange(1, hits.shape[1] + 1)
    precision = hits.cumsum(1) / place
    among_r = hits & (place <= total[:, None])
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of a query without a right item
        out = among_r.sum(1), (precision * among_r).sum(1), (precision * hits).sum(1)
        r_precision, ap_at_r, average_precision = (x / total for x in out)
    return ranks, Precisions(np.where(total > 0, hits[:, :1].any(1), np.nan), r_precision, ap_at_r, average_precision)


def kmeans(points: np.ndarray, start: np.ndarray, steps: int = 300) -> tuple[np.ndarray, float]:
    """Lloyd's algorithm from the centres `start` [cluster, d] until no point moves: (clusters int64 [n], inertia).

    A cluster that loses all its points restarts at the point farthest from its own centre. Raises ValueError where
    there are fewer points than clusters.
    """
    points, centres = np.asarray(points, np.float64), np.array(start, np.float64)
    if len(points) < len(centres):
        raise ValueError(f"{len(points)} points cannot fill {len(centres)} clusters")
    clusters = np.full(len(points), -1)
    for _ in range(steps):
        squared = np.square(points).sum(1, keepdims=True) - 2 * points @ centres.T + np.square(centres).sum(1)  # [point, cluster]
        before, clusters = clusters, squared.argmin(1)
        if np.array_equal(before, clusters):
            break
        apart = squared[np.arange(len(points)), clusters]
        members = clusters.copy()
        for empty in np.setdiff1d(np.arange(len(centres)), members):
            farthest = int(apart.argmax())
            members[farthest], apart[farthest] = empty, -1.0
        counts = np.bincount(members, minlength=len(centres))
        sums = np.zeros_like(centres)
        np.add.at(sums, members, points)
        centres = sums / np.maximum(counts, 1)[:, None]
    return clusters, float(np.square(points - centres[clusters]).sum())


def nmi(labels: np.ndarray, clusters: np.ndarray, mean: str = "arithmetic") -> float:
    """Mutual information over the `mean` (arithmetic, geometric, min, max) of the two entropies; 1 where neither has any."""
    table = _contingency(labels, clusters)
    h = _entropy(table.sum(1)), _entropy(table.sum(0))
    bound = _mean(*h, mean)
    if h == (0.0, 0.0):
        return 1.0
    return _mutual_information(table) / bound if bound > 0 else 0.0


def ami(labels: np.ndarray, clusters: np.ndarray, mean: str = "arithmetic") -> float:
    """Mutual information adjusted for chance: 0 for random clusters of the same sizes, 1 for the labels themselves."""
    table = _contingency(labels, clusters)
    a, b, n = table.sum(1), table.sum(0), int(table.sum())
    h = _entropy(a), _entropy(b)
    if len(a) == len(b) == 1 or len(a) == len(b) == n:  # one cluster, or one point each: the partitions agree
        return 1.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    expected = 0.0
    for ai in a:
        for bj in b:
            k = np.arange(max(1, ai + bj - n), min(ai, bj) + 1)  # sizes their overlap can have
            log_p = sum(log_factorial[x] for x in (ai, bj, n - ai, n - bj)) - sum(
                log_factorial[x] for x in (n, k, ai - k, bj - k, n - ai - bj + k)
            )
            expected += float((k / n * np.log(n * k / (ai * bj)) * np.exp(log_p)).sum())
    room = _mean(*h, mean) - expected
    return (_mutual_information(table) - expected) / room if room else 0.0


def _contingency(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    if labels.shape != clusters.shape or labels.ndim != 1 or not labels.size:
        raise ValueError(f"labels {labels.shape} and clusters {clusters.shape} must be two lists of one length above 0")
    rows, i = np.unique(labels, return_inverse=True)
    columns, j = np.unique(clusters, return_inverse=True)
    return np.bincount(i * len(columns) + j, minlength=len(rows) * len(columns)).reshape(len(rows), len(columns))


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return abs(float((p * np.log(p)).sum()))


def _mutual_information(table: np.ndarray) -> float:
    n = table.sum()
    outer = table.sum(1, keepdims=True) * table.sum(0)
    some = table > 0
    return float((table[some] / n * np.log(table[some] * n / outer[some])).sum())


def _mean(a: float, b: float, kind: str) -> float:
    means = {"arithmetic": (a + b) / 2, "geometric": math.sqrt(a * b), "min": min(a, b), "max": max(a, b)}
    if kind not in means:
        raise ValueError(f"mean={kind!r} must be one of {', '.join(means)}")
    return means[kind]
