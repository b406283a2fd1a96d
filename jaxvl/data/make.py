"""A folder of images with captions, written as shards."""

import csv
import itertools
import json
import os
from collections.abc import Iterable
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
    captioned = [
        p
        for p in images
        if listed.get(p.relative_to(folder).as_posix(), {}).get("captions") or p.with_suffix(".txt").is_file()
    ]
    if not captioned:
        raise ValueError(
            f"{folder} has {len(images)} images, none with a NAME.txt or a line in one of {', '.join(LISTS)}"
        )
    samples = progress((_sample(folder, p, listed) for p in captioned), len(captioned), "writing shards")
    shards = [out / f"{number:05d}.tar" for number in range(-(-len(captioned) // per_shard))]
    for number, shard in enumerate(shards):
        _write(shard, number * per_shard, itertools.islice(samples, per_shard))
    return shards, [str(p) for p in sorted(set(images) - set(captioned))]


def _write(shard: Path, first: int, samples: Iterable[dict[str, bytes]]) -> None:
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
        lines = (
            [json.loads(line) for line in file if line.strip()]
            if path.suffix == ".jsonl"
            else list(csv.DictReader(file))
        )
    listed: dict[str, dict[str, Any]] = {}
    for line in lines:
        file_column = next((c for c in FILE if c in line), None)
        caption_column = next((c for c in CAPTION if c in line), None)
        if file_column is None or caption_column is None:
            raise ValueError(
                f"{path}: a line has columns {', '.join(map(str, line))}; it needs one of {FILE} and one of {CAPTION}"
            )
        captions = line.pop(caption_column)
        fields = listed.setdefault(str(line.pop(file_column)), {"captions": []} | line)
        fields["captions"] += captions if isinstance(captions, list) else [str(captions or "")]
    return listed
