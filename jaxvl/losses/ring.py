"""A batch split over devices whose blocks travel round a ring, so that a loss over all pairs holds one block at a time.

With B rows on n devices, a device keeps its own b = B/n rows and meets the b rows of every device in n steps. Nothing
larger than a [b, b] block and a few [b, width] arrays is ever live, where the plain computation holds [b, B] and
gathers [B, width]. Each block is cut in two halves that travel in opposite directions, because links between
accelerators carry both directions at once.

A loss is written as a `step` that combines the rows at home with one visiting block. What the step adds up comes in two
kinds: sums that stay with the rows at home, and sums that travel with the visiting block and are complete when it is
home again.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


class Ring(NamedTuple):
    axes: tuple[str, ...]  # mesh axes the batch is split over, none on a ring of one device
    size: int  # devices on the ring, n
    rows: int  # rows at home, b = B/n


def of_batch(batch: int) -> Ring:
    """The ring of the context mesh (`jax.set_mesh`): its axes "data" and "fsdp"; without a mesh, a ring of one.

    Raises:
      ValueError: `batch` does not divide by the number of devices on the ring.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in BATCH_AXES if a in mesh.axis_names and mesh.shape[a] > 1)
    n = prod(mesh.shape[a] for a in axes)
    if batch % n:
        sizes = " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
        raise ValueError(
            f"a batch is split evenly over {n} devices (mesh {sizes}), but this one has {batch} rows: use a multiple of {n}, or for a "
            "loss with impl='ring' impl='global'"
        )
    return Ring(axes, n, batch // n)


def over_rows(f: Callable, ring: Ring, args: tuple, outputs: str) -> Any:
    """`f(*args)` on every device's own rows; arguments with axes are split by rows, scalars are copied.

    `outputs` has one letter for each value `f` returns: "r" for rows, kept split; "s" for a scalar that `f` has already
    summed over the ring with `total`.
    """
    if ring.size == 1:
        return f(*args)
    split = P(ring.axes)
    specs = tuple(split if jnp.ndim(a) else P() for a in args)
    return jax.shard_map(f, in_specs=specs, out_specs=tuple(split if o == "r" else P() for o in outputs))(*args)


def total(ring: Ring, x: jax.Array) -> jax.Array:
    return lax.psum(x, ring.axes) if ring.axes else x


def row_ids(ring: Ring) -> jax.Array:
    """Positions in the global batch of the rows at home, int32 [b]: equal ids mark the pairs that belong together."""
    first = lax.axis_index(ring.axes) * ring.rows if ring.axes else 0
    return first + jnp.arange(ring.rows)


def circulate(step: Callable, ring: Ring, home: Any, block: Any, travel: Any) -> tuple[Any, Any]:
    """Shows every block of the ring to the rows at home.

    Args:
      step: `(home, block, travel) -> (home, travel)`, called once for each half of each block, own block first.
      home: pytree of sums that stay here, before the first step: constants, the same on every device.
      block: pytree of arrays with leading axis [b], what the other devices need of the rows at home.
      travel: pytree of arrays with leading axis [b], sums that go with `block`: constants likewise.

    Returns:
      `home` after all n blocks, and `travel` as the n devices have filled it for the rows at home.
    """
    half = ring.rows // 2 if ring.size > 2 else 0
    cuts, turns = ((slice(half), slice(half, None)), (1, -1)) if half else ((slice(None),), (1,))
    blocks, travels = ([_cut(tree, cut) for cut in cuts] for tree in (block, travel))

    def hop(trees: list) -> list:
        if not ring.axes:
            return trees
        n = ring.size
        return [lax.ppermute(tree, ring.axes, [(i, (i + turn) % n) for i in range(n)]) for tree, turn in zip(trees, turns, strict=True)]

    def meet(home: Any, blocks: list, travels: list) -> tuple[Any, list]:
        filled = []
        for b, t in zip(blocks, travels, strict=True):
            home, t = step(home, b, t)
            filled.append(t)
        return home, filled

    def body(_: jax.Array, carry: tuple) -> tuple:
        home, blocks, travels = carry
        following = hop(blocks)  # in flight while these blocks are used
        home, travels = meet(home, blocks, hop(travels))
        return home, following, travels

    if ring.axes:  # the loop turns these constants into values that differ between devices
        home, travels = lax.pcast((home, travels), ring.axes, to="varying")
    home, blocks, travels = lax.fori_loop(0, ring.size - 1, body, (home, blocks, travels))
    home, travels = meet(home, blocks, hop(travels))
    return home, jax.tree.map(lambda *x: jnp.concatenate(x), *hop(travels))


def _cut(tree: Any, rows: slice) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)
