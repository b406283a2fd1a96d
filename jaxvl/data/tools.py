"""What `jaxvl data` does: index shards, check every sample, describe them, make new ones; tables or JSON."""

import collections
import hashlib
import json as jsonlib
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data import decode
from jaxvl.data.cache import locked
from jaxvl.data.contents import Contents, open_contents
from jaxvl.data.dataset import DataOptions, decode_options, place_of
from jaxvl.data.faults import fault_notes, lost_samples
from jaxvl.data.indexing import cores, index_path, parallel, progress
from jaxvl.data.labels import word
from jaxvl.data.pixels import notice
from jaxvl.data.reasons import NOTES, REASONS
from jaxvl.data.source import Bad, Source, Want
from jaxvl.data.sources import open_source
from jaxvl.data.tarindex import exclude, load_index, save_index
from jaxvl.terminal import table, tell

SHOWN = 40  # shards of a table; the sum has them all
SAMPLED = 100_000  # samples that stats looks into
OF_FIELDS = ("unlabelled", "nocaption", "unreadable")  # what --record leaves alone: it depends on the field asked for, or on the disk
READS = {  # the options of `data make` by what is made
    "set": ("part", "per-shard"), "glyphs": ("part", "size"), "list": ("images", "split", "per-shard"), "layout": ("layout", "part", "per-shard"), "folder": ("per-shard", "layout")
}  # fmt: skip
PROCESSES_FROM = 2_000  # samples below which starting processes costs more than it saves
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


class ShardCount(NamedTuple):
    """One shard: number of usable samples and keys of bad ones by reason, together all; reasons of its damage."""

    shard: str
    good: int
    bad: dict[str, list[str]]
    damage: dict[str, int]


def index(
    paths: Sequence[str],
    json: bool = False,
    rebuild: bool = False,
    indexes: str = "",
    cache: str = "",
    caption_field: str = "",
    label: str = "",
) -> int:
    """Index the shards that `paths` name and print what is known. Returns 0, or 1 where no sample can be used."""
    opened = _open(paths, indexes, cache, caption_field, label, rebuild)
    return _print_counts([count for one in opened for count in known_counts(one.source)], json, collections.Counter(), _told(opened))


def check(
    paths: Sequence[str],
    json: bool = False,
    record: bool = False,
    indexes: str = "",
    cache: str = "",
    caption_field: str = "",
    label: str = "",
) -> int:
    """Decode every sample and print why some cannot be used; good and bad of a shard add up to its index.

    Samples have what the set has (contents.py): KEY.txt, the field `caption_field` of captions, the field `label`, or an image alone.
    With `record`, what cannot be decoded becomes bad in the index, so that later runs leave it out; `index --rebuild`
    takes it back. Returns 0, or 1 where no sample can be used.
    """
    counts = []
    notes: collections.Counter[str] = collections.Counter()
    opened = _open(paths, indexes, cache, caption_field, label)
    for one in opened:
        failures = check_source(one, notes)
        for count, failed in zip(known_counts(one.source), failures, strict=True):
            for key, reason in failed.values():
                count.bad.setdefault(reason, []).append(key)
            counts.append(count._replace(good=count.good - len(failed)))
        if record:
            _record(one.source, failures, place_of(DataOptions(indexes=indexes, cache=cache)).indexes)
    return _print_counts(counts, json, notes, _told(opened))


