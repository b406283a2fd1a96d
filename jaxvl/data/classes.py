"""Classes of a data set: every sample's class as a place among them, the groups above them, and halves that share no class.

Metric learning trains on some classes and is tested on others. `data.classes` takes all classes, or the first or the second half of them
in order (numbers as numbers, words by the alphabet); of an odd number the first half has one more. With `data.split_level` the groups of
that entry of the hierarchy are halved instead, so that whole branches are unseen.

The hierarchy of a class is a list of groups, the coarsest first: a field of its samples, a list or one value, or with "re:PATTERN" the
groups that a regular expression finds in the name of the class, with "FIELD:re:PATTERN" in a field. A group is known by its place in the tree, all entries down to it, so
that two of one name in two branches are two groups.
"""

import functools
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data.cache import digest
from jaxvl.data.indexing import cores, parallel, progress
from jaxvl.data.kept import keep, kept
from jaxvl.data.labels import FIELDS, PROCESSES_FROM, word
from jaxvl.data.source import Bad, Record, Source, Want

Path_ = tuple[str, ...]


class Wanted(NamedTuple):
    """The options that a class table answers: data.label, classes, split_level, hierarchy, levels."""

    label: str
    half: str
    split_level: int
    hierarchy: str
    levels: tuple[int, ...]


class ClassTable(NamedTuple):
    """names: of the classes kept, in order. labels: int32 [sample] of the samples kept. groups: of every level asked for, names in order.
    parents: of every level asked for, the group of each class, then of each group of the level before."""

    names: tuple[str, ...]
    labels: np.ndarray
    groups: tuple[tuple[str, ...], ...]
    parents: tuple[tuple[int, ...], ...]


def keep_classes(sources: Sequence[Source], wanted: Wanted, folder: str) -> tuple[tuple[Source, ...], ClassTable]:
    """The sources cut to the samples of the classes asked for, and their table. Samples without a class become known as bad.

    Raises ValueError where no sample has the field, a class lies in two groups, or a hierarchy does not reach a level.
    """
    of_sample, names, paths = _read(sources, wanted, folder)
    levels = (*wanted.levels, *([wanted.split_level] if wanted.split_level >= 0 else []))
    tree = _tree(of_sample, names, paths, levels, wanted)
    kept = list(range(len(names)))
    if wanted.half != "all":
        group = {c: tree[c][: wanted.split_level + 1] if wanted.split_level >= 0 else (str(c),) for c in kept}
        order = list(dict.fromkeys(sorted(group.values()) if wanted.split_level >= 0 else group.values()))
        middle = -(-len(order) // 2)
        chosen = set(order[:middle] if wanted.half == "first" else order[middle:])
        kept = [c for c in kept if group[c] in chosen]
        if not kept:
            raise ValueError(f"data.classes is {wanted.half!r}, but {len(order)} group(s) of {len(names)} classes have no such half")
    place = np.full(len(names) + 1, -1, np.int32)  # the last is for samples without a class
    place[kept] = np.arange(len(kept))
    labels = place[of_sample[:, 0]]
    cuts, at = [], 0
    for source in sources:
        rows = []
        for count in source.counts.tolist():
            rows.append((np.flatnonzero(labels[at : at + count] >= 0), np.flatnonzero(of_sample[at : at + count, 0] < 0)))
            at += count
        cuts.append(_cut(source, rows, wanted))
    groups, parents = _levels([tree[c] for c in kept], wanted.levels)
    return tuple(cuts), ClassTable(tuple(names[c] for c in kept), labels[labels >= 0], groups, parents)


def _levels(tree: list[Path_], levels: Sequence[int]) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[int, ...], ...]]:
    below, groups, parents = tree, [], []
    for level in levels:
        of = [path[: level + 1] for path in below]
        order = sorted(set(of))
        number = {path: i for i, path in enumerate(order)}
        parents.append(tuple(number[path] for path in of))
        groups.append(tuple("/".join(path) for path in order))
        below = order
    return tuple(groups), tuple(parents)


def _tree(of_sample: np.ndarray, names: Sequence[str], paths: Sequence[Path_], levels: Sequence[int], wanted: Wanted) -> list[Path_]:
    """The hierarchy of each class as far as `levels` reach, which all of its samples must agree on."""
    deepest = max(levels, default=-1) + 1
    tree: list[Path_ | None] = [None] * len(names)
    for c, p in np.unique(of_sample[of_sample[:, 0] >= 0], axis=0) if deepest else ():
        path = paths[p][:deepest]
        if len(path) < deepest:
            raise ValueError(
                f"data.levels asks for entry {deepest - 1} of the hierarchy {wanted.hierarchy!r}, but class {names[c]!r} has {list(paths[p])}"
            )
        if tree[c] not in (None, path):
            raise ValueError(
                f"class {names[c]!r} lies in {'/'.join(tree[c] or ())} and in {'/'.join(path)}: take coarser levels than {tuple(levels)}"
            )
        tree[c] = path
    return [path or () for path in tree]


