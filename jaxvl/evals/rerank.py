"""Two-stage retrieval (Li et al. 2021, section 6): the dual encoder proposes k_test candidates, the fusion layers order them.

A query's score of a candidate is the fusion's match logit alone, as published, or with score="itm+itc" its sum with the pair's logit
in the dual encoder, the cosine over τ, which a head needs that has not learned much yet. Every other item comes after all candidates;
recall counts the best ranked right item. A pair has one score whichever side asks, so the candidates of both directions are scored as one set of pairs, ordered
by image. Images then pass in tiles: a tile's keys and values are computed once and read by all pairs of its images.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxvl.data.augment import AugmentOptions, preprocess
from jaxvl.data.dataset import DataOptions, Dataset
from jaxvl.data.stream import eval_batches
from jaxvl.evals import ranking, retrieval
from jaxvl.evals.embed import Embedded, Model, embed_samples, fetch, whole_batch
from jaxvl.evals.groups import Groups, groups_of
from jaxvl.evals.ranking import Ranks
from jaxvl.evals.topk import nearest
from jaxvl.gallery import Gallery
from jaxvl.mesh import BATCH, place, process_rows
from jaxvl.methods.method import Method, PairScore
from jaxvl.progress import say

OUTSIDE = -100.0  # the score of an item that was not proposed, or less where a candidate has as little
QUERIES = 256  # whose scores of all items are laid out at a time


class RerankOptions(NamedTuple):
    """The keys of an `evals` entry of this kind.

    source, every, captions, cleaning, group, ks, show: as in kind "retrieval". score: "itm", the match logit alone, or "itm+itc", its sum
    with cosine/τ. k_test: candidates a query has, all items where there are
    fewer. batch_size: images embedded at a time. pairs: pairs that a device scores at a time. cache_gb: most memory of a device
    for keys and values of images; fewer images pass at a time where it asks for that.
    """

    kind: Literal["rerank"] = "rerank"
    source: str | tuple[str, ...] = ""
    every: int = 0
    captions: int = 1
    cleaning: Literal["", "plain", "albef"] = ""
    group: str = ""
    score: Literal["itm", "itm+itc"] = "itm"
    ks: tuple[int, ...] = (1, 5, 10)
    k_test: int = 128
    batch_size: int = 256
    pairs: int = 256
    cache_gb: float = 4.0
    show: int = 12


class Candidates(NamedTuple):
    """What the first stage proposes to each query: places of items int [query, k], their scores and, where known, their cosines, float32 [query, k]."""

    items: np.ndarray
    scores: np.ndarray
    cosines: np.ndarray | None = None


def evaluate(name: str, options: RerankOptions, model: Model) -> tuple[dict[str, float], list[Gallery]]:
    """R@K, median rank (1-based) and rsum of the candidates re-ranked, and under "dual/" of the dual encoder alone.

    Under "itm/" those of the match logit alone, where the score is another. With a group its name, and R@K of chance. Raises ValueError for options that cannot be and for scores that are not numbers.
    """
    dataset = open_checked(options, model.data)
    embedded = embed_samples(model, dataset, options.batch_size, options.captions)
    groups = groups_of(options.group, dataset, embedded, options.captions)
    to_text, to_image = matched = rerank(options, model, dataset, embedded)
    others = {"dual": retrieval.rank(model, embedded.images, embedded.texts, groups)}
    if options.score == "itm+itc":
        others["itm"] = ranks_of(matched, groups)
        to_text, to_image = summed(model, matched)
    i2t, t2i = ranks_of((to_text, to_image), groups)
    numbers = ranking.both_ways(i2t, t2i, options.ks)
    numbers |= {f"{name}/{k}": v for name, ranks in others.items() for k, v in ranking.both_ways(*ranks, options.ks).items()}
    numbers |= retrieval.told(options.group, embedded, groups, options.ks)

    def by_match(way: str, chosen: np.ndarray) -> retrieval.Retrieved:
        found, ranks = (to_text, i2t) if way == "image to text" else (to_image, t2i)
        best = np.lexsort((found.items[chosen], -found.scores[chosen]), 1)[:, : retrieval.HITS]
        pick = lambda x: np.take_along_axis(x[chosen], best, 1)
        return retrieval.Retrieved(pick(found.items), pick(found.scores), ranks.stable[chosen])

    return numbers, retrieval.galleries(name, options, dataset, embedded, groups, by_match) if options.show else []


def open_checked(options: RerankOptions, data: DataOptions) -> Dataset:
    """The data set to evaluate on. Raises ValueError for options that cannot be."""
    for key in ("k_test", "pairs"):
        if getattr(options, key) < 1:
            raise ValueError(f"{key} is {getattr(options, key)}; it must be at least 1")
    if options.score not in ("itm", "itm+itc"):
        raise ValueError(f"score is {options.score!r}; it must be 'itm' or 'itm+itc'")
    if not options.cache_gb > 0:
        raise ValueError(f"cache_gb is {options.cache_gb}; it must be above 0")
    shared = set(options._fields) & set(retrieval.RetrievalOptions._fields) - {"kind"}
    return retrieval.open_checked(retrieval.RetrievalOptions(**{k: getattr(options, k) for k in shared}), data)


def ranks_of(candidates: tuple[Candidates, Candidates], groups: Groups) -> tuple[Ranks, Ranks]:
    """Ranks of image queries among texts and of text queries among images."""
    to_text, to_image = candidates
    return candidate_ranks(to_text, groups.images, groups.texts), candidate_ranks(to_image, groups.texts, groups.images)


def summed(model: Model, candidates: tuple[Candidates, Candidates]) -> list[Candidates]:
    """Scored by match logit + cosine/τ. Raises ValueError for a method without τ."""
    face = model.method.score_pair
    if face is None or face.temperature is None:
        raise ValueError("score is 'itm+itc', but the method of this run has no temperature to divide cosines by; score must be 'itm'")
    tau = jax.device_get(jax.jit(face.temperature)(model.params))
    return [c._replace(scores=c.scores + c.cosines / tau) for c in candidates]


def candidate_ranks(candidates: Candidates, query_group: np.ndarray, item_group: np.ndarray) -> Ranks:
    """`ranking.exact_ranks` of scores that are OUTSIDE but for the candidates; a right item shares a group with the query."""
    outside = min(OUTSIDE, float(candidates.scores.min(initial=0)) - 1)
    parts = []
    for start in range(0, len(query_group), QUERIES):
        items, found = (x[start : start + QUERIES] for x in candidates[:2])
        scores = np.full((len(items), len(item_group)), outside, np.float32)
        np.put_along_axis(scores, items, found, 1)
        parts.append(ranking.exact_ranks(scores, ranking.in_common(query_group[start : start + QUERIES], item_group)))
    return Ranks(*map(np.concatenate, zip(*parts, strict=True)))


def rerank(options: RerankOptions, model: Model, dataset: Dataset, embedded: Embedded) -> tuple[Candidates, Candidates]:
    """The candidates of images among texts and of texts among images, with their match logits."""
    images, texts = len(embedded.images), len(embedded.texts)
    to_text, cosines = nearest(embedded.images, embedded.texts, min(options.k_test, texts), model.mesh)
    to_image, cosines_back = nearest(embedded.texts, embedded.images, min(options.k_test, images), model.mesh)
    asked = np.arange(images)[:, None] * texts + to_text, to_image * texts + np.arange(texts)[:, None]
    pairs, place_of = np.unique(np.concatenate([x.ravel() for x in asked]), return_inverse=True)
    logits = score_pairs(options, model, dataset, embedded, *np.divmod(pairs, texts))[place_of]
    i2t, t2i = np.split(logits, [to_text.size])
    return Candidates(to_text, i2t.reshape(to_text.shape), cosines), Candidates(to_image, t2i.reshape(to_image.shape), cosines_back)


def score_pairs(
    options: RerankOptions, model: Model, dataset: Dataset, embedded: Embedded, image: np.ndarray, text: np.ndarray
) -> np.ndarray:
    """Match logits float32 [pair] of pairs int [pair], ordered by image: places in `embedded.images` and in `embedded.texts`."""
    face = model.method.score_pair
    if face is None:
        raise ValueError("the method of this run scores no pairs: it has no score_pair")
    parts = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    tile = tile_size(options, model, face, parts)
    tell(model, face, len(image), len(embedded.images), embedded.tokens.shape[1])
    rows, step = process_rows(model.mesh, tile), parts * options.pairs
    states = text_sides(model, embedded.tokens, options.batch_size)
    at = embedded.ids[image]  # [pair], the image's row of the data set
    out = np.empty(len(image), np.float32)
    filled: list[np.ndarray] = []

    def scores() -> Iterator[dict[str, jax.Array]]:
        low, high = process_rows(model.mesh, step)
        for number, batch in enumerate(eval_batches(dataset, model.tokenizer, batch_size=tile, rows=rows)):
            first, last = np.searchsorted(at, (number * tile, (number + 1) * tile))
            if first == last:
                continue
            side = _image_side(
                model.params, place({"image": batch.arrays["image"]}, model.mesh), method=model.method, augment=model.augment
            )
            for chosen in schedule(at[first:last] - number * tile, tile // parts, parts, options.pairs):
                mine = first + np.maximum(chosen, 0)  # [group, pairs], of all pairs; those that fill up are thrown away
                source = ((at[mine] - number * tile) % (tile // parts)).astype(np.int32)
                words = jax.tree.map(lambda x, mine=mine: x[text[mine.ravel()[low:high]]], states)
                given = place({"source": source[low // options.pairs : high // options.pairs]}, model.mesh)
                filled.append(np.where(chosen < 0, -1, mine).ravel())
                yield {"score": _score(model.params, side, placed(words, model), given["source"], method=model.method)}

    for found, where in zip(fetch(scores()), filled, strict=False):  # `filled` grows one ahead of what is fetched
        out[where[where >= 0]] = found["score"][where >= 0]
    return out


def schedule(local: np.ndarray, size: int, groups: int, count: int) -> Iterator[np.ndarray]:
    """Cuts pairs, whose images have places `local` in a tile of `groups` groups of `size`, in steps of `count` a group.

    Yields places in `local`, int [group, count], -1 where a group has none left.
    """
    bounds = np.searchsorted(local, np.arange(groups + 1) * size)
    for start in range(0, int(np.diff(bounds).max(initial=0)), count):
        chosen = bounds[:-1, None] + start + np.arange(count)
        yield np.where(chosen < bounds[1:, None], chosen, -1)


def tile_size(options: RerankOptions, model: Model, face: PairScore, parts: int) -> int:
    """Images whose sides are on the devices at a time. Raises ValueError where cache_gb is too little for one."""
    size = model.data.image_size
    one = jax.eval_shape(face.image_side, model.params, jax.ShapeDtypeStruct((1, size, size, 3), np.float32))
    image = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
    fits = int(options.cache_gb * 2**30 // image)
    if fits < 1:
        raise ValueError(f"cache_gb is {options.cache_gb}, but the keys and values of one image take {image / 2**30:.3g} GB")
    return min(whole_batch(model, options.batch_size), fits * parts)


def text_sides(model: Model, tokens: np.ndarray, batch_size: int) -> Any:
    """The text side of texts int32 [text, token], on the host: pytree of [text, ...]."""
    size = whole_batch(model, batch_size)
    low, high = process_rows(model.mesh, size)

    def sides() -> Iterator[Any]:
        for start in range(0, len(tokens), size):
            batch = np.zeros((size, tokens.shape[1]), np.int32)
            batch[: len(tokens) - start] = tokens[start : start + size]
            yield _text_side(model.params, place({"tokens": batch[low:high]}, model.mesh)["tokens"], method=model.method)

    return jax.tree.map(lambda *x: np.concatenate(x)[: len(tokens)], *fetch(sides()))


def placed(tree: Any, model: Model) -> Any:
    """This process's rows of arrays as global arrays, split over the batch axes."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = place({str(i): leaf for i, leaf in enumerate(leaves)}, model.mesh)
    return jax.tree.unflatten(structure, [arrays[str(i)] for i in range(len(leaves))])


