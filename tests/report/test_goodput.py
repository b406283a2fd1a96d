import pytest
from hypothesis import given, strategies as st

from jaxvl.report.goodput import KINDS, Session, account, between, read_sessions, resume, save_sessions
from jaxvl.report.page_style import STYLE


def session(first, last, seconds):
    return Session(0.0, first, last, last, seconds)


def test_work_done_twice_is_lost(tmp_path):
    sessions = [session(0, 130, {"compute": 130.0, "data": 26.0, "eval": 9.0})]
    sessions = [*resume(sessions, 100), session(100, 250, {"compute": 150.0, "restart": 5.0})]
    save_sessions(tmp_path, sessions)
    total = account(read_sessions(tmp_path))
    assert total == pytest.approx(dict.fromkeys(KINDS, 0.0) | {"compute": 250.0, "data": 20.0, "eval": 9.0, "restart": 5.0, "lost": 36.0})
    # An older checkpoint takes steps from both sessions; the rest of a session counts as before.
    assert account(resume(sessions, 50))["compute"] == pytest.approx(50.0)
    assert account(resume(sessions, 200))["compute"] == pytest.approx(200.0)
    assert read_sessions(tmp_path / "nowhere") == []


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 60)), min_size=1, max_size=6))
def test_no_second_appears_or_vanishes_and_kept_steps_are_the_run(cases):
    sessions, at = [], 0
    for made, back in cases:
        sessions = [*resume(sessions, at), session(at, at + made, {"compute": float(made), "checkpoint": 1.0})]
        at = max(0, at + made - back)
    sessions = resume(sessions, at)
    total = account(sessions)
    assert sum(total.values()) == pytest.approx(sum(sum(s.seconds.values()) for s in sessions))
    assert sum(s.kept - s.first for s in sessions) == at
    assert total["compute"] == pytest.approx(at)


def test_time_without_a_process():
    at = lambda began, seconds: Session(began, 0, 1, 1, {"compute": seconds})
    assert between([]) == between([at(5.0, 9.0)]) == 0.0
    assert between([at(0.0, 10.0), at(12.5, 10.0), at(22.0, 1.0)]) == 2.5  # a clock set back in between gives nothing back


def test_every_kind_has_a_colour_in_light_and_in_dark():
    for number in range(len(KINDS)):
        assert STYLE.count(f"--c{number}:#") == 2 and f".c{number}{{--c:var(--c{number})}}" in STYLE, number
