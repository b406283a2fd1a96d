"""Approximate structures of other libraries, kept in the index folder; what they find is scored again by the vectors of the index.

seismic  lexical vectors: Bruch et al., Efficient Inverted Indexes for Approximate Retrieval over Learned Sparse Representations, SIGIR 2024
faiss    dense vectors: a graph of neighbours, Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using HNSW, 2018
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from jaxvl.progress import progress
from jaxvl.search.lexical import ROWS, Hits, best, rescored

LINKS, BUILD_WIDTH, SEARCH_WIDTH = 32, 200, 128  # of a node in the graph; nodes looked at to place one, and to answer a query
QUERY_CUT, HEAP = 64, 0.7  # words of a query that Seismic follows; the share of the k-th score below which it passes over a block
SEISMIC, FAISS = "seismic", "faiss.hnsw"  # files
LIBRARIES = {"seismic": ("pyseismic-lsr", "seismic"), "faiss": ("faiss-cpu", "faiss")}  # package and module


class Extra(NamedTuple):
    """kind: of the index it belongs to. build(vectors, folder) writes the structure; open(vectors, folder) -> search(queries, k) -> Hits."""

    kind: str
    build: Callable[[Any, Path], None]
    open: Callable[[Any, Path], Callable[[Any, int], Hits]]


def library(name: str) -> Any:
    """The module of an extra. Raises ValueError where it is not installed."""
    package, module = LIBRARIES[name]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{package} is not installed, which the backend {name} is: pip install {package}") from None


def _build_seismic(rows: sp.csr_array, folder: Path) -> None:
    seismic = library("seismic")
    held, kind = seismic.SeismicDataset(), seismic.get_seismic_string()
    names = np.arange(rows.shape[1]).astype(kind)
    for item in progress(range(rows.shape[0]), "handing vectors to seismic", unit="vectors"):
        part = slice(rows.indptr[item], rows.indptr[item + 1])
        held.add_document(str(item), names[rows.indices[part]], np.ascontiguousarray(rows.data[part]))
    with _aside():
        seismic.SeismicIndex.build_from_dataset(held).save(str(folder / SEISMIC))


def _open_seismic(rows: sp.csr_array, folder: Path) -> Callable[[sp.csr_array, int], Hits]:
    seismic = library("seismic")
    index = seismic.SeismicIndex.load(str(folder / f"{SEISMIC}.index.seismic"))
    kind = seismic.get_seismic_string()

    def search(queries: sp.csr_array, k: int) -> Hits:
        k = min(k, rows.shape[0])
        found = np.full((queries.shape[0], k), -1, np.int64)
        for q in range(queries.shape[0]):
            query = queries[[q]]
            if query.nnz:
                words = query.indices.astype(kind)
                answer = index.search(
                    query_id="", query_components=words, query_values=query.data, k=k, query_cut=QUERY_CUT, heap_factor=HEAP
                )
                found[q, : len(answer)] = [int(item) for _, _, item in answer]
        return again(found, lambda q, ids: rescored(rows, queries[[q]], ids))

    return search


@contextmanager
def _aside() -> Iterator[None]:
    """What native code prints goes to standard error: standard output is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _build_faiss(rows: np.ndarray, folder: Path) -> None:
    faiss = library("faiss")
    index = faiss.IndexHNSWFlat(rows.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_WIDTH
    for start in range(0, len(rows), ROWS):
        index.add(np.ascontiguousarray(rows[start : start + ROWS]))
    faiss.write_index(index, str(folder / FAISS))


def _open_faiss(rows: np.ndarray, folder: Path) -> Callable[[np.ndarray, int], Hits]:
    faiss = library("faiss")
    index = faiss.read_index(str(folder / FAISS))

    def search(queries: np.ndarray, k: int) -> Hits:
        k = min(k, len(rows))
        index.hnsw.efSearch = max(SEARCH_WIDTH, k)
        _, found = index.search(np.ascontiguousarray(queries, np.float32), k)
        return again(found, lambda q, ids: rows[ids] @ queries[q])

    return search


def again(found: np.ndarray, score: Callable[[int, np.ndarray], np.ndarray]) -> Hits:
    """Hits of ids int64 [query, k], -1 for none, with exact scores, in their order. score(query, ids) -> float32 [len(ids)]."""
    hits = Hits(np.full(found.shape, -1, np.int64), np.full(found.shape, -np.inf, np.float32))
    for q, row in enumerate(found):
        ids = np.sort(row[row >= 0])
        values = score(q, ids)
        order = best(values, len(ids))
        hits.ids[q, : len(ids)], hits.scores[q, : len(ids)] = ids[order], values[order]
    return hits


EXTRAS = {"seismic": Extra("lexical", _build_seismic, _open_seismic), "faiss": Extra("dense", _build_faiss, _open_faiss)}
