"""Published metric-learning sets, as they are unpacked, written as shards with the fields `class` and `hierarchy`, coarse first.

    folders       any tree ROOT/GROUP/.../CLASS/NAME.jpg, such as the images of CUB-200-2011
    sop           Stanford Online Products: Ebay_train.txt, Ebay_test.txt; hierarchy: the super-class
    inshop        In-Shop: list_eval_partition.txt (there, in Eval/ or in Anno/); parts train, query, gallery; hierarchy: section, category
    inaturalist   iNaturalist 2018 with the lists of its retrieval split, Inaturalist_train_set1.txt and ..._test_set1.txt, or PART.txt;
                  hierarchy: the super-category, or with categories.json kingdom, phylum, class, order, family, genus

Lists that name images which are not there are no error: the images are told, and the others written.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jaxvl.data.formats import unread
from jaxvl.data.lists import column, entries, find, read_json, text_lines
from jaxvl.data.make import check, write_shards
from jaxvl.data.targroup import IMAGES
from jaxvl.progress import say

TAXONOMY = ("kingdom", "phylum", "class", "order", "family", "genus")


class Listed(NamedTuple):
    """One image: its path under the root, its class and the groups above it, coarse first, the class itself left out."""

    file: str
    name: str
    groups: tuple[str, ...]


def make_classes(layout: str, folder: Path, out: Path, part: str, per_shard: int) -> tuple[list[Path], list[str]]:
    """Write a part of the set in `folder` into out/00000.tar ... of `per_shard` samples each; files keep their bytes.

    Returns the shards, and the listed images that are missing. Raises ValueError for a layout, a part or lists that cannot be, and where
    no image is there; FileExistsError where `out` holds shards.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    check(out, per_shard)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one the set was unpacked in")
    listed = list(LAYOUTS[layout](folder, part))
    found = [find(one.file, folder, lambda path: os.path.isfile(folder / path)) for one in listed]
    there = [one._replace(file=path) for one, path in zip(listed, found, strict=True) if path]
    if not there:
        example = f", for one {listed[0].file}" if listed else ""
        raise ValueError(f"{folder} has none of the {len(listed)} images of part {part!r} of layout {layout!r}{example}")
    shards = write_shards(out, (_sample(folder, one) for one in there), len(there), per_shard)
    return shards, [one.file for one, path in zip(listed, found, strict=True) if not path]


def _sample(folder: Path, one: Listed) -> dict[str, bytes]:
    fields = {"file": one.file, "class": one.name, "hierarchy": [*one.groups, one.name]}
    return {
        Path(one.file).suffix[1:].lower(): (folder / one.file).read_bytes(),
        "json": json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace"),
    }


def _folders(folder: Path, part: str) -> Iterator[Listed]:
    if part not in ("all", "train"):
        raise ValueError(f"part {part!r}: a tree of folders is written whole; its halves of classes are data.classes=first and second")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if others := unread(files):
        say(f"{len(others):,} images left out, of formats that are not read ({others[0]})")
    for file in (p for p in files if p.suffix[1:].lower() in IMAGES):
        path = file.relative_to(folder)
        above = path.parts[:-1]
        if above:  # an image beside the folders has no class
            yield Listed(path.as_posix(), "/".join(above), above[:-1])


def _sop(folder: Path, part: str) -> Iterator[Listed]:
    for where, number, line in _lines(folder, part, {"train": ["Ebay_train.txt"], "test": ["Ebay_test.txt"]}):
        words = line.split()
        if number == 1 and words[:2] == ["image_id", "class_id"]:
            continue
        if len(words) != 4:
            raise ValueError(f"{where}: {line!r} is not `image_id class_id super_class_id path`")
        yield Listed(words[3], words[1], (words[3].split("/")[0].removesuffix("_final"),))


def _inshop(folder: Path, part: str) -> Iterator[Listed]:
    files = [f"{where}list_eval_partition.txt" for where in ("", "Eval/", "Anno/")]
    for where, number, line in _lines(folder, part, dict.fromkeys(("train", "query", "gallery"), files)):
        words = line.split()
        if number <= 2 and (len(words) == 1 or words[0] == "image_name"):  # how many, and the names of the columns
            continue
        if len(words) != 3:
            raise ValueError(f"{where}: {line!r} is not `image_name item_id evaluation_status`")
        if words[2] == part:
            yield Listed(words[0], words[1], PurePosixPath(words[0]).parts[1:3])


def _inaturalist(folder: Path, part: str) -> Iterator[Listed]:
    taxonomy: dict[str, tuple[str, ...]] = {}
    if (folder / "categories.json").is_file():
        for row in entries(read_json(folder / "categories.json"), str(folder / "categories.json")):
            taxonomy[str(row.fields[column(row, ["id"])])] = tuple(str(row.fields[column(row, [rank])]) for rank in TAXONOMY)
    names = [f"Inaturalist_{part}_set1.txt", f"{part}.txt"]
    for where, _, line in _lines(folder, part, {part: names}):
        path = PurePosixPath(line)
        if len(path.parts) < 3:
            raise ValueError(f"{where}: {line!r} is not `.../SUPER-CATEGORY/CLASS/NAME.jpg`")
        name = path.parts[-2]
        if taxonomy and name not in taxonomy:
            raise ValueError(f"{folder}/categories.json has no category {name!r}, the class of {line}")
        yield Listed(line, name, taxonomy.get(name, (path.parts[-3],)))


def _lines(folder: Path, part: str, lists: dict[str, list[str]]) -> Iterator[tuple[str, int, str]]:
    """(FILE:LINE, number from 1, text) of the lines of the first of a part's lists that is there."""
    if part not in lists:
        raise ValueError(f"part {part!r} is none of {', '.join(lists)}")
    file = next((folder / name for name in lists[part] if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has no {' or '.join(lists[part])}")
    for number, line in text_lines(file):
        yield f"{file}:{number}", number, line.strip()


LAYOUTS: dict[str, Callable[[Path, str], Iterator[Listed]]] = {
    "folders": _folders,
    "sop": _sop,
    "inshop": _inshop,
    "inaturalist": _inaturalist,
}
