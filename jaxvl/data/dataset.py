"""Opened data: what the config says, checked, and the samples it leads to."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxvl.data import decode, triplets
from jaxvl.data.cache import Cache, cache_folder
from jaxvl.data.classes import ClassTable, Wanted, field_and_pattern, keep_classes
from jaxvl.data.faults import fault_notes, lost_samples
from jaxvl.data.guard import BadData, table
from jaxvl.data.labels import class_names
from jaxvl.data.mixing import quotas
from jaxvl.data.siblings import SiblingRule
from jaxvl.data.source import Bad, Place, Record, Source, Want
from jaxvl.data.sources import open_source
from jaxvl.data.text import Cleaning
from jaxvl.data.triplets import Texts, Triplets
from jaxvl.patterns import check_pattern

CROP = decode.DecodeOptions()
OWN = "sample"  # data.id of data whose records are the images: the id is the sample's place in the data
Style = Literal["plain", "albef"]


class DataOptions(NamedTuple):
    """Where samples come from and what is made of them.

    source: patterns of shards (sources.expand) or tfds://. weights: shares of the sources; without, they mix by size.
    captions: which of a sample's captions to train on, the first being KEY.txt, the others "captions" of KEY.json;
    "optional" the first of samples that have one, "none" needs none. caption_field: the field of KEY.json that has the captions instead. cleaning: what becomes of
    captions (text.py), for all sources or one for each; albef keeps max_words words. label: a field of KEY.json,
    or "cls" for KEY.cls, to deliver as "label". id: a field of KEY.json to deliver as "id", by which samples of one
    image are known to be of one image, or "sample" where every sample is an image of its own. classes: "" for every sample, its
    label a word's place among all words or the number itself; "all", "first" or "second" half of the classes, the label a
    class's place among those kept (classes.py). hierarchy, split_level: where groups of classes come from, and which entry
    of them is halved instead of the classes. levels: entries that are coarser levels of labels, fine to coarse. per_class:
    samples of a class in a batch, 0 for a random order (balanced.py). triplets: "beside", "siblings",
    "attributes" or paths of files, see triplets.py; training samples are then triplets, and with `pairs` each image that is in none
    as a pair with its caption. triplet_text: what a list of texts for one change is. sibling_rule: see siblings.py. draws: triplets
    drawn for each image in an epoch. attributes: fields of KEY.json, for triplets "attributes". image_size: pixels a side; crop, crop_scale, crop_ratio, fit, dct_margin,
    min_side, max_pixels: see decode.py. resize: where training crops are resized; "device" saves the host the work and
    ships canvases of up to 3.5 times the bytes. group_shards: shards whose samples are shuffled together, 0 for all. chunk:
    samples that one thread prepares at a time. threads (of each process) and workers (processes): 0 and -1 choose by
    the cores there are. prefetch: batches prepared ahead. max_bad_rate: share of bad samples, with those that lost
    shards lack, above which the run stops. indexes: folder of the shards' indexes, by default in the cache. cache: folder for remote shards and
    rendered sets, by default $JAXVL_CACHE or ~/.cache/jaxvl. cache_gb: bound of the shards in it.
    """

    source: str | tuple[str, ...] = ""
    weights: tuple[float, ...] = ()
    captions: Literal["first", "random", "longest", "optional", "none"] = "first"
    caption_field: str = ""
    cleaning: Style | tuple[Style, ...] = "plain"
    max_words: int = 30
    label: str = ""
    id: str = ""
    classes: Literal["", "all", "first", "second"] = ""
    hierarchy: str = ""
    split_level: int = -1
    levels: tuple[int, ...] = ()
    per_class: int = 0
    triplets: str | tuple[str, ...] = ""
    pairs: bool = True
    triplet_text: Texts = "joined"
    sibling_rule: SiblingRule = "substring"
    draws: int = 1
    attributes: tuple[str, ...] = ()
    image_size: int = CROP.size
    crop: Literal["area", "side"] = CROP.crop
    crop_scale: tuple[float, float] = CROP.crop_scale
    crop_ratio: tuple[float, float] = CROP.crop_ratio
    fit: Literal["crop", "squash"] = "crop"
    resize: Literal["host", "device"] = "host"
    dct_margin: float = CROP.dct_margin
    min_side: int = CROP.min_side
    max_pixels: int = CROP.max_pixels
    group_shards: int = 16
    chunk: int = 32
    threads: int = 0
    workers: int = -1
    prefetch: int = 2
    max_bad_rate: float = 0.1
    indexes: str = ""
    cache: str = ""
    cache_gb: float = 64.0


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Opened sources, their shards numbered through.

    counts: int64 [shard] usable samples. starts: int64 [shard + 1], the id of each shard's first sample, and the
    number of all. parts: (first, last + 1) shard of each part of the mixture, with `quota` samples in a block
    (mixing.py). classes: the class names that labels are places in, empty where labels are the numbers in the data;
    ids: likewise of the ids. table: where data.classes asks for it, the class of every sample and the groups above. triplets: the training
    samples where data.triplets asks for them.
    """

    options: DataOptions
    sources: tuple[Source, ...]
    counts: np.ndarray
    starts: np.ndarray
    parts: tuple[tuple[int, int], ...]
    quota: tuple[int, ...]
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    table: ClassTable | None = None
    triplets: Triplets | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def epoch(self) -> int:
        """Training samples in a pass over the data."""
        return self.triplets.number + len(self.triplets.alone) if self.triplets else len(self)

    @property
    def bad(self) -> Iterator[Bad]:
        """The samples, and with an empty key the shards, that are known to be bad and are not in the order."""
        missing = self.triplets.missing if self.triplets else ()
        return itertools.chain((bad for source in self.sources for bad in source.known()), missing)


