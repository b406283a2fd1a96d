"""Which items answer a query of image-text retrieval: those of its sample, or those of its group where a set has equals.

In many sets several images share a caption or a class; no model can tell such a caption's own image from the others'.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxvl.data.dataset import Dataset, read_samples
from jaxvl.data.labels import word
from jaxvl.data.source import Want
from jaxvl.evals.embed import Embedded, known

CAPTION = "caption"  # the group of samples with an equal caption; any other group is a field of the sample


class Groups(NamedTuple):
    """images: int64 [image, n], the groups of each image, each once, filled up with -1; texts: int64 [text], that of each text.

    An image and a text answer each other where the text's group is one of the image's.
    """

    images: np.ndarray
    texts: np.ndarray

    def right(self, image: int, text: int) -> bool:
        return bool((self.images[image] == self.texts[text]).any())


def groups_of(group: str, dataset: Dataset, embedded: Embedded, captions: int) -> Groups:
    """The groups of a set of which `captions` texts an image are embedded: "" its samples, "caption", or a field's values.

    A caption is equal to another as it is after cleaning, and an image has the groups of all its texts.
    Raises ValueError for a sample that lacks the field.
    """
    own = np.arange(len(embedded.images))
    if not group:
        return Groups(own[:, None], embedded.owner.astype(np.int64))
    if group != CAPTION:
        of_image = numbered(values(dataset, embedded.ids, group))
        return Groups(of_image[:, None], of_image[embedded.owner])
    want = Want(image=False, alternates=captions > 1, fields=False)
    lists = [known(record).captions[:captions] for record in read_samples(dataset, embedded.ids, want)]
    texts = numbered(c for some in lists for c in some)
    pairs = np.unique(np.stack([embedded.owner, texts], 1), axis=0)  # a caption that an image has twice counts once
    place = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])
    images = np.full((len(own), int(place.max()) + 1), -1, np.int64)
    images[pairs[:, 0], place] = pairs[:, 1]
    return Groups(images, texts)


def check(group: str, dataset: Dataset) -> None:
    """Raises ValueError where a sample lacks the field `group`."""
    if group not in ("", CAPTION):
        values(dataset, np.arange(len(dataset)), group)


def values(dataset: Dataset, ids: np.ndarray, field: str) -> list[str]:
    """A field of the samples with these ids. Raises ValueError for one that has no text or whole number there."""
    out = []
    for record in map(known, read_samples(dataset, ids, Want(image=False, captions=False, alternates=False))):
        if (value := word(record.meta.get(field))) is None:
            held = f"is {record.meta[field]!r:.40}" if field in record.meta else "is missing"
            raise ValueError(
                f"group is {field!r}, a field that {held} in sample {record.key!r} of {dataset.options.source}; it must be a text or a whole"
                " number in every sample, or group must be 'caption' or ''"
            )
        out.append(value)
    return out


def numbered(names: Iterable[Hashable]) -> np.ndarray:
    """int64, equal for equal names, in the order they first appear in."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in names], np.int64)


def chance(groups: Groups, ks: Sequence[int]) -> dict[str, float]:
    """ "i2t/chance_r@K" and "t2i/chance_r@K": R@K of items in an order of chance, which is higher where more of them are right.

    Of n items of which r are right, K at random hold none with the odds (n-r)/n · (n-r-1)/(n-1) · ... of K factors.
    """
    most = 1 + max(groups.images.max(), groups.texts.max())
    images_of, texts_of = (np.bincount(x[x >= 0], minlength=most) for x in groups)  # [group]
    sides = {
        "i2t": (np.where(groups.images >= 0, texts_of[groups.images], 0).sum(1), len(groups.texts)),
        "t2i": (images_of[groups.texts], len(groups.images)),
    }
    out = {}
    for way, (right, items) in sides.items():
        for k in ks:
            drawn = np.arange(min(k, items))
            none = np.prod(np.clip(items - right[:, None] - drawn, 0, None) / (items - drawn), axis=1)
            out[f"{way}/chance_r@{k}"] = float(np.mean(1 - none))
    return out
