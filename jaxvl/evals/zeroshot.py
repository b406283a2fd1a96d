"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1.4).

A class is the mean of the unit embeddings of its prompts, made a unit vector again; an image goes to the class of the
highest cosine, equals to the class that comes first.
"""

import itertools
from typing import Literal, NamedTuple

import numpy as np

from jaxvl.data.dataset import DataOptions, Dataset, cleaning_of
from jaxvl.data.text import Cleaning, prompts
from jaxvl.evals.embed import Embedded, Model, cleaned, embed_samples, embed_texts, open_for, records
from jaxvl.evals.topk import nearest
from jaxvl.gallery import Gallery, Hit, Query

HITS = 5  # classes shown for an image


class ZeroshotOptions(NamedTuple):
    """The keys of an `evals` entry of this kind.

    source: shards, as in data.source. label: the field of the samples that names the class. classes: names of the classes to use
    in prompts, in the order of the labels; () where the data's own words will do. templates: prompts, "{}" being the class, or the name of a set of them (data/text.py). cleaning: of prompts, by default that of the training's captions.
    every: steps between evaluations in a run, 0 for its end only. ks: the K of top-K accuracy. batch_size: images or prompts
    embedded at a time. show: images in the report.
    """

    kind: Literal["zeroshot"] = "zeroshot"
    source: str | tuple[str, ...] = ""
    label: str = "class"
    classes: tuple[str, ...] = ()
    templates: str | tuple[str, ...] = ("{}", "a photo of a {}.")
    cleaning: Literal["", "plain", "albef"] = ""
    every: int = 0
    ks: tuple[int, ...] = (1, 5)
    batch_size: int = 256
    show: int = 12


def evaluate(name: str, options: ZeroshotOptions, model: Model) -> tuple[dict[str, float], list[Gallery]]:
    """Top-K accuracies "acc@K", and "class_acc@1", the mean over classes of their top-1 accuracy.

    Raises ValueError for options that cannot be, and for labels that no class name fits.
    """
    dataset = open_checked(options, model.data)
    embedded = embed_samples(model, dataset, options.batch_size)
    names = class_names(options, dataset, embedded.labels)
    weights = class_embeddings(model, names, options.templates, options.batch_size, cleaning_of(model.data, options.cleaning))
    top, scores = nearest(embedded.images, weights, min(max(*options.ks, HITS), len(names)), model.mesh)
    right = top == embedded.labels[:, None]  # [image, place]
    numbers = {f"acc@{k}": float(right[:, :k].any(1).mean()) for k in options.ks}
    numbers["class_acc@1"] = float(np.nanmean(per_class(right[:, 0], embedded.labels, len(names))))
    return numbers, [gallery(name, options, dataset, embedded, names, top, scores)] if options.show else []


def open_checked(options: ZeroshotOptions, data: DataOptions) -> Dataset:
    """The data set to evaluate on. Raises ValueError for options that cannot be."""
    prompts(options.templates, ["thing"])
    if not options.ks or min(options.ks) < 1:
        raise ValueError(f"ks is {options.ks}; it must be one or more whole numbers from 1")
    if not options.label or options.show < 0:
        raise ValueError(f"label is {options.label!r} and show is {options.show}; they must name a field and be at least 0")
    cleaning = cleaning_of(data, options.cleaning)
    dataset = open_for(data, options.source, captions="none", label=options.label)
    cleaned(itertools.chain.from_iterable(prompts(options.templates, options.classes or dataset.classes)), cleaning)
    return dataset


def class_names(options: ZeroshotOptions, dataset: Dataset, labels: np.ndarray) -> tuple[str, ...]:
    """The classes' names in the order of the labels."""
    names = options.classes or dataset.classes
    if not names:
        raise ValueError(f"the labels in {options.label!r} are numbers; set classes to the names they stand for")
    if dataset.classes and len(names) != len(dataset.classes):
        raise ValueError(
            f"classes has {len(names)} names, but {options.label!r} has {len(dataset.classes)} values: {', '.join(dataset.classes[:5])}, ..."
        )
    if labels.max() >= len(names):
        raise ValueError(f"{options.label!r} holds the label {labels.max()}, but classes has only {len(names)} names")
    return tuple(names)


def class_embeddings(
    model: Model, names: tuple[str, ...], templates: str | tuple[str, ...], batch_size: int, cleaning: Cleaning
) -> np.ndarray:
    """float32 [class, d], unit vectors."""
    texts = prompts(templates, names)
    each = embed_texts(model, [text for of_class in texts for text in of_class], batch_size, cleaning).reshape(
        len(names), len(texts[0]), -1
    )
    mean = each.mean(1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def per_class(right: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """float64 [class], the share of right answers among the images of each class; NaN for a class without images."""
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts, np.bincount(labels, right, classes) / np.maximum(counts, 1), np.nan)


def gallery(
    name: str, options: ZeroshotOptions, dataset: Dataset, embedded: Embedded, names: tuple[str, ...], top: np.ndarray, scores: np.ndarray
) -> Gallery:
    """Images evenly spread over the set with their best classes; the rank is known as far as `top` goes."""
    chosen = np.unique(np.linspace(0, len(embedded.images) - 1, options.show).round().astype(int))
    queries = []
    for image, (picture, _) in zip(chosen, records(dataset, embedded.ids[chosen]), strict=True):
        label, best = embedded.labels[image], top[image]
        hits = tuple(Hit(names[c], float(s), bool(c == label)) for c, s in zip(best[:HITS], scores[image], strict=False))
        found = np.flatnonzero(best == label)
        queries.append(Query(picture, hits, int(found[0]) if found.size else len(best), names[label]))
    return Gallery(f"{name}: image to class", tuple(queries))
