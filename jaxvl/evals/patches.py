"""PatchDis on images with instance annotations: patches against the names of classes (patchdis.py), from files to one number."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxvl.data import decode, instances
from jaxvl.data.augment import AugmentOptions, preprocess
from jaxvl.data.dataset import DataOptions, cleaning_of, decode_options
from jaxvl.data.instances import Instances, Picture
from jaxvl.data.pixels import read_header, upright
from jaxvl.evals import patchdis, words
from jaxvl.evals.embed import Model, cleaned, embed_texts, fetch, whole_batch
from jaxvl.evals.patchdis import Overlap
from jaxvl.gallery import Table
from jaxvl.mesh import place, process_rows
from jaxvl.methods.method import Method

Classes = Literal["present", "all"]
Resolution = Literal["pixel", "patch"]
Aggregate = Literal["sum", "image"]
ClassText = Literal["prompt", "word"]


class PatchdisOptions(NamedTuple):
    """The keys of an `evals` entry of this kind.

    source: a file of instances in COCO's layout; images: the folder of its files, "" for the file's own. classes: a patch may get a class
    "present" in its image, or "all". resolution: the map of patches is compared with each "pixel" of the mask, or with the most frequent
    label of each "patch". aggregate: intersections and unions are the "sum" over the data set, or mIoU is taken of each "image" and averaged.
    class_text: a class is its name as a caption ("prompt"), or the "word" of that name alone, the maximum over its words where there are several.
    Images are squashed to the training's size, and masks with them (nearest).
    """

    kind: Literal["patchdis"] = "patchdis"
    source: str = ""
    images: str = ""
    every: int = 0
    classes: Classes = "present"
    resolution: Resolution = "pixel"
    aggregate: Aggregate = "sum"
    class_text: ClassText = "prompt"
    batch_size: int = 32


def evaluate(name: str, options: PatchdisOptions, model: Model) -> tuple[dict[str, float], list[Table]]:
    """miou, the same of a classifier that draws among the classes it may choose (chance, one draw), and the share of the labelled pixels (or patches)
    that are right. Raises ValueError for options or files that cannot be."""
    found = open_checked(options, model.data)
    side = model.data.image_size
    texts = class_vectors(options, model, found.classes)
    overlaps: list[Overlap] = []
    chance: list[Overlap] = []
    rng = np.random.default_rng(0)
    for scores, labels in scored(options, model, found, texts):
        rows, columns = scores.shape[1:3]
        if side % rows or side // rows != side // columns:
            raise ValueError(f"{rows} x {columns} patches do not cover images of {side} pixels")
        truth = patchdis.to_patches(labels, side // rows) if options.resolution == "patch" else labels
        present = patchdis.present_classes(labels, len(found.classes))[:, None, None] if options.classes == "present" else None
        for chosen, into in (scores, overlaps), (rng.random(scores.shape), chance):
            grid = patchdis.choose(chosen, present)
            drawn = grid if options.resolution == "patch" else patchdis.to_pixels(grid, side // rows)
            into += [patchdis.overlap(one, label, len(found.classes)) for one, label in zip(drawn, truth, strict=True)]
    total = summed(overlaps)
    rows_ = [(c, f"{100 * i / u:.1f} %", f"{u:,}") for c, i, u in zip(found.classes, *total, strict=True) if u]
    right = float(total.intersection.sum() / max(labelled(overlaps), 1))
    numbers = {
        "miou": miou(overlaps, options.aggregate),
        "miou_chance": miou(chance, options.aggregate),
        "accuracy": right,
        "images": len(overlaps),
    }
    return numbers, [
        Table(
            f"{name}: intersection over union",
            ("class", "IoU", "union, " + options.resolution + ("es" if options.resolution == "patch" else "s")),
            tuple(rows_),
        )
    ]


def scored(options: PatchdisOptions, model: Model, found: Instances, texts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(products float32 [b, row, column, class], labels int32 [b, side, side]) of all pictures, those without a labelled pixel left out."""
    size = whole_batch(model, options.batch_size)
    low, high = process_rows(model.mesh, size)
    side = model.data.image_size
    how = decode_options(model.data)._replace(fit="squash")

    def products() -> Iterator[dict[str, jax.Array]]:
        for start in range(0, len(found.pictures), size):
            mine = found.pictures[start : start + size][low:high]
            pixels = np.zeros((high - low, side, side, 3), np.uint8)
            for i, picture in enumerate(mine):
                try:
                    pixels[i] = decode.decode_eval(picture.path.read_bytes(), how)
                except decode.Undecodable as error:
                    raise ValueError(f"{picture.path} cannot be decoded: {error}") from None
            yield {
                "scores": _products(
                    model.params, place({"image": pixels}, model.mesh)["image"], texts, method=model.method, augment=model.augment
                )
            }

    for start, scores in zip(range(0, len(found.pictures), size), fetch(products()), strict=True):
        some = found.pictures[start : start + size]
        labels = np.stack([instances.resized(shown(p, how), side, side) for p in some])
        seen = (labels != patchdis.VOID).any((1, 2))
        if seen.any():
            yield scores["scores"][: len(some)][seen], labels[seen]


