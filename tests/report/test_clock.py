import time

import pytest
from hypothesis import given, settings, strategies as st

from jaxvl.report import clock
from jaxvl.report.clock import Clock, Span, peak_flops, split


def by_the_millisecond(previous, dispatched, arrived, done, spans):
    """What the device did in each whole unit of time of (previous, done]."""
    out = {}
    for t in range(previous, done):
        if t >= max(dispatched, arrived):
            name = "compute"
        elif t >= dispatched:
            name = "transfer"
        else:
            name = next((s.name for s in spans if s.begin <= t < s.end), "other")
        out[name] = out.get(name, 0) + 1
    return out


@st.composite
def steps(draw):
    """Whole times of a step: the host's spans, one after the other, then the dispatch."""
    at, spans = 0, []
    for _ in range(draw(st.integers(0, 5))):
        at += draw(st.integers(0, 4))
        length = draw(st.integers(0, 6))
        spans.append(Span(draw(st.sampled_from(["data", "transfer", "eval"])), at, at + length))
        at += length
    dispatched = at + draw(st.integers(0, 3))
    arrived = draw(st.integers(max(0, dispatched - 5), dispatched + 5))
    previous = draw(st.integers(0, dispatched + 8))
    return previous, dispatched, arrived, max(previous, dispatched, arrived) + draw(st.integers(0, 9)), spans


@settings(max_examples=300, deadline=None)
@given(steps())
def test_split_is_what_a_look_at_every_moment_gives(case):
    found = {k: v for k, v in split(*case).items() if v}
    assert found == by_the_millisecond(*case)
    assert sum(found.values()) == case[3] - case[0]


def test_a_wait_hidden_behind_compute_costs_nothing():
    assert split(10.0, 6.0, 6.0, 15.0, [Span("data", 1.0, 5.0)]) == {
        "data": 0,
        "other": 0,
        "transfer": 0,
        "compute": 5.0,
    }


def test_peaks():
    kinds = {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU v6 lite": 918e12,
        "TPU7x": 1153.5e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GB200": 2500e12,
        "cpu": None,
        "NVIDIA H20": None,
        "TPU v3": None,
    }
    assert {kind: peak_flops(kind) for kind in kinds} == kinds


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until told: now[0] is the time."""
    at = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: at[0])
    return at


def test_every_second_of_a_run_is_accounted_for(now):
    c = Clock()
    now[0] += 3  # start-up
    with c.span("compile"):
        now[0] += 20
    for _ in range(2):
        with c.span("data"):
            now[0] += 1
        with c.span("transfer"):
            now[0] += 0.5
        dispatched, spans = c.dispatch()
        seconds = c.end_step(dispatched, dispatched, now[0] + 2, spans)
        now[0] += 2
        with c.span("eval"):
            now[0] += 4
            with c.span("compile"):
                now[0] += 6
            now[0] += 1
    assert seconds == {"data": 1, "transfer": 0.5, "compute": 2, "other": 0, "eval": 5, "compile": 6}
    now[0] += 0.25
    assert c.totals() == {
        "restart": 3,
        "compile": 32,
        "data": 2,
        "transfer": 1,
        "compute": 4,
        "eval": 10,
        "other": 0.25,
    }
    assert sum(c.totals().values()) == now[0] - c.begin


def test_what_came_before_the_clock_counts_as_the_start(now):
    c = Clock(age=7.0)
    now[0] += 3
    assert c.activity().since == 100.0  # the watchdog does not take it for a stall
    with c.span("data"):
        now[0] += 1
    dispatched, spans = c.dispatch()
    c.end_step(dispatched, dispatched, now[0] + 2, spans)
    now[0] += 2
    assert c.totals() == {"restart": 10, "data": 1, "transfer": 0, "compute": 2, "other": 0}
    assert now[0] - c.begin == 13


def test_activity_names_the_phase_and_its_usual_length(now):
    c = Clock()
    assert c.activity() == ("restart", 100.0, None)
    with c.span("data"):
        now[0] += 2
        assert c.activity() == ("data", 100.0, None)
    for length in (1, 5, 3):
        dispatched, spans = c.dispatch()
        assert c.activity().phase == "compute"
        now[0] += length
        with c.span("data"):  # the device still holds a step, so the host's wait is not what holds the run
            assert c.activity().phase == "compute"
        c.end_step(dispatched, dispatched, now[0], spans)
    assert c.activity() == ("other", now[0], 3)
    with c.span("checkpoint"):
        since = now[0]
        now[0] += 7
        assert c.activity() == ("checkpoint", since, None)
    with c.span("checkpoint"):
        assert c.activity() == ("checkpoint", now[0], 7)
    assert c.activity() == ("other", now[0], 3)  # the wait for the next step begins after the pause


def test_real_time_adds_up():
    c = Clock()
    with c.span("data"):
        time.sleep(0.01)
    dispatched, spans = c.dispatch()
    c.end_step(dispatched, dispatched, time.perf_counter(), spans)
    before = time.perf_counter() - c.begin
    assert before <= sum(c.totals().values()) <= time.perf_counter() - c.begin + 1e-6
