"""What a lexical model sees and reads, in words: of images their words and where they are, of pairs what makes their score.

Li et al. 2024, https://arxiv.org/abs/2407.17827, section 4.4. `jaxvl words` makes a page of it (report/words.py).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvl.data import decode
from jaxvl.data.augment import AugmentOptions, preprocess
from jaxvl.data.dataset import Dataset, decode_options
from jaxvl.data.stream import Want, read_samples
from jaxvl.evals import lexical, words
from jaxvl.evals.embed import Embedded, Model, embed_samples, fetch, known, png, whole_batch
from jaxvl.evals.groups import groups_of
from jaxvl.evals.lexical import LexicalOptions
from jaxvl.evals.streamed import streamed_ranks
from jaxvl.gallery import Explained, Seen, Sought
from jaxvl.mesh import place, process_rows
from jaxvl.methods.method import Method
from jaxvl.models import sparse

MAPS, SPOKEN = 4, 4  # words whose map is drawn: the greatest of an image, and the first of its caption
BATCH = 16  # images whose patches are on the device at a time


def explain(options: LexicalOptions, model: Model, *, images: int, searched: int, each: int) -> Explained:
    """`images` of the set in words, and for the `searched` most frequent words of its captions the `each` images they are greatest in.

    Raises ValueError for options that cannot be, and for a method or tokenizer without words.
    """
    if model.method.embed_patches is None or model.method.embed_words is None or getattr(model.tokenizer, "lexicon", None) is None:
        raise ValueError("the run's method has no words: its coordinates mean nothing that could be shown; LexVLA's do")
    if images < 1 or searched < 0 or each < 1:
        raise ValueError(f"{images} images, {searched} words and {each} images a word cannot be shown; they must be at least 1, 0 and 1")
    dataset = lexical.open_checked(options, model.data)
    embedded = embed_samples(model, dataset, options.batch_size, options.captions)
    V = embedded.images.shape[1]
    threshold = options.threshold or sparse.default_threshold(V)
    first = np.searchsorted(embedded.owner, np.arange(len(embedded.images)))
    spoken = words.of_captions(model.tokenizer, embedded.tokens[first])
    top = words.order(embedded.images, min(options.words, V))

    chosen = np.unique(np.linspace(0, len(embedded.images) - 1, images).round().astype(int))
    mapped = {i: list(dict.fromkeys([*top[i, :MAPS].tolist(), *spoken[i][:SPOKEN].tolist()])) for i in chosen}
    often = np.bincount(np.concatenate([np.zeros(0, int), *spoken]), minlength=V)
    wanted = [int(j) for j in np.argsort(-often, kind="stable")[:searched] if often[j]]
    best = {j: np.argsort(-embedded.images[:, j], kind="stable")[:each] for j in wanted}

    places = np.unique(np.concatenate([chosen, *best.values()]))
    columns = np.array(sorted({*wanted, *(j for some in mapped.values() for j in some)}))
    pictures, captions, patches = looked_at(model, dataset, embedded.ids[places], columns)
    at = {int(i): n for n, i in enumerate(places)}
    column = {int(j): n for n, j in enumerate(columns)}
    name = words.names(model.tokenizer, V)
    kept = [np.where(s > threshold, s, 0) for s in (embedded.images, embedded.texts)]
    groups = groups_of(options.group, dataset, embedded, options.captions)
    ranks = streamed_ranks(kept[0][chosen], kept[1], groups.images[chosen], groups.texts, model.mesh).stable

    def seen(i: int, rank: int) -> Seen:
        products = kept[0][i].astype(np.float64) * kept[1][first[i]]
        return Seen(
            pictures[at[i]], captions[at[i]], tuple((name[j], float(embedded.images[i, j])) for j in top[i]), tuple(name[j] for j in spoken[i]),
            {name[j]: patches[at[i], ..., column[j]] for j in mapped[i]},
            tuple((name[j], float(products[j])) for j in np.argsort(-products, kind="stable")[: options.words] if products[j] > 0), float(products.sum()), rank,
        )  # fmt: skip

    sought = tuple(
        Sought(name[j], tuple((pictures[at[int(i)]], float(embedded.images[i, j]), patches[at[int(i)], ..., column[j]]) for i in best[j]))
        for j in wanted
    )
    shown = tuple(seen(int(i), int(rank)) for i, rank in zip(chosen, ranks, strict=True))
    return Explained(
        lexical.listed(options, embedded, model), most_used(embedded, threshold, name), threshold, len(embedded.images), shown, sought
    )


def most_used(embedded: Embedded, threshold: float, name: Sequence[str]) -> dict[str, tuple[tuple[str, float, float], ...]]:
    out = {}
    for side, s in ("image", embedded.images), ("text", embedded.texts):
        use = words.use(s, threshold)
        most = np.argsort(-use.mean, kind="stable")[: lexical.LISTED]
        out[side] = tuple((name[j], float(use.mean[j]), float(use.share[j])) for j in most)
    return out


def looked_at(model: Model, dataset: Dataset, ids: np.ndarray, columns: np.ndarray) -> tuple[list[bytes], list[str], np.ndarray]:
    """PNG and main caption of the samples with these ids, and their patches in these columns, float32 [image, row, column, len(columns)]."""
    how = decode_options(dataset.options)
    pixels, captions = [], []
    for record in map(known, read_samples(dataset, ids, Want(captions=True, alternates=False, fields=False))):
        pixels.append(decode.decode_eval(record.image, how))
        captions.append(record.captions[0])
    size = whole_batch(model, BATCH)
    low, high = process_rows(model.mesh, size)

    def batches() -> Any:
        for start in range(0, len(pixels), size):
            batch = np.zeros((size, *pixels[0].shape), np.uint8)
            some = np.stack(pixels[start : start + size])
            batch[: len(some)] = some
            yield {
                "maps": _patches(
                    model.params,
                    place({"image": batch[low:high]}, model.mesh)["image"],
                    columns,
                    method=model.method,
                    augment=model.augment,
                )
            }

    maps = np.concatenate([part["maps"] for part in fetch(batches())])[: len(pixels)]
    return [png(p) for p in pixels], captions, maps


@partial(jax.jit, static_argnames=("method", "augment"))
def _patches(params: Any, images: jax.Array, columns: jax.Array, *, method: Method, augment: AugmentOptions) -> jax.Array:
    assert method.embed_patches is not None
    return jnp.take(method.embed_patches(params, preprocess(images, None, augment)), columns, -1)
