r"""The hierarchical proxy loss: Yang, Bastan, Zhu, Gray and Samaras, Hierarchical Proxy-based Loss for Deep Metric Learning, WACV 2022,
https://arxiv.org/abs/2103.13538.

Proxies P_0, one a class, have coarser proxies P_1, P_2, ... above them. a_l names the parent of every proxy of level l in level l + 1,
so that an image of class y_0 has one label a level, y_{l+1} = a_l[y_l], and any proxy loss can be asked of every level:

.. math::
    L = \sum_l w_l \, L_\text{base}(X, y_l, P_l)

The sum is not divided by the weights'. Where the coarse proxies come from is told by what is passed as them: parameters of their own
(free), the means of an earlier step (frozen), or the means of this step, which hand their gradient down (tied, `tie`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from jaxvl.losses import cluster
from jaxvl.losses.cluster import Empty, How, Space

Arrays = tuple[jax.Array, ...]


class Hierarchy(NamedTuple):
    """What lies above the classes. parents: a_0 int32 [class] (padding 0), a_1 int32 [C_1], ... coarse: P_1 [C_1, width], ...
    counts: int32 [C_1], ..., children of each."""

    parents: Arrays
    coarse: Arrays
    counts: Arrays


def labels_of(parents: Sequence[jax.Array], labels: jax.Array) -> Arrays:
    """y_0, y_1, ... of labels y_0 int32 [batch]."""
    levels = [labels]
    for a in parents:
        levels.append(cluster.look_up(a, levels[-1]))
    return tuple(levels)


def hierarchical(
    base: Callable[..., jax.Array], x: jax.Array, proxies: Sequence[jax.Array], labels: Sequence[jax.Array], weights: Sequence, classes: int
) -> tuple[jax.Array, Arrays]:
    """(L, the loss of each level without its weight) of embeddings x [batch, width].

    base: (x, p, labels, classes=n) -> scalar, a loss of `losses/proxy.py` with its own numbers filled in. proxies, labels, weights: of each
    level, fine first. classes: how many rows of proxies[0] are no padding.
    """
    if not len(proxies) == len(labels) == len(weights):
        raise ValueError(f"{len(proxies)} levels of proxies, {len(labels)} of labels and {len(weights)} weights must be as many")
    sizes = [classes, *map(len, proxies[1:])]
    losses = tuple(base(x, p, y, classes=n) for p, y, n in zip(proxies, labels, sizes, strict=True))
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)), losses  # type: ignore[return-value]


def tie(p: jax.Array, above: Hierarchy, classes: int, space: Space = "unit") -> Arrays:
    """P_1, P_2, ... as means of their children, bottom-up and differentiable by p; a childless one keeps its row."""
    levels, below, rows = [], p, classes
    for a, old in zip(above.parents, above.coarse, strict=True):
        below = cluster.means(below, a, old, How(rows, space))
        levels.append(below)
        rows = len(old)
    return tuple(levels)


def refresh(p: jax.Array, above: Hierarchy, classes: int, space: Space = "unit", empty: Empty = "keep") -> Hierarchy:
    """One online update of every level, bottom-up, from the coarse proxies in force: each child to the nearest, then their means."""
    return _upwards(p, above.coarse, classes, lambda p, old, level, rows: cluster.online_step(p, old, How(rows, space, empty)))


def build(key: jax.Array, p: jax.Array, like: Sequence[jax.Array], classes: int, space: Space = "unit", empty: Empty = "keep") -> Hierarchy:
    """A hierarchy from nothing: k-means of the classes, then of the centroids, as many clusters a level as `like` has rows."""

    def level_of(p: jax.Array, old: jax.Array, level: int, rows: int) -> cluster.Clusters:
        return cluster.kmeans(jax.random.fold_in(key, level), p, len(old), How(rows, space, empty))

    return _upwards(p, like, classes, level_of)


def averaged(p: jax.Array, above: Hierarchy, classes: int, space: Space = "unit") -> Hierarchy:
    """The same parents, and coarse proxies that are the means of their children now."""
    coarse = tie(p, above, classes, space)
    rows = [classes, *map(len, coarse)]
    counts = tuple(cluster.recount(a, len(c), How(n)) for a, c, n in zip(above.parents, coarse, rows[:-1], strict=True))
    return Hierarchy(above.parents, coarse, counts)


def _upwards(p: jax.Array, coarse: Sequence[jax.Array], classes: int, level_of: Callable) -> Hierarchy:
    found, below, rows = [], p, classes
    for level, old in enumerate(coarse):
        found.append(level_of(below, old, level, rows))
        below, rows = found[-1].centroids, len(old)
    return Hierarchy(
        tuple(c.assign for c in found),
        tuple(c.centroids.astype(old.dtype) for c, old in zip(found, coarse, strict=True)),
        tuple(c.counts for c in found),
    )
