"""A folder of images with captions, or an annotation file and its images, written as shards."""

import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxvl.data.indexing import progress
from jaxvl.data.targroup import IMAGES

LISTS = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv", "captions.txt")
FILE, CAPTION = (
    ("file_name", "file", "image", "filename"),
    ("text", "caption", "captions", "comment"),
)  # how lists call their columns


def make_shards(folder: Path, out: Path, per_shard: int) -> tuple[list[Path], list[str]]:
    """Write the images of `folder`, with their captions, into out/00000.tar ... of `per_shard` samples each.

    Captions come from NAME.txt next to NAME.jpg, or from a list in the folder: metadata.jsonl or captions.jsonl with
    one object a line, or metadata.csv, captions.csv or captions.txt with a first line of column names. A list has a
    column file_name (or file, image) and a column caption (or text); an image can have several lines, which are its
    captions. Further columns, and NAME.json, become fields of the sample. Files keep their bytes.

    Returns the shards, and the images that were left out because nothing captions them. Raises ValueError where there
    is nothing to write or `per_shard` is below 1, FileExistsError where `out` holds shards.
    """
    if per_shard < 1:
        raise ValueError(f"{per_shard} samples a shard are too few; it must be at least 1")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one of images with captions, or glyphs")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.tar")):
        raise FileExistsError(f"{out} holds shards already; choose an empty folder")
    images = sorted(p for p in folder.rglob("*") if p.suffix[1:].lower() in IMAGES and p.is_file())
    listed = _listed(folder)
    captioned = [p for p in images if listed.get(p.relative_to(folder).as_posix(), {}).get("captions") or p.with_suffix(".txt").is_file()]
    if not captioned:
        raise ValueError(f"{folder} has {len(images)} images, none with a NAME.txt or a line in one of {', '.join(LISTS)}")
    samples = progress((_sample(folder, p, listed) for p in captioned), len(captioned), "writing shards")
    shards = [out / f"{number:05d}.tar" for number in range(-(-len(captioned) // per_shard))]
    for number, shard in enumerate(shards):
        write_shard(shard, number * per_shard, itertools.islice(samples, per_shard))
    return shards, [str(p) for p in sorted(set(images) - set(captioned))]


def make_annotated(file: Path, images: Path, out: Path, per_shard: int, splits: tuple[str, ...] = ()) -> tuple[list[Path], list[str]]:
    """Write the images that an annotation file names, one sample an image with all its captions, as `make_shards` does.

    file: JSON, either Karpathy's splits of COCO and Flickr30K ({"images": [{"filename", "filepath", "sentences": [{"raw"}], "split",
    "cocoid" or "imgid"}]}) or ALBEF's lists ([{"image", "caption", "image_id"}], where an image may have several entries and a caption
    may be a list). Paths are below `images`. splits: those of Karpathy's to take, all where none is named. A sample has the
    fields "image_id" (as in the file, else the image's path), "file" and "captions".

    Returns the shards, and the images that were left out because they have no caption. Raises ValueError for a file of neither kind,
    a split that it does not have, and images that are not there, naming the first of them; FileExistsError as `make_shards`.
    """
    if per_shard < 1:
        raise ValueError(f"{per_shard} samples a shard are too few; it must be at least 1")
    samples: dict[str, dict[str, Any]] = {}
    for path, captions, number in _annotated(file, splits):
        fields = samples.setdefault(path, {"file": path, "image_id": path if number is None else number, "captions": []})
        fields["captions"] += [caption for caption in captions if caption.strip() and caption not in fields["captions"]]
    captioned = {path: fields for path, fields in samples.items() if fields["captions"]}
    if not captioned:
        raise ValueError(f"{file} has no image with a caption in {', '.join(splits) or 'any split'}")
    if missing := [path for path in captioned if not (images / path).is_file()]:
        raise ValueError(f"{len(missing):,} of {len(captioned):,} images of {file} are not below {images}: {missing[0]} is the first")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.tar")):
        raise FileExistsError(f"{out} holds shards already; choose an empty folder")
    written = progress((_annotated_sample(images / path, fields) for path, fields in captioned.items()), len(captioned), "writing shards")
    shards = [out / f"{number:05d}.tar" for number in range(-(-len(captioned) // per_shard))]
    for number, shard in enumerate(shards):
        write_shard(shard, number * per_shard, itertools.islice(written, per_shard))
    return shards, sorted(samples.keys() - captioned.keys())


def _annotated(file: Path, splits: tuple[str, ...]) -> Iterator[tuple[str, list[str], Any]]:
    """(path, captions, image id or None) of every entry of an annotation file."""
    try:
        content = json.loads(file.read_bytes())
        entries = content["images"] if isinstance(content, dict) else content
        if isinstance(content, dict):
            have = {entry["split"] for entry in entries}
            if unknown := sorted(set(splits) - have):
                raise KeyError(f"split {unknown[0]!r}; it has {', '.join(sorted(have))}")
        elif splits:
            raise KeyError("splits: a list of images and captions is one")
        for entry in entries:
            if isinstance(content, list):
                caption = entry["caption"]
                yield entry["image"], caption if isinstance(caption, list) else [caption], entry.get("image_id")
            elif not splits or entry["split"] in splits:
                path = "/".join(part for part in (entry.get("filepath", ""), entry["filename"]) if part)
                yield path, [sentence["raw"] for sentence in entry["sentences"]], entry.get("cocoid", entry.get("imgid"))
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no annotation file, neither Karpathy's splits nor a list of images and captions: {error}") from None


def _annotated_sample(image: Path, fields: dict[str, Any]) -> dict[str, bytes]:
    extension = image.suffix[1:].lower()
    if extension not in IMAGES:
        raise ValueError(f"{image} is no image by its name; known are {', '.join(IMAGES)}")
    text, meta = fields["captions"][0].encode(), json.dumps(fields, ensure_ascii=False).encode()
    return {extension: image.read_bytes(), "txt": text, "json": meta}


def write_shard(shard: Path, first: int, samples: Iterable[dict[str, bytes]]) -> None:
    """Write samples {extension: bytes} under keys that count from `first`; the shard appears when it is whole."""
    import webdataset

    partial = shard.with_suffix(".partial")
    with webdataset.TarWriter(str(partial), encoder=False, mtime=0.0) as writer:
        for number, sample in enumerate(samples, first):
            writer.write({"__key__": f"{number:08d}", **sample})
    os.replace(partial, shard)


def _sample(folder: Path, image: Path, listed: dict[str, dict[str, Any]]) -> dict[str, bytes]:
    name = image.relative_to(folder).as_posix()
    fields = {"file": name} | _fields(image.with_suffix(".json")) | listed.get(name, {})
    text = image.with_suffix(".txt")
    main = text.read_bytes() if text.is_file() else fields["captions"][0].encode()
    return {
        image.suffix[1:].lower(): image.read_bytes(),
        "txt": main,
        "json": json.dumps(fields, ensure_ascii=False).encode(),
    }


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no json: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}; it must be an object of fields")
    return fields


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """The fields of each image that a list names, its captions under "captions"."""
    path = next((folder / name for name in LISTS if (folder / name).is_file()), None)
    if path is None:
        return {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = [json.loads(line) for line in file if line.strip()] if path.suffix == ".jsonl" else list(csv.DictReader(file))
    listed: dict[str, dict[str, Any]] = {}
    for line in lines:
        file_column = next((c for c in FILE if c in line), None)
        caption_column = next((c for c in CAPTION if c in line), None)
        if file_column is None or caption_column is None:
            raise ValueError(f"{path}: a line has columns {', '.join(map(str, line))}; it needs one of {FILE} and one of {CAPTION}")
        captions = line.pop(caption_column)
        fields = listed.setdefault(str(line.pop(file_column)), {"captions": []} | line)
        fields["captions"] += captions if isinstance(captions, list) else [str(captions or "")]
    return listed
