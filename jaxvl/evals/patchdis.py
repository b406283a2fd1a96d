"""PatchDis: how well the patches of an image tell its classes apart; Li et al. 2024, https://arxiv.org/abs/2407.17827, section 4.3.

Every patch gets the class with the greatest product of lexical vectors; the map is compared with a mask of the classes. Intersections and
unions are summed over a data set before they are divided. A label of VOID belongs to no class and is not counted.
"""

from typing import NamedTuple

import numpy as np

from jaxvl.data.instances import VOID


class Overlap(NamedTuple):
    """Counts of a data set so far, int64 [class]; add up those of its images."""

    intersection: np.ndarray
    union: np.ndarray


def classify(patches: np.ndarray, classes: np.ndarray, present: np.ndarray | None = None) -> np.ndarray:
    """The class of each patch, int64 [...]; of equal ones the first.

    patches: [..., V]; classes: [class, V]; present: bool, broadcast to [..., class], the classes that may be chosen (by default all).
    Raises ValueError where a patch has no class to choose.
    """
    return choose(patches.astype(np.float64) @ classes.astype(np.float64).T, present)


def choose(scores: np.ndarray, present: np.ndarray | None = None) -> np.ndarray:
    """The class of the greatest of scores [..., class], int64 [...]; `present` and errors as for `classify`."""
    if present is not None:
        present = np.broadcast_to(present, scores.shape)
        if not present.any(-1).all():
            raise ValueError("an image has none of the classes, so its patches cannot be told apart; leave it out")
        scores = np.where(present, scores, -np.inf)
    return scores.argmax(-1)


def present_classes(labels: np.ndarray, classes: int) -> np.ndarray:
    """Which of the classes each mask [image, height, width] has; bool [image, class]."""
    return np.stack([np.bincount(mask[mask != VOID].ravel(), minlength=classes) > 0 for mask in labels])


def to_pixels(grid: np.ndarray, patch: int) -> np.ndarray:
    """A map of patches [..., row, column] as pixels [..., row * patch, column * patch]."""
    return grid.repeat(patch, -2).repeat(patch, -1)


def to_patches(labels: np.ndarray, patch: int) -> np.ndarray:
    """The most frequent label of each patch of masks [image, height, width], void included; of equally frequent ones the lowest."""
    images, height, width = labels.shape
    if height % patch or width % patch:
        raise ValueError(f"masks of {height} x {width} pixels do not divide into patches of {patch} x {patch}")
    cut = (
        labels.reshape(images, height // patch, patch, width // patch, patch)
        .swapaxes(2, 3)
        .reshape(images, height // patch, width // patch, -1)
    )
    names = np.unique(labels)  # ascending, so that the first maximum is the lowest label
    return names[(cut[..., None] == names).sum(-2).argmax(-1)]


def overlap(predicted: np.ndarray, labels: np.ndarray, classes: int) -> Overlap:
    """Intersections and unions of predictions and labels of one shape, where the label is not VOID."""
    known = labels != VOID
    predicted, labels = predicted[known].astype(np.int64), labels[known].astype(np.int64)
    count = lambda x: np.bincount(x, minlength=classes)
    both = count(labels[predicted == labels])
    return Overlap(both, count(predicted) + count(labels) - both)


def miou(found: Overlap) -> float:
    """The mean over the classes that have a union; NaN where none has."""
    seen = found.union > 0
    return float(np.mean(found.intersection[seen] / found.union[seen])) if seen.any() else float("nan")
