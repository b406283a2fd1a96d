"""Instance annotations in COCO's layout: one JSON file of images, categories and segmentations, beside a folder of images.

A segmentation is a list of polygons [x0, y0, x1, y1, ...] in pixels, or run lengths {"size": [height, width], "counts": ...} column after
column, as a list of numbers or as COCO's string. https://cocodataset.org/#format-data
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data.lists import read_json

VOID = -1  # label of a pixel that no annotation covers


class Segment(NamedTuple):
    """category: place in `Instances.classes`. area: in pixels, as annotated. shape: the JSON's segmentation."""

    category: int
    area: float
    shape: Any


class Picture(NamedTuple):
    """path: of the image file. height, width: of the image that was annotated, in pixels. segments: of all its annotations."""

    path: Path
    height: int
    width: int
    segments: tuple[Segment, ...]


class Instances(NamedTuple):
    """classes: names, ordered by id. pictures: images with at least one annotation, ordered by id."""

    classes: tuple[str, ...]
    pictures: tuple[Picture, ...]


def read(annotations: str | Path, images: str | Path = "") -> Instances:
    """The annotations of a file; images: the folder of its files (default: the file's own).

    Raises ValueError where the file is not of this layout, names a category or image it does not define, or annotates nothing.
    """
    annotations = Path(annotations)
    folder = Path(images) if images else annotations.parent
    body = read_json(annotations)
    try:
        names = {c["id"]: c["name"] for c in sorted(body["categories"], key=lambda c: c["id"])}
        place = {number: i for i, number in enumerate(names)}
        segments: dict[int, list[Segment]] = defaultdict(list)
        sizes = {i["id"]: (folder / i["file_name"], int(i["height"]), int(i["width"])) for i in body["images"]}
        for a in body["annotations"]:
            if a["image_id"] not in sizes or a["category_id"] not in place:
                raise ValueError(
                    f"annotation {a.get('id')} is of image {a['image_id']} and category {a['category_id']}, which are not both among its images and categories"
                )
            segments[a["image_id"]].append(Segment(place[a["category_id"]], float(a.get("area", 0)), a["segmentation"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{annotations} is no file of instances in COCO's layout ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise ValueError(f"{annotations}: {error}") from None
    pictures = tuple(Picture(*sizes[i], tuple(segments[i])) for i in sorted(segments))
    if not pictures:
        raise ValueError(f"{annotations} annotates none of its {len(sizes)} images")
    return Instances(tuple(names.values()), pictures)


def labels(picture: Picture) -> np.ndarray:
    """The category of each pixel, int32 [height, width], VOID where there is none; where annotations overlap, that of the smallest area."""
    out = np.full((picture.height, picture.width), VOID, np.int32)
    for segment in sorted(picture.segments, key=lambda s: -s.area):
        try:
            out[mask(segment.shape, picture.height, picture.width)] = segment.category
        except ValueError as error:
            raise ValueError(f"a segmentation of {picture.path.name}: {error}") from None
    return out


def resized(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels of another size, each pixel that of the nearest one by their centres."""
    rows, columns = ((np.arange(n) * 2 + 1) * was // (2 * n) for n, was in ((height, labels.shape[0]), (width, labels.shape[1])))
    return labels[rows[:, None], columns]


def mask(shape: Any, height: int, width: int) -> np.ndarray:
    """The pixels of a segmentation, bool [height, width]. Raises ValueError for one that is neither of polygons nor of run lengths for this size."""
    if isinstance(shape, dict):
        if list(shape.get("size", ())) != [height, width]:
            raise ValueError(f"run lengths of size {shape.get('size')} for an image of height {height} and width {width}")
        counts = shape["counts"]
        return runs(unpacked(counts) if isinstance(counts, str) else counts, height, width)
    if not isinstance(shape, list) or not all(isinstance(p, list) and len(p) % 2 == 0 and len(p) >= 6 for p in shape):
        raise ValueError("it takes run lengths, or a list of polygons of at least three points x, y each")
    out = np.zeros((height, width), bool)
    for points in shape:
        out |= polygon(np.asarray(points, np.float64).reshape(-1, 2), height, width)
    return out


def polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels whose centres lie inside a polygon of points [n, 2] (x, y), by the even-odd rule; bool [height, width].

    Of pixels on an edge itself those at a left or upper one count. COCO's own program rounds edges on a finer grid and may differ in
    single pixels along them.
    """
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, 0).T
    y = np.arange(height)[:, None] + 0.5
    crosses = (y0 <= y) != (y1 <= y)  # [row, edge]
    rows, edges = np.nonzero(crosses)
    at = x0[edges] + (y[rows, 0] - y0[edges]) * (x1 - x0)[edges] / (y1 - y0)[edges]
    first = np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)  # the first centre right of the crossing or on it
    toggles = np.zeros((height, width + 1), np.int64)
    np.add.at(toggles, (rows, first), 1)
    return np.cumsum(toggles, 1)[:, :width] % 2 == 1


def runs(counts: Any, height: int, width: int) -> np.ndarray:
    """A mask of the lengths of its runs of 0 and 1 in turn, down the columns. Raises ValueError where they do not fill it."""
    counts = np.asarray(counts, np.int64)
    if counts.ndim != 1 or (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(f"run lengths come to {int(counts.sum())} pixels for an image of {height} x {width}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def unpacked(text: str) -> list[int]:
    """Run lengths of COCO's string: six bits a character from "0" on, the lowest five first, the sixth for "more to come", two's complement;
    from the fourth number on the difference to the one two before."""
    counts: list[int] = []
    value = shift = 0
    for character in text.encode():
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"run lengths hold the character {chr(character)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("run lengths end within a number")
    return counts
