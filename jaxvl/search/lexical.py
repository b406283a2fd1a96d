"""Search among sparse vectors whose coordinates are words: exact by the inverted index, or in two stages.

A score is the sum over the words that query and item share of the products of their weights, float32, added in the order of the words.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

NONE = -1  # the id of a hit that was not found
ROWS = 4096  # of a block of vectors; at most 2^15


class Hits(NamedTuple):
    """The best items of each query, best first, equals by id: ids int64 and scores float32, [query, k]; NONE and -inf where there are fewer."""

    ids: np.ndarray
    scores: np.ndarray


class Pruning(NamedTuple):
    """The first of two stages. items, query: how many of the greatest entries of a vector are kept. candidates: how many go on."""

    items: int = 64
    query: int = 64
    candidates: int = 256


def check(pruning: Pruning) -> None:
    for key, value in pruning._asdict().items():
        if value < 1:
            raise ValueError(f"two-stage search keeps {value} {key}; it must be at least 1")


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Places of the k greatest of scores [n], greatest first, equals by place; all n where there are fewer."""
    k = min(k, len(scores))
    if not k:
        return np.zeros(0, np.int64)
    floor = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > floor)
    kept = np.concatenate([above, np.flatnonzero(scores == floor)[: k - len(above)]])
    return kept[np.lexsort((kept, -scores[kept]))]


def invert(rows: sp.csr_array) -> sp.csr_array:
    """The inverted index [V, n] of vectors [n, V]: for each word the items that have it, ascending."""
    return rows.tocsc().T


def scores(postings: sp.csr_array, query: sp.csr_array) -> np.ndarray:
    """Scores of every item, float32 [n]: of one query [1, V], reading the postings of its words alone."""
    # Chosen rows, then one product with a dense vector: scipy's product of two sparse matrices makes the result's structure first, twice the time.
    return postings[query.indices].T @ query.data


def exact(postings: sp.csr_array, queries: sp.csr_array, k: int) -> Hits:
    """The k items of the greatest score for each of queries [query, V]; items that share no word with a query have the score 0."""
    return _each(queries, k, postings.shape[1], lambda query: _taken(scores(postings, query), k))


def two_stage(pruned: sp.csr_array, rows: sp.csr_array, queries: sp.csr_array, k: int, pruning: Pruning) -> Hits:
    """The k best of the candidates that a pruned query finds in `pruned`, the inverted index of pruned vectors; scored by the whole vectors `rows`."""

    def one(query: sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
        found = np.sort(best(scores(pruned, prune(query, pruning.query)), max(k, pruning.candidates)))
        again = rescored(rows, query, found)
        place = best(again, k)
        return found[place], again[place]

    return _each(queries, k, rows.shape[0], one)


def rescored(rows: sp.csr_array, query: sp.csr_array, ids: np.ndarray) -> np.ndarray:
    """The exact scores of some items, float32 [len(ids)]."""
    return rows[ids] @ query.toarray()[0]


def prune(rows: sp.csr_array, k: int) -> sp.csr_array:
    """Vectors [n, V] with all but their k greatest entries left out, of equal ones the last."""
    kept = [_prune(rows[start : start + ROWS], k) for start in range(0, rows.shape[0], ROWS)]
    return sp.vstack(kept, format="csr") if len(kept) > 1 else kept[0] if kept else rows


def contributions(query: sp.csr_array, item: sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """The words that query and item [1, V] share, int64, and what each adds to the score, float32: the greatest first."""
    words, one, other = np.intersect1d(query.indices, item.indices, assume_unique=True, return_indices=True)
    parts = query.data[one] * item.data[other]
    order = np.lexsort((words, -parts))
    return words[order].astype(np.int64), parts[order]


def _prune(rows: sp.csr_array, k: int) -> sp.csr_array:
    lengths = np.diff(rows.indptr)
    if not len(lengths) or lengths.max() <= k:
        return rows
    row = np.repeat(np.arange(len(lengths), dtype=np.int16), lengths)  # of numbers of 16 bits numpy's stable sort is by radix
    falling = np.argsort(-rows.data, kind="stable")  # entries come in the order of their words, so that equal ones stay in it
    order = falling[np.argsort(row[falling], kind="stable")]
    keep = np.zeros(rows.nnz, bool)
    keep[order[np.arange(rows.nnz) - rows.indptr[row] < k]] = True
    ends = np.append(0, np.cumsum(np.minimum(lengths, k)))
    return sp.csr_array((rows.data[keep], rows.indices[keep], ends), shape=rows.shape)


def _taken(all_scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = best(all_scores, k)
    return ids, all_scores[ids]


def _each(queries: sp.csr_array, k: int, count: int, search) -> Hits:  # type: ignore[no-untyped-def]
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    k = min(k, count)
    hits = Hits(np.full((queries.shape[0], k), NONE, np.int64), np.full((queries.shape[0], k), -np.inf, np.float32))
    for q in range(queries.shape[0]):
        ids, values = search(queries[[q]])
        hits.ids[q, : len(ids)], hits.scores[q, : len(ids)] = ids, values
    return hits
