"""Annotation files, entry by entry: which image, which captions.

    Karpathy's splits   {"images": [{"filename", "filepath", "sentences": [{"raw"}], "split", "cocoid" or "imgid"}]}, of COCO and Flickr30K
    COCO's own          {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    lists               ALBEF's [{"image", "caption", "image_id"}], or such rows as JSON lines, CSV or TSV; a caption may be a list

An image may have several entries.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl.data.lists import Row, column, entries, kind, read_json, rows

FILE, CAPTION = (
    ("file_name", "file", "image", "filename"),
    ("text", "caption", "captions", "comment"),
)  # how lists call their columns


class Entry(NamedTuple):
    """where: for messages. number: the image's id, None without one. others: kinds of what stands for a caption and is no text."""

    where: str
    file: str
    captions: list[str]
    number: Any = None
    others: tuple[str, ...] = ()


def annotated(file: Path, splits: tuple[str, ...] = ()) -> Iterator[Entry]:
    """The entries of an annotation file, of Karpathy's those of `splits` or all. Raises ValueError for a file of no such kind, and a split it has not."""
    try:
        content = read_json(file) if file.suffix == ".json" else None
    except ValueError as error:
        raise ValueError(f"{file} is no annotation file: {error}") from None
    if isinstance(content, dict) and "images" in content and "annotations" not in content:
        yield from _karpathy(file, content["images"], splits)
        return
    if splits:
        raise ValueError(f"{file} has no splits: only Karpathy's files have several in one")
    if content is None:
        yield from map(entry, rows(file))
    elif isinstance(content, list) and all(isinstance(value, dict) for value in content):
        yield from map(entry, entries(content, str(file)))
    elif isinstance(content, dict) and "images" in content:
        yield from _coco(file, content["images"], content["annotations"])
    else:
        told = f"an object of {', '.join(list(content)[:8])}" if isinstance(content, dict) else kind(content)
        raise ValueError(
            f"{file} is no annotation file: it holds {told}, and neither Karpathy's splits, COCO's captions nor a list of images"
        )


def entry(row: Row) -> Entry:
    """The entry that a row of a list is. Raises ValueError where it names no image or has no column for a caption."""
    name, texts = row.fields[column(row, FILE)], row.fields[column(row, CAPTION)]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{row.where} has {kind(name) if not isinstance(name, str) else 'a blank'} for the path of an image")
    return _entry(row.where, name, texts if isinstance(texts, list) else [texts], row.fields.get("image_id"))


def _entry(where: str, name: str, texts: list[Any], number: Any) -> Entry:
    others = tuple(kind(text) for text in texts if not isinstance(text, str))
    return Entry(where, name, [text for text in texts if isinstance(text, str)], number, others)


def _karpathy(file: Path, images: Any, splits: tuple[str, ...]) -> Iterator[Entry]:
    found = list(entries(images, f"{file}, images"))
    have = {str(_value(row, "split", str)) for row in found}
    if unknown := sorted(set(splits) - have):
        raise ValueError(f"{file} has no split {unknown[0]!r}; it has {', '.join(sorted(have))}")
    for row in found:
        if not splits or row.fields["split"] in splits:
            name, folder = _value(row, "filename", str), row.fields.get("filepath", "")
            sentences = [_value(s, "raw") for s in entries(_value(row, "sentences"), f"{row.where}, sentences")]
            number = row.fields.get("cocoid", row.fields.get("imgid"))
            yield _entry(row.where, f"{folder}/{name}" if folder else name, sentences, number)


def _coco(file: Path, images: Any, annotations: Any) -> Iterator[Entry]:
    names = {}
    for row in entries(images, f"{file}, images"):
        number = _value(row, "id", int | str)
        if number in names:
            raise ValueError(f"{row.where} has the id {number!r}, which another image has")
        names[number] = Entry(row.where, _value(row, "file_name", str), [], number)
    yield from names.values()
    for row in entries(annotations, f"{file}, annotations"):
        number = _value(row, "image_id", int | str)
        if number not in names:
            raise ValueError(f"{row.where} is of image {number!r}, which {file} has not among its images")
        if "caption" not in row.fields:
            raise ValueError(
                f"{row.where} has no caption but {', '.join(row.fields)}; of COCO's files, those called captions_... have them"
            )
        yield _entry(row.where, names[number].file, [row.fields["caption"]], number)


def _value(row: Row, key: str, of: Any = object) -> Any:
    if key not in row.fields:
        raise ValueError(f"{row.where} has no {key}; it has {', '.join(row.fields) or 'nothing'}")
    if not isinstance(row.fields[key], of):
        raise ValueError(f"{row.where} has {kind(row.fields[key])} for {key}")
    return row.fields[key]