def open_data(options: DataOptions) -> Dataset:
    """Find, index and check the shards that `options` names.

    Raises ValueError for options that cannot be right, naming key and value; BadData where nothing, or too little,
    can be used.
    """
    check(options)
    patterns = (options.source,) if isinstance(options.source, str) else tuple(options.source)
    place = place_of(options)
    styles = (options.cleaning,) * len(patterns) if isinstance(options.cleaning, str) else options.cleaning
    cleanings = [Cleaning(style, options.max_words) for style in styles]
    sources = tuple(open_source(p, place._replace(cleaning=c)) for p, c in zip(patterns, cleanings, strict=True))
    _refuse_repeats(sources)
    class_table = None
    if options.classes:
        asked = Wanted(options.label, options.classes, options.split_level, options.hierarchy, options.levels)
        sources, class_table = keep_classes(sources, asked, place.indexes)
    good, bad, lost = sum(int(s.counts.sum()) for s in sources), sum(int(s.bad.sum()) for s in sources), lost_samples(sources)
    notes = fault_notes(sources)
    if not good or bad + lost > options.max_bad_rate * (good + bad + lost):
        why = f"above data.max_bad_rate={options.max_bad_rate}" if good else "none can be used"
        what = f"are bad, {lost:,} of them in shards that are lost" if lost else "are bad"
        known = "\n".join([table(b for s in sources for b in s.known()), *notes]).strip("\n")
        raise BadData(f"{', '.join(patterns)}: {bad + lost:,} of {good + bad + lost:,} samples {what}, {why}:\n{known}")
    for note in notes:
        warnings.warn(note, stacklevel=2)
    if options.weights and (hollow := [s.name for s in sources if not s.counts.any()]):
        raise BadData(f"data.weights gives {hollow[0]} a share, but none of its samples can be used")
    counts = np.concatenate([s.counts for s in sources])
    ends = np.cumsum([len(s.counts) for s in sources]).tolist() if options.weights else [len(counts)]
    parts = tuple(zip([0, *ends[:-1]], ends, strict=True))
    if class_table is not None:
        classes = class_table.names
    else:
        classes = class_names(sources, options.label, place.indexes) if options.label else ()
    ids = class_names(sources, options.id, place.indexes, "data.id") if options.id not in ("", OWN) else ()
    starts = np.append(0, np.cumsum(counts))
    found = open_triplets(options, sources, int(starts[-1])) if options.triplets else None
    return Dataset(options, sources, counts, starts, parts, quotas(options.weights or (1.0,)), classes, ids, class_table, found)


