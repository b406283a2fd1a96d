"""report.html: one self-contained page about a run, made from what lies in its workdir, as often as wanted."""

import base64
import html
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxvl.gallery import Gallery, Hit, Query, Table
from jaxvl.progress import duration
from jaxvl.report import plots, sparsity
from jaxvl.report.clock import STEP
from jaxvl.report.goodput import KINDS, Session, account, between, read_sessions
from jaxvl.report.metrics import read_lines, read_metrics, read_whole, write_atomic
from jaxvl.report.page_style import STYLE
from jaxvl.report.summary import KEPT_OUT, WAYS, finals, headed, last_line, number, of_recall, recalls

MOST_SHARDS = 40  # rows of the table of bad samples
CAPTION = 160  # characters of a caption shown
CODES = {  # what the metrics "codes/..." tell, by the name before _image and _text: title, unit, whether it is drawn from 0
    "usage_entropy": ("Evenness of code use, 1 at best", "", True),
    "dead": ("Dead codes", "", True),
    "agreement": ("Image and text agree on a code", "%", True),
    "target_entropy": ("Spread of a sample, 0: one code", "", True),
    "nearest": ("Cosine of the nearest code", "", False),
    "row_error": ("Largest error of a plan's row", "", True),
}


def save_galleries(folder: Path, step: int, galleries: Sequence[Gallery | Table]) -> None:
    """Keep galleries and tables in `folder` for the page; each replaces the one of its title."""
    if galleries:
        path = folder / "galleries.json"
        kept = read_whole(path, dict, {})
        for g in galleries:
            body = {"head": g.head, "rows": g.rows} if isinstance(g, Table) else {"queries": [_plain(q) for q in g.queries]}
            kept[g.title] = {"step": step, **body}
        write_atomic(path, json.dumps(kept))


def write_report(workdir: str | Path) -> Path:
    """Make report.html of a run from its workdir alone, and return its path.

    Raises FileNotFoundError where no run was logged.
    """
    workdir = Path(workdir)
    folder = workdir / "report"
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} holds no report/ folder: no run was logged there")
    rows = read_metrics(workdir)
    facts = read_whole(folder / "facts.json", _facts, {})
    sessions = read_sessions(folder)
    galleries, tables = read_whole(folder / "galleries.json", _shown, ({}, []))
    bad = [(r["shard"], r["reason"]) for path in sorted(folder.glob("bad-*.jsonl")) for _, r in read_lines(path, shard=str, reason=str)]
    name = workdir.resolve().name
    sections = (
        _head(name, facts, rows, sessions),
        _curves(rows),
        _codes(rows),
        section("Words", grid(sparsity.charts(rows)) + (f'<div class="tables">{"".join(map(_titled, tables))}</div>' if tables else "")),
        "".join(_gallery(title, step, queries) for title, (step, queries) in galleries.items()),
        _speed(rows, sessions),
        section("Final metrics", _metrics_table(rows)),
        section("Bad samples", _bad_table(bad)) if bad else "",
        _details(facts),
    )
    path = workdir / "report.html"
    write_document(path, name, "".join(sections))
    return path


