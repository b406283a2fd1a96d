"""Evaluation kind "metric_learning": how well images of one class are found by an image of it, and whether clusters are classes.

Queries rank a gallery, or each other where there is none, a query never being an item of its own (it is left out by its place, not as
the first hit). Nothing holds a score of every query with every item: ranks are counted, the first places kept, in blocks.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxvl.data.dataset import DataOptions, Dataset
from jaxvl.evals.embed import Embedded, Model, embed_samples, open_for, records
from jaxvl.evals.metric_learning import nmi
from jaxvl.evals.ranking import recall_at
from jaxvl.evals.streamed import streamed_ranks
from jaxvl.evals.topk import BLOCK, nearest, place_array, top as top_of
from jaxvl.gallery import Gallery, Hit, Query
from jaxvl.losses.classes import PER_DEVICE
from jaxvl.losses.cluster import How, lloyd

HITS = 5  # retrieved items shown for a query
PASSES = 100  # of Lloyd's algorithm, where clusters do not come to rest before


class MetricLearningOptions(NamedTuple):
    """The keys of an `evals` entry of this kind.

    source, gallery: shards, as in data.source; without a gallery the queries are it. label: the field that names the class. classes,
    hierarchy, split_level: which of the classes, as in the data section. every: steps between evaluations in a run, 0 for its end only.
    ks: the K of R@K. nmi: the mean of entropies that the mutual information of clusters and classes is divided by, "none" for no
    clustering. seed: of the samples that clustering starts from. batch_size: images embedded at a time. show: queries in the report.
    """

    kind: Literal["metric_learning"] = "metric_learning"
    source: str | tuple[str, ...] = ""
    gallery: str | tuple[str, ...] = ""
    label: str = "class"
    classes: Literal["", "all", "first", "second"] = "all"
    hierarchy: str = ""
    split_level: int = -1
    every: int = 0
    ks: tuple[int, ...] = (1, 2, 4, 8)
    nmi: Literal["arithmetic", "geometric", "min", "max", "none"] = "arithmetic"
    seed: int = 0
    batch_size: int = 256
    show: int = 12


class Places(NamedTuple):
    """float64 [query], NaN for a query without a right item: r_precision and ap_at_r as in evals/metric_learning.py."""

    r_precision: np.ndarray
    ap_at_r: np.ndarray


def evaluate(name: str, options: MetricLearningOptions, model: Model) -> tuple[dict[str, float], list[Gallery]]:
    """ "r@K" under the stable rule, "r_precision", "map@r", "nmi_MEAN", and "lone", queries without a right item, which no mean counts."""
    datasets = _open(options, model.data)
    queries, *rest = [embed_samples(model, dataset, options.batch_size) for dataset in datasets]
    items = rest[0] if rest else None
    labels, item_labels = same_numbers([d.classes for d in datasets], [queries.labels, *(e.labels for e in rest)])
    numbers = measure(queries.images, labels, items.images if items else None, item_labels, options.ks, model.mesh)
    if options.nmi != "none":
        numbers[f"nmi_{options.nmi}"] = clustered(queries.images, labels, options.nmi, options.seed, model.mesh)
    shown = [gallery(name, options, model, datasets, queries, items, labels, item_labels)] if options.show else []
    return numbers, shown


def open_checked(options: MetricLearningOptions, data: DataOptions) -> Dataset:
    """The data set of the queries. Raises ValueError for options that cannot be."""
    return _open(options, data)[0]


def measure(
    queries: np.ndarray,
    labels: np.ndarray,
    items: np.ndarray | None,
    item_labels: np.ndarray | None,
    ks: Sequence[int],
    mesh: Mesh,
    block: int = BLOCK,
) -> dict[str, float]:
    """The numbers of a ranking by the dot products of float32 rows; warns where the order of equal scores matters to them."""
    own = items is None or item_labels is None
    items, item_labels = (queries, labels) if items is None or item_labels is None else (items, item_labels)
    ranks = streamed_ranks(queries, items, labels, item_labels, mesh, leave_one_out=own, block=block)
    recalls = [recall_at(r, ks) for r in ranks]
    if not np.array_equal(recalls[0], recalls[1], equal_nan=True):
        shown = ", ".join(f"R@{k} {hi:.4f} or {lo:.4f}" for k, hi, lo in zip(ks, *recalls[:2], strict=True) if hi != lo)
        warnings.warn(f"equal scores make recall a matter of order ({shown}); the lowest index goes first", stacklevel=2)
    found = places(queries, labels, items, item_labels, mesh, own=own, block=block)
    mean = lambda x: float(np.nanmean(x)) if (~np.isnan(x)).any() else float("nan")
    numbers = {f"r@{k}": float(r) for k, r in zip(ks, recalls[2], strict=True)}
    return numbers | {"r_precision": mean(found.r_precision), "map@r": mean(found.ap_at_r), "lone": float((ranks.stable < 0).sum())}


def places(
    queries: np.ndarray, labels: np.ndarray, items: np.ndarray, item_labels: np.ndarray, mesh: Mesh, *, own: bool, block: int = BLOCK
) -> Places:
    """What the first R places of each query hold, R being its right items; equal scores in the order of the index."""
    known, sizes = np.unique(item_labels, return_counts=True)
    at = np.clip(np.searchsorted(known, labels), 0, len(known) - 1)
    total = np.where(known[at] == labels, sizes[at], 0) - own
    out = Places(np.full(len(queries), np.nan), np.full(len(queries), np.nan))
    k = int(total.max(initial=0))
    if not k:
        return out
    place = np.arange(1, k + 1)
    placed = place_array(items, mesh, block=block)
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        top, _ = top_of(placed, queries[rows], k + own)
        if own:  # the query itself, or where equals stand before it the last
            self = top == start + np.arange(len(top))[:, None]
            self[:, -1] |= ~self.any(1)
            top = top[~self].reshape(len(top), -1)
        hits = (item_labels[top] == labels[rows, None]) & (place <= total[rows, None])
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is the NaN of a query without a right item
            out.r_precision[rows] = hits.sum(1) / np.where(total[rows] > 0, total[rows], np.nan)
            out.ap_at_r[rows] = (hits.cumsum(1) / place * hits).sum(1) / np.where(total[rows] > 0, total[rows], np.nan)
    return out


def clustered(points: np.ndarray, labels: np.ndarray, mean: str, seed: int, mesh: Mesh) -> float:
    """NMI of the classes and of as many clusters, by Lloyd's algorithm from distinct random points; empty clusters are seeded anew."""
    clusters = len(np.unique(labels))
    start = points[np.sort(np.random.default_rng(seed).choice(len(points), clusters, replace=False))]
    padded = np.pad(points, [(0, -len(points) % mesh.size), (0, 0)])
    with jax.set_mesh(mesh):
        rows = jax.make_array_from_callback(padded.shape, NamedSharding(mesh, PER_DEVICE), lambda index: padded[index])
        found = _lloyd(rows, start, len(points))
    return nmi(labels, np.asarray(jax.device_get(found))[: len(points)], mean)


