"""Zero-shot image-text retrieval, both ways, with several captions an image: any caption of an image is a right answer to it, and
where the evaluation has a group any item of the same group (groups.py)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxvl.data.dataset import DataOptions, Dataset
from jaxvl.evals import ranking
from jaxvl.evals.embed import Embedded, Model, embed_samples, open_for, records
from jaxvl.evals.groups import Groups, chance, check, groups_of
from jaxvl.evals.ranking import Ranks
from jaxvl.evals.streamed import streamed_ranks
from jaxvl.evals.topk import nearest
from jaxvl.gallery import Gallery, Hit, Query

HITS = 5  # retrieved items shown for a query


class Retrieved(NamedTuple):
    """The HITS best items of each query, best first: places int [query, hit], scores; and the stable rank of its best right item."""

    top: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray


class RetrievalOptions(NamedTuple):
    """The keys of an `evals` entry of this kind.

    source: shards, as in data.source. every: steps between evaluations in a run, 0 for its end only. captions: texts an image
    has at most, the main one first. cleaning: of captions, as in data.cleaning, by default the training's. group: what makes items right
    answers: "" the same sample, "caption" also an equal caption, or a field of the samples with an equal value. ks: the K of R@K. folds: equal blocks of consecutive images that are ranked alone and averaged
    (5 for COCO 1K). batch_size: images embedded at a time. show: queries each way in the report.
    """

    kind: Literal["retrieval"] = "retrieval"
    source: str | tuple[str, ...] = ""
    every: int = 0
    captions: int = 1
    cleaning: Literal["", "plain", "albef"] = ""
    group: str = ""
    ks: tuple[int, ...] = (1, 5, 10)
    folds: int = 1
    batch_size: int = 256
    show: int = 12


def evaluate(name: str, options: RetrievalOptions, model: Model) -> tuple[dict[str, float], list[Gallery]]:
    """R@K, median rank (1-based) and rsum under the stable rule; see ranking.py. With a group its name, and R@K of chance (`told`).

    Raises ValueError for options that cannot be.
    """
    dataset = open_checked(options, model.data)
    embedded = embed_samples(model, dataset, options.batch_size, options.captions)
    groups = groups_of(options.group, dataset, embedded, options.captions)
    numbers = recalls(model, embedded, groups, options.ks, options.folds) | told(options.group, embedded, groups, options.ks, options.folds)
    shown = galleries(name, options, dataset, embedded, groups, partial(by_cosine, model, embedded, groups)) if options.show else []
    return numbers, shown


def open_checked(options: RetrievalOptions, data: DataOptions) -> Dataset:
    """The data set to evaluate on. Raises ValueError for options that cannot be."""
    if not options.ks or min(options.ks) < 1:
        raise ValueError(f"ks is {options.ks}; it must be one or more whole numbers from 1")
    if options.captions < 1 or options.show < 0 or options.folds < 1 or options.batch_size < 1:
        low = {"captions": 1, "show": 0, "folds": 1, "batch_size": 1}
        raise ValueError(
            "; ".join(f"{k} is {getattr(options, k)}, it must be at least {n}" for k, n in low.items() if getattr(options, k) < n)
        )
    dataset = open_for(data, options.source, captions="random" if options.captions > 1 else "first", cleaning=options.cleaning)
    check(options.group, dataset)
    return dataset


def recalls(model: Model, embedded: Embedded, groups: Groups, ks: tuple[int, ...], folds: int) -> dict[str, float]:
    """The numbers of both ways, averaged over folds. Raises ValueError for folds that do not divide the images."""
    ranks = [rank(model, embedded.images[rows], embedded.texts[texts], some) for rows, texts, some in blocks(embedded, groups, folds)]
    return ranking.mean([ranking.both_ways(*both, ks) for both in ranks])


def told(group: str, embedded: Embedded, groups: Groups, ks: tuple[int, ...], folds: int = 1) -> dict[str, float]:
    """What stands beside grouped numbers: "grouped_by/NAME", how many groups there are, and R@K of chance; {} without a group."""
    if not group:
        return {}
    by_chance = ranking.mean([chance(some, ks) for _, _, some in blocks(embedded, groups, folds)])
    return {f"grouped_by/{group}": float(len(np.unique(groups.texts))), **by_chance}


def blocks(embedded: Embedded, groups: Groups, folds: int) -> list[tuple[slice, np.ndarray, Groups]]:
    """Rows of images and of texts and their groups, of each fold. Raises ValueError for folds that do not divide the images."""
    parts = ranking.folds(embedded.owner, len(embedded.images), folds)
    return [(rows, texts, Groups(groups.images[rows], groups.texts[texts])) for rows, texts, _ in parts]


def rank(model: Model, images: np.ndarray, texts: np.ndarray, groups: Groups) -> tuple[Ranks, Ranks]:
    """Ranks of image queries among texts and of text queries among images."""
    sides = (images, texts), (groups.images, groups.texts)
    to_text, to_image = (streamed_ranks(*rows, *of, model.mesh) for rows, of in (sides, [side[::-1] for side in sides]))
    return to_text, to_image


def galleries(
    name: str, options: Any, dataset: Dataset, embedded: Embedded, groups: Groups, retrieve: Callable[[str, np.ndarray], Retrieved]
) -> list[Gallery]:
    """Queries evenly spread over the set, with what they retrieve from all of it: retrieve(way, queries' places) -> Retrieved."""
    first = np.searchsorted(embedded.owner, np.arange(len(embedded.images)))  # main text of each image
    chosen = np.unique(np.linspace(0, len(embedded.images) - 1, options.show).round().astype(int))
    out = []
    for way in ("image to text", "text to image"):
        place = embedded.owner if way == "image to text" else np.arange(len(embedded.images))  # the image of each item
        right = (lambda i, t: groups.right(i, t)) if way == "image to text" else (lambda i, other: groups.right(other, int(first[i])))
        top, scores, ranks = retrieve(way, chosen if way == "image to text" else first[chosen])
        needed = np.unique(np.concatenate([chosen, place[top].ravel()]))
        seen = dict(zip(needed, records(dataset, embedded.ids[needed], options.captions), strict=True))
        text = lambda t, seen=seen: seen[embedded.owner[t]][1][t - first[embedded.owner[t]]]
        show = text if way == "image to text" else lambda i, seen=seen: seen[i][0]
        rows = []
        for q, image in enumerate(chosen):
            hits = tuple(Hit(show(i), float(s), right(image, i)) for i, s in zip(top[q], scores[q], strict=True))
            picture, caption = seen[image][0], text(first[image])
            item, answer = (picture, caption) if way == "image to text" else (caption, picture)
            rows.append(Query(item, hits, int(ranks[q]), answer))
        out.append(Gallery(f"{name}: {way}", tuple(rows)))
    return out


def by_cosine(model: Model, embedded: Embedded, groups: Groups, way: str, chosen: np.ndarray) -> Retrieved:
    """What queries retrieve by their embeddings."""
    sides = (embedded.images, groups.images), (embedded.texts, groups.texts)
    (queries, own), (items, theirs) = sides if way == "image to text" else sides[::-1]
    top, scores = nearest(queries[chosen], items, min(HITS, len(items)), model.mesh)
    return Retrieved(top, scores, streamed_ranks(queries[chosen], items, own[chosen], theirs, model.mesh).stable)
