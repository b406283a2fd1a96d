"""What a sweep has found: a value a trial, a spread a row, as tables for the terminal and for other programs."""

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl.report.metrics import write_atomic
from jaxvl.report.summary import number
from jaxvl.sweep import folder as folders
from jaxvl.sweep.folder import Record
from jaxvl.sweep.options import SweepOptions
from jaxvl.sweep.plan import short_keys
from jaxvl.terminal import table as show_table, tell

FORMULA = ("=", "+", "-", "@", "\t", "\n")  # what a spreadsheet may begin to compute at
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


class Result(NamedTuple):
    """A trial and what it reached. step: of its values, None before its first evaluation. values: by metric."""

    record: Record
    step: int | None
    values: dict[str, float]


class Spread(NamedTuple):
    """A metric over the finished seeds of a row. std: with n - 1, nan for one seed."""

    n: int
    mean: float
    std: float
    low: float
    high: float


class Row(NamedTuple):
    """A row of the table: the trials that differ in nothing but the seed. spread: by metric, of those that are done."""

    name: str
    results: list[Result]
    spread: dict[str, Spread]


class Found(NamedTuple):
    """All of a sweep. rows: named rows in their own order, those of a search best first. keys: short names of the overrides."""

    options: SweepOptions
    rows: list[Row]
    keys: dict[str, str]

    def results(self) -> list[Result]:
        """The trials, row by row."""
        return [result for row in self.rows for result in row.results]


def gather(folder: Path) -> Found:
    """Read a sweep from its folder alone. Raises SweepError where there is none."""
    options, names = folders.read_options(folder)
    results = []
    for name in names:
        record = folders.read_record(folder, name)
        step, values = chosen(options, folders.evaluations(folder / name))
        results.append(Result(record, step, values))
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.record.group, []).append(result)
    rows = [Row(name, some, _spread(options, some)) for name, some in grouped.items()]
    if not options.rows:
        rows.sort(key=lambda row: rank(options, row))
    varied = dict.fromkeys(key for result in results for key in result.record.overrides if key in options.grid or key in options.space)
    return Found(options, rows, short_keys(varied))


def chosen(options: SweepOptions, rows: Sequence[Mapping[str, Any]]) -> tuple[int | None, dict[str, float]]:
    """The step at which a trial counts and its metrics there, from its evaluation lines: (None, {}) where the metric is missing.

    A further metric that was not evaluated at that very step counts with its last value before it.
    """
    curve = [(row["step"], float(row[options.metric])) for row in rows if options.metric in row]
    if not curve:
        return None, {}
    step = curve[-1][0]
    good = [(v if options.mode == "max" else -v, s) for s, v in curve if math.isfinite(v)]
    if options.pick == "best" and good:
        step = max(good)[1]
    values: dict[str, float] = {}
    for metric in (options.metric, *options.also):
        before = [float(row[metric]) for row in rows if metric in row and row["step"] <= step]
        if before:
            values[metric] = before[-1]
    return step, values


def write_tables(folder: Path, found: Found) -> list[Path]:
    """results.csv, a line a trial, and rows.csv, a line a row, in the folder of the sweep."""
    metrics = (found.options.metric, *found.options.also)
    overrides = list(dict.fromkeys(k for r in found.results() for k in r.record.overrides))
    head = [
        "trial",
        "row",
        "seed",
        "status",
        "step",
        *metrics,
        *("config" if k == "config" else f"config.{k}" for k in overrides),
        "seconds",
        "reason",
    ]
    lines = [
        [r.record.name, r.record.group, "" if r.record.seed is None else r.record.seed, r.record.status, "" if r.step is None else r.step,
         *(r.values.get(m, "") for m in metrics), *(r.record.overrides.get(k, "") for k in overrides), r.record.seconds, r.record.reason]
        for r in found.results()
    ]  # fmt: skip
    spread_head = ["row", "trials", "done", *(f"{m} {word}" for m in metrics for word in ("mean", "std", "min", "max"))]
    spread_lines = [
        [row.name, len(row.results), sum(r.record.status == "done" for r in row.results),
         *(x for m in metrics for x in (row.spread[m][1:] if m in row.spread else [""] * 4))]
        for row in found.rows
    ]  # fmt: skip
    paths = []
    for name, top, body in (("results.csv", head, lines), ("rows.csv", spread_head, spread_lines)):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([[_cell(value) for value in line] for line in (top, *body)])
        write_atomic(folder / name, text.getvalue().encode(errors="replace").decode())  # as the page does, of bytes that are no text
        paths.append(folder / name)
    return paths


