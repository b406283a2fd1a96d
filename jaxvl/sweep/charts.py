"""The charts of sweep.html that a single run has no use for: the spread over seeds, and a metric against what was varied."""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxvl.report.plots import short, ticks

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560, 58, 16, 12, 40


class Bar(NamedTuple):
    """A row of seeds: the value of each, and their mean."""

    label: str
    values: Sequence[float]
    mean: float


class Point(NamedTuple):
    """A trial: the varied value, the metric, and whether it ran to its end."""

    label: str
    x: Any
    y: float
    done: bool


def spreads(title: str, bars: Sequence[Bar]) -> str:
    """A line from the lowest to the highest seed for each row, a dot a seed, a stroke at the mean; "" without any."""
    bars = [b._replace(values=[v for v in b.values if math.isfinite(v)]) for b in bars]
    bars = [b for b in bars if b.values]
    if not bars:
        return ""
    low, high = _room([v for b in bars for v in b.values])
    left = min(260, 24 + 7 * max(len(b.label) for b in bars))
    height = TOP + 30 * len(bars) + BOTTOM
    across = lambda v: left + (v - low) / (high - low) * (WIDTH - left - RIGHT)
    parts = []
    for tick in ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(_text(across(tick), height - BOTTOM + 18, short(tick)))
    for i, b in enumerate(bars):
        y = TOP + 30 * i + 15
        cut = b.label if len(b.label) <= 34 else b.label[:33] + "…"
        parts.append(_text(left - 12, y + 4, cut, "end"))
        parts.append(f'<line class="line c0" x1="{across(min(b.values)):.1f}" x2="{across(max(b.values)):.1f}" y1="{y}" y2="{y}"/>')
        parts += [f'<circle class="dot c0" cx="{across(v):.1f}" cy="{y}" r="3.4"/>' for v in b.values]
        if math.isfinite(b.mean):
            parts.append(f'<line class="line c1" x1="{across(b.mean):.1f}" x2="{across(b.mean):.1f}" y1="{y - 9}" y2="{y + 9}"/>')
        words = f"{b.label}: mean {short(b.mean)}, {short(min(b.values))} to {short(max(b.values))}, {len(b.values)} seeds"
        parts.append(
            f'<rect class="strip" x="{left}" y="{y - 15}" width="{WIDTH - left - RIGHT}" height="30"><title>{html.escape(words)}</title></rect>'
        )
    return _figure(title, "a dot a seed; the stroke is the mean", "".join(parts), height)


def scatter(title: str, points: Sequence[Point], *, log: bool, height: int = 240) -> str:
    """The metric against one override, each trial a dot, hollow where it did not run to its end; "" without any.

    Values that are not numbers stand side by side in the order they are met.
    """
    points = [p for p in points if math.isfinite(p.y)]
    if not points:
        return ""
    numeric = all(isinstance(p.x, (int, float)) and not isinstance(p.x, bool) for p in points)
    kinds = list(dict.fromkeys(str(p.x) for p in points))
    place = (lambda x: math.log10(x) if log else float(x)) if numeric else lambda x: float(kinds.index(str(x)))
    low, high = _room([place(p.x) for p in points]) if numeric else (-0.5, len(kinds) - 0.5)
    bottom, top = _room([p.y for p in points])
    across = lambda v: LEFT + (v - low) / (high - low) * (WIDTH - LEFT - RIGHT)
    down = lambda v: height - BOTTOM - (v - bottom) / (top - bottom) * (height - TOP - BOTTOM)
    parts = []
    for tick in ticks(bottom, top, 5):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>')
        parts.append(_text(LEFT - 7, down(tick) + 4, short(tick), "end"))
    marks = (
        [(place(x), short(x)) for x in (_log_ticks(low, high) if log else ticks(low, high, 6))]
        if numeric
        else [(float(i), k) for i, k in enumerate(kinds)]
    )
    parts += [_text(across(x), height - BOTTOM + 18, word) for x, word in marks]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height - BOTTOM}" y2="{height - BOTTOM}"/>')
    for p in points:
        style = 'class="dot c0"' if p.done else 'class="line c6" style="stroke-width:1.4"'
        parts.append(
            f'<circle {style} cx="{across(place(p.x)):.1f}" cy="{down(p.y):.1f}" r="4"><title>{html.escape(f"{p.label}: {short(p.y)}")}</title></circle>'
        )
    return _figure(title, "", "".join(parts), height)


def _room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - pad, high + pad


def _log_ticks(low: float, high: float) -> list[float]:
    """Values at 1, 2 and 5 times powers of ten whose logarithms lie within [low, high]; powers alone where those are many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = [m * 10.0**p for p in powers for m in ((1, 2, 5) if high - low < 2.5 else (1,))]
    return [v for v in every if low <= math.log10(v) <= high]


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _figure(title: str, note: str, body: str, height: int) -> str:
    name = html.escape(title)
    legend = f'<div class="legend">{html.escape(note)}</div>' if note else ""
    return f'<figure><figcaption>{name}</figcaption>{legend}<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{body}</svg></figure>'