def write_document(path: Path, title: str, body: str, style: str = "") -> None:
    """Write a self-contained page in the style of all reports, and `style` besides; atomic."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)} · jaxvl</title><style>{STYLE}{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
    write_atomic(path, page.encode(errors="replace").decode())  # file names can hold bytes that are no text


def _head(name: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], sessions: Sequence[Session]) -> str:
    found = {k: final.last for k, final in finals(rows).items()}
    train = [row for row in rows if "samples" in row]
    seconds = account(sessions)
    tiles = []
    for evaluation, ways in recalls(found).items():
        for way, at in ways.items():
            if 1 in at:
                tiles.append((f"{100 * at[1]:.1f} %", f"{headed(evaluation, found)} {WAYS[way]} R@1".strip()))
    if train:
        tiles.append((f"{train[-1]['step']:,}", f"steps, {train[-1]['samples']:,} samples"))
    if "samples_per_s" in found:
        tiles.append((number(found["samples_per_s"]), "samples/s"))
    if sum(seconds.values()):
        tiles.append((duration(sum(seconds.values())), f"in {len(sessions)} {'process' if len(sessions) == 1 else 'processes'}"))
    if "mfu" in found:
        tiles.append((f"{100 * found['mfu']:.1f} %", "MFU"))
    cells = "".join(f"<div><b>{html.escape(big)}</b><span>{html.escape(small)}</span></div>" for big, small in tiles)
    if sessions:
        facts = {"began": time.strftime("%Y-%m-%d %H:%M", time.localtime(sessions[0].began)), **facts}
    lines = [f"<span><em>{html.escape(k)}</em> {html.escape(v)}</span>" for k, v in facts.items() if isinstance(v, str) and k != "config"]
    words = f"<p>{html.escape(last_line({k: v for k, v in found.items() if of_recall(k)}))}</p>"
    top = f'<h1>{html.escape(name)}</h1><div class="facts">{"".join(lines)}</div>'
    return f'<header>{top}<div class="tiles">{cells}</div>{words}</header>'


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    train = [row for row in rows if "samples" in row]
    x, loss = _column(train, "loss")
    charts = []
    if x:
        trend = plots.smooth(loss, max(3.0, len(x) / 20))
        charts.append(plots.lines("Loss", [plots.Series("each line", x, loss, 0, faint=True), plots.Series("smoothed", x, trend, 0)]))
    names = list(dict.fromkeys(name for row in rows for name in row))
    for evaluation in recalls(dict.fromkeys(names, 0.0)):
        series = []
        for name, ways in ((n, recalls({n: 0.0}).get(evaluation)) for n in names):
            if ways:
                ((way, at),) = ways.items()
                (k,) = at
                at_x, y = _column(rows, name)
                colour = {1: 1, 5: 2, 10: 0}.get(k, 3)
                series.append(plots.Series(f"{WAYS[way]} R@{k}", at_x, [100 * v for v in y], colour, dash="" if way == "i2t" else "6 4"))
        charts.append(plots.lines(f"Recall {headed(evaluation, dict.fromkeys(names, 0.0))}".strip(), series, unit="%", zero=True))
    own = [
        n
        for n in names
        if not of_recall(n)
        and not sparsity.POINT.fullmatch(n)
        and not n.startswith(("time/", "samples_per_s", "codes/"))
        and not n.endswith(("/queries", "/gallery"))  # sizes of what was evaluated, which do not change
    ]
    small = []
    for i, name in enumerate(n for n in own if n not in (*KEPT_OUT, "loss", "mfu")):
        at_x, y = _column(rows, name)
        small.append(plots.lines(name.replace("_", " "), [plots.Series(name, at_x, y, 1 + i % 5)], width=380, height=180))
    return section("Curves", grid(charts) + grid(small, "small"))


def _codes(rows: Sequence[Mapping[str, Any]]) -> str:
    """How a codebook is used, image and text in one chart."""
    charts = []
    for name, (title, unit, zero) in CODES.items():
        series = []
        for view, colour, dash in (("image", 0, ""), ("text", 1, "6 4"), ("", 2, "")):
            x, y = _column(rows, f"codes/{name}_{view}".rstrip("_"))
            if x:
                scaled = [100 * v for v in y] if unit == "%" else y
                series.append(plots.Series(view or name, x, scaled, colour, dash=dash))
        if series:
            charts.append(plots.lines(title, series, unit=unit, zero=zero, width=380, height=180))
    return section("Codebook", grid(charts, "small"))


def _speed(rows: Sequence[Mapping[str, Any]], sessions: Sequence[Session]) -> str:
    train = [row for row in rows if "samples" in row]
    series = [plots.Series(KINDS[name], *_column(train, f"time/{name}_ms"), i) for i, name in enumerate(KINDS) if name in STEP]
    x, rate = _column(train, "samples_per_s")
    charts = [plots.lines("Throughput", [plots.Series("samples/s", x, rate, 0)], unit="samples/s", zero=True) if x else ""]
    charts.append(plots.areas("A step", series, unit="ms"))
    x, mfu = _column(train, "mfu")
    charts.append(plots.lines("MFU", [plots.Series("MFU", x, [100 * v for v in mfu], 2)], unit="%", zero=True) if x else "")
    seconds = account(sessions)
    total = sum(seconds.values())
    text = ""
    if total:
        parts = [(KINDS.get(k, k), v, f"{100 * v / total:.1f} % ({duration(v)})") for k, v in seconds.items()]
        apart = f", {duration(between(sessions))} between its {len(sessions)} processes" if len(sessions) > 1 else ""
        text = f"<h3>Goodput {100 * seconds['compute'] / total:.1f} % of {duration(total)}{apart}</h3>{plots.bar(parts)}"
    return section("Speed", grid(charts) + text)


def _metrics_table(rows: Sequence[Mapping[str, Any]]) -> str:
    found = finals(rows)
    evals = [(n, number(f.last), number(f.best), f"{f.best_step:,}") for n, f in found.items() if f.best is not None]
    train = [(n, number(f.last)) for n, f in found.items() if f.best is None]
    tables = (
        table(("evaluation", "last", "best", "at step"), evals) if evals else "",
        table(("training", "last"), train) if train else "",
    )
    return f'<div class="tables">{"".join(tables)}</div>' if any(tables) else ""


def _bad_table(bad: Iterable[tuple[str, str]]) -> str:
    counts = Counter(bad)
    reasons = sorted({reason for _, reason in counts})
    shards = sorted({shard for shard, _ in counts}, key=lambda s: -sum(counts[s, r] for r in reasons))
    shown, rest = shards[:MOST_SHARDS], shards[MOST_SHARDS:]

    def row(label: str, of: Sequence[str]) -> tuple[str, ...]:
        each = [sum(counts[s, r] for s in of) for r in reasons]
        return (label, *(f"{n:,}" if n else "" for n in each), f"{sum(each):,}")

    lines = [row(shard, [shard]) for shard in shown]
    if rest:
        lines.append(row(f"{len(rest):,} more shards", rest))
    return table(("shard", *reasons, "all"), [*lines, row("all", shards)])


def _titled(named: tuple[str, str]) -> str:
    """A table below its title, to stand beside others."""
    title, body = named
    return f"<div><h3>{html.escape(title)}</h3>{body}</div>"


def _gallery(title: str, step: int, queries: Sequence[Query]) -> str:
    rows = []
    for q in queries:
        hits = "".join(_hit(i, hit) for i, hit in enumerate(q.hits, 1))
        if not any(hit.right for hit in q.hits):
            hits += f'<div class="hit answer">{_item(q.answer)}<small>a right one: rank {q.rank + 1:,}</small></div>'
        rows.append(f'<div class="query"><div class="asked">{_item(q.item)}</div><div class="hits">{hits}</div></div>')
    first = sum(q.rank == 0 for q in queries)
    note = f"{first} of {len(queries)} shown have a right answer first; step {step:,}. ✓ right, ✗ wrong."
    return section(title, f"<p>{note}</p>{''.join(rows)}")


def _hit(place: int, hit: Hit) -> str:
    kind, sign, word = ("right", "✓", "right") if hit.right else ("wrong", "✗", "wrong")
    return (
        f'<div class="hit {kind}">{_item(hit.item)}'
        f'<small><b role="img" aria-label="{word}">{sign}</b> {place}. {hit.score:.3f}</small></div>'
    )


def _item(item: str | bytes) -> str:
    if isinstance(item, bytes):
        return f'<img alt="" src="data:image/png;base64,{base64.b64encode(item).decode()}">'
    return clipped(item)


def clipped(item: str) -> str:
    """A caption as a quotation, its end left out where it is long."""
    clean = re.sub(r"[\x00-\x1f\x7f\s]+", " ", item).strip()
    short = clean if len(clean) <= CAPTION else clean[: CAPTION - 1] + "…"
    return f'<q title="{html.escape(clean[:1000])}">{html.escape(short)}</q>'


def _details(facts: Mapping[str, Any]) -> str:
    versions = "  ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    text = f"<details><summary>config</summary><pre>{html.escape(facts['config'])}</pre></details>" if "config" in facts else ""
    return f"<footer>{text}<p>{html.escape(versions)}</p></footer>"


def grid(charts: Sequence[str], kind: str = "") -> str:
    """Charts side by side; "" where there is none."""
    return f'<div class="charts {kind}">{"".join(charts)}</div>' if any(charts) else ""


def section(title: str, body: str) -> str:
    """A part of the page under its title; "" where it is empty."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have the metric."""
    pairs = [(row["step"], float(row[name])) for row in rows if name in row]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _facts(kept: Any) -> dict[str, Any]:
    """The facts of a run (RunLog.describe). Raises TypeError where they are none."""
    facts = dict(kept)
    if not isinstance(facts.get("config", ""), str) or not isinstance(facts.get("versions", {}), dict):
        raise TypeError("config is no text, or versions are no object")
    return facts


def _shown(kept: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The galleries and the tables that `save_galleries` has kept."""
    galleries = {t: (g["step"], [_query(q) for q in g["queries"]]) for t, g in kept.items() if "queries" in g}
    return galleries, [(t, table(g["head"], g["rows"])) for t, g in kept.items() if "rows" in g]


def _plain(q: Query) -> dict[str, Any]:
    """A query as JSON; pictures as {"png": base64}."""

    def item(value: str | bytes) -> Any:
        return value if isinstance(value, str) else {"png": base64.b64encode(value).decode()}

    hits = [[item(hit.item), float(hit.score), bool(hit.right)] for hit in q.hits]
    return {"item": item(q.item), "hits": hits, "rank": int(q.rank), "answer": item(q.answer)}


def _query(plain: Mapping[str, Any]) -> Query:
    """The inverse of `_plain`."""

    def item(value: Any) -> str | bytes:
        return value if isinstance(value, str) else base64.b64decode(value["png"])

    hits = tuple(Hit(item(what), score, right) for what, score, right in plain["hits"])
    return Query(item(plain["item"]), hits, plain["rank"], item(plain["answer"]))
