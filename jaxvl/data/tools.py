"""What `jaxvl data` does: index shards, check every sample, describe them, make new ones; tables or JSON."""

import collections
import hashlib
import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data import decode
from jaxvl.data.cache import locked
from jaxvl.data.dataset import DataOptions, decode_options, place_of
from jaxvl.data.indexing import cores, index_path, parallel, progress
from jaxvl.data.pixels import notice
from jaxvl.data.reasons import REASONS
from jaxvl.data.source import Bad, Source, Want
from jaxvl.data.sources import open_source
from jaxvl.data.tarindex import exclude, load_index, save_index
from jaxvl.terminal import table, tell

SHOWN = 40  # shards of a table; the sum has them all
SAMPLED = 100_000  # samples that stats looks into
PROCESSES_FROM = 2_000  # samples below which starting processes costs more than it saves
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


class ShardCount(NamedTuple):
    """One shard: number of usable samples and keys of bad ones by reason, together all; reasons of its damage."""

    shard: str
    good: int
    bad: dict[str, list[str]]
    damage: dict[str, int]


def index(paths: Sequence[str], json: bool = False, rebuild: bool = False, indexes: str = "", cache: str = "") -> int:
    """Index the shards that `paths` name and print what is known. Returns 0, or 1 where no sample can be used."""
    sources = open_sources(paths, indexes, cache, rebuild)
    return _print_counts([count for source in sources for count in known_counts(source)], json, collections.Counter())


def check(paths: Sequence[str], json: bool = False, record: bool = False, indexes: str = "", cache: str = "") -> int:
    """Decode every sample and print why some cannot be used; good and bad of a shard add up to its index.

    With `record`, what cannot be used becomes bad in the index, so that later runs leave it out; `index --rebuild`
    takes it back. Returns 0, or 1 where no sample can be used.
    """
    counts = []
    notes: collections.Counter[str] = collections.Counter()
    for source in open_sources(paths, indexes, cache):
        failures = check_source(source, notes)
        for count, failed in zip(known_counts(source), failures, strict=True):
            for key, reason in failed.values():
                count.bad.setdefault(reason, []).append(key)
            counts.append(count._replace(good=count.good - len(failed)))
        if record:
            _record(source, failures, place_of(DataOptions(indexes=indexes, cache=cache)).indexes)
    return _print_counts(counts, json, notes)


