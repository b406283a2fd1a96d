"""k-means of proxies inside jit: the fine proxies split over devices by class, the centroids on all of them.

Distances are met in blocks of rows, [block, cluster] at a time. Sums of members are matrix products with one-hot rows on every device and
one all-reduce, which gives the same bits every time, as an atomic scatter would not. Equal distances go to the lowest cluster.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxvl.losses import classes as axis
from jaxvl.losses.classes import Split, dot, unit

Space = Literal["unit", "raw"]
Empty = Literal["keep", "reseed_farthest"]
BLOCK = 4096  # rows met at a time
MOST = 300  # passes of Lloyd's algorithm


class Clusters(NamedTuple):
    """assign: int32 [row], the cluster of each row, 0 for padding. centroids: [cluster, width]. counts: int32 [cluster], members."""

    assign: jax.Array
    centroids: jax.Array
    counts: jax.Array


class How(NamedTuple):
    """rows: how many of the array are no padding. space: whether rows are made unit vectors first. empty: what becomes of a cluster that
    no row is nearest to: it keeps its centroid, or, in the order of their numbers, such clusters take the row farthest from its own
    centroid out of those that share a cluster (equals: the lowest)."""

    rows: int
    space: Space = "unit"
    empty: Empty = "keep"


def online_step(p: jax.Array, centroids: jax.Array, how: How) -> Clusters:
    """One pass: each row of p [row, width] goes to the nearest of the centroids, which become the means of their members."""
    return _on_devices(partial(_pass, how), p, centroids)


def lloyd(p: jax.Array, centroids: jax.Array, how: How, most: int = MOST) -> Clusters:
    """Passes until no row moves, or `most` of them."""

    def device(split: Split, p: jax.Array, centroids: jax.Array) -> Clusters:
        def more(carry: tuple) -> jax.Array:
            return carry[1] & (carry[2] < most)

        def again(carry: tuple) -> tuple:
            clusters, _, passes = carry
            new = _pass(how, split, p, clusters.centroids)
            return new, axis.total(split, jnp.sum(new.assign != clusters.assign)) > 0, passes + 1

        return lax.while_loop(more, again, (_pass(how, split, p, centroids), jnp.bool_(True), 1))[0]

    return _on_devices(device, p, centroids)


def plus_plus(key: jax.Array, p: jax.Array, clusters: int, how: How) -> jax.Array:
    """[cluster, width] rows to start from, each drawn with a probability in proportion to its squared distance from those before it:
    Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, SODA 2007. A draw is the same on any number of devices.

    Raises ValueError for more clusters than rows.
    """
    if not 1 <= clusters <= how.rows:
        raise ValueError(f"{clusters} clusters of {how.rows} rows cannot be; there must be at least one and no more than rows")
    real = jnp.arange(len(p)) < how.rows
    wide = p.astype(jnp.promote_types(p.dtype, jnp.float32))
    length = lax.rsqrt(jnp.sum(wide * wide, 1) + axis.EPS) if how.space == "unit" else jnp.ones(len(p), wide.dtype)
    square = jnp.sum(wide * wide, 1) * length**2
    first = jax.random.randint(jax.random.fold_in(key, 0), (), 0, how.rows)

    def draw(k: jax.Array, carry: tuple) -> tuple:
        found, nearest, at = carry
        row = wide[at] * length[at]
        nearest = jnp.minimum(nearest, jnp.maximum(square - 2 * dot(wide, row) * length + jnp.sum(row * row), 0))
        # The greatest of log probability plus Gumbel noise is a draw; unlike a running sum over rows it does not depend on their layout.
        noisy = jnp.log(nearest) + jax.random.gumbel(jax.random.fold_in(key, k + 1), (len(p),), wide.dtype)
        return found.at[k].set(row), nearest, jnp.argmax(jnp.where(real, noisy, -jnp.inf))

    start = jnp.zeros((clusters, p.shape[1]), wide.dtype), jnp.full(len(p), jnp.inf, wide.dtype), first
    return lax.fori_loop(0, clusters, draw, start)[0]


def kmeans(key: jax.Array, p: jax.Array, clusters: int, how: How, most: int = MOST) -> Clusters:
    """k-means++ and then Lloyd's algorithm."""
    return lloyd(p, plus_plus(key, p, clusters, how), how, most)


def means(p: jax.Array, assign: jax.Array, centroids: jax.Array, how: How) -> jax.Array:
    """Centroids as the means of their members under `assign` int32 [row]; a cluster without one keeps its row of `centroids`.

    Differentiable by p, to which each mean gives 1 / members of its gradient; a kept row gives and gets none.
    """
    return _means(how, p, assign, lax.stop_gradient(centroids))[0]


def recount(assign: jax.Array, clusters: int, how: How) -> jax.Array:
    """int32 [cluster], members under `assign`."""
    real = jnp.where(jnp.arange(len(assign)) < how.rows, assign, clusters)
    return jnp.zeros(clusters, jnp.int32).at[real].add(1, mode="drop")


def look_up(table: jax.Array, at: jax.Array) -> jax.Array:
    """`table[at]` for an int32 table [class] split over devices and indices [batch] that every device has."""

    def device(split: Split, table: jax.Array, at: jax.Array) -> tuple[jax.Array]:
        local = at - axis.first(split, len(table))
        mine = (local >= 0) & (local < len(table))
        return (axis.total(split, jnp.where(mine, table[jnp.clip(local, 0, len(table) - 1)], 0)),)

    split = axis.of_mesh(len(table))
    return axis.on_devices(partial(device, split), split, (table, at), "cr", "r")[0]


