"""Prepared TFDS data as a source, without TensorFlow: tfds://NAME/SPLIT or tfds:///FOLDER/OF/VERSION/SPLIT.

    tfds://coco_captions/2014/train?dir=/data/tfds&caption=captions.text
    tfds://cifar10/test?caption=label
    tfds://cars196/train                                    metric learning: label, no captions
    tfds://caltech_birds2011/train?image=image              and label; it has masks, too
    tfds://stanford_online_products/train                   class_id, and super_class_id as hierarchy

NAME is a prepared set, NAME/CONFIG:VERSION in full, in `dir` or in TFDS's own folder; SPLIT may be a slice such as
train[:90%]. `image` and `caption` name features, inner ones after a dot; where they are left out, the only image and
a feature called caption, captions or text are taken. A caption from a class label is the name of the class. Labels
are such names too. TFDS reads files at random places only where they were prepared with file_format="array_record".
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np

from jaxvl.data.cache import digest
from jaxvl.data.source import Bad, Place, Record, Source, Want
from jaxvl.data.text import Cleaning, Uncaptioned, clean_caption

CAPTIONS = ("caption", "captions", "text")


class _Split(NamedTuple):
    """What a tfds:// pattern says; empty strings where it says nothing."""

    pattern: str
    name: str
    split: str
    folder: str
    image: str
    caption: str


class _Opened(NamedTuple):
    rows: Any  # sequence of examples, images encoded
    features: Any
    version: str
    lengths: tuple[int, ...]
    image: str
    images: tuple[str, ...]
    caption: str


def tfds_source(pattern: str, how: Place) -> Source:
    """The source of a prepared split, each file a shard. Raises ValueError with the pattern and what is wrong."""
    path, _, query = pattern.removeprefix("tfds://").partition("?")
    words = dict(parse_qsl(query, keep_blank_values=True))
    name, _, split = path.rpartition("/")
    unknown = sorted(set(words) - {"dir", "image", "caption"})
    if not name or not split or unknown:
        raise ValueError(f"data.source {pattern!r}: write tfds://NAME/SPLIT?dir=FOLDER&image=FEATURE&caption=FEATURE")
    asked = _Split(pattern, name, split, words.get("dir", ""), words.get("image", ""), words.get("caption", how.caption_field))
    opened = _open(asked)
    if how.captions and not opened.caption:
        raise ValueError(
            f"data.source {pattern!r} has no feature {' or '.join(CAPTIONS)}; add ?caption= one of {', '.join(opened.features)}"
        )
    counts = np.array(opened.lengths, np.int64)
    shards = tuple(f"{pattern}#{i}" for i in range(len(counts)))
    starts = np.append(0, np.cumsum(counts))
    version = digest(f"{pattern} {opened.version} {opened.lengths}")
    return Source(pattern, version, shards, counts, np.zeros_like(counts), functools.partial(_read, asked, starts, how.cleaning), _nothing)


def _nothing() -> Iterator[Bad]:
    return iter(())


@functools.cache
def _open(asked: _Split) -> _Opened:
    import tensorflow_datasets as tfds

    try:
        if asked.name.startswith("/"):
            builder = tfds.builder_from_directory(asked.name)
        else:
            builder = tfds.core.read_only_builder.builder_from_files(asked.name, data_dir=asked.folder or None)
        features = builder.info.features
        images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        image = asked.image or (images[0] if len(images) == 1 else "")
        if image not in images:
            raise ValueError(f"?image= must be one of its images: {', '.join(images) or 'it has none'}")
        caption = asked.caption or next((c for c in CAPTIONS if c in features), "")
        if caption and caption.partition(".")[0] not in features:
            raise ValueError(f"?caption= must be one of {', '.join(features)}")
        rows = builder.as_data_source(asked.split, decoders={name: tfds.decode.SkipDecoding() for name in images})  # masks too
        lengths = tuple(builder.info.splits[asked.split].shard_lengths) if asked.split in builder.info.splits else ()
    except (ValueError, OSError, NotImplementedError) as error:
        raise ValueError(f"data.source {asked.pattern!r}: {str(error).splitlines()[0]}") from error
    lengths = lengths if sum(lengths) == len(rows) else (len(rows),)
    return _Opened(rows, features, str(builder.info.version), lengths, image, tuple(images), caption)


def _read(asked: _Split, starts: np.ndarray, cleaning: Cleaning, shard: int, row: int, want: Want) -> Record | Bad:
    opened = _open(asked)
    number = int(starts[shard]) + row
    example, key = opened.rows[number], f"{asked.split}-{number}"
    texts = _texts(opened, example) if want.captions else []
    found = []
    for number, value in enumerate(texts if want.alternates else texts[:1]):
        try:
            found.append(clean_caption(value, cleaning))
        except Uncaptioned as error:
            if number == 0:
                return Bad(f"{asked.pattern}#{shard}", key, error.reason)
    if want.captions and not found:
        return Bad(f"{asked.pattern}#{shard}", key, "nocaption")
    meta = {k: _plain(opened, k, v) for k, v in example.items() if k not in opened.images} if want.fields else {}
    return Record(key, example[opened.image] if want.image else b"", tuple(dict.fromkeys(found)), meta)


def _texts(opened: _Opened, example: dict[str, Any]) -> list[bytes | str]:
    """The captions of an example: a text, a list of texts, or texts inside a feature of features."""
    name, _, inner = opened.caption.partition(".")
    value = _plain(opened, name, example[name])
    for part in inner.split(".") if inner else ():
        value = value[part] if isinstance(value, dict) else [v[part] for v in value]
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    return [v for v in values if isinstance(v, (bytes, str))]


def _plain(opened: _Opened, name: str, value: Any) -> Any:
    """Class labels as their names, bytes as text where they are text."""
    feature = opened.features[name]
    if hasattr(feature, "int2str") and np.ndim(value) == 0:
        return feature.int2str(int(value))
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