@partial(jax.jit, static_argnums=2)
def _lloyd(points: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    assign = lloyd(points, start, How(rows, "raw", "reseed_farthest"), PASSES).assign
    return jax.lax.with_sharding_constraint(assign, jax.sharding.PartitionSpec())


def same_numbers(classes: Sequence[Sequence[str]], labels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels of queries and gallery as numbers of one list of classes; those of data sets without class names are numbers already."""
    if len(labels) == 1:
        return labels[0], None
    if bool(classes[0]) != bool(classes[1]):
        raise ValueError("the classes of source are names and those of gallery numbers, or the other way round; set classes to all")
    number = {name: i for i, name in enumerate(dict.fromkeys([*classes[0], *classes[1]]))}
    one, other = (np.array([number[c] for c in names], np.int32)[l] if names else l for names, l in zip(classes, labels, strict=True))
    return one, other


def gallery(
    name: str, options: MetricLearningOptions, model: Model, datasets: Sequence[Dataset], queries: Embedded, items: Embedded | None,
    labels: np.ndarray, item_labels: np.ndarray | None,
) -> Gallery:  # fmt: skip
    """Queries evenly spread over the set with the images nearest to them."""
    chosen = np.unique(np.linspace(0, len(queries.images) - 1, options.show).round().astype(int))
    own = items is None or item_labels is None
    found, found_labels = (queries, labels) if items is None or item_labels is None else (items, item_labels)
    top, scores = nearest(queries.images[chosen], found.images, min(HITS + own, len(found.images)), model.mesh)
    first = None if own else streamed_ranks(queries.images[chosen], found.images, labels[chosen], found_labels, model.mesh).stable
    shown = lambda dataset, embedded, rows: [picture for picture, _ in records(dataset, embedded.ids[rows])]
    rows = []
    for q, picture in enumerate(shown(datasets[0], queries, chosen)):
        keep = [i for i, item in enumerate(top[q]) if not (own and item == chosen[q])][:HITS]
        pictures = shown(datasets[-1], found, top[q][keep])
        hits = tuple(
            Hit(p, float(scores[q, i]), bool(found_labels[top[q, i]] == labels[chosen[q]])) for p, i in zip(pictures, keep, strict=True)
        )
        rank = (
            int(first[q]) if first is not None else next((r for r, hit in enumerate(hits) if hit.right), HITS)
        )  # known as far as it is shown
        names = datasets[0].classes
        rows.append(Query(picture, hits, rank, names[queries.labels[chosen[q]]] if names else str(queries.labels[chosen[q]])))
    return Gallery(f"{name}: image to class", tuple(rows))


def _open(options: MetricLearningOptions, data: DataOptions) -> list[Dataset]:
    if not options.ks or min(options.ks) < 1:
        raise ValueError(f"ks is {options.ks}; it must be one or more whole numbers from 1")
    if not options.label or options.show < 0:
        raise ValueError(f"label is {options.label!r} and show is {options.show}; they must name a field and be at least 0")
    choice: dict[str, Any] = {name: getattr(options, name) for name in ("label", "classes", "hierarchy", "split_level")}
    sources = [options.source, *([options.gallery] if options.gallery else [])]
    return [open_for(data, source, captions="none", **choice) for source in sources]
