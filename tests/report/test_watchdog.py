import threading
import time

import pytest

from jaxvl.report.clock import Activity
from jaxvl.report.watchdog import Watchdog


def wait_for(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def a_function_that_hangs(event):
    event.wait()


@pytest.fixture
def stuck():
    """A thread that hangs where the stacks must show it."""
    event = threading.Event()
    thread = threading.Thread(target=a_function_that_hangs, args=(event,))
    thread.start()
    yield
    event.set()
    thread.join()


@pytest.mark.usefixtures("stuck")
def test_one_dump_a_stall_with_phase_step_and_stacks(tmp_path, capfd):
    now = [Activity("data", time.perf_counter(), 0.001)]
    dog = Watchdog(lambda: now[0], lambda: 1234, tmp_path, factor=2.0, floor=0.1)
    stacks = lambda: sorted(tmp_path.glob("stacks-0-[0-9]*.txt"))
    assert wait_for(lambda: len(stacks()) == 1)
    time.sleep(0.3)
    assert len(stacks()) == 1
    now[0] = Activity("eval", time.perf_counter(), None)
    assert wait_for(lambda: len(stacks()) == 2)
    dog.close()
    first, second = (path.read_text() for path in stacks())
    assert "phase: data, after step 1,234" in first and "times the median of 0.001 s" in first
    assert "a_function_that_hangs" in first and "test_watchdog.py" in first
    assert "phase: eval" in second and "median" not in second
    error = capfd.readouterr().err
    assert error.count("watchdog: ") == 2 and error.count("a_function_that_hangs") == 2
    assert not list(tmp_path.glob("*frozen*"))


def test_no_dump_while_steps_end_or_are_usually_long(tmp_path):
    begin = time.perf_counter()
    beat = [lambda: Activity("compute", time.perf_counter(), 0.001), lambda: Activity("compute", begin, 10.0)]
    for activity in beat:
        dog = Watchdog(activity, lambda: 0, tmp_path, factor=2.0, floor=0.2)
        time.sleep(0.5)
        dog.close()
    assert not list(tmp_path.iterdir())


def test_stacks_of_a_frozen_interpreter(tmp_path):
    """While the watchdog's own thread cannot run, the timer that needs no interpreter dumps for it."""
    release = threading.Event()

    def activity():
        release.wait()  # the watchdog's thread stands still here, as if another held the interpreter
        return Activity("compute", time.perf_counter(), None)

    dog = Watchdog(activity, lambda: 0, tmp_path, factor=2.0, floor=0.1)
    frozen = tmp_path / "stacks-0-frozen.txt"
    assert wait_for(lambda: frozen.stat().st_size > 0)
    assert "Thread" in frozen.read_text()
    release.set()
    dog.close()
    assert frozen.exists()
