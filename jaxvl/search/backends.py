"""Ways to search an opened index, by name, and how much of what exact search finds each of them finds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from jax.sharding import Mesh

from jaxvl.evals import topk
from jaxvl.search import lexical
from jaxvl.search.extras import EXTRAS
from jaxvl.search.lexical import Hits, Pruning
from jaxvl.search.store import Index

Search = Callable[[Any, int], Hits]  # (queries, k): a csr_array [query, V] of a lexical index, float32 [query, d] of a dense one

ROWS, POSTINGS, PRUNED, VECTORS = "rows", "postings", "pruned", "vectors"
SAMPLE, AT = 200, 10  # items that ask for others when recall is measured, and how many they ask for
BACKENDS = {"lexical": ("exact", "device", "two-stage", "seismic"), "dense": ("exact", "faiss")}


def open_backend(index: Index, name: str, mesh: Mesh) -> Search:
    """The search of this name. Raises ValueError where the index has not what it needs, naming what would be right.

    Of lexical vectors "exact" reads the inverted index, and "device" multiplies them as dense ones; of dense vectors "exact" is on devices.
    """
    kind = index.meta["kind"]
    if name not in BACKENDS[kind]:
        raise ValueError(f"--backend is {name!r}; an index of {kind} vectors takes {', '.join(BACKENDS[kind])}")
    if name in EXTRAS:
        if name not in index.meta["also"]:
            raise ValueError(f"{index.folder} was made without {name}; make one with `jaxvl search index ... --also {name}`")
        return EXTRAS[name].open(vectors(index), index.folder)
    if kind == "dense":
        rows = vectors(index)
        _fits(rows.shape, mesh)
        placed = topk.place(lambda start, stop: rows[start:stop], rows.shape[0], rows.shape[1], mesh)
        return lambda queries, k: Hits(*topk.top(placed, queries, k))
    if name == "device":
        rows = vectors(index)
        _fits(rows.shape, mesh)
        placed = topk.place(lambda start, stop: rows[start:stop].toarray(), rows.shape[0], rows.shape[1], mesh)
        return lambda queries, k: Hits(*topk.top(placed, queries.toarray(), k))
    if name == "two-stage":
        index.needs(pruning=Pruning)
        rows, pruned, pruning = vectors(index), csr(index, PRUNED), Pruning(**index.meta["pruning"])
        return lambda queries, k: lexical.two_stage(pruned, rows, queries, k, pruning)
    postings = csr(index, POSTINGS)
    return lambda queries, k: lexical.exact(postings, queries, k)


def vectors(index: Index) -> Any:
    """The vectors of the index by item: a csr_array [n, V], or float32 [n, d]."""
    return csr(index, ROWS) if index.lexical else index.array(VECTORS, index.total, index.meta["width"])


def csr(index: Index, name: str) -> sp.csr_array:
    """One of the sparse arrays of a lexical index: ROWS [n, V], POSTINGS or PRUNED [V, n]."""
    shape = (index.total, index.meta["width"])
    data, indices, ends = (index.array(f"{name}.{part}") for part in ("data", "indices", "ends"))
    return sp.csr_array((data, indices, np.append(0, ends)), shape=shape if name == ROWS else shape[::-1])


def recall(search: Search, truth: Search, rows: Any, *, k: int = AT, sample: int = SAMPLE) -> float:
    """The share of the k best of exact search that `search` finds, for items of the index that ask for others: evenly spread, up to `sample`.

    An item that scores as high as the k-th of them counts as found. NaN where there is no other item.
    """
    count = rows.shape[0]
    ids = np.unique(np.linspace(0, count - 1, min(sample, count)).astype(np.int64))
    asked = rows[ids]
    shares = []
    for own, right, got in zip(ids, zip(*truth(asked, k + 1), strict=True), zip(*search(asked, k + 1), strict=True), strict=True):
        (wanted, scores), (found, values) = (tuple(x[hits[0] != own][:k] for x in hits) for hits in (right, got))
        if len(wanted):
            shares.append(min(np.sum(np.isin(found, wanted) | (values >= scores[-1])), len(wanted)) / len(wanted))
    return float(np.mean(shares)) if shares else float("nan")


def _fits(shape: tuple[int, ...], mesh: Mesh) -> None:
    """Raises ValueError where float32 vectors of this shape, split over the devices, are more than a device of this process has room for."""
    size = 4 * int(np.prod(shape, dtype=np.int64)) // mesh.size
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        room = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
        if stats.get("bytes_limit") and size > room:
            raise ValueError(
                f"{shape[0]:,} vectors of {shape[1]:,} float32 numbers are {size / 2**30:.1f} GiB on each of {mesh.size} devices, and {device} has "
                f"{room / 2**30:.1f} GiB left; use more devices or, for lexical vectors, --backend exact"
            )