def shown(picture: Picture, how: decode.DecodeOptions) -> np.ndarray:
    """The labels of an upright picture: turned with it where they were drawn on it as stored, which their size tells."""
    labels, header = instances.labels(picture), read_header(picture.path.read_bytes(), how.min_side, how.max_pixels)
    size = picture.width, picture.height
    return labels if size != (header.width, header.height) or size == header.upright else upright(labels[..., None], header)[..., 0]


def class_vectors(options: PatchdisOptions, model: Model, classes: tuple[str, ...]) -> np.ndarray:
    """float32 [class, d]. Raises ValueError where a class is asked for as a word and has none."""
    if options.class_text == "prompt":
        return embed_texts(model, classes, options.batch_size)
    if model.method.embed_words is None or getattr(model.tokenizer, "lexicon", None) is None:
        raise ValueError("class_text is 'word', which needs a method whose coordinates are words; set it to 'prompt'")
    columns = words.of_captions(model.tokenizer, model.tokenizer.encode_batch(cleaned(classes, cleaning_of(model.data))))
    if missing := [name for name, some in zip(classes, columns, strict=True) if not len(some)]:
        raise ValueError(f"class_text is 'word', and the class {missing[0]!r} has none of the model's words; set it to 'prompt'")
    alone = np.asarray(jax.jit(model.method.embed_words)(model.params, jnp.asarray(np.concatenate(columns), jnp.int32)))
    together = np.stack([some.max(0) for some in np.split(alone, np.cumsum([len(c) for c in columns])[:-1])])
    return together / np.linalg.norm(together, axis=1, keepdims=True)


def open_checked(options: PatchdisOptions, data: DataOptions) -> Instances:
    """The annotations to evaluate on. Raises ValueError for options or files that cannot be."""
    cleaning_of(data)  # refuses what leaves open how the names of the classes are cleaned
    if not options.source:
        raise ValueError("source is empty; it must name a file of instances in COCO's layout, such as 'annotations/instances_val2017.json'")
    for key, legal in (("classes", Classes), ("resolution", Resolution), ("aggregate", Aggregate), ("class_text", ClassText)):
        if getattr(options, key) not in get_args(legal):
            raise ValueError(f"{key} is {getattr(options, key)!r}; it must be one of {', '.join(get_args(legal))}")
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; it must be at least 1")
    found = instances.read(options.source, options.images)
    if not (first := Path(found.pictures[0].path)).is_file():
        raise ValueError(f"there is no {first}, the first image of {options.source}; images must name the folder of the image files")
    return found


def summed(overlaps: list[Overlap]) -> Overlap:
    return Overlap(*(np.sum(counts, 0) for counts in zip(*overlaps, strict=True)))


def labelled(overlaps: list[Overlap]) -> int:
    """How many labels were compared: each is in one union where it is right, and in two where it is wrong."""
    total = summed(overlaps)
    return int(total.intersection.sum() + (total.union - total.intersection).sum() // 2)


def miou(overlaps: list[Overlap], aggregate: Aggregate) -> float:
    return (
        patchdis.miou(summed(overlaps)) if aggregate == "sum" else float(np.nanmean([patchdis.miou(o) for o in overlaps]))
    )  # patches can all be void


@partial(jax.jit, static_argnames=("method", "augment"))
def _products(params: Any, images: jax.Array, texts: jax.Array, *, method: Method, augment: AugmentOptions) -> jax.Array:
    assert method.embed_patches is not None
    patches = method.embed_patches(params, preprocess(images, None, augment))
    return jnp.einsum("brcd,kd->brck", patches, texts, precision="highest")