def stats(paths: Sequence[str], json: bool = False, indexes: str = "", cache: str = "", caption_field: str = "", label: str = "") -> int:
    """Print counts, sizes, shapes, caption lengths, labels and duplicates, of an even 100,000 samples where there are more.

    Returns 0, or 1 where no sample can be used.
    """
    opened = _open(paths, indexes, cache, caption_field, label)
    good = sum(int(one.source.counts.sum()) for one in opened)
    every = max(1, good // SAMPLED)
    jobs = [(number, shard) for number, one in enumerate(opened) for shard in range(len(one.source.shards))]
    looks = progress(parallel(_look, (opened, every), jobs, _workers(good)), len(jobs), "reading samples")
    rows = [row for look in looks for row in look]
    report: dict[str, Any] = {
        "samples": good,
        "bad": sum(int(one.source.bad.sum()) for one in opened),
        "shards": len(jobs),
        "looked at": len(rows),
    }
    report |= _describe(rows, any(one.label for one in opened)) if rows else {}
    if json:
        tell(jsonlib.dumps(report | {"contents": _told(opened, REASONS)}))
    else:
        for sentence in _told(opened, REASONS):
            tell(sentence)
        _print_stats(report)
    return 0 if rows else 1


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
        kind = "set"
    elif what == "glyphs":
        kind = "glyphs"
    else:
        kind = "list" if what.endswith(LISTS) else "layout" if layout else "folder"
    given = {
        "part": part != "train",
        "size": size is not None,
        "per-shard": per_shard != 1000,
        "images": images,
        "split": split,
        "layout": layout,
    }
    if strange := [option for option, value in given.items() if value and option not in READS[kind]]:
        raise ValueError(f"--{strange[0]} is not for {what!r}, which takes {', '.join(f'--{option}' for option in READS[kind])}")
    if kind == "set":
        shards, missing = composed_sets.make_set(name, Path(folder), Path(out), part, per_shard)
        tell(f"{len(shards)} shards in {out}; {len(missing)} images are missing, {part}-missing.txt lists them")
        return 0
    if kind == "list":
        splits = tuple(s for s in split.split(",") if s)
        shards, left_out = make_annotated(Path(what), Path(images) if images else Path(what).parent, Path(out), per_shard, splits)
    elif kind == "glyphs":
        shards, left_out = glyphs.write_shards(out, part, size), list[str]()
    elif kind == "layout":
        shards, left_out = make_classes(layout, Path(what), Path(out), part, per_shard)
    else:
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


def check_source(opened: Contents, notes: collections.Counter[str] | None = None) -> list[dict[int, tuple[str, str]]]:
    """Of every shard, the rows whose samples cannot be used although the index has them: row -> key, reason.

    notes: counts what is odd about images that are used (pixels.notice).
    """
    shards = range(len(opened.source.shards))
    checked = parallel(_check_shard, opened, shards, _workers(int(opened.source.counts.sum())))
    found = list(progress(checked, len(shards), "checking shards"))
    if notes is not None:
        notes.update(word for _, odd in found for word in odd)
    return [failures for failures, _ in found]


def _check_shard(opened: Contents, shard: int) -> tuple[dict[int, tuple[str, str]], list[str]]:
    failures: dict[int, tuple[str, str]] = {}
    odd: list[str] = []
    rows = range(int(opened.source.counts[shard]))
    for row in rows:
        try:
            key, reason, oddity = _check_row(opened, shard, row)
        except Exception as error:
            _skipped(opened, shard, error)
            failures |= {later: (f"row {later}", "unreadable") for later in rows[row:]}
            break
        if reason:
            failures[row] = key, reason
        elif oddity:
            odd.append(oddity)
    return failures, odd


def _check_row(opened: Contents, shard: int, row: int) -> tuple[str, str, str]:
    """Key of a sample, why it cannot be used, and what is odd about it; "" for nothing."""
    want = Want(captions=opened.captions, alternates=False, fields=bool(opened.label))
    record = opened.source.read(shard, row, want)
    if isinstance(record, Bad):
        return record.key, record.reason, ""
    try:
        decode.decode_eval(record.image, decode_options(DataOptions()))
    except decode.Undecodable as error:
        return record.key, error.reason, ""
    missing = opened.label and word(record.meta.get(opened.label)) is None
    return record.key, "unlabelled" if missing else "", notice(record.image) or ""


def _record(source: Source, failures: list[dict[int, tuple[str, str]]], folder: str) -> None:
    if source.name.startswith("tfds://"):
        raise ValueError(f"{source.name} has no index to record in; only shards of tar files have")
    with locked(Path(folder) / "build.lock"):
        for shard, failed in zip(source.shards, failures, strict=True):
            if reasons := {row: reason for row, (_, reason) in failed.items() if reason not in OF_FIELDS}:
                path = Path(index_path(shard, folder))
                save_index(exclude(load_index(path), reasons), path)


class Look(NamedTuple):
    """What stats sees of a sample. caption: characters, words, captions, digest of the first; () without."""

    size: int
    width: int
    height: int
    digest: int
    caption: tuple[int, ...]
    label: str | None


def _look(shared: tuple[list[Contents], int], job: tuple[int, int]) -> list[Look]:
    """Every so many samples of a shard, those that cannot be used left out."""
    opened, every = shared
    one, shard = opened[job[0]], job[1]
    rows: list[Look] = []
    try:
        rows.extend(look for row in range(0, int(one.source.counts[shard]), every) if (look := _look_at(one, shard, row)))
    except Exception as error:
        _skipped(one, shard, error)
    return rows


def _look_at(one: Contents, shard: int, row: int) -> Look | None:
    record = one.source.read(shard, row, Want(captions=one.captions, fields=bool(one.label)))
    if isinstance(record, Bad):
        return None
    try:
        width, height = decode.probe(record.image, decode_options(DataOptions()))
    except decode.Undecodable:
        return None
    main = record.captions[0] if record.captions else ""
    caption = (len(main), len(main.split()), len(record.captions), _digest(main.encode())) if main else ()
    return Look(len(record.image), width, height, _digest(record.image), caption, word(record.meta.get(one.label)))


def _skipped(opened: Contents, shard: int, error: Exception) -> None:
    """Say what one shard raised, whatever it is: the others are read all the same."""
    warnings.warn(f"the rest of shard {opened.source.shards[shard]} cannot be read: {error}", stacklevel=3)


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _describe(rows: list[Look], labelled: bool) -> dict[str, Any]:
    size, width, height = (np.array(column) for column in zip(*(row[:3] for row in rows), strict=True))
    columns = {"image bytes": size, "width": width, "height": height, "width / height": width / height}
    report = {"repeated images": len(rows) - len({row.digest for row in rows})}
    if captions := [row.caption for row in rows if row.caption]:
        names = ("caption characters", "caption words", "captions a sample")
        columns |= dict(zip(names, np.array([c[:3] for c in captions]).T, strict=True))
        report["repeated captions"] = len(captions) - len({c[3] for c in captions})
    if labelled:
        labels = collections.Counter(row.label for row in rows if row.label is not None)
        report |= {"labels": len(labels), "unlabelled": len(rows) - labels.total()}
        columns |= {"samples a label": np.array(list(labels.values()))} if labels else {}
    spread = {name: {q: round(float(np.quantile(v, at)), 3) for q, at in QUANTILES.items()} for name, v in columns.items()}
    return report | {"spread": spread}


def _open(paths: Sequence[str], indexes: str, cache: str, caption_field: str, label: str, rebuild: bool = False) -> list[Contents]:
    place = place_of(DataOptions(indexes=indexes, cache=cache))._replace(rebuild=rebuild)
    return [open_contents(path, place, caption_field, label) for path in paths]


def _told(opened: Sequence[Contents], words: Collection[str] = NOTES) -> list[str]:
    """What was taken to be in the sets, and what is true of whole shards, as far as `words` tell it."""
    sources = [one.source._replace(faults=tuple(f for f in one.source.faults if f[0] in words)) for one in opened]
    lost = lost_samples([one.source for one in opened])
    missing = [f"lost shards lack some {lost:,} samples, by the mean of the others"] if lost else []
    return [*(one.told for one in opened if one.told), *fault_notes(sources), *missing]


def open_sources(paths: Sequence[str], indexes: str, cache: str, rebuild: bool = False) -> list[Source]:
    """The sources that `paths` name, as training opens them."""
    place = place_of(DataOptions(indexes=indexes, cache=cache))._replace(rebuild=rebuild)
    return [open_source(path, place) for path in paths]


def _workers(samples: int) -> int:
    return cores() if samples >= PROCESSES_FROM else 1


def _print_counts(counts: list[ShardCount], json: bool, notes: collections.Counter[str], told: Sequence[str]) -> int:
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
                    "contents": list(told),
                    "shards": shards,
                }
            )
        )
        return 0 if good else 1
    faults = {c.shard: sum(map(len, c.bad.values())) for c in counts}
    worst = {c.shard for c in sorted(counts, key=lambda c: (-sum(c.damage.values()), -faults[c.shard]))[:SHOWN]}
    rows = []
    for count in (c for c in counts if c.shard in worst):
        bad, words = faults[count.shard], _words({reason: len(keys) for reason, keys in count.bad.items()})
        rows.append((count.shard, f"{count.good + bad:,}", f"{count.good:,}", f"{bad:,}", words, _words(count.damage)))
    if len(counts) > SHOWN:
        rows.append((f"... and {len(counts) - SHOWN} more, with fewer faults", "", "", "", "", ""))
    rows.append(("all", f"{good + reasons.total():,}", f"{good:,}", f"{reasons.total():,}", _words(reasons), _words(damage)))
    head = ("shard", "samples", "good", "bad", "reasons", "damage")
    table(f"{len(counts)} shards", head, rows, left=("shard", "reasons", "damage"), total=True)
    for sentence in told:
        tell(sentence)
    for reason in sorted({*reasons, *damage}):
        tell(f"{reason}: {REASONS[reason]}")
    for oddity, number in notes.items():
        tell(f"{oddity}, {number:,} images: {REASONS[oddity]}")
    return 0 if good else 1


def _words(counted: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {word}" for word, n in sorted(counted.items(), key=lambda item: -item[1]))


def _print_stats(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if name != "spread":
            tell(f"{name}: {value:,}")
    spread = report.get("spread", {}).items()
    table("", ("", *QUANTILES), [(name, *(f"{v:,.3g}" if v < 100 else f"{v:,.0f}" for v in values.values())) for name, values in spread])
