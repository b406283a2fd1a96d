"""Retrieval by lexical vectors at any sparsity, and how a model uses its words; Li et al. 2024, https://arxiv.org/abs/2407.17827, section 4."""

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from jaxvl.data.dataset import DataOptions, Dataset
from jaxvl.evals import retrieval, words
from jaxvl.evals.embed import Embedded, Model, embed_samples
from jaxvl.evals.groups import groups_of
from jaxvl.gallery import Gallery, Table
from jaxvl.models import sparse

LISTED = 20  # words of the table of the most used ones


class LexicalOptions(NamedTuple):
    """The keys of an `evals` entry of this kind.

    source, every, captions, cleaning, group, ks, folds, batch_size, show: as for kind "retrieval". threshold: entries above it are kept, 0 for 1/√V,
    the paper's. top: numbers of entries at which retrieval is measured besides, in images and texts; those beyond V are left out.
    words: how many of an image's greatest entries are its words.
    """

    kind: Literal["lexical"] = "lexical"
    source: str | tuple[str, ...] = ""
    every: int = 0
    captions: int = 1
    cleaning: Literal["", "plain", "albef"] = ""
    group: str = ""
    ks: tuple[int, ...] = (1, 5, 10)
    folds: int = 1
    threshold: float = 0.0
    top: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
    words: int = 10
    batch_size: int = 256
    show: int = 12


def evaluate(name: str, options: LexicalOptions, model: Model) -> tuple[dict[str, float], list[Gallery | Table]]:
    """Recalls of the thresholded vectors as of kind "retrieval", below dense/ those of the whole ones, and below topK/ the sweep.

    Beside them, for image and text: active entries of a vector (mean), their share of V (density) and the rest (sparsity), the share of
    words that any vector uses, the share of vectors with the most used word, and of all use (Σ m_j) that of the twenty most used words. words@K/...: of
    a caption's words among the first K of its image, also for captions of other images (other_...), which is what a model comes to that lists
    the same words for everything. Raises ValueError for options that cannot be.
    """
    dataset = open_checked(options, model.data)
    embedded = embed_samples(model, dataset, options.batch_size, options.captions)
    V = embedded.images.shape[1]
    threshold = options.threshold or sparse.default_threshold(V)
    kept = embedded._replace(
        images=np.where(embedded.images > threshold, embedded.images, 0), texts=np.where(embedded.texts > threshold, embedded.texts, 0)
    )
    groups = groups_of(options.group, dataset, embedded, options.captions)
    numbers = retrieval.recalls(model, kept, groups, options.ks, options.folds)
    numbers |= retrieval.told(options.group, embedded, groups, options.ks, options.folds)
    for point, some in [("dense", embedded), *sweep(options, embedded)]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*equal scores")  # of few entries many products are zero
            found = retrieval.recalls(model, some, groups, options.ks, options.folds)
        # Under names of their own, so that the page does not draw a chart for each.
        numbers |= {f"{point}/{key.replace('/', '_')}": value for key, value in found.items() if "/r@" in key}
    tables = []
    named = words.names(model.tokenizer, V)
    for side, s in ("image", embedded.images), ("text", embedded.texts):
        use = words.use(s, threshold)
        active = float(use.share.sum())
        most = np.argsort(-use.mean, kind="stable")[:LISTED]
        numbers |= {
            f"{side}_active": active, f"{side}_density": active / V, f"{side}_sparsity": 1 - active / V, f"{side}_ever_active": float(np.mean(use.share > 0)),
            f"{side}_most_used": float(use.share.max()), f"{side}_use_of_{LISTED}": float(use.mean[most].sum() / use.mean.sum()),
        }  # fmt: skip
        rows = tuple((named[j], f"{use.mean[j]:.4f}", f"{100 * use.share[j]:.1f} %") for j in most)
        tables.append(Table(f"{name}: most used words, {side}", ("word", "mean entry", f"{side}s with it"), rows))
    if getattr(model.tokenizer, "lexicon", None) is not None:
        numbers |= listed(options, embedded, model)
    by_cosine = partial(retrieval.by_cosine, model, kept, groups)
    shown = retrieval.galleries(name, options, dataset, kept, groups, by_cosine) if options.show else []
    return numbers, [*tables, *shown]


def sweep(options: LexicalOptions, embedded: Embedded) -> Iterator[tuple[str, Embedded]]:
    """("topK", the vectors with their K greatest entries alone) for the Ks of the options."""
    V = embedded.images.shape[1]
    ks = [k for k in sorted(set(options.top)) if k < V]
    places = [words.order(s, max(ks)) for s in (embedded.images, embedded.texts)] if ks else []
    for k in ks:
        images, texts = (words.keep(s, at[:, :k]) for s, at in zip((embedded.images, embedded.texts), places, strict=True))
        yield f"top{k}", embedded._replace(images=images, texts=texts)


def listed(options: LexicalOptions, embedded: Embedded, model: Model) -> dict[str, float]:
    """Whether the words of its caption (the first) are among those of an image."""
    first = np.searchsorted(embedded.owner, np.arange(len(embedded.images)))
    captions = words.of_captions(model.tokenizer, embedded.tokens[first])
    top = words.order(embedded.images, min(options.words, embedded.images.shape[1]))
    others = np.roll(np.arange(len(captions)), len(captions) // 2)  # a caption far away in the set
    own, other = words.found(captions, top), words.found([captions[i] for i in others], top)
    return {
        f"words@{options.words}/{key}": value
        for key, value in [*own._asdict().items(), *((f"other_{k}", v) for k, v in other._asdict().items())]
    }


def open_checked(options: LexicalOptions, data: DataOptions) -> Dataset:
    """The data set to evaluate on. Raises ValueError for options that cannot be."""
    if options.threshold < 0 or options.words < 1 or min(options.top, default=1) < 1:
        raise ValueError(
            f"threshold is {options.threshold}, words {options.words}, top {options.top}; threshold must be at least 0, words and each of top at least 1"
        )
    common = {key: value for key, value in options._asdict().items() if key in retrieval.RetrievalOptions._fields and key != "kind"}
    return retrieval.open_checked(retrieval.RetrievalOptions(**common), data)