def _cell(value: Any) -> Any:
    """A value as a cell that no spreadsheet takes for a formula: such a text, unless it is a number, is led by an apostrophe."""
    if not isinstance(value, str):
        return value
    value = value.replace("\r\n", "\n").replace("\r", "\n")  # the writer puts no quotes around a CR alone, which would end the row
    return f"'{value}" if value.startswith(FORMULA) and not NUMBER.fullmatch(value) else value


def print_found(folder: Path, found: Found) -> None:
    """The table on standard output, and below it every trial that failed with its reason and its log."""
    head, body = table(found)
    show_table(f"{found.options.metric} ({found.options.mode}, {found.options.pick})", head, body)
    for r in found.results():
        if r.record.status == "failed":
            tell(f"{r.record.name} failed: {r.record.reason}; its log: {folder / r.record.name / folders.LOG}")


def table(found: Found) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and cells of the table of rows: name, overrides, metrics, step, status."""
    metrics = (found.options.metric, *found.options.also)
    body = []
    for row in found.rows:
        of = [found_value(row, m) for m in metrics]
        drawn = [show(row.results[0].record.overrides.get(k, "")) for k in found.keys]
        steps = sorted({r.step for r in row.results if r.step is not None})
        body.append(
            (
                row.name or "all",
                *drawn,
                *of,
                "..".join(f"{s:,}" for s in dict.fromkeys((steps[0], steps[-1]))) if steps else "",
                states(row.results),
            )
        )
    several = any(len(row.results) > 1 for row in found.rows)
    return ("row" if several else "trial", *found.keys.values(), *metrics, "step", "trials" if several else "status"), body


def found_value(row: Row, metric: str) -> str:
    """A cell of the table: "0.412 (0.401..0.420)" over seeds, one number for one trial, in brackets where it is not done."""
    if metric in row.spread:
        s = row.spread[metric]
        return show(s.mean) if len(row.results) == 1 else f"{show(s.mean)} ({show(s.low)}..{show(s.high)})"
    values = [r.values[metric] for r in row.results if metric in r.values]
    return f"[{', '.join(map(show, values))}]" if values else ""


def states(results: Sequence[Result]) -> str:
    """The status of one trial; of several, "2 done, 1 failed"."""
    count = {status: sum(r.record.status == status for r in results) for status in dict.fromkeys(r.record.status for r in results)}
    return ", ".join(count) if len(results) == 1 else ", ".join(f"{n} {status}" for status, n in count.items())


def show(value: Any) -> str:
    """A value for people."""
    return number(value) if isinstance(value, float) else str(value)


def _spread(options: SweepOptions, results: Sequence[Result]) -> dict[str, Spread]:
    out = {}
    for metric in (options.metric, *options.also):
        values = [r.values[metric] for r in results if r.record.status == "done" and metric in r.values]
        if values:
            std = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
            out[metric] = Spread(len(values), sum(values) / len(values), std, min(values), max(values))
    return out


def rank(options: SweepOptions, row: Row) -> tuple[int, float]:
    """Finished rows first, each kind best first; what is not a number comes last."""
    done = options.metric in row.spread
    value = row.spread[options.metric].mean if done else next((r.values[options.metric] for r in row.results if r.values), math.nan)
    better = -value if options.mode == "max" else value
    return (0 if done else 1 if math.isfinite(value) else 2), better if math.isfinite(better) else math.inf
