"""Exact search on devices: items stay there, split over them, each device finds its best and these are merged.

No array has a query and an item axis beyond one block of a device's items.
"""
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxvl.search.lexical import Hits

BLOCK = 4096  # items that a device scores at a time


class Placed(NamedTuple):
    """items: float32 [rows, d], split over all axes of `mesh`, the first `total` rows real; rows a device divide into blocks of `block`."""

    items: jax.Array
    total: int
    block: int
    mesh: Mesh


def place(read: Callable[[int, int], np.ndarray], count: int, width: int, mesh: Mesh, *, block: int = BLOCK) -> Placed:
    """Items on the devices of `mesh`. read(start, stop): rows of them, float32 [stop - start, width], asked for once, a device's at a time.

    Raises ValueError where they do not fit into the devices' memory.
    """
    each = -(-count // mesh.size)
    block = min(block, each)
    each = -(-each // block) * block
    _fits(4 * each * width, mesh, f"{count:,} vectors of {width:,} float32 numbers")

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(each * mesh.size)
        rows = np.zeros((stop - start, width), np.float32)
        for at in range(start, min(stop, count), block):
            end = min(at + block, stop, count)
            rows[at - start : end - start] = read(at, end)
        return rows

    items = jax.make_array_from_callback((each * mesh.size, width), NamedSharding(mesh, P(mesh.axis_names)), part)
    return Placed(items, count, block, mesh)


def top(placed: Placed, queries: np.ndarray, k: int) -> Hits:
    """The k items of the greatest product with each of queries [query, d]; products are float32 at the highest precision."""
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if queries.ndim != 2 or queries.shape[1] != placed.items.shape[1]:
        raise ValueError(f"queries are {queries.shape}; the index has vectors of {placed.items.shape[1]} numbers")
    k = min(k, placed.total)
    every = NamedSharding(placed.mesh, P())
    asked = jax.make_array_from_callback(queries.shape, every, lambda index: np.asarray(queries, np.float32)[index])
    ids, scores = _top(placed.items, asked, total=placed.total, block=placed.block, k=k, mesh=placed.mesh)
    return Hits(np.asarray(ids).astype(np.int64), np.asarray(scores))


@partial(jax.jit, static_argnames=("total", "block", "k", "mesh"))
def _top(items: jax.Array, queries: jax.Array, *, total: int, block: int, k: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    axes = mesh.axis_names

    def of_device(items: jax.Array, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = lax.axis_index(axes) * len(items)

        def step(found: tuple[jax.Array, jax.Array], n: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            ids, best = found
            part = lax.dynamic_slice_in_dim(items, n * block, block)
            index = first + n * block + jnp.arange(block, dtype=jnp.int32)
            scores = jnp.dot(queries, part.T, precision="highest", preferred_element_type=jnp.float32)
            scores = jnp.where(index < total, scores, -jnp.inf)
            best, at = lax.top_k(jnp.concatenate([best, scores], 1), k)  # earlier items stand first and win ties
            return (jnp.take_along_axis(jnp.concatenate([ids, jnp.broadcast_to(index, scores.shape)], 1), at, 1), best), None

        shape = len(queries), k
        none = jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32)
        (ids, best), _ = lax.scan(step, none, jnp.arange(len(items) // block))
        # Devices hold ascending ids, and their lists come in the order of the devices: again the earlier of equals stand first.
        ids, best = (lax.all_gather(x, axes, axis=1, tiled=True) for x in (ids, best))
        best, at = lax.top_k(best, k)
        return jnp.take_along_axis(ids, at, 1), best

    return jax.shard_map(of_device, mesh=mesh, in_specs=(P(axes), P()), out_specs=P(), check_vma=False)(items, queries)


def _fits(size: int, mesh: Mesh, what: str) -> None:
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        room = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
        if stats.get("bytes_limit") and size > room:
            raise ValueError(f"{what} over {mesh.size} devices are {size / 2**30:.1f} GiB each, and {device} has {room / 2**30:.1f} GiB left; use more devices or --backend exact")
