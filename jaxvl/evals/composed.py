"""Composed retrieval: images ranked for a reference image and a text that says what to change, beside what needs no composition.

Of one model and one gallery: the composed query, the reference image alone, the text alone, and the sum of the two embeddings;
then text-to-image and image-to-text retrieval, where equal captions are equally right. The reference is no item of its own query's
gallery. Each triplet is a query and its target the right answer, as Fashion-IQ is scored officially; where a set means every target of an
equal reference and text, queries="merged" makes them one query with several.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxvl.data import triplets
from jaxvl.data.dataset import DataOptions, Dataset, cleaning_of, read_samples, triplet_files
from jaxvl.data.source import Record, Want
from jaxvl.data.triplets import AND, Texts, Triplet
from jaxvl.evals import embed, ranking
from jaxvl.evals.embed import Embedded, Model, embed_samples, embed_texts, open_for, records
from jaxvl.evals.groups import Groups, chance, numbered
from jaxvl.evals.ranking import Ranks
from jaxvl.evals.streamed import streamed_ranks
from jaxvl.evals.topk import nearest
from jaxvl.gallery import Gallery, Hit, Query

HITS = 5  # retrieved items shown for a query


class ComposedOptions(NamedTuple):
    """The keys of an `evals` entry of this kind.

    source: shards, as in data.source. triplets: "beside" or paths, as data.triplets. every: steps between evaluations in a run, 0 for its
    end only. ks: the K of R@K. texts: what a list of texts for one change is, as data.triplet_text; "single" makes each a query of its own.
    queries: "triplet", one each, or "merged", one for those of equal reference and text, any of whose targets is right. gallery: "original" ranks every image of a category, "val" only those that a triplet names. right: "targets" of the triplets, or every image
    with the target's "caption" (Fashion-200k) or attributes. exclude_reference: whether the reference leaves the gallery. batch_size: images
    embedded at a time. show: queries in the report.
    """

    kind: Literal["composed"] = "composed"
    source: str | tuple[str, ...] = ""
    triplets: str | tuple[str, ...] = triplets.BESIDE
    every: int = 0
    ks: tuple[int, ...] = (1, 5, 10)
    texts: Texts = "joined"
    queries: Literal["triplet", "merged"] = "triplet"
    gallery: Literal["original", "val"] = "original"
    right: Literal["targets", "caption"] = "targets"
    exclude_reference: bool = True
    batch_size: int = 256
    show: int = 12


class Asked(NamedTuple):
    """The queries of one category. images, texts: reference ids and texts. answers: int [query, most] target ids, filled up with -1."""

    images: np.ndarray
    texts: tuple[str, ...]
    answers: np.ndarray


def evaluate(name: str, options: ComposedOptions, model: Model) -> tuple[dict[str, float], list[Gallery]]:
    """ "composed/r@K", "image/r@K", "text/r@K", "sum/r@K", and "t2i/...", "i2t/..." of the images with a caption.

    Where triplets have a category, each category is ranked in its own gallery, its numbers begin with "PROTOCOL/CATEGORY/", and those
    that begin with "PROTOCOL/" are the means; PROTOCOL is the gallery, what the texts were and, where they are merged, the queries, such as
    "original,joined", Fashion-IQ's official one. It is left out where nothing depends on it: one text a change, one gallery. Beside them
    "queries", those that count, and "gallery", images among which they do. Raises ValueError for options that cannot be.
    """
    dataset = open_checked(options, model.data)
    rows, missing = triplets.read_files(files(options, dataset), triplets.keys(dataset.sources), cleaning_of(model.data))
    embedded = embed_samples(model, dataset, options.batch_size)
    captions = triplets.captions(dataset.sources)
    caption_ids = same_caption(captions)
    categories = list(dict.fromkeys(str(t.fields.get("category", "")) for t in rows))
    of_image = categories_of(dataset, categories)
    numbers: list[dict[str, float]] = []
    sizes: list[dict[str, float]] = []
    shown: list[Gallery] = []
    place = np.full(len(dataset), -1)
    place[embedded.ids] = np.arange(len(embedded.ids))  # id -> row of the embeddings, -1 where the image cannot be used
    for category in categories:
        mine = [t for t in rows if str(t.fields.get("category", "")) == category]
        asked = ask(mine, options.texts, options.queries)
        used = np.unique([i for t in mine for i in (t.reference, t.target)])
        within = np.flatnonzero([category in some for some in of_image])
        gallery = used if options.gallery == "val" else np.union1d(within, used)
        gallery = gallery[place[gallery] >= 0]
        queries, valid = embed_queries(model, dataset, asked, place, embedded.images, options.batch_size)
        asked = Asked(asked.images[valid], tuple(np.array(asked.texts, object)[valid]), asked.answers[valid])
        found = {
            what: rank(
                model, q, embedded.images[place[gallery]], gallery, asked, caption_ids if options.right == "caption" else None, options
            )
            for what, q in queries.items()
        }
        numbers.append(
            {
                f"{what}/r@{k}": float(r)
                for what, ranks in found.items()
                for k, r in zip(options.ks, ranking.recall_at(ranks.stable, options.ks), strict=True)
            }
        )
        sizes.append({"queries": float((found["composed"].stable >= 0).sum()), "gallery": float(len(gallery))})
        if options.show:
            shown.append(
                show(
                    name + (f" {category}" if category else ""),
                    options,
                    model,
                    dataset,
                    asked,
                    queries["composed"],
                    embedded.images[place[gallery]],
                    gallery,
                    found["composed"],
                )
            )
    several = any(categories) or any(len(t.texts) > 1 for t in rows)
    how = ",".join([options.gallery, options.texts, *(["merged"] if options.queries == "merged" else [])])
    protocol = f"{how}/" if several or how != "original,joined" else ""
    out = {f"{protocol}{k}": float(np.mean([n[k] for n in numbers])) for k in numbers[0]}
    for category, n, size in zip(categories, numbers, sizes, strict=True):
        out |= {f"{protocol}{category or 'none'}/{k}": value for k, value in (n | size).items()} if any(categories) else size
    if missing:
        out["missing"] = float(len(missing))
    return out | text_image(model, embedded, captions, caption_ids, options), shown


def open_checked(options: ComposedOptions, data: DataOptions) -> Dataset:
    """The data set to evaluate on. Raises ValueError for options that cannot be."""
    if not options.ks or min(options.ks) < 1:
        raise ValueError(f"ks is {options.ks}; it must be one or more whole numbers from 1")
    if options.batch_size < 1 or options.show < 0:
        raise ValueError(f"batch_size is {options.batch_size} and show is {options.show}; they must be at least 1 and 0")
    if options.triplets in ("", triplets.SIBLINGS, triplets.ATTRIBUTES):
        raise ValueError(f"triplets is {options.triplets!r}; queries are fixed, so it must be 'beside' or paths of files")
    if options.queries not in ("triplet", "merged"):
        raise ValueError(f"queries is {options.queries!r}; it must be 'triplet' or 'merged'")
    if options.texts == "joined_random":
        raise ValueError("texts is 'joined_random', which is for training; queries take 'joined' or 'single'")
    dataset = open_for(data, options.source, captions="none")
    triplets.read_files(files(options, dataset), triplets.keys(dataset.sources), cleaning_of(data))
    return dataset


def files(options: ComposedOptions, dataset: Dataset) -> list[str]:
    return triplet_files(dataset.options._replace(triplets=options.triplets), dataset.sources)


def same_caption(captions: Sequence[str | None]) -> np.ndarray:
    """int64 [image], equal for equal captions; an image without one is like no other."""
    return numbered(i if c is None else c for i, c in enumerate(captions))


def categories_of(dataset: Dataset, categories: list[str]) -> list[list[str]]:
    """The categories of every image: its field "categories" or, where it has none, "category"; [""] where triplets name none."""
    if categories == [""]:
        return [[""]] * len(dataset)
    want = Want(image=False, captions=False, alternates=False)
    fields = [r.meta if isinstance(r, Record) else {} for r in read_samples(dataset, np.arange(len(dataset)), want)]
    listed = [meta.get("categories", meta.get("category", "")) for meta in fields]
    return [list(map(str, some)) if isinstance(some, list) else [str(some)] for some in listed]


def ask(rows: list[Triplet], how: Texts, queries: str) -> Asked:
    """Queries in order: one for each triplet and text, or "merged" for each reference and text with all of their targets."""
    answers: dict[tuple, list[int]] = {}
    for number, t in enumerate(rows):
        for place, text in enumerate(t.texts if how == "single" else (AND.join(t.texts),)):
            own = () if queries == "merged" else (number, place)
            answers.setdefault((t.reference, text, *own), []).append(t.target)
    most = max(len(set(targets)) for targets in answers.values())
    table = np.full((len(answers), most), -1, np.int64)
    for row, targets in zip(table, answers.values(), strict=True):
        unique = list(dict.fromkeys(targets))
        row[: len(unique)] = unique
    return Asked(np.array([image for image, *_ in answers], np.int64), tuple(text for _, text, *_ in answers), table)


def embed_queries(
    model: Model, dataset: Dataset, asked: Asked, place: np.ndarray, images: np.ndarray, batch_size: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Query embeddings float32 [query, d] by how they are made, of the usable queries, and which are, bool [all queries]."""
    composed, text, valid = embed.embed_queries(model, dataset, asked.images, list(asked.texts), batch_size)
    valid &= place[asked.images] >= 0
    composed, text, image = composed[valid], text[valid], images[place[asked.images[valid]]]
    both = image + text
    return {
        "composed": composed,
        "image": image,
        "text": text,
        "sum": both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12),
    }, valid