def _on_devices(f: Callable, p: jax.Array, centroids: jax.Array) -> Clusters:
    split = axis.of_mesh(len(p))
    return Clusters(*axis.on_devices(lambda *args: tuple(f(split, *args)), split, (p, centroids), "cr", "crr"))


def _pass(how: How, split: Split, p: jax.Array, centroids: jax.Array) -> Clusters:
    """`online_step` on a device."""
    rows, clusters = len(p), len(centroids)
    real = axis.ids(split, rows, how.rows) >= 0
    square = jnp.sum(centroids * centroids, 1)

    def nearest(carry: tuple, start: jax.Array, fresh: jax.Array) -> tuple:
        u = _points(how, lax.dynamic_slice_in_dim(p, start, len(fresh)))
        apart = square - 2 * dot(u, centroids.T)  # without |u|^2, which is the same for all clusters
        put = lambda a, b: lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), start, 0)
        return put(carry[0], jnp.argmin(apart, 1)), put(carry[1], apart.min(1) + jnp.sum(u * u, 1))

    assign, apart = axis.over_pieces(nearest, rows, BLOCK, (jnp.zeros(rows, jnp.int32), jnp.zeros(rows, square.dtype)))
    assign = jnp.where(real, assign, 0)
    counts = axis.total(split, jnp.zeros(clusters, jnp.int32).at[jnp.where(real, assign, clusters)].add(1, mode="drop"))
    if how.empty == "reseed_farthest":
        assign, counts = _reseed(split, assign, apart, counts, real)
    return Clusters(assign, _mean(how, split, p, assign, real, counts, centroids), counts)


def _points(how: How, p: jax.Array) -> jax.Array:
    return unit(p) if how.space == "unit" else p.astype(jnp.promote_types(p.dtype, jnp.float32))


def _mean(how: How, split: Split, p: jax.Array, assign: jax.Array, real: jax.Array, counts: jax.Array, centroids: jax.Array) -> jax.Array:
    def add(sums: jax.Array, start: jax.Array, fresh: jax.Array) -> jax.Array:
        cut = lambda a: lax.dynamic_slice_in_dim(a, start, len(fresh))
        members = (cut(assign)[:, None] == jnp.arange(len(centroids))) & (cut(real) & fresh)[:, None]
        return sums + dot(members.T.astype(sums.dtype), _points(how, cut(p)))

    sums = axis.total(split, axis.over_pieces(add, len(p), BLOCK, jnp.zeros(centroids.shape, jnp.promote_types(p.dtype, jnp.float32))))
    return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], centroids).astype(centroids.dtype)


def _reseed(split: Split, assign: jax.Array, apart: jax.Array, counts: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = len(assign)
    number = axis.first(split, rows) + jnp.arange(rows, dtype=jnp.int32)
    over = lambda reduce, x: reduce(x, split.axes) if split.axes else x

    def fill(k: jax.Array, carry: tuple) -> tuple:
        assign, counts = carry
        far = jnp.where(real & (counts[assign] >= 2), apart, -jnp.inf)
        farthest = over(lax.pmax, far.max())
        chosen = over(lax.pmin, jnp.min(jnp.where((far == farthest) & jnp.isfinite(far), number, jnp.iinfo(jnp.int32).max)))
        mine = number == chosen
        left = axis.total(split, jnp.sum(jnp.where(mine, assign, 0)))
        moved = counts.at[left].add(-1).at[k].add(1)
        return jnp.where(mine, k, assign), jnp.where(jnp.isfinite(farthest), moved, counts)

    def visit(k: jax.Array, carry: tuple) -> tuple:
        return lax.cond(carry[1][k] == 0, lambda c: fill(k, c), lambda c: c, carry)

    return lax.fori_loop(jnp.int32(0), jnp.int32(len(counts)), visit, (assign, counts))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _means(how: How, p: jax.Array, assign: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    def device(split: Split, p: jax.Array, assign: jax.Array, centroids: jax.Array) -> tuple:
        real = axis.ids(split, len(p), how.rows) >= 0
        counts = axis.total(split, jnp.zeros(len(centroids), jnp.int32).at[jnp.where(real, assign, len(centroids))].add(1, mode="drop"))
        return _mean(how, split, p, assign, real, counts, centroids), counts

    split = axis.of_mesh(len(p))
    return axis.on_devices(partial(device, split), split, (p, assign, centroids), "ccr", "rr")


def _means_forward(how: How, p: jax.Array, assign: jax.Array, centroids: jax.Array) -> tuple:
    mean, counts = _means(how, p, assign, centroids)
    return (mean, counts), (p, assign, counts)


def _means_backward(how: How, residuals: tuple, g: tuple) -> tuple:
    p, assign, counts = residuals
    share = g[0] / jnp.maximum(counts, 1)[:, None]

    def device(split: Split, p: jax.Array, assign: jax.Array, share: jax.Array) -> tuple[jax.Array]:
        real = axis.ids(split, len(p), how.rows) >= 0
        _, pull = jax.vjp(partial(_points, how), p)
        return pull(jnp.where(real[:, None], share[assign], 0))

    split = axis.of_mesh(len(p))
    (dp,) = axis.on_devices(partial(device, split), split, (p, assign, share), "ccr", "c")
    return dp, None, jnp.zeros_like(g[0])


_means.defvjp(_means_forward, _means_backward)
