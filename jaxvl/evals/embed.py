"""From an opened data set to embeddings on the host: jitted, split over the mesh, in batches of one shape with a mask."""

import io
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxvl.data import decode
from jaxvl.data.augment import AugmentOptions, preprocess
from jaxvl.data.dataset import cleaning_of, decode_options
from jaxvl.data.source import Record
from jaxvl.data.stream import Bad, DataOptions, Dataset, Want, eval_batches, open_data, query_batches, read_samples
from jaxvl.data.text import Cleaning, Uncaptioned, clean_caption
from jaxvl.mesh import place, process_rows
from jaxvl.methods.method import Method


class Model(NamedTuple):
    """What is evaluated, and where. `data` and `augment` are those of the training."""

    method: Method
    params: Any
    tokenizer: Any
    data: DataOptions
    augment: AugmentOptions
    mesh: Mesh


class Embedded(NamedTuple):
    """Embeddings of the usable samples of a data set, in its order.

    images: float32 [image, d]. ids: int64 [image], rows of the data set. labels: int32 [image], 0 where none are asked for.
    texts: float32 [text, d], all texts of an image together. owner: int32 [text], place of the text's image in `images`.
    tokens: int32 [text, token].
    """

    images: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    texts: np.ndarray
    owner: np.ndarray
    tokens: np.ndarray


def open_for(
    data: DataOptions,
    source: str | Sequence[str],
    *,
    captions: Literal["first", "random", "none"] = "first",
    label: str = "",
    cleaning: Literal["", "plain", "albef"] = "",
    classes: Literal["", "all", "first", "second"] = "",
    hierarchy: str = "",
    split_level: int = -1,
) -> Dataset:
    """The data set of an evaluation, read as the training's, its captions cleaned as `cleaning` says or as the training's.

    Raises ValueError where `source` is empty or cannot be opened, or where the training cleans its sources in several ways.
    """
    if not source:
        raise ValueError("source is empty; it must name shards, such as 'val-{0000..0003}.tar' or 'glyphs://val-seen'")
    source = source if isinstance(source, str) else tuple(source)
    style = data.cleaning if isinstance(data.cleaning, str) else data.cleaning[0]
    if captions != "none":
        style = cleaning_of(data, cleaning).style
    data = data._replace(classes=classes, hierarchy=hierarchy, split_level=split_level, levels=(), per_class=0, triplets="", attributes=())
    return open_data(data._replace(source=source, weights=(), captions=captions, label=label, id="", cleaning=style))


def cleaned(texts: Iterable[str], cleaning: Cleaning) -> list[str]:
    """The texts as captions are cleaned. Raises ValueError naming the first of which nothing is left."""
    out = []
    for text in texts:
        try:
            out.append(clean_caption(text, cleaning))
        except Uncaptioned as error:
            raise ValueError(
                f"the text {text[:80]!r} cannot be embedded: cleaned as the captions were ({cleaning.style}), it is {error}"
            ) from None
    return out


def embed_samples(model: Model, dataset: Dataset, batch_size: int, captions: int = 1) -> Embedded:
    """Embeds every usable sample with at most `captions` of its texts, none where the data set has data.captions="none"."""
    reasons: Counter[str] = Counter()
    parts = list(embed_stream(model, dataset, batch_size, captions, reasons))
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    valid = whole["valid"]
    if missing := len(dataset) - int(valid.sum()):
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
        message = (
            f"{missing:,} of {len(dataset):,} samples of {', '.join(s.name for s in dataset.sources)} cannot be used (here {why or 'none'})"
        )
        if not valid.any():
            raise ValueError(message)
        warnings.warn(f"{message}; the numbers are of the others", stacklevel=2)
    images, labels = whole["image"][valid], whole["label"][valid] if "label" in whole else np.zeros(valid.sum(), np.int32)
    if "text" not in whole:
        return Embedded(
            images,
            np.flatnonzero(valid),
            labels,
            np.zeros((0, images.shape[1]), np.float32),
            np.zeros(0, np.int32),
            np.zeros((0, 0), np.int32),
        )
    real = np.arange(captions) < whole["captions"][valid][:, None]  # [image, captions]
    owner = np.broadcast_to(np.arange(len(images), dtype=np.int32)[:, None], real.shape)
    return Embedded(images, np.flatnonzero(valid), labels, whole["text"][valid][real], owner[real], whole["tokens"][valid][real])


