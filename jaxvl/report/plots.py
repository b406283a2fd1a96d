"""Charts as inline SVG: no network, no script, colours from the page's style sheet, so light and dark both work."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 34
MOST = 400  # points drawn of one line; more are averaged in bins
STRIPS = 80  # places along the x axis that show their values under the pointer


class Series(NamedTuple):
    """One line; y that is not finite is a gap. label: "" keeps it out of the legend. colour: number of a --c variable. dash: told apart without colour."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    dash: str = ""


def short(value: float) -> str:
    """A number for an axis or a legend: 0.00012, 1.5, 12k, 3.4M."""
    if not math.isfinite(value):
        return str(value)
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers within [low, high], evenly spaced by 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    while True:
        for factor in (1, 2, 5):
            first, last = math.ceil(low / (step * factor) - 1e-9), math.floor(high / (step * factor) + 1e-9)
            if last - first < most:
                return [i * step * factor for i in range(first, last + 1)]
        step *= 10


def powers(low: float, high: float, most: int = 8) -> list[float]:
    """At most `most` powers of 2, 4, 16, ... within [low, high], low above 0."""
    step = 1
    while True:
        first, last = math.ceil(math.log2(low) / step - 1e-9), math.floor(math.log2(high) / step + 1e-9)
        if last - first < most:
            return [2.0 ** (i * step) for i in range(first, last + 1)]
        step *= 2


