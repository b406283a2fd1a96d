"""What is indexed: images of a folder or of shards, or texts of a file; embedded a batch at a time, with their names."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data.dataset import Dataset, read_samples, rows_of
from jaxvl.data.folder import SCHEME, images_below
from jaxvl.data.lists import parse, text_lines
from jaxvl.data.source import Want
from jaxvl.data.text import Cleaning, Uncaptioned, clean_caption
from jaxvl.evals.embed import Model, embed_stream, embed_texts, open_for
from jaxvl.progress import progress, say

TEXTS = (".txt", ".jsonl")
FIELDS = ("text", "caption", "title")  # of a line of JSON
AHEAD = 8  # batches of texts that are tokenised together


class Items(NamedTuple):
    """what: "images" or "texts". batches: (float32 [b, d], their names)."""

    what: str
    batches: Iterator[tuple[np.ndarray, list[str]]]


def items(model: Model, source: str, batch_size: int, cleaning: Cleaning) -> Items:
    """The items of a source: a .txt or .jsonl file of texts, a folder of images, or shards as in data.source.

    cleaning: of texts; their names are the texts on one line. Raises ValueError where there is nothing, or where the method embeds no texts; from the iterator for a line that holds no text.
    """
    path = Path(source).expanduser()
    if path.suffix in TEXTS:
        if model.method.embed_text is None:
            raise ValueError(f"{source} holds texts, and the method of this run embeds none")
        total = sum(1 for _ in text_lines(path))
        if not total:
            raise ValueError(f"{source} has no line of text")
        return Items("texts", _texts(model, path, batch_size, total, cleaning))
    if path.is_dir() and not any(path.glob("*.tar")):
        if not images_below(path):
            raise ValueError(f"{source} is a folder with neither images nor *.tar; a file of texts ends in {' or '.join(TEXTS)}")
        source = f"{SCHEME}{path.absolute()}"
    dataset = open_for(model.data, source, captions="none")
    return Items("images", _images(model, dataset, batch_size))


def _images(model: Model, dataset: Dataset, batch_size: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    reasons: Counter[str] = Counter()
    names = Want(image=False, captions=False, alternates=False, fields=False)
    shards = [shard for source in dataset.sources for shard in source.shards]
    start = bad = 0
    with progress(total=len(dataset), text="embedding images", unit="images") as bar:
        for batch in embed_stream(model, dataset, batch_size, reasons=reasons):
            ids = start + np.flatnonzero(batch["valid"])
            real = min(len(batch["valid"]), len(dataset) - start)
            start, bad = start + real, bad + real - len(ids)
            where = [shards[shard] for shard in rows_of(dataset, ids)[0]]
            called = [f"{shard}/{record.key}" for shard, record in zip(where, read_samples(dataset, ids, names), strict=True)]
            bar.advance(real)
            yield batch["image"][batch["valid"]], called
    if bad:
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
        say(f"{bad:,} of {len(dataset):,} images cannot be used and are not in the index ({why or 'found so before'})")


def _texts(model: Model, path: Path, batch_size: int, total: int, cleaning: Cleaning) -> Iterator[tuple[np.ndarray, list[str]]]:
    lines = ((f"{path}:{number}", parse(line, path, number) if path.suffix == ".jsonl" else line) for number, line in text_lines(path))
    part: list[str] = []
    with progress(total=total, text="embedding texts", unit="texts") as bar:
        for where, line in lines:
            part.append(_text(line, where, cleaning))
            if len(part) == AHEAD * batch_size:
                yield embed_texts(model, part, batch_size, cleaning), part
                bar.advance(len(part))
                part = []
        if part:
            yield embed_texts(model, part, batch_size, cleaning), part
            bar.advance(len(part))


def _text(value: Any, where: str, cleaning: Cleaning) -> str:
    """The text in a line, or in its JSON value, on one line. Raises ValueError where it has none, or nothing is left of it when it is cleaned."""
    fields = [value.get(f) for f in FIELDS] if isinstance(value, dict) else [value]
    found = next((text for text in fields if isinstance(text, str)), None)
    if found is None:
        raise ValueError(f"{where} has no text: a line is a string, or an object with one of {', '.join(FIELDS)}")
    try:
        clean_caption(found, cleaning)
        return clean_caption(found)
    except Uncaptioned as error:
        raise ValueError(f"{where}: {error}") from None