def embed_stream(
    model: Model, dataset: Dataset, batch_size: int, captions: int = 1, reasons: Counter[str] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Every sample once, a global batch at a time: the arrays of `eval_batches` but for the pixels, with "image" float32 [batch, d] and "text".

    reasons: counts why samples of this process could not be used.
    """
    size = whole_batch(model, batch_size)

    def outputs() -> Iterator[dict[str, jax.Array]]:
        for batch in eval_batches(dataset, model.tokenizer, batch_size=size, rows=process_rows(model.mesh, size), captions=captions):
            if reasons is not None:
                reasons.update(bad.reason for bad in batch.bad)
            yield _embed(model.params, place(batch.arrays, model.mesh), method=model.method, augment=model.augment)

    return fetch(outputs())


def embed_image(model: Model, image: bytes) -> np.ndarray:
    """float32 [d], of an encoded image. Raises decode.Undecodable."""
    low, high = process_rows(model.mesh, size := whole_batch(model, 1))
    pixels = decode.decode_eval(image, decode_options(model.data))
    batch = {"image": np.broadcast_to(pixels, (size, *pixels.shape))[low:high]}
    (out,) = fetch([_embed(model.params, place(batch, model.mesh), method=model.method, augment=model.augment)])
    return out["image"][0]


def embed_texts(model: Model, texts: Sequence[str], batch_size: int, cleaning: Cleaning | None = None) -> np.ndarray:
    """float32 [text, d], of texts cleaned as the training's captions, or as `cleaning` says. Raises ValueError where nothing is left of one."""
    texts, size = cleaned(texts, cleaning or cleaning_of(model.data)), whole_batch(model, batch_size)
    tokens = model.tokenizer.encode_batch(texts)
    low, high = process_rows(model.mesh, size)

    def batches() -> Iterator[dict[str, jax.Array]]:
        for start in range(0, len(tokens), size):
            batch = np.zeros((size, tokens.shape[1]), np.int32)
            batch[: len(tokens) - start] = tokens[start : start + size]
            yield _embed(model.params, place({"tokens": batch[low:high, None]}, model.mesh), method=model.method, augment=model.augment)

    return np.concatenate([part["text"][:, 0] for part in fetch(batches())])[: len(tokens)]


def embed_queries(
    model: Model, dataset: Dataset, images: np.ndarray, texts: list[str], batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Composed embeddings of images (ids) and texts, and of the texts alone, float32 [query, d], and which are usable, bool [query]."""
    size = whole_batch(model, batch_size)

    def outputs() -> Iterator[dict[str, jax.Array]]:
        for batch in query_batches(dataset, model.tokenizer, images, texts, batch_size=size, rows=process_rows(model.mesh, size)):
            yield _compose(model.params, place(batch.arrays, model.mesh), method=model.method, augment=model.augment)

    parts = list(fetch(outputs()))
    composed, text, valid = (np.concatenate([p[k] for p in parts])[: len(images)] for k in ("composed", "text", "valid"))
    return composed, text, valid


def whole_batch(model: Model, batch_size: int) -> int:
    """`batch_size` rounded up to a multiple of the parts that the mesh cuts a batch into."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    parts = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    return -(-batch_size // parts) * parts


def fetch(outputs: Iterable[dict[str, jax.Array]]) -> Iterator[dict[str, np.ndarray]]:
    """Global arrays as host arrays, one behind: a result is waited for when the next one is on its way."""
    last = None
    for output in outputs:
        if last is not None:
            yield multihost_utils.process_allgather(last, tiled=True)
        last = output
    if last is not None:
        yield multihost_utils.process_allgather(last, tiled=True)


def records(dataset: Dataset, ids: np.ndarray, captions: int = 1) -> list[tuple[bytes, tuple[str, ...]]]:
    """PNG of what the model saw, and the texts, of the samples with these ids."""
    want = Want(captions=dataset.options.captions != "none", alternates=captions > 1, fields=False)
    how = decode_options(dataset.options)
    found = map(known, read_samples(dataset, ids, want))
    return [(png(decode.decode_eval(record.image, how)), record.captions[:captions]) for record in found]


def known(record: Record | Bad) -> Record:
    """A sample that could be read before. Raises ValueError where it no longer can."""
    if isinstance(record, Bad):
        raise ValueError(f"sample {record.key!r} of {record.shard} was usable a moment ago and is not now: {record.reason}")
    return record


def png(pixels: np.ndarray) -> bytes:
    """uint8 [height, width, 3] as a PNG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@partial(jax.jit, static_argnames=("method", "augment"))
def _embed(params: Any, batch: dict[str, jax.Array], *, method: Method, augment: AugmentOptions) -> dict[str, jax.Array]:
    out = {k: v for k, v in batch.items() if k != "image"}
    if "image" in batch:
        out["image"] = method.embed_image(params, preprocess(batch["image"], None, augment))  # [batch, d]
    if "tokens" in batch and method.embed_text is not None:
        tokens = batch["tokens"]  # [batch, captions, token]
        out["text"] = method.embed_text(params, tokens.reshape(-1, tokens.shape[-1])).reshape(*tokens.shape[:2], -1)
    return out


@partial(jax.jit, static_argnames=("method", "augment"))
def _compose(params: Any, batch: dict[str, jax.Array], *, method: Method, augment: AugmentOptions) -> dict[str, jax.Array]:
    assert method.compose is not None and method.embed_text is not None
    tokens = batch["tokens"][:, 0]
    composed = method.compose(params, preprocess(batch["image"], None, augment), tokens)
    return {"composed": composed, "text": method.embed_text(params, tokens), "valid": batch["valid"]}