def tell(model: Model, face: PairScore, pairs: int, images: int, length: int) -> None:
    """Says what a pair costs here, and what it would cost without what is kept."""
    flops = face.flops(model.data.image_size, model.data.image_size, length)
    ours, keys_values, both = pair_costs(flops, pairs / images)
    say(f"{pairs:,} pairs of {images:,} images: {ours / 1e9:.3g} GFLOPs a pair; {keys_values / 1e9:.3g} ({keys_values / ours:.1f} times as many) "
        f"with keys and values computed for every pair, {both / 1e9:.3g} ({both / ours:.1f} times) with both towers as well")  # fmt: skip


def pair_costs(flops: dict[str, float], pairs: float) -> tuple[float, float, float]:
    """FLOPs a pair: of ours, its share of keys and values for `pairs` pairs an image included; with them computed for every pair; with
    the towers as well."""
    every = flops["pair"] + flops["keys_values"]
    return flops["pair"] + flops["keys_values"] / pairs, every, every + flops["image_tower"] + flops["text_tower"]


@partial(jax.jit, static_argnames=("method", "augment"))
def _image_side(params: Any, batch: dict[str, jax.Array], *, method: Method, augment: AugmentOptions) -> Any:
    side = method.score_pair.image_side(params, preprocess(batch["image"], None, augment))  # type: ignore[union-attr]
    return jax.lax.with_sharding_constraint(side, P(None, *BATCH))


@partial(jax.jit, static_argnames="method")
def _text_side(params: Any, tokens: jax.Array, *, method: Method) -> Any:
    return jax.lax.with_sharding_constraint(method.score_pair.text_side(params, tokens), BATCH)  # type: ignore[union-attr]


@partial(jax.jit, static_argnames="method")
def _score(params: Any, images: Any, texts: Any, source: jax.Array, *, method: Method) -> jax.Array:
    return jax.lax.with_sharding_constraint(method.score_pair.score(params, images, texts, source), BATCH)  # type: ignore[union-attr]