def open_triplets(options: DataOptions, sources: tuple[Source, ...], images: int) -> Triplets:
    """The training samples that data.triplets names. Raises ValueError where there are none."""
    if options.triplets == triplets.SIBLINGS:
        found = triplets.of_captions(triplets.captions(sources), options.sibling_rule, options.draws)
    elif options.triplets == triplets.ATTRIBUTES:
        found = triplets.of_attributes(triplets.attributes(sources, options.attributes), options.draws, cleaning_of(options))
    else:
        rows, missing = triplets.read_files(triplet_files(options, sources), triplets.keys(sources), cleaning_of(options))
        found = triplets.listed(rows, images, options.triplet_text, missing)
    if not found.number:
        raise ValueError(f"data.triplets is {options.triplets!r}, but no two samples of {', '.join(s.name for s in sources)} are siblings")
    return found if options.pairs else found._replace(alone=found.alone[:0])


def triplet_files(options: DataOptions, sources: tuple[Source, ...]) -> list[str]:
    """The files that data.triplets names."""
    if options.triplets == triplets.BESIDE:
        return triplets.files_beside(shard for source in sources for shard in source.shards)
    return [options.triplets] if isinstance(options.triplets, str) else list(options.triplets)


def cleaning_of(options: DataOptions, chosen: Literal["", "plain", "albef"] = "") -> Cleaning:
    """What becomes of a text that is of no source, such as a query: as `chosen`, or as the training cleans its captions.

    Raises ValueError where the training cleans its sources in several ways and none is chosen.
    """
    styles: set[Style] = {chosen} if chosen else {options.cleaning} if isinstance(options.cleaning, str) else set(options.cleaning)
    if len(styles) > 1:
        raise ValueError(
            f"data.cleaning differs between the sources of the training ({', '.join(sorted(styles))}); "
            "set cleaning here, or data.cleaning where there is no such key, to one of them"
        )
    return Cleaning(min(styles), options.max_words)


def place_of(options: DataOptions) -> Place:
    """The part of `options` that opening a source reads."""
    folder = cache_folder(options.cache)
    cache = Cache(str(folder), int(options.cache_gb * 2**30))
    return Place(options.indexes or str(folder / "index"), cache, options.captions not in ("optional", "none"), options.caption_field)


def check(options: DataOptions) -> None:
    """Raise ValueError naming the first option that cannot be right."""
    sources = (options.source,) if isinstance(options.source, str) else options.source
    if not sources or not all(sources):
        raise ValueError(f"data.source is {options.source!r}; it must name shards, such as '{{0000..0127}}.tar' or 'glyphs://train'")
    if options.weights and len(options.weights) != len(sources):
        raise ValueError(f"data.weights has {len(options.weights)} entries for {len(sources)} sources; give one each, or none")
    styles = (options.cleaning,) if isinstance(options.cleaning, str) else options.cleaning
    if wrong := [s for s in styles if s not in get_args(Style)]:
        raise ValueError(f"data.cleaning has {wrong[0]!r}; it takes {' or '.join(get_args(Style))}")
    if not isinstance(options.cleaning, str) and len(styles) != len(sources):
        raise ValueError(f"data.cleaning has {len(styles)} entries for {len(sources)} sources; give one for all, or one each")
    if options.classes and not options.label:
        raise ValueError(f"data.classes is {options.classes!r}; data.label must name the field of the class")
    asking = {k: getattr(options, k) for k in ("per_class", "levels", "hierarchy") if getattr(options, k)}
    if not options.classes and (asking or options.split_level >= 0):
        key = next(iter(asking), "split_level")
        raise ValueError(
            f"data.{key} is {getattr(options, key)!r}, which is read of a table of classes: set data.classes to all, first or second"
        )
    if (options.levels or options.split_level >= 0) and not options.hierarchy:
        raise ValueError(
            "data.levels and data.split_level are entries of data.hierarchy, which is empty; name a field, or a pattern re:..."
        )
    if list(options.levels) != sorted(set(options.levels), reverse=True) or min(options.levels, default=0) < 0:
        raise ValueError(f"data.levels is {options.levels}; it must fall from fine to coarse entries of the hierarchy, such as (1, 0)")
    check_pattern("data.hierarchy", field_and_pattern(options.hierarchy)[1])
    if options.per_class and options.weights:
        raise ValueError(f"data.per_class is {options.per_class}, which draws classes and not sources; data.weights must be empty")
    if options.resize not in ("host", "device"):
        raise ValueError(f"data.resize is {options.resize!r}; it must be host or device")
    if options.captions not in ("first", "random", "longest", "optional", "none"):
        raise ValueError(f"data.captions is {options.captions!r}; it must be first, random, longest, optional or none")
    if options.captions == "optional" and not options.triplets:
        raise ValueError("data.captions is 'optional', which is for triplets; a sample without caption is no pair")
    if options.triplets and options.captions == "none":
        raise ValueError("data.captions is 'none', but triplets have texts; 'optional' leaves out the captions that are not there")
    if options.triplets and (options.label or options.per_class):
        raise ValueError("data.label and data.per_class are of single images; leave them out with data.triplets")
    if (options.triplets == triplets.ATTRIBUTES) != bool(options.attributes):
        raise ValueError(
            f"data.attributes is {options.attributes}; it must name fields where data.triplets is 'attributes', and nothing otherwise"
        )
    if options.triplets and options.weights:
        raise ValueError(
            "data.weights shares out samples, but with data.triplets the samples are triplets, whose images may be in any source"
        )
    for key, low, high in (
        ("image_size", 1, 1 << 14),
        ("max_words", 1, math.inf),
        ("split_level", -1, math.inf),
        ("per_class", 0, math.inf),
        ("group_shards", 0, math.inf),
        ("chunk", 1, 1 << 14),
        ("draws", 1, 1 << 10),
        ("threads", 0, 1 << 10),
        ("workers", -1, 1 << 10),
        ("prefetch", 1, 1 << 10),
        ("max_bad_rate", 0.0, 1.0),
        ("cache_gb", 0.0, math.inf),
    ):
        if not low <= getattr(options, key) <= high:
            raise ValueError(f"data.{key} is {getattr(options, key)}; it must be from {low} to {high}")
    try:
        decode.check(decode_options(options))
    except ValueError as error:
        raise ValueError(f"data.{error}") from None


