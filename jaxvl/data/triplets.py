"""Triplets of composed retrieval: a reference image, a text that says what to change, a target image.

data.triplets says where they come from:
- "beside": the file PART-triplets.jsonl beside the shards PART-0000.tar ..., one object a line: `reference` and `target` are keys of
  samples, `modification` is the text or a list of texts for one change; further fields (`category`, `kind`) are kept;
- paths of such files;
- "siblings": drawn anew for each sample from captions that differ in one word (siblings.py), as for Fashion-200k;
- "attributes": drawn likewise from samples that differ in one of the fields data.attributes, as for UT-Zap50k.

An image that a file names and no shard has is listed, and its triplets are left out.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxvl.data import siblings
from jaxvl.data.lists import lines, parse
from jaxvl.data.siblings import SiblingRule
from jaxvl.data.source import Bad, Record, Source, Want
from jaxvl.data.text import Cleaning, clean_caption

Texts = Literal["single", "joined", "joined_random"]
BESIDE, SIBLINGS, ATTRIBUTES = "beside", "siblings", "attributes"
AND = " <and> "  # between two texts of one change
LANES = 3  # uniform numbers that a draw takes
TEXTS = 100_000  # modification texts that a tokenizer is trained on, at most


class Triplet(NamedTuple):
    """One line of a file, its images as ids of the dataset. texts: the texts of the change; fields: all of the line."""

    reference: int
    target: int
    texts: tuple[str, ...]
    fields: dict[str, Any]


class Triplets(NamedTuple):
    """The training samples of a dataset with triplets: `number` triplets, then the images of `alone`, which are in none.

    alone: int64 [image]. draw(m, uniforms float64 [LANES]) -> ids of reference and target, and the text, of triplet m. texts: some
    of the texts, for tokenizers. missing: what the files name and the shards lack.
    """

    number: int
    alone: np.ndarray
    draw: Callable[[int, np.ndarray], tuple[int, int, str]]
    texts: tuple[str, ...]
    missing: tuple[Bad, ...]


def listed(triplets: Sequence[Triplet], images: int, how: Texts, missing: tuple[Bad, ...]) -> Triplets:
    """The samples of triplets read from files. how: "single" makes each text of a change a triplet of its own; "joined" joins them in
    order, "joined_random" in either order by turns of chance."""
    if how == "single":
        triplets = [t._replace(texts=(text,)) for t in triplets for text in t.texts]
    used = {image for t in triplets for image in (t.reference, t.target)}
    alone = np.array([i for i in range(images) if i not in used], np.int64)
    rows = tuple((t.reference, t.target, t.texts) for t in triplets)
    texts = tuple(AND.join(t.texts) for t in triplets[:TEXTS])
    return Triplets(len(rows), alone, functools.partial(_listed, rows, how), texts, missing)


def _listed(rows: Sequence[tuple[int, int, tuple[str, ...]]], how: Texts, m: int, uniforms: np.ndarray) -> tuple[int, int, str]:
    reference, target, texts = rows[m]
    if how == "joined_random" and uniforms[0] < 0.5:
        texts = texts[::-1]
    return reference, target, AND.join(texts)


class Families(NamedTuple):
    """Values (captions, or tuples of attributes) and which of them are siblings. values: of each kind; images: ids of each value's
    images; parents: for each value, the lists of its siblings under each of its parents; text(a, b): the modification."""

    values: tuple[Any, ...]
    images: tuple[np.ndarray, ...]
    parents: tuple[tuple[np.ndarray, ...], ...]
    text: Callable[[Any, Any], str]


def drawn(values: Sequence[Any], parents_of: Callable[[Any], Iterable[Any]], text: Callable[[Any, Any], str], draws: int) -> Triplets:
    """Triplets drawn for each image, `draws` times in an epoch: a parent of its value, another child of it, an image of that child.

    values: of each image, None where it has none. Siblings of the same words are no change, so they are left out.
    """
    places: dict[Any, list[int]] = {}
    for image, value in enumerate(values):
        if value is not None:
            places.setdefault(value, []).append(image)
    names = list(places)
    children: dict[Any, list[int]] = {}
    for number, value in enumerate(names):
        for parent in dict.fromkeys(parents_of(value)):
            children.setdefault(parent, []).append(number)
    words = [frozenset(value.split()) if isinstance(value, str) else value for value in names]
    lists = []
    for number, value in enumerate(names):
        mine = ([c for c in children[p] if words[c] != words[number]] for p in dict.fromkeys(parents_of(value)))
        lists.append(tuple(np.array(found, np.int64) for found in mine if found))
    families = Families(tuple(names), tuple(np.array(places[v], np.int64) for v in names), tuple(lists), text)
    anchors = np.array([(image, number) for number, value in enumerate(names) if lists[number] for image in places[value]], np.int64)
    anchors = anchors[np.argsort(anchors[:, 0])] if len(anchors) else anchors.reshape(0, 2)
    alone = np.setdiff1d(np.arange(len(values)), anchors[:, 0])
    draw = functools.partial(_drawn, families, anchors, draws)
    spread = np.linspace(0, len(anchors) * draws, min(TEXTS, len(anchors) * draws), endpoint=False).astype(np.int64)
    halves = np.random.default_rng(0).uniform(size=(len(spread), LANES))
    return Triplets(len(anchors) * draws, alone, draw, tuple(draw(int(m), u)[2] for m, u in zip(spread, halves, strict=True)), ())


def _drawn(families: Families, anchors: np.ndarray, draws: int, m: int, uniforms: np.ndarray) -> tuple[int, int, str]:
    reference, value = (int(x) for x in anchors[m // draws])
    pick = lambda options, u: options[int(u * len(options))]
    sibling = int(pick(pick(families.parents[value], uniforms[0]), uniforms[1]))
    target = int(pick(families.images[sibling], uniforms[2]))
    return reference, target, families.text(families.values[value], families.values[sibling])


def of_captions(captions: Sequence[str | None], rule: SiblingRule, draws: int) -> Triplets:
    """`drawn` from captions that differ in one word."""
    return drawn(captions, functools.partial(siblings.parents, rule=rule), siblings.modification, draws)


def of_attributes(values: Sequence[tuple[str, ...] | None], draws: int, cleaning: Cleaning = Cleaning()) -> Triplets:
    """`drawn` from tuples of attributes that differ in one place; the texts are cleaned as captions."""
    return drawn(values, _without_one, functools.partial(_exchange, cleaning), draws)


def _without_one(value: tuple[str, ...]) -> list[tuple]:
    return [(i, *value[:i], *value[i + 1 :]) for i in range(len(value))]


def _exchange(cleaning: Cleaning, source: tuple[str, ...], target: tuple[str, ...]) -> str:
    return next(clean_caption(f"replace {a} with {b}", cleaning) for a, b in zip(source, target, strict=True) if a != b)


def read_files(paths: Sequence[str], ids: dict[str, int], cleaning: Cleaning = Cleaning()) -> tuple[list[Triplet], tuple[Bad, ...]]:
    """The triplets of files whose images are in `ids` (key -> id), and one Bad for each image that is not. The texts are cleaned as captions.

    Raises ValueError naming file and line for what is no triplet, and where not one triplet has both its images.
    """
    import fsspec

    found: list[Triplet] = []
    missing: dict[tuple[str, str], Bad] = {}
    total = 0
    for path in paths:
        try:
            with fsspec.open(path, "rb") as file:
                content = list(lines(file, path))
        except OSError as error:
            raise ValueError(
                f"data.triplets: {path} cannot be read ({error}); it is a file of one triplet a line, or set data.triplets to {SIBLINGS!r}"
            ) from None
        for number, line in content:
            if not line.strip():
                continue
            total += 1
            fields, texts = _line(path, number, line, cleaning)
            absent = [key for key in (fields["reference"], fields["target"]) if key not in ids]
            missing |= {(path, key): Bad(path, key, "missing") for key in absent}
            if not absent:
                found.append(Triplet(ids[fields["reference"]], ids[fields["target"]], texts, fields))
    if not found:
        some = ", ".join(key for _, key in list(missing)[:3])
        raise ValueError(
            f"data.triplets: none of the {total} triplets of {', '.join(paths)} has both its images in the shards (missing: {some or 'nothing'})"
        )
    return found, tuple(missing.values())


def _line(path: str, number: int, line: str, cleaning: Cleaning) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        fields = parse(line, path, number)
        texts = fields["modification"]
        texts = tuple(clean_caption(t, cleaning) for t in ([texts] if isinstance(texts, str) else texts))
        good = bool(texts) and all(isinstance(fields[k], str) for k in ("reference", "target"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise ValueError(
            f"{path}:{number}: {line[:80]!r} is no triplet; it needs the texts reference, target and modification (or a list of texts)"
        )
    return fields, texts


def files_beside(shards: Iterable[str]) -> list[str]:
    """FOLDER/PART-triplets.jsonl of shards FOLDER/PART-0000.tar."""
    return list(dict.fromkeys(re.sub(r"(?:-\d+)?\.tar$", "", shard) + "-triplets.jsonl" for shard in shards))


def keys(sources: Sequence[Source]) -> dict[str, int]:
    """Key -> id of every sample. Raises ValueError for a key that two samples have, since a triplet could mean either."""
    ids: dict[str, int] = {}
    for at, record in enumerate(_records(sources, Want(image=False, captions=False, alternates=False, fields=False))):
        if ids.setdefault(record.key, at) != at:
            raise ValueError(
                f"data.triplets: two samples of {', '.join(s.name for s in sources)} have the key {record.key!r}, so triplets cannot name them"
            )
    return ids


def captions(sources: Sequence[Source]) -> list[str | None]:
    """The main caption of every sample, None where it has none."""
    return [r.captions[0] if isinstance(r, Record) else None for r in _records(sources, Want(image=False, alternates=False, fields=False))]


def attributes(sources: Sequence[Source], fields: Sequence[str]) -> list[tuple[str, ...] | None]:
    """The fields of every sample as texts, None where it lacks one of them."""
    records = _records(sources, Want(image=False, captions=False, alternates=False))
    return [tuple(str(r.meta[f]) for f in fields) if isinstance(r, Record) and all(f in r.meta for f in fields) else None for r in records]


def _records(sources: Sequence[Source], want: Want) -> Iterable[Record | Bad]:
    for source in sources:
        for shard, count in enumerate(source.counts):
            for row in range(int(count)):
                yield source.read(shard, row, want)
