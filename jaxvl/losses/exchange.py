"""Rows of a batch that other devices hold: each device gets the ones it asks for, and their gradients go home.

Gathering the batch would put all of it on every device, and the compiler's way of indexing a split array is to do that, once for every array that
is read. Here the rows pass by on a ring and a device keeps what it needs.
"""

import jax
import jax.numpy as jnp

from jaxvl.losses.ring import circulate, of_batch, over_rows, row_ids
from jaxvl.rows import grouped


def at_home(groups: int, batch: int) -> bool:
    """Whether every device holds whole groups of a batch split over devices."""
    return groups % of_batch(batch).size == 0


def fetch(x: jax.Array, rows: jax.Array) -> jax.Array:
    """[B, ...] of x [B, ...]: row r of group g is row rows[g, r] of that group; rows int [group, B / group], x and the result split over the batch axes.

    Groups that lie whole on one device are read there. Else each of n devices sends B - B/n rows, and in the backward pass gradients of B + B/n.
    """
    count, size = rows.shape
    if at_home(count, len(x)):
        return jax.vmap(lambda x, rows: x[rows])(grouped(x, count), rows).reshape(x.shape)
    rows = (rows + size * jnp.arange(count)[:, None]).reshape(-1)
    return _fetch(x, rows) if jnp.issubdtype(x.dtype, jnp.inexact) else _pass_rows(x, rows)


@jax.custom_vjp
def _fetch(x: jax.Array, rows: jax.Array) -> jax.Array:
    return _pass_rows(x, rows)


def _pass_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x[rows]: the rows of x pass by."""
    ring = of_batch(len(x))

    def of_device(x: jax.Array, rows: jax.Array) -> tuple[jax.Array]:
        def meet(found: jax.Array, block: tuple[jax.Array, jax.Array], _: tuple) -> tuple[jax.Array, tuple]:
            ids, there = block
            at = rows - ids[0]
            here = ((at >= 0) & (at < len(ids))).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(here, there[jnp.clip(at, 0, len(ids) - 1)], found), ()

        return (circulate(meet, ring, jnp.zeros(x.shape, x.dtype), (row_ids(ring), x), ())[0],)

    return over_rows(of_device, ring, (x, rows), "r")[0]


def _pass_gradients(rows: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    """The transpose of `_pass_rows`: sums for the rows of x pass by, and every device adds what it has for them."""
    ring = of_batch(len(rows))

    def of_device(gradient: jax.Array, rows: jax.Array) -> tuple[jax.Array]:
        def meet(_: tuple, ids: jax.Array, sums: jax.Array) -> tuple[tuple, jax.Array]:
            at = rows - ids[0]
            at = jnp.where((at >= 0) & (at < len(ids)), at, len(ids))  # out of bounds, and dropped
            return (), sums.at[at].add(gradient, mode="drop")

        return (circulate(meet, ring, (), row_ids(ring), jnp.zeros(gradient.shape, gradient.dtype))[1],)

    return over_rows(of_device, ring, (gradient, rows), "r")[0], None


_fetch.defvjp(lambda x, rows: (_pass_rows(x, rows), rows), _pass_gradients)
