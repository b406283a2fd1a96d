"""A folder of images with captions, or an annotation file and its images, written as shards."""

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl.data.annotations import CAPTION, FILE, Entry, annotated, entry
from jaxvl.data.formats import unread
from jaxvl.data.indexing import progress
from jaxvl.data.lists import column, find, read_object, rows
from jaxvl.data.targroup import EXTENSIONS, IMAGES
from jaxvl.data.text import Uncaptioned, clean_caption
from jaxvl.new_files import new_files
from jaxvl.progress import say

LISTS = (
    *("metadata.jsonl", "metadata.csv", "metadata.tsv"),
    *("captions.jsonl", "captions.csv", "captions.tsv", "captions.txt"),
)  # the first that is there is read
SIDECARS = [ending for ending, slot in EXTENSIONS.items() if slot == "text"]
SHOWN = 5  # lines of a list that are told one by one


def make_shards(folder: Path, out: Path, per_shard: int) -> tuple[list[Path], list[str]]:
    """Write the images of `folder`, with their captions, into out/00000.tar ... of `per_shard` samples each.

    Captions come from NAME.txt, .text or .caption next to NAME.jpg, or from a list in the folder (LISTS): one object a line, or a table
    whose first line names the columns. A list has a column file_name (or another of FILE) and a column caption (or another of CAPTION);
    an image can have several lines, which are its captions. Further columns, and NAME.json, become fields of the sample. Files keep
    their bytes. Captions that are no text or blank are told and left out, and so are lines that name no image of the folder.

    Returns the shards, and the images that were left out because nothing captions them. Raises ValueError where there
    is nothing to write, a list is damaged (lists.py) or `per_shard` is below 1, FileExistsError where `out` holds shards.
    """
    check(out, per_shard)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one of images with captions, or glyphs")
    beside = _beside(folder)
    images = sorted(p for p in beside if p.suffix[1:].lower() in IMAGES)
    _tell(unread(beside), "images left out, of formats that are not read")
    names = {p.relative_to(folder).as_posix(): p for p in images}
    listed, told = _listed(folder, names)
    faults: list[str] = []
    files = progress(names.items(), len(names), "reading captions")
    captions = {name: _captions(beside[p], listed.get(name), faults) for name, p in files}
    captioned = [name for name, found in captions.items() if found]
    _tell(faults, "captions left out")
    if not captioned:
        raise ValueError(f"{folder} has {len(images)} images, none with {' or '.join(f'a NAME.{s}' for s in SIDECARS)}, and {told}")
    samples = (_sample(names[name], name, beside[names[name]], captions[name], listed.get(name)) for name in captioned)
    return write_shards(out, samples, len(captioned), per_shard), [str(names[name]) for name in names if not captions[name]]


def make_annotated(file: Path, images: Path, out: Path, per_shard: int, splits: tuple[str, ...] = ()) -> tuple[list[Path], list[str]]:
    """Write the images that an annotation file names (annotations.py), one sample an image with all its captions, as `make_shards` does.

    Paths are below `images`. splits: those of Karpathy's to take, all where none is named. A sample has the fields "image_id" (as in the
    file, else the image's path), "file" and "captions".

    Returns the shards, and the images that were left out because they have no caption. Raises ValueError for a file of no known kind,
    a split that it does not have, and images that are not there, naming the first of them; FileExistsError as `make_shards`.
    """
    check(out, per_shard)
    samples: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    missing: dict[str, None] = {}
    for found in annotated(file, splits):
        path = find(found.file, images, lambda path: os.path.isfile(images / path))
        if path is None:
            missing[path := found.file] = None
        fields = samples.setdefault(path, {"file": path, "image_id": path if found.number is None else found.number, "captions": []})
        fields["captions"] += [caption for caption in _good(found, faults) if caption not in fields["captions"]]
    _tell(faults, "captions left out")
    captioned = {path: fields for path, fields in samples.items() if fields["captions"]}
    if not captioned:
        raise ValueError(f"{file} has no image with a caption in {', '.join(splits) or 'any split'}")
    if lost := [path for path in missing if path in captioned]:
        raise ValueError(f"{len(lost):,} of {len(captioned):,} images of {file} are not below {images}: {lost[0]} is the first")
    if strange := [path for path in captioned if Path(path).suffix[1:].lower() not in IMAGES]:
        named = unread([Path(strange[0])])
        raise ValueError(f"{file}: {named[0] if named else f'{strange[0]} is no image by its name'}; known are {', '.join(IMAGES)}")
    contents = (_packed(images / path, fields["captions"][0].encode(), fields) for path, fields in captioned.items())
    return write_shards(out, contents, len(captioned), per_shard), sorted(samples.keys() - captioned.keys())


def check(out: Path, per_shard: int) -> None:
    """Raise ValueError and FileExistsError for what cannot be written."""
    if per_shard < 1:
        raise ValueError(f"{per_shard} samples a shard are too few; it must be at least 1")
    if any(out.glob("*.tar")):
        raise FileExistsError(f"{out} holds shards already; choose an empty folder")


