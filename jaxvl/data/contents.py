"""What the samples of a set hold besides the image: captions in KEY.txt or in a field, a label, or neither; found by looking."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data.labels import FIELDS, word
from jaxvl.data.source import Place, Record, Source
from jaxvl.data.sources import open_source

LOOKS = 64  # samples that are looked into
CAPTIONS = (
    "captions",
    "caption",
    "text",
    "texts",
    "alt",
    "alt_text",
    "alttext",
    "description",
    "title",
    "prompt",
)  # the usual names of fields
LABELS = ("cls", "class", "label", "class_name", "class_id", "category", "category_id", "species", "target")


class Contents(NamedTuple):
    """A source, and what its samples are taken to hold: whether captions, the field of a label, and that in words."""

    source: Source
    captions: bool
    label: str
    told: str


def open_contents(pattern: str, place: Place, caption_field: str = "", label: str = "") -> Contents:
    """Open what `pattern` names as what it is. A field that is named is taken; a set without captions is looked into.

    Raises ValueError as open_source does.
    """
    if caption_field:
        return Contents(open_source(pattern, place._replace(captions=True, caption_field=caption_field)), True, label, "")
    try:
        pairs = open_source(pattern, place._replace(captions=True))
        if pairs.counts.sum() > (pairs.bad.sum() if label else 0):
            return Contents(pairs, True, label, "")
    except ValueError:  # no set with captions; what else is wrong will be said again
        pairs = None
    images = open_source(pattern, place._replace(captions=False, rebuild=False))
    if label:
        return Contents(images, False, label, "")
    records = _some(images)
    fields = Counter(field for record in records for field in record.meta)
    enough = lambda fits: next((f for f in fits[1] if 2 * sum(fits[0](r.meta.get(f)) for r in records) >= max(len(records), 1)), "")
    named = enough((lambda value: word(value) is not None, LABELS))
    if found := enough((_is_text, CAPTIONS)):
        source = open_source(pattern, place._replace(captions=True, caption_field=found, rebuild=False))
        return Contents(source, True, "", f"{pattern}: no KEY.txt; captions are read from the field {found!r}")
    if named:
        return Contents(images, False, named, f"{pattern}: no captions; labels are read from the field {named!r}")
    if pairs is not None and not fields:
        return Contents(pairs, True, "", "")
    others = f" among {', '.join(sorted(fields)[:12])}; --caption-field or --label names one" if fields else ""
    return Contents(images, False, "", f"{pattern}: images alone, without a caption or a label known by name{others}")


def _some(source: Source) -> Sequence[Record]:
    """An even choice of samples, without their images."""
    ends = np.cumsum(source.counts)
    chosen = np.unique(np.linspace(0, ends[-1] - 1, LOOKS, dtype=np.int64)) if ends[-1] else np.zeros(0, np.int64)
    records = []
    for n in chosen:
        shard = int(np.searchsorted(ends, n, "right"))
        with contextlib.suppress(OSError):  # a shard that cannot be read is told when it is gone through
            records.append(source.read(shard, int(n - ends[shard] + source.counts[shard]), FIELDS))
    return [record for record in records if isinstance(record, Record)]


def _is_text(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(v, str) and v.strip() for v in values)