def decode_options(options: DataOptions) -> decode.DecodeOptions:
    """The part of `options` that decode.py reads."""
    same = {field: getattr(options, field) for field in decode.DecodeOptions._fields if field != "size"}
    return decode.DecodeOptions(size=options.image_size, **same)


def read(dataset: Dataset, shard: int, row: int, want: Want) -> Record | Bad:
    """Sample `row` of the dataset's shard `shard`."""
    source, shard = source_of(dataset, shard)
    return source.read(shard, row, want)


def source_of(dataset: Dataset, shard: int) -> tuple[Source, int]:
    """The source that holds the dataset's shard `shard`, and the shard's number in it."""
    for source in dataset.sources:
        if shard < len(source.shards):
            return source, shard
        shard -= len(source.shards)
    raise IndexError(f"the dataset has no shard {shard} beyond its last")


def rows_of(dataset: Dataset, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shard and row, int64 [b] each, of samples by id."""
    shard = np.searchsorted(dataset.starts, ids, side="right") - 1
    return shard, ids - dataset.starts[shard]


def read_samples(dataset: Dataset, ids: Sequence[int] | np.ndarray, want: Want = Want()) -> Iterator[Record | Bad]:
    """The samples with these ids, not decoded: for galleries and triplets."""
    for shard, row in zip(*rows_of(dataset, np.asarray(ids, np.int64)), strict=True):
        yield read(dataset, int(shard), int(row), want)


def captions(dataset: Dataset, most: int = 1_000_000) -> Iterator[str]:
    """The captions of at most `most` samples, spread evenly, and texts of triplets: what a tokenizer is trained on."""
    ids = np.linspace(0, len(dataset), min(most, len(dataset)), endpoint=False).astype(np.int64)
    want = Want(
        image=False, captions=dataset.options.captions != "none", alternates=dataset.options.captions in ("random", "longest"), fields=False
    )
    for record in read_samples(dataset, ids, want):
        if isinstance(record, Record):
            yield from record.captions
    if dataset.triplets:
        yield from dataset.triplets.texts


def _refuse_repeats(sources: Sequence[Source]) -> None:
    seen: dict[str, str] = {}
    for source in sources:
        for shard in source.shards:
            if shard in seen:
                raise ValueError(f"shard {shard} is in data.source {seen[shard]!r} and again in {source.name!r}")
            seen[shard] = source.name