def write_shards(out: Path, samples: Iterable[dict[str, bytes]], total: int, per_shard: int) -> list[Path]:
    """Write `total` samples {extension: bytes} into out/00000.tar ... under keys that count from 0; where one cannot be read, none is left."""
    written = iter(progress(samples, total, "writing shards"))
    shards = [out / f"{number:05d}.tar" for number in range(-(-total // per_shard))]
    with new_files(out, shards):
        for number, shard in enumerate(shards):
            _write(shard, number * per_shard, itertools.islice(written, per_shard))
    return shards


def _write(shard: Path, first: int, samples: Iterable[dict[str, bytes]]) -> None:
    """Write samples under keys that count from `first`; the shard appears when it is whole."""
    import webdataset

    partial = shard.with_suffix(".partial")
    try:
        with webdataset.TarWriter(str(partial), encoder=False, mtime=0.0) as writer:
            for number, sample in enumerate(samples, first):
                writer.write({"__key__": f"{number:08d}", **sample})
        os.replace(partial, shard)
    finally:
        partial.unlink(missing_ok=True)


class Listed(NamedTuple):
    """What a list has of an image. fields: the further columns of its first line. entries: of all its lines."""

    fields: dict[str, Any]
    entries: list[Entry]


def _beside(folder: Path) -> dict[Path, dict[str, Path]]:
    """Every file below `folder`, and the files of its name with another ending, by that ending in lower case."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.suffix.islower(), p))  # of .TXT and .txt the last
    alike: defaultdict[Path, dict[str, Path]] = defaultdict(dict)
    for path in files:
        alike[path.with_suffix("")][path.suffix[1:].lower()] = path
    return {path: alike[path.with_suffix("")] for path in files}


def _listed(folder: Path, images: dict[str, Path]) -> tuple[dict[str, Listed], str]:
    """The entries of each image that the folder's list names, and what to say of the list where that is no help.

    Lines that name no image are told.
    """
    present = [folder / name for name in LISTS if (folder / name).is_file()]
    if not present:
        return {}, f"there is no list of captions ({', '.join(LISTS)}; a .json is given in place of the folder, with --images)"
    path = present[0]
    if present[1:]:
        say(f"captions are read from {path}, and not from {', '.join(p.name for p in present[1:])}")
    listed: dict[str, Listed] = {}
    lost: list[str] = []
    total = 0
    for row in rows(path):
        found, total = entry(row), total + 1
        name = find(found.file, folder, images.__contains__)
        if name is None:
            lost.append(f"{found.where} names {found.file}")
            continue
        read = (column(row, FILE), column(row, CAPTION))
        more = {key: value for key, value in row.fields.items() if key not in read}
        listed.setdefault(name, Listed(more, [])).entries.append(found)
    _tell(lost, f"lines of {total:,} that name no image of {folder}")
    return listed, f"no line of {path} names one of them" + (f", for one {lost[0]}" if lost else " with a caption")


def _captions(beside: dict[str, Path], listed: Listed | None, faults: list[str]) -> list[bytes | str]:
    """The captions of an image that can be used, that of its own file first and in that file's bytes."""
    own: list[bytes | str] = []
    for path in (beside[ending] for ending in SIDECARS if ending in beside):
        try:
            clean_caption(data := path.read_bytes())
        except Uncaptioned as error:
            faults.append(f"{path} is {error.reason}")
            continue
        if own:
            faults.append(f"{path} stands beside another")
        else:
            own.append(data)
    return own + [caption for found in (listed.entries if listed else []) for caption in _good(found, faults)]


def _good(found: Entry, faults: list[str]) -> Iterator[str]:
    """The captions of an entry that can be used; what is wrong with the others goes to `faults`."""
    for caption in found.captions:
        try:
            clean_caption(caption)
            yield caption
        except Uncaptioned as error:
            faults.append(f"{found.where} has a caption that is {error.reason}")
    faults += [f"{found.where} has {what} for a caption" for what in found.others]


def _tell(what: list[str], of: str) -> None:
    if what:
        say(f"{of}: {len(what):,} ({'; '.join(what[:SHOWN])}{'; ...' if len(what) > SHOWN else ''})")


def _sample(image: Path, name: str, beside: dict[str, Path], captions: list[bytes | str], listed: Listed | None) -> dict[str, bytes]:
    main = captions[0] if isinstance(captions[0], bytes) else captions[0].encode()
    texts = [caption for caption in captions if isinstance(caption, str)]
    more = listed.fields | {"captions": texts} if listed else {}
    return _packed(image, main, {"file": name} | (read_object(beside["json"]) if "json" in beside else {}) | more)


def _packed(image: Path, main: bytes, fields: dict[str, Any]) -> dict[str, bytes]:
    body = json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace")  # of half a surrogate pair, JSON's own escape
    return {image.suffix[1:].lower(): image.read_bytes(), "txt": main, "json": body}