def rank(
    model: Model,
    queries: np.ndarray,
    items: np.ndarray,
    gallery: np.ndarray,
    asked: Asked,
    caption_ids: np.ndarray | None,
    options: ComposedOptions,
) -> Ranks:
    """Ranks of the best right image; `gallery` int [item] are the ids of `items`."""
    row = np.full(max(int(gallery.max()), int(asked.answers.max()), int(asked.images.max())) + 1, -1)
    row[gallery] = np.arange(len(gallery))
    without = row[asked.images] if options.exclude_reference else None
    if caption_ids is not None:
        return streamed_ranks(queries, items, caption_ids[asked.answers[:, 0]], caption_ids[gallery], model.mesh, without=without)
    answers = np.where(asked.answers >= 0, row[asked.answers], -1)
    nothing = np.full(len(queries), -2)
    return streamed_ranks(queries, items, nothing, np.zeros(len(items), np.int64), model.mesh, without=without, answers=answers)


def text_image(
    model: Model, embedded: Embedded, captions: Sequence[str | None], caption_ids: np.ndarray, options: ComposedOptions
) -> dict[str, float]:
    """ "t2i/r@K" and "i2t/r@K" between the captioned images and their distinct captions, with chance beside; {} where there are none."""
    usable = [(row, i, c) for row, i in enumerate(embedded.ids) if (c := captions[i]) is not None]
    if not usable:
        return {}
    found, ids, words = zip(*usable, strict=True)
    groups, images = caption_ids[list(ids)], embedded.images[list(found)]
    unique, first = np.unique(groups, return_index=True)
    texts = embed_texts(model, [words[i] for i in first], options.batch_size)
    ways = {
        "t2i": streamed_ranks(texts, images, unique, groups, model.mesh),
        "i2t": streamed_ranks(images, texts, groups, unique, model.mesh),
    }
    numbers = {
        f"{way}/r@{k}": float(r)
        for way, ranks in ways.items()
        for k, r in zip(options.ks, ranking.recall_at(ranks.stable, options.ks), strict=True)
    }
    return numbers | {"grouped_by/caption": float(len(unique)), **chance(Groups(groups[:, None], unique), options.ks)}


def show(
    title: str,
    options: ComposedOptions,
    model: Model,
    dataset: Dataset,
    asked: Asked,
    queries: np.ndarray,
    items: np.ndarray,
    gallery: np.ndarray,
    ranks: Ranks,
) -> Gallery:
    """Composed queries evenly spread over all of them, with the images they retrieve; the reference may be among those shown."""
    chosen = np.unique(np.linspace(0, len(queries) - 1, options.show).round().astype(int))
    top, scores = nearest(queries[chosen], items, min(HITS, len(items)), model.mesh)
    needed = np.unique(np.concatenate([gallery[top].ravel(), asked.answers[chosen, 0]]))
    seen = dict(zip(needed.tolist(), (picture for picture, _ in records(dataset, needed)), strict=True))
    rows = []
    for q, found, score in zip(chosen, gallery[top], scores, strict=True):
        hits = tuple(Hit(seen[int(i)], float(s), bool(i in asked.answers[q])) for i, s in zip(found, score, strict=True))
        rows.append(Query(asked.texts[q], hits, int(ranks.stable[q]), seen[int(asked.answers[q, 0])]))
    return Gallery(f"{title}: image and text to image", tuple(rows))
