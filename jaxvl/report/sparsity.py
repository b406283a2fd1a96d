"""Recall against the active entries of lexical vectors, drawn from the numbers that evaluations of kind "lexical" log."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxvl.report import plots
from jaxvl.report.summary import WAYS, finals

POINT = re.compile(r"(?:(?P<eval>.+)/)?(?P<point>top(?P<kept>\d+)|dense)/(?P<way>i2t|t2i)_r@(?P<k>\d+)")
COLOURS = {1: 1, 5: 2, 10: 0}  # those of the page's other recalls


def charts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A chart for each evaluation: its last recalls with the greatest few entries of every vector; the last point has all of them."""
    found = finals(rows)
    curves: dict[str, dict[tuple[str, int], dict[float, float]]] = {}
    for name, final in found.items():
        if m := POINT.fullmatch(name):
            evaluation = m["eval"] or ""
            curves.setdefault(evaluation, {}).setdefault((m["way"], int(m["k"])), {})[_active(m, found)] = 100 * final.last
    out = []
    for evaluation, by_way in curves.items():
        series = []
        for (way, k), points in by_way.items():
            x = sorted(points)
            series.append(
                plots.Series(f"{WAYS[way]} R@{k}", x, [points[n] for n in x], COLOURS.get(k, 3), dash="" if way == "i2t" else "6 4")
            )
        out.append(plots.lines(f"Recall {evaluation} by entries kept", series, unit="%", zero=True, across="entries", log=True))
    return out


def _active(point: re.Match[str], found: Mapping[str, Any]) -> float:
    """Entries that a vector keeps; all of them, for the dense ones, come of the active ones and their density."""
    if point["kept"]:
        return float(point["kept"])
    start = f"{point['eval']}/" if point["eval"] else ""
    return round(found[f"{start}image_active"].last / found[f"{start}image_density"].last)
