"""sweep.html: one self-contained page about a sweep, made from its folder alone; each trial links to its own report."""

import html
import math
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote

from jaxvl.progress import duration
from jaxvl.report import plots
from jaxvl.report.page import grid, section, write_document
from jaxvl.sweep import charts, folder as folders, results
from jaxvl.sweep.folder import LOG, STATUSES
from jaxvl.sweep.options import Choice
from jaxvl.sweep.results import Found, Result, show

COLOURED = 6  # rows with a colour of their own in the curves; the others are grey


def write_page(folder: Path, found: Found) -> Path:
    """Write sweep.html of the sweep in `folder`, and return its path."""
    name = folder.resolve().name
    sections = (
        _head(name, found),
        section("Results", _table(folder, found)),
        section("Curves", grid([_curves(folder, found, metric) for metric in (found.options.metric, *found.options.also)])),
        section("Seeds", grid([_spreads(found, metric) for metric in (found.options.metric, *found.options.also)])),
        section("What was varied", grid([_scatter(found, key) for key in found.keys])),
        section("Failed", _failed(found)),
    )
    path = folder / "sweep.html"
    write_document(path, name, "".join(sections))
    return path


def _head(name: str, found: Found) -> str:
    o, some = found.options, found.results()
    best = [row for row in found.rows if o.metric in row.spread and math.isfinite(row.spread[o.metric].mean)]
    tiles = []
    if best:
        top = (max if o.mode == "max" else min)(best, key=lambda row: row.spread[o.metric].mean)
        tiles.append((show(top.spread[o.metric].mean), f"{o.metric}, {'highest' if o.mode == 'max' else 'lowest'}: {top.name or 'all'}"))
    count = Counter(r.record.status for r in some)
    tiles += [(f"{count[status]}", f"of {len(some)} {status}") for status in STATUSES if count[status]]
    tiles.append((duration(sum(r.record.seconds for r in some)), "in the trials together"))
    cells = "".join(f"<div><b>{html.escape(big)}</b><span>{html.escape(small)}</span></div>" for big, small in tiles)
    facts = {"metric": f"{o.metric} ({o.mode}, {o.pick} value of a run)", "written": time.strftime("%Y-%m-%d %H:%M")}
    if o.space:
        facts["sampler"] = f"{o.sampler}, {o.trials} trials"
    if o.keep < 1:
        facts["pruning"] = f"the best {100 * o.keep:.0f} % go on, from step {o.keep_from:,}, once {o.keep_least} got there"
    lines = "".join(f"<span><em>{html.escape(k)}</em> {html.escape(v)}</span>" for k, v in facts.items())
    return f'<header><h1>{html.escape(name)}</h1><div class="facts">{lines}</div><div class="tiles">{cells}</div></header>'


def _table(folder: Path, found: Found) -> str:
    head, body = results.table(found)
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in (*head, "runs"))
    lines = []
    for row, cells in zip(found.rows, body, strict=True):
        links = " ".join(_link(folder, r) for r in row.results)
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + f"<td>{links}</td></tr>")
    notes = (
        ("Over seeds: mean (lowest..highest) of the trials that are done. ", len(found.options.seeds) > 1),
        ("In brackets: where trials stood that are not done.", any(r.values and r.record.status != "done" for r in found.results())),
    )
    note = "".join(words for words, due in notes if due)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div><p>{note}</p>'


def _link(folder: Path, result: Result) -> str:
    """To the report of a trial, to its log where it has none yet, nowhere before it has begun. Seeds are told apart by their number."""
    name = result.record.name
    for file, word in (("report.html", "report"), (LOG, "log")):
        if (folder / name / file).is_file():
            seed = "" if result.record.seed is None else f" {result.record.seed}"
            return f'<a href="{quote(f"{name}/{file}")}">{word}{seed}</a>'
    return ""


def _curves(folder: Path, found: Found, metric: str) -> str:
    series: list[plots.Series] = []
    tail: list[plots.Series] = []
    for place, row in enumerate(_by_merit(found)):
        for i, r in enumerate(row.results):
            curve = folders.curve(folder / r.record.name, metric)
            coloured = place < COLOURED
            label = f"{row.name or 'all'}" if coloured and i == 0 else ""
            dash = "" if r.record.status == "done" else "5 4"
            one = plots.Series(label, list(curve), list(curve.values()), place if coloured else 6, faint=not coloured, dash=dash)
            (series if coloured else tail).append(one)
    shown = [s for s in [*tail, *series] if s.x]  # the best are drawn last, so on top
    return plots.lines(metric, shown) if shown else ""


def _by_merit(found: Found) -> list[results.Row]:
    return sorted(found.rows, key=lambda row: results.rank(found.options, row))


def _spreads(found: Found, metric: str) -> str:
    if len(found.options.seeds) < 2:
        return ""
    rows = [row for row in found.rows if metric in row.spread]
    value = lambda row: [r.values[metric] for r in row.results if r.record.status == "done" and metric in r.values]
    return charts.spreads(metric, [charts.Bar(row.name or "all", value(row), row.spread[metric].mean) for row in rows])


def _scatter(found: Found, key: str) -> str:
    points = [
        charts.Point(r.record.name, r.record.overrides[key], r.values[found.options.metric], r.record.status == "done")
        for r in found.results()
        if key in r.record.overrides and found.options.metric in r.values
    ]
    return charts.scatter(f"{found.options.metric} by {found.keys[key]}", points, log=_logarithmic(found, key))


def _logarithmic(found: Found, key: str) -> bool:
    """Whether an override was varied on a logarithmic scale: as its distribution says, or over a factor of ten or more."""
    distribution = found.options.space.get(key)
    if distribution is not None and not isinstance(distribution, Choice):
        return distribution.log
    values = distribution.options if distribution is not None else found.options.grid[key]
    numbers = [v for v in values if isinstance(v, (int, float))]
    return len(numbers) == len(values) and min(numbers) > 0 and max(numbers) / min(numbers) >= 10


def _failed(found: Found) -> str:
    failed = [r for r in found.results() if r.record.status == "failed"]
    rows = "".join(
        f'<tr><td>{html.escape(r.record.name)}</td><td style="text-align:left">{html.escape(r.record.reason)}</td>'
        f'<td><a href="{quote(f"{r.record.name}/{LOG}")}">log</a></td></tr>'
        for r in failed
    )
    return (
        f'<div class="wide"><table><thead><tr><th>trial</th><th style="text-align:left">reason</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>'
        if failed
        else ""
    )
