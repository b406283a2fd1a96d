"""The rows of a batch that is split over devices: cut in parts, worked on part by part, seen in groups."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxvl.mesh import BATCH


def cut(tree: Any, parts: int) -> Any:
    """Arrays [B, ...] as [B / parts, parts, ...]; part i is [:, i]. Raises ValueError where B does not divide.

    Part i holds the rows i, i + parts, i + 2 parts, ...: of a batch split over devices, the same number from each device, so
    that no row moves.
    """
    batch = jax.tree.leaves(tree)[0].shape[0]
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % (parts * devices):
        raise ValueError(
            f"a batch of {batch} rows does not cut into {parts} microbatches over {devices} devices: make it a multiple of {parts * devices}"
        )
    return jax.tree.map(lambda x: x.reshape(batch // parts, parts, *x.shape[1:]), tree)


def join(x: jax.Array) -> jax.Array:
    """The inverse of `cut` for parts stacked in front: [parts, B / parts, ...] -> [B, ...]."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def split_over_devices(tree: Any) -> Any:
    """Pins the leading axis to the batch axes of the context mesh, which the compiler may lose in the reshapes."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, BATCH), tree)


def part_by_part(f: Callable[[Any, jax.Array | None], Any], parts: int, rows: Any, key: jax.Array | None) -> Any:
    """f(rows, key) for rows [B, ...] in `parts` parts, one after another, each with a key of its own; results [B, ...].

    Row i of f's results depends on row i alone, so that only its random draws can tell the number of parts. What f's backward pass needs is
    computed again there, one part at a time: nothing but one part's activations is ever held.
    """
    if parts == 1:
        return f(rows, key)
    mine = cut(rows, parts)
    keys = None if key is None else jax.random.split(key, parts)

    @jax.checkpoint
    def one(i: jax.Array) -> Any:
        return f(split_over_devices(jax.tree.map(lambda x: x[:, i], mine)), None if keys is None else keys[i])

    return jax.tree.map(join, lax.map(one, jax.numpy.arange(parts)))


def groups(batch: int, size: int) -> int:
    """The number of groups of `size` consecutive rows in a batch. Raises ValueError where they do not divide it."""
    if size < 1 or batch % size:
        raise ValueError(
            f"a batch of {batch} rows does not divide into groups of {size}: make it a multiple, or let the whole batch be one group"
        )
    return batch // size


def grouped(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] as [count, B / count, ...], rows in order."""
    return x.reshape(count, -1, *x.shape[1:])
