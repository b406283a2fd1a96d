import itertools
import math
import re

import pytest
from hypothesis import given, strategies as st

from jaxvl.report import plots
from jaxvl.report.plots import Series


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 9))
def test_ticks_are_round_few_and_inside(low, size, most):
    high = low + size
    found = plots.ticks(low, high, most)
    assert len(found) <= most
    near = 1e-6 * size + 4 * math.ulp(abs(low) + size)  # what floats of that size can tell apart
    assert all(low - near <= t <= high + near for t in found)
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(abs(step - steps[0]) <= near for step in steps)
    assert found or high == low or size < near


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.00012, "0.00012"), (1500, "1500"), (12000, "12k"), (3.4e6, "3.4M"), (-2e9, "-2G")]
)
def test_short(value, text):
    assert plots.short(value) == text


@given(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(math.nan)), max_size=30), st.floats(1.5, 20))
def test_smooth_is_the_weighted_mean_of_both_sides(y, span):
    keep = 1 - 1 / span
    for i, found in enumerate(plots.smooth(y, span)):
        pairs = [(keep ** abs(i - j), v) for j, v in enumerate(y) if math.isfinite(v)]
        if pairs:
            assert found == pytest.approx(sum(w * v for w, v in pairs) / sum(w for w, _ in pairs), abs=1e-6)
        else:
            assert math.isnan(found)


def test_thin_keeps_the_mean_and_the_gaps():
    x = list(range(1000))
    y = [math.nan if 200 <= i < 400 else float(i) for i in x]
    thin_x, thin_y = plots.thin(x, y, 10)
    assert thin_x == [49.5 + 100 * i for i in range(10)]
    assert thin_y[:2] == thin_x[:2] and all(map(math.isnan, thin_y[2:4])) and thin_y[4:] == thin_x[4:]
    assert plots.thin(x[:10], y[:10], 10) == (x[:10], y[:10])


def points(svg):
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in re.findall(r'polyline[^>]*points="([^"]*)"', svg)]


def test_lines_are_drawn_to_scale_and_broken_at_gaps():
    svg = plots.lines("t", [Series("a", [0, 1, 2, 3, 4], [0.0, 1.0, math.nan, 1.0, 2.0])], zero=True)
    first, second = points(svg)
    assert len(first) == len(second) == 2
    (x0, y0), (x1, y1), (_, y3), (x4, y4) = *first, *second
    assert x1 - x0 == pytest.approx((x4 - x1) / 3, abs=0.2) and y1 == y3
    assert y0 - y1 == pytest.approx(y3 - y4, abs=0.2) and y0 > y1 > y4
    assert y0 == 250 - plots.BOTTOM
    assert "step 4\na: 2" in svg


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios():
    svg = plots.lines("t", [Series("a", [4, 16, 64, 1300], [1.0, 2.0, 3.0, 4.0])], across="entries", log=True)
    ((a, b, c, d),) = points(svg)
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.2) and d[0] == 560 - plots.RIGHT
    assert "entries 64\na: 3" in svg and ">entries<" in svg and "step" not in svg
    assert [t for t in ("4", "16", "64", "256") if f'text-anchor="middle">{t}<' in svg] == ["4", "16", "64", "256"]


@given(st.floats(1e-3, 1e6), st.floats(1.5, 1e6), st.integers(2, 9))
def test_powers_are_few_and_inside(low, ratio, most):
    found = plots.powers(low, low * ratio, most)
    assert len(found) <= most and all(low * (1 - 1e-6) <= x <= low * ratio * (1 + 1e-6) for x in found)
    assert len({round(math.log2(b / a)) for a, b in itertools.pairwise(found)}) <= 1


@pytest.mark.parametrize("y", [[], [math.nan, math.inf]])
def test_nothing_finite_draws_nothing(y):
    assert plots.lines("t", [Series("a", range(len(y)), y)]) == ""
    assert plots.areas("t", [Series("a", range(len(y)), y)]) == ""


@pytest.mark.parametrize("y", [[1.0], [0.0, 0.0], [-5.0, -5.0], [1e-30, 1e30]])
def test_strange_values_are_drawn(y):
    svg = plots.lines("<t>", [Series("a & b", range(len(y)), y, faint=True), Series("c", range(len(y)), y)])
    assert "nan" not in svg and "&lt;t&gt;" in svg and "a &amp; b" in svg


def test_areas_stack():
    svg = plots.areas("t", [Series("a", [0, 1], [1.0, 1.0]), Series("b", [0, 1], [1.0, 3.0])])
    lower, upper = ([tuple(map(float, p.split(","))) for p in s.split()] for s in re.findall(r'polygon[^>]*points="([^"]*)"', svg))
    assert lower[:2] == upper[:1:-1]  # b stands on a
    height = [under[1] - over[1] for over, under in zip(upper[:2], upper[:1:-1], strict=True)]
    assert height[1] == pytest.approx(3 * height[0], rel=0.01)


def test_bar_is_cut_in_proportion_and_colours_keep_their_places():
    svg = plots.bar([("a", 3.0, "75 %"), ("left out", 0.0, "0 %"), ("b", 1.0, "25 %")])
    assert re.findall(r'rect class="area (c\d)" x="([\d.]+)"[^>]*?width="([\d.]+)"', svg) == [
        ("c0", "0.00", "749.00"),
        ("c2", "750.00", "249.00"),
    ]
    assert "left out" not in svg and "b: 25 %" in svg


def test_a_single_evaluation_stands_at_the_end_of_its_run():
    chart = plots.lines("recall", [Series("R@1", [600], [5.0], 0)], unit="%", zero=True)
    assert ">600<" in chart and ">0<" in chart and "600.2" not in chart
    assert ">64<" in plots.lines("recall", [Series("R@1", [64], [5.0], 0)], unit="%", zero=True, across="entries", log=True)
