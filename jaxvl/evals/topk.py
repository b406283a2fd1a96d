"""The nearest items of queries, exactly: items stay on the devices, split over them, each finds its best and these are merged.

No array has more than BLOCK x BLOCK scores on a device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

BLOCK = 4096  # queries, and items of each device, that are scored at a time


class Placed(NamedTuple):
    """items: float32 [rows, d], split over all axes of `mesh`, the first `total` rows real; rows a device divide into blocks of `block`."""

    items: jax.Array
    total: int
    block: int
    mesh: Mesh


def place(read: Callable[[int, int], np.ndarray], count: int, width: int, mesh: Mesh, *, block: int = BLOCK) -> Placed:
    """Items on the devices of `mesh`. read(start, stop): rows of them, float32 [stop - start, width], asked for once, a device's at a time.

    Raises ValueError where there are none.
    """
    if count < 1:
        raise ValueError("there is no item to search among")
    each = -(-count // mesh.size)
    blocks = -(-each // block)
    block = -(-each // blocks)  # equal blocks, so that little is padded
    each = blocks * block

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(each * mesh.size)
        rows = np.zeros((stop - start, width), np.float32)
        for at in range(start, min(stop, count), block):
            end = min(at + block, stop, count)
            rows[at - start : end - start] = read(at, end)
        return rows

    items = jax.make_array_from_callback((each * mesh.size, width), NamedSharding(mesh, P(mesh.axis_names)), part)
    return Placed(items, count, block, mesh)


def place_array(gallery: np.ndarray, mesh: Mesh, *, block: int = BLOCK) -> Placed:
    """`place` of an array [item, d]. Raises ValueError as it does, and for items that are not finite."""
    check_finite("gallery", gallery)
    return place(lambda start, stop: gallery[start:stop], gallery.shape[0], gallery.shape[1], mesh, block=block)


def top(placed: Placed, queries: np.ndarray, k: int, *, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64, scores float32), [query, k]: the k items, or all where there are fewer, of the greatest product with each of `queries` [query, d], best
    first, equals by index. Products are float32 at the highest precision. Raises ValueError for queries that are not finite or of another width."""
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if queries.ndim != 2 or queries.shape[1] != placed.items.shape[1]:
        raise ValueError(f"queries are {queries.shape}; the items have {placed.items.shape[1]} numbers each")
    check_finite("query", queries)
    every = NamedSharding(placed.mesh, P())
    k = min(k, placed.total)
    merged = placed.mesh.size * min(k, len(placed.items) // placed.mesh.size)  # candidates of a query, from all devices
    size, found = min(block, len(queries), max(1, block * block // merged)), []
    for start in range(0, len(queries), size):
        rows = np.zeros((size, queries.shape[1]), np.float32)  # equally many, so that one program serves
        rows[: len(queries) - start] = queries[start : start + size]
        asked = jax.make_array_from_callback(rows.shape, every, rows.__getitem__)
        found.append(jax.device_get(_top(placed.items, asked, total=placed.total, block=placed.block, k=k, mesh=placed.mesh)))
    ids, scores = (np.concatenate(parts)[: len(queries)] for parts in zip(*found, strict=True))
    return ids.astype(np.int64), scores


def nearest(queries: np.ndarray, gallery: np.ndarray, k: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """`top` of a gallery [item, d] that is asked once. Raises ValueError as `top` does, and where the gallery has fewer than k items."""
    check_finite("query", queries)
    if len(gallery) and not 1 <= k <= len(gallery):
        raise ValueError(f"k={k} must lie between 1 and the {len(gallery)} items of the gallery")
    return top(place_array(gallery, mesh), queries, k)


def check_finite(what: str, rows: np.ndarray) -> None:
    """Raises ValueError unless `rows` [row, d] are embeddings that can be compared."""
    if rows.ndim != 2:
        raise ValueError(f"{what} embeddings are {rows.shape}; they must be [rows, d]")
    if not len(rows):
        raise ValueError(f"there is no {what} embedding")
    if broken := int((~np.isfinite(rows)).any(1).sum()):  # NaN is neither above nor below anything, so every rank would be perfect
        raise ValueError(f"{broken} of {len(rows)} {what} embeddings are not finite; the model has diverged or an input is broken")


@partial(jax.jit, static_argnames=("total", "block", "k", "mesh"))
def _top(items: jax.Array, queries: jax.Array, *, total: int, block: int, k: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    axes = mesh.axis_names

    def of_device(items: jax.Array, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = lax.axis_index(axes) * len(items)
        shape = len(queries), min(k, len(items))  # a device may hold fewer than k

        def step(found: tuple[jax.Array, jax.Array], n: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            ids, best = found
            part = lax.dynamic_slice_in_dim(items, n * block, block)
            index = first + n * block + jnp.arange(block, dtype=jnp.int32)
            scores = jnp.dot(queries, part.T, precision="highest", preferred_element_type=jnp.float32)
            scores = jnp.where(index < total, scores, -jnp.inf)
            best, at = lax.top_k(jnp.concatenate([best, scores], 1), shape[1])  # earlier items stand first and win ties
            return (jnp.take_along_axis(jnp.concatenate([ids, jnp.broadcast_to(index, scores.shape)], 1), at, 1), best), None

        none = jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32)
        (ids, best), _ = lax.scan(step, none, jnp.arange(len(items) // block))
        # Devices hold ascending ids, and their lists come in the order of the devices: again the earlier of equals stand first.
        ids, best = (lax.all_gather(x, axes, axis=1, tiled=True) for x in (ids, best))
        best, at = lax.top_k(best, k)
        return jnp.take_along_axis(ids, at, 1), best

    return jax.shard_map(of_device, mesh=mesh, in_specs=(P(axes), P()), out_specs=P(), check_vma=False)(items, queries)
