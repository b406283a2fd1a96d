"""Labels and ids: a field of the samples as int32, numbers as they are, words by their place among all words in order."""

import json
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from jaxvl.data.cache import digest
from jaxvl.data.indexing import cores, parallel, progress
from jaxvl.data.kept import keep, kept
from jaxvl.data.source import Record, Source, Want
from jaxvl.data.text import INVISIBLE

FIELDS = Want(image=False, captions=False, alternates=False)
PROCESSES_FROM = 100_000  # samples below which starting processes costs more than it saves


def class_names(sources: Sequence[Source], field: str, folder: str, key: str = "data.label") -> tuple[str, ...]:
    """All words of `field` in order, empty where every value is a number; read once and kept in `folder`.

    Raises ValueError where no sample has the field; it names `key`, the option that asks for the field.
    """
    path = Path(folder) / f"labels-{digest(' '.join([field, *(s.version for s in sources)]))}.json"
    if (held := kept(path)) is not None:
        return tuple(json.loads(held))
    jobs = [(source, shard) for source, s in enumerate(sources) for shard in range(len(s.shards))]
    large = sum(int(s.counts.sum()) for s in sources) >= PROCESSES_FROM
    values = set().union(*progress(parallel(_values, (sources, field), jobs, cores() if large else 1), len(jobs), f"reading {field}"))
    if not values:
        raise ValueError(f"{key} is {field!r}, a field that no sample of {', '.join(s.name for s in sources)} has")
    names = () if all(_number(v) is not None for v in values) else tuple(sorted(values))
    keep(path, json.dumps(names).encode())
    return names


def label_of(meta: dict[str, Any], field: str, places: dict[str, int]) -> int | None:
    """The label of a sample with these fields, None if it has none; `places`: class name to label, empty for numbers."""
    value = word(meta.get(field))
    return None if value is None else places.get(value) if places else _number(value)


def _values(shared: tuple[Sequence[Source], str], job: tuple[int, int]) -> set[str]:
    (sources, field), (number, shard) = shared, job
    source = sources[number]
    records = (source.read(shard, row, FIELDS) for row in range(int(source.counts[shard])))
    words = {word(r.meta.get(field)) for r in records if isinstance(r, Record)}
    return {w for w in words if w is not None}


def word(value: Any) -> str | None:
    """A value as the name of a class; None for what names none, such as a text with nothing visible."""
    return str(value) if isinstance(value, Integral) or (isinstance(value, str) and value.translate(INVISIBLE).strip()) else None


def _number(value: str) -> int | None:
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else None