def _read(sources: Sequence[Source], wanted: Wanted, folder: str) -> tuple[np.ndarray, list[str], list[Path_]]:
    """(class and path of each sample int32 [sample, 2], -1 without; names of classes; hierarchy paths); read once and kept in `folder`."""
    key = " ".join([wanted.label, wanted.hierarchy, *(s.version for s in sources)])
    file = Path(folder) / f"classes-{digest(key)}.npz"
    held = kept(file)
    if held is None:
        jobs = [(source, shard) for source, s in enumerate(sources) for shard in range(len(s.shards))]
        large = sum(int(s.counts.sum()) for s in sources) >= PROCESSES_FROM
        found = progress(parallel(_look, (sources, wanted), jobs, cores() if large else 1), len(jobs), f"reading {wanted.label}")
        rows = list(itertools.chain.from_iterable(found))
        words = sorted({w for w, _ in rows if w is not None})
        if not words:
            raise ValueError(f"data.label is {wanted.label!r}, a field that no sample of {', '.join(s.name for s in sources)} has")
        if all(w.lstrip("-").isdigit() for w in words):
            words.sort(key=int)
        paths = sorted({p for _, p in rows})
        number, path_number = {w: i for i, w in enumerate(words)}, {p: i for i, p in enumerate(paths)}
        table = np.array([(number[w] if w is not None else -1, path_number[p]) for w, p in rows], np.int32)
        out = io.BytesIO()
        np.savez(out, table=table, names=np.array(json.dumps([words, paths])))
        held = out.getvalue()
        keep(file, held)
    with np.load(io.BytesIO(held)) as saved:
        words, paths = json.loads(str(saved["names"]))
        return saved["table"], words, [tuple(p) for p in paths]


def _look(shared: tuple[Sequence[Source], Wanted], job: tuple[int, int]) -> list[tuple[str | None, Path_]]:
    (sources, wanted), (number, shard) = shared, job
    source = sources[number]
    return [_place(source.read(shard, row, FIELDS), wanted) for row in range(int(source.counts[shard]))]


def _place(record: Record | Bad, wanted: Wanted) -> tuple[str | None, Path_]:
    name = word(record.meta.get(wanted.label)) if isinstance(record, Record) else None
    if name is None or isinstance(record, Bad) or not wanted.hierarchy:
        return name, ()
    field, pattern = field_and_pattern(wanted.hierarchy)
    if pattern:
        match = re.search(pattern, name if not field else word(record.meta.get(field)) or "")
        return name, tuple(g or "" for g in match.groups()) if match else ()
    value: Any = record.meta.get(field)
    entries = [word(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return name, tuple(e for e in itertools.takewhile(lambda e: e is not None, entries) if e is not None)


def field_and_pattern(hierarchy: str) -> tuple[str, str]:
    """The field of data.hierarchy, empty for the class itself, and the regular expression that is looked for in it, empty for none."""
    found = re.match(r"(?:(.*?):)?re:(.+)", hierarchy)
    return (found[1] or "", found[2]) if found else (hierarchy, "")


def _cut(source: Source, rows: Sequence[tuple[np.ndarray, np.ndarray]], wanted: Wanted) -> Source:
    """`source` with the kept rows of each shard alone, those without a class among the bad."""
    kept, without = [k for k, _ in rows], [w for _, w in rows]
    counts = np.array([len(k) for k in kept], np.int64)
    bad = source.bad + np.array([len(w) for w in without], np.int64)
    chosen = digest(f"{source.version} {wanted}")
    return source._replace(
        version=chosen,
        counts=counts,
        bad=bad,
        read=functools.partial(_kept_row, source, kept),
        known=functools.partial(_known, source, without),
    )


def _kept_row(source: Source, kept: Sequence[np.ndarray], shard: int, row: int, want: Want) -> Record | Bad:
    return source.read(shard, int(kept[shard][row]), want)


def _known(source: Source, without: Sequence[np.ndarray]) -> Iterator[Bad]:
    yield from source.known()
    for shard, rows in enumerate(without):
        yield from (Bad(source.shards[shard], f"row {row}", "unlabelled") for row in rows.tolist())