def smooth(y: Sequence[float], span: float) -> list[float]:
    """Exponential mean over about `span` points each way, so that it does not lag; not-finite points are passed over."""
    keep = 1 - 1 / span

    def sums(values: Sequence[float]) -> list[tuple[float, float]]:
        total, weight, out = 0.0, 0.0, []
        for value in values:  # the sums before this point, so that the two sides and the point itself add up
            out.append((total, weight))
            good = math.isfinite(value)
            total, weight = keep * (total + (value if good else 0.0)), keep * (weight + good)
        return out

    out = []
    for (a, u), (b, v), value in zip(sums(y), reversed(sums(y[::-1])), y, strict=True):
        good = math.isfinite(value)
        weight = u + v + good
        out.append((a + b + (value if good else 0.0)) / weight if weight else math.nan)
    return out


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST) -> tuple[list[float], list[float]]:
    """At most `most` points: the means of equal bins. A bin without a finite y stays a gap."""
    if len(x) <= most:
        return list(x), list(y)
    out_x, out_y = [], []
    for i in range(most):
        part = slice(i * len(x) // most, (i + 1) * len(x) // most)
        good = [v for v in y[part] if math.isfinite(v)]
        out_x.append(sum(x[part]) / len(x[part]))
        out_y.append(sum(good) / len(good) if good else math.nan)
    return out_x, out_y


def lines(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    zero: bool = False,
    width: int = 560,
    height: int = 250,
    across: str = "step",
    log: bool = False,
) -> str:
    """A chart of lines with legend and values under the pointer; "" where nothing is finite.

    zero: the y axis starts at 0. width, height: in pixels at full size. across: what x is; log: on a logarithmic axis, x above 0.
    """
    series = [s._replace(x=x, y=y) for s in series for x, y in [thin(s.x, s.y)]]
    values = [v for s in series for v in s.y if math.isfinite(v)]
    if not values:
        return ""
    low, high = (min(0.0, *values) if zero else min(values)), max(values)
    if high == low:
        low, high = (low - abs(low) * 0.05, high + abs(high) * 0.05) if low else (0.0, 1.0)
    pad = 0.04 * (high - low)
    frame = _frame(series, low if zero and low == 0 else low - pad, high + pad, width, height, across, log)
    body = [_path(s, frame) for s in series]
    label = f"{title}, {unit}" if unit else title
    return _figure(label, series, frame, _axes(frame) + "".join(body) + _strips(series, frame, unit))


def areas(title: str, series: Sequence[Series], *, unit: str = "", width: int = 560, height: int = 250) -> str:
    """The series, all over the same x, stacked on one another; "" where there is nothing to draw."""
    series = [s._replace(x=x, y=[v if math.isfinite(v) else 0.0 for v in y]) for s in series for x, y in [thin(s.x, s.y)]]
    if not series or not series[0].x or not any(any(s.y) for s in series):
        return ""
    base = [0.0] * len(series[0].x)
    bands = []
    for s in series:
        top = [a + b for a, b in zip(base, s.y, strict=True)]
        bands.append((s, base, top))
        base = top
    frame = _frame(series, 0.0, max(base) * 1.04, width, height)
    body = []
    for s, under, over in bands:
        edge = [*zip(s.x, over, strict=True), *reversed(list(zip(s.x, under, strict=True)))]
        body.append(f'<polygon class="area c{s.colour}" points="{" ".join(_point(frame, x, y) for x, y in edge)}"/>')
    return _figure(
        f"{title}, {unit}" if unit else title,
        series,
        frame,
        _axes(frame) + "".join(body) + _strips(series, frame, unit),
        area=True,
    )


def bar(parts: Sequence[tuple[str, float, str]]) -> str:
    """One horizontal bar cut in proportion to the values, (label, value, text), with a legend that gives each text.

    Parts below 0.05 % are left out; every part keeps the colour of its place.
    """
    total = sum(value for _, value, _ in parts) or 1.0
    at, cells, legend = 0.0, [], []
    for i, (label, value, text) in enumerate(parts):
        if value < 5e-4 * total:
            continue
        wide = 1000 * value / total
        words = html.escape(f"{label}: {text}")
        place = f'x="{at:.2f}" y="0" width="{max(0, wide - 1):.2f}" height="34"'
        cells.append(f'<rect class="area c{i}" {place}><title>{words}</title></rect>')
        legend.append(f'<span><i class="key c{i}"></i>{words}</span>')
        at += wide
    picture = f'<svg viewBox="0 0 1000 34" preserveAspectRatio="none" role="img" class="bar">{"".join(cells)}</svg>'
    return f'{picture}<div class="legend">{"".join(legend)}</div>'


class _Frame(NamedTuple):
    """Ranges of the data, and the maps to places in the picture."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float
    width: int
    height: int
    across: str = "step"
    log: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where the point (x, y) lies in the picture."""
        low, x, high = map(math.log, (self.low_x, x, self.high_x)) if self.log else (self.low_x, x, self.high_x)
        across = (x - low) / (high - low)
        up = (y - self.low_y) / (self.high_y - self.low_y)
        return LEFT + across * (self.width - LEFT - RIGHT), self.height - BOTTOM - up * (self.height - TOP - BOTTOM)


def _frame(series: Sequence[Series], low: float, high: float, width: int, height: int, across: str = "step", log: bool = False) -> _Frame:
    places = [x for s in series for x in s.x]
    first, last = min(places), max(places)
    if first == last:  # a single evaluation, drawn at the end of the run it belongs to
        first, last = (0, last) if last > 0 and not log else (first, first + 1)
    return _Frame(first, last, low, high, width, height, across, log)


def _point(frame: _Frame, x: float, y: float) -> str:
    across, down = frame.place(x, y)
    return f"{across:.1f},{down:.1f}"


def _path(s: Series, frame: _Frame) -> str:
    """The line of a series, broken at values that are not finite; a point without neighbours is drawn as a dot."""
    runs: list[list[str]] = [[]]
    for x, y in zip(s.x, s.y, strict=True):
        if math.isfinite(y):
            runs[-1].append(_point(frame, x, y))
        elif runs[-1]:
            runs.append([])
    drawn = [f'<polyline class="{_kind(s)}" points="{" ".join(run)}"{_dash(s)}/>' for run in runs if len(run) > 1]
    alone = [run[0].split(",") for run in runs if len(run) == 1]
    marks = alone if len(s.x) > 30 or s.faint else [p.split(",") for run in runs for p in run]
    drawn += [f'<circle class="dot c{s.colour}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in marks]
    return "".join(drawn)


def _kind(s: Series) -> str:
    return f"line c{s.colour}" + (" faint" if s.faint else "")


def _dash(s: Series) -> str:
    return f' stroke-dasharray="{s.dash}"' if s.dash else ""


def _axes(frame: _Frame) -> str:
    parts = []
    for y in ticks(frame.low_y, frame.high_y, 5):
        down = frame.place(frame.low_x, y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{down + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in powers(frame.low_x, frame.high_x) if frame.log else ticks(frame.low_x, frame.high_x, 6):
        across = frame.place(x, frame.low_y)[0]
        parts.append(f'<text x="{across:.1f}" y="{frame.height - BOTTOM + 18}" text-anchor="middle">{short(x)}</text>')
    base = frame.height - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{base}" y2="{base}"/>')
    return (
        "".join(parts)
        + f'<text class="unit" x="{frame.width - RIGHT}" y="{frame.height - 2}" text-anchor="end">{html.escape(frame.across)}</text>'
    )


def _strips(series: Sequence[Series], frame: _Frame, unit: str) -> str:
    """Invisible columns whose titles tell the values beneath the pointer."""
    longest = max(series, key=lambda s: len(s.x))
    at = thin(longest.x, longest.y, STRIPS)[0]
    wide = (frame.width - LEFT - RIGHT) / max(1, len(at))
    parts = []
    for x in at:
        words = "\n".join(f"{s.label}: {short(_nearest(s, x))} {unit}".rstrip() for s in series if s.x and s.label)
        left = frame.place(x, frame.low_y)[0] - wide / 2
        title = html.escape(f"{frame.across} {x:,.0f}\n{words}")
        place = f'x="{left:.1f}" y="{TOP}" width="{wide:.1f}" height="{frame.height - TOP - BOTTOM}"'
        parts.append(f'<rect class="strip" {place}><title>{title}</title></rect>')
    return "".join(parts)


def _nearest(s: Series, x: float) -> float:
    """The y of the point of a series that is nearest to x."""
    return s.y[min(range(len(s.x)), key=lambda i: abs(s.x[i] - x))]


def _figure(title: str, legend: Sequence[Series], frame: _Frame, body: str, area: bool = False) -> str:
    keys = []
    for s in [s for s in legend if s.label] if len(legend) > 1 or area else []:
        swatch = f'<i class="key c{s.colour}"></i>'
        if not area:
            line = f'<line class="{_kind(s)}" x1="0" x2="26" y1="4" y2="4"{_dash(s)}/>'
            swatch = f'<svg class="swatch" viewBox="0 0 26 8">{line}</svg>'
        keys.append(f"<span>{swatch}{html.escape(s.label)}</span>")
    name = html.escape(title)
    picture = f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{name}">{body}</svg>'
    return f'<figure><figcaption>{name}</figcaption><div class="legend">{"".join(keys)}</div>{picture}</figure>'
