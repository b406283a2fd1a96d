"""Ranks from embeddings, in blocks: queries split over the devices, the gallery passing by, counts kept.

No array has a query and an item axis beyond one block of [block / devices, block] scores a device. Embeddings stay on the host.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxvl.evals.ranking import Ranks, finish, in_common
from jaxvl.evals.topk import BLOCK, check_finite


class Counts(NamedTuple):
    """What is known of each query so far, [query]."""

    best: jax.Array  # float32, score of the best right item
    first: jax.Array  # int32, its index (the lowest of equals), -1 if none
    above: jax.Array  # int32, wrong items with a greater score
    level: jax.Array  # int32, wrong items with the same score
    before: jax.Array  # int32, those of them with a lower index


def streamed_ranks(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_group: np.ndarray,
    gallery_group: np.ndarray,
    mesh: Mesh,
    *,
    leave_one_out: bool = False,
    without: np.ndarray | None = None,
    answers: np.ndarray | None = None,
    block: int = BLOCK,
) -> Ranks:
    """Ranks of the best right item, as `ranking.exact_ranks`, from float32 `queries` [query, d] and `gallery` [item, d].

    An item is right where its group (int >= 0) is that of the query; either may have several, [rows, group] filled up with -1,
    of which one in common will do. `leave_one_out`: queries and gallery are the same rows, and a
    row is not an item of its own. `without`: int [query], one item that each query's gallery lacks, -1 for none. `answers`: int
    [query, answer], right items by index, filled up with -1, beside those of the group. Scores are float32 dot products at the
    highest precision.

    The gallery passes twice, first to find the best right item, then to count against it. Scores of two programs may
    differ in the last bit, which would turn a tie into a win or a loss, so one compiled program serves both passes.

    Raises ValueError for embeddings that are not finite or whose widths differ.
    """
    check_finite("query", queries)
    check_finite("gallery", gallery)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {queries.shape} and gallery {gallery.shape} must be [rows, d] of one width d")
    if leave_one_out and len(queries) != len(gallery):
        raise ValueError(f"leave_one_out ranks rows against themselves, but there are {len(queries)} queries and {len(gallery)} items")
    without = np.arange(len(queries)) if leave_one_out else without
    place, count = _split(mesh), _program(mesh)
    parts: list[Counts] = []
    for start, rows in _chunks(queries, block, mesh):
        zeros = np.zeros(len(rows), np.int32)
        mine = lambda x, start=start, rows=rows: place(_pad(x[start : start + len(rows)].astype(np.int32), len(rows), -1))
        group, own = mine(query_group), place(zeros - 1) if without is None else mine(without)
        right = None if answers is None else mine(answers)
        counts = Counts(*map(place, (np.full(len(rows), -np.inf, np.float32), zeros - 1, zeros, zeros, zeros)))
        placed = place(rows)
        for counting in (False, True):
            for at, items, groups in _blocks(gallery, gallery_group, block, mesh):
                last, counts = counts, count(counts, placed, group, own, right, items, groups, at, np.bool_(counting))
                jax.block_until_ready(last)  # no more than two blocks wait on the devices
        parts.append(counts)
    _, first, above, level, before = (np.concatenate(x)[: len(queries)] for x in zip(*_fetch(parts), strict=True))
    return finish(first >= 0, above, level, before)


@functools.cache
def _program(mesh: Mesh) -> Callable:
    """`_pass` with its shardings pinned: left open, those of a result could call for a second program."""
    rows, every = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    return jax.jit(_pass, in_shardings=(rows,) * 5 + (every,) * 4, out_shardings=rows)


def _pass(counts, queries, query_group, own, answers, items, groups, start, counting) -> Counts:  # type: ignore[no-untyped-def]
    """One block of the gallery. First pass (counting=False): the best right item; second: the wrong items around it."""
    scores = jax.lax.optimization_barrier(
        jnp.dot(queries, items.T, precision="highest", preferred_element_type=jnp.float32)
    )  # [query, item]
    index = start + jnp.arange(len(items))  # [item]
    valid = (groups.reshape(len(items), -1) >= 0).any(1) & (index != own[:, None])
    right = in_common(query_group, groups)
    if answers is not None:
        right |= (index[:, None] == answers[:, None]).any(2)
    right &= valid
    wrong = valid & ~right

    hopes = jnp.where(right, scores, -jnp.inf)
    best, first = hopes.max(1), index[hopes.argmax(1)]  # argmax takes the first of equals
    better = best > counts.best  # an earlier block keeps the tie
    found = Counts(jnp.where(better, best, counts.best), jnp.where(better, first, counts.first), *counts[2:])

    above = wrong & (scores > counts.best[:, None])
    level = wrong & (scores == counts.best[:, None])
    before = level & (index < counts.first[:, None])
    counted = counts._replace(above=counts.above + above.sum(1), level=counts.level + level.sum(1), before=counts.before + before.sum(1))
    return jax.tree.map(lambda a, b: jnp.where(counting, a, b), counted, found)


def _chunks(queries: np.ndarray, block: int, mesh: Mesh) -> Iterator[tuple[int, np.ndarray]]:
    """(start, rows) of equally many queries, a multiple of the devices; the last are padded with zeros."""
    size = _round_up(min(block, len(queries)), mesh.size)
    for start in range(0, len(queries), size):
        yield start, _pad(np.asarray(queries[start : start + size], np.float32), size, 0)


def _blocks(gallery: np.ndarray, groups: np.ndarray, block: int, mesh: Mesh) -> Iterator[tuple[np.int32, jax.Array, jax.Array]]:
    """(start, items, groups) on every device, equally many; the last are padded with items of group -1."""
    size = _round_up(min(block, len(gallery)), 8)
    for start in range(0, len(gallery), size):
        items = _pad(np.asarray(gallery[start : start + size], np.float32), size, 0)
        group = _pad(groups[start : start + size].astype(np.int32), size, -1)
        yield np.int32(start), _place(items, mesh, P()), _place(group, mesh, P())


def _split(mesh: Mesh) -> Callable[[np.ndarray], jax.Array]:
    return lambda x: _place(x, mesh, P(mesh.axis_names))


def _place(x: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def _fetch(tree: Any) -> Any:
    return multihost_utils.process_allgather(tree, tiled=True)


def _pad(x: np.ndarray, size: int, fill: int) -> np.ndarray:
    return np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=fill)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