def stats(paths: Sequence[str], json: bool = False, indexes: str = "", cache: str = "") -> int:
    """Print counts, sizes, shapes, caption lengths and duplicates, of an even 100,000 samples where there are more.

    Returns 0, or 1 where no sample can be used.
    """
    sources = open_sources(paths, indexes, cache)
    good = sum(int(s.counts.sum()) for s in sources)
    every = max(1, good // SAMPLED)
    jobs = [(source, shard) for source, s in enumerate(sources) for shard in range(len(s.shards))]
    looks = progress(parallel(_look, (sources, every), jobs, _workers(good)), len(jobs), "reading samples")
    rows = [row for look in looks for row in look]
    report = {
        "samples": good,
        "bad": sum(int(s.bad.sum()) for s in sources),
        "shards": len(jobs),
        "looked at": len(rows),
    }
    report |= _describe(rows) if rows else {}
    if json:
        tell(jsonlib.dumps(report))
    else:
        _print_stats(report)
    return 0 if good else 1


def make(
    what: str,
    out: Path,
    part: str = "train",
    size: int | None = None,
    per_shard: int = 1000,
    images: str = "",
    split: str = "",
    layout: str = "",
) -> int:
    """Write shards into `out`: for "glyphs" `size` images of a `part`; for "fashion200k:FOLDER", "fashioniq:..." and "utzap50k:..." a `part`
    of that set, as published; for an annotation file WHAT.json (.jsonl, .csv, .tsv) those of its `images` that are in the splits of `split`,
    "train,restval"; else the images of folder `what`, with captions or, where a `layout` is named, a `part` of them with classes
    (layouts.py). Returns 0."""
    from jaxvl.data import composed_sets, glyphs
    from jaxvl.data.layouts import make_classes
    from jaxvl.data.lists import LISTS
    from jaxvl.data.make import make_annotated, make_shards

    name, _, folder = what.partition(":")
    if folder and name in composed_sets.SETS:
        shards, missing = composed_sets.make_set(name, Path(folder), Path(out), part, per_shard)
        tell(f"{len(shards)} shards in {out}; {len(missing)} images are missing, {part}-missing.txt lists them")
        return 0
    annotated = what.endswith(LISTS)
    if (images or split) and not annotated:
        raise ValueError(f"images and split are for an annotation file ({', '.join(LISTS)}), which {what!r} is not")
    if annotated:
        if size is not None or part != "train":
            raise ValueError("part and size are for glyphs; of an annotation file the split is chosen")
        splits = tuple(s for s in split.split(",") if s)
        shards, left_out = make_annotated(Path(what), Path(images) if images else Path(what).parent, Path(out), per_shard, splits)
    elif what == "glyphs":
        if per_shard != glyphs.SHARD:
            raise ValueError(f"glyphs come in shards of {glyphs.SHARD}; {per_shard} a shard is for folders")
        shards, left_out = glyphs.write_shards(out, part, size), list[str]()
    elif layout:
        if size is not None:
            raise ValueError("size is for glyphs; a set is written whole")
        shards, left_out = make_classes(layout, Path(what), Path(out), part, per_shard)
    else:
        if size is not None or part != "train":
            raise ValueError("part and size are for glyphs; a folder is written whole")
        shards, left_out = make_shards(Path(what), Path(out), per_shard)
    for path in left_out:
        tell(f"left out, {'missing' if layout else 'no caption'}: {path}")
    tell(f"{len(shards)} shards in {out}, {len(left_out)} images left out")
    return 0


def known_counts(source: Source) -> list[ShardCount]:
    """What the index knows of every shard of a source."""
    counts = {s: ShardCount(s, int(n), {}, {}) for s, n in zip(source.shards, source.counts, strict=True)}
    for shard, key, reason in source.known():
        if key:
            counts[shard].bad.setdefault(reason, []).append(key)
        else:
            counts[shard].damage[reason] = counts[shard].damage.get(reason, 0) + 1
    return list(counts.values())


def check_source(source: Source, notes: collections.Counter[str] | None = None) -> list[dict[int, tuple[str, str]]]:
    """Of every shard, the rows whose samples cannot be used although the index has them: row -> key, reason.

    notes: counts what is odd about images that are used (pixels.notice).
    """
    shards = range(len(source.shards))
    checked = parallel(_check_shard, source, shards, _workers(int(source.counts.sum())))
    found = list(progress(checked, len(shards), "checking shards"))
    if notes is not None:
        notes.update(word for _, odd in found for word in odd)
    return [failures for failures, _ in found]


def _check_shard(source: Source, shard: int) -> tuple[dict[int, tuple[str, str]], list[str]]:
    how, want = decode_options(DataOptions()), Want(alternates=False, fields=False)
    failures, odd = {}, []
    for row in range(int(source.counts[shard])):
        record = source.read(shard, row, want)
        if isinstance(record, Bad):
            failures[row] = record.key, record.reason
            continue
        try:
            decode.decode_eval(record.image, how)
        except decode.Undecodable as error:
            failures[row] = record.key, error.reason
            continue
        if word := notice(record.image):
            odd.append(word)
    return failures, odd


def _record(source: Source, failures: list[dict[int, tuple[str, str]]], folder: str) -> None:
    if source.name.startswith("tfds://"):
        raise ValueError(f"{source.name} has no index to record in; only shards of tar files have")
    with locked(Path(folder) / "build.lock"):
        for shard, failed in zip(source.shards, failures, strict=True):
            if failed:
                path = Path(index_path(shard, folder))
                save_index(exclude(load_index(path), {row: reason for row, (_, reason) in failed.items()}), path)


def _look(shared: tuple[list[Source], int], job: tuple[int, int]) -> list[tuple]:
    """Of every so many samples of a shard: image bytes, width, height, caption characters, words, captions, digests."""
    sources, every = shared
    source, shard = sources[job[0]], job[1]
    how, rows = decode_options(DataOptions()), []
    for row in range(0, int(source.counts[shard]), every):
        record = source.read(shard, row, Want(fields=False))
        if isinstance(record, Bad):
            continue
        try:
            width, height = decode.probe(record.image, how)
        except decode.Undecodable:
            continue
        main = record.captions[0]
        rows.append(
            (
                len(record.image),
                width,
                height,
                len(main),
                len(main.split()),
                len(record.captions),
                _digest(record.image),
                _digest(main.encode()),
            )
        )
    return rows


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _describe(rows: list[tuple]) -> dict[str, Any]:
    *numbers, images, captions = zip(*rows, strict=True)
    size, width, height, characters, words, number = (np.array(n) for n in numbers)
    columns = {
        "image bytes": size, "width": width, "height": height, "width / height": width / height,
        "caption characters": characters, "caption words": words, "captions a sample": number,
    }  # fmt: skip
    spread = {name: {q: round(float(np.quantile(v, at)), 3) for q, at in QUANTILES.items()} for name, v in columns.items()}
    return {
        "repeated images": len(rows) - len(set(images)),
        "repeated captions": len(rows) - len(set(captions)),
        "spread": spread,
    }


def open_sources(paths: Sequence[str], indexes: str, cache: str, rebuild: bool = False) -> list[Source]:
    """The sources that `paths` name, as training opens them."""
    place = place_of(DataOptions(indexes=indexes, cache=cache))._replace(rebuild=rebuild)
    return [open_source(path, place) for path in paths]


def _workers(samples: int) -> int:
    return cores() if samples >= PROCESSES_FROM else 1


def _print_counts(counts: list[ShardCount], json: bool, notes: collections.Counter[str]) -> int:
    reasons: collections.Counter[str] = collections.Counter()
    damage: collections.Counter[str] = collections.Counter()
    for count in counts:
        reasons.update({reason: len(keys) for reason, keys in count.bad.items()})
        damage.update(count.damage)
    good = sum(c.good for c in counts)
    if json:
        shards = [c._asdict() for c in counts]
        tell(
            jsonlib.dumps(
                {
                    "good": good,
                    "bad": reasons.total(),
                    "reasons": dict(reasons),
                    "damage": dict(damage),
                    "notes": dict(notes),
                    "shards": shards,
                }
            )
        )
        return 0 if good else 1
    faults = {c.shard: sum(map(len, c.bad.values())) for c in counts}
    worst = set(sorted(faults, key=lambda shard: -faults[shard])[:SHOWN])
    rows = []
    for count in (c for c in counts if c.shard in worst):
        bad, words = faults[count.shard], _words({reason: len(keys) for reason, keys in count.bad.items()})
        rows.append((count.shard, f"{count.good + bad:,}", f"{count.good:,}", f"{bad:,}", words, _words(count.damage)))
    if len(counts) > SHOWN:
        rows.append((f"... and {len(counts) - SHOWN} more, with fewer faults", "", "", "", "", ""))
    rows.append(("all", f"{good + reasons.total():,}", f"{good:,}", f"{reasons.total():,}", _words(reasons), _words(damage)))
    head = ("shard", "samples", "good", "bad", "reasons", "damage")
    table(f"{len(counts)} shards", head, rows, left=("shard", "reasons", "damage"), total=True)
    for word in sorted({*reasons, *damage}):
        tell(f"{word}: {REASONS[word]}")
    for word, number in notes.items():
        tell(f"{word}, {number:,} images: {REASONS[word]}")
    return 0 if good else 1


def _words(counted: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {word}" for word, n in sorted(counted.items(), key=lambda item: -item[1]))


def _print_stats(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if name != "spread":
            tell(f"{name}: {value:,}")
    spread = report.get("spread", {}).items()
    table("", ("", *QUANTILES), [(name, *(f"{v:,.3g}" if v < 100 else f"{v:,.0f}" for v in values.values())) for name, values in spread])
