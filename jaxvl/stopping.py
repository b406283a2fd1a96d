"""How a run is told to stop: SIGTERM or a first Ctrl-C has it save and leave, a second Ctrl-C ends it at once.

with stopping() as told:
    for step in ...:
        if status := told(): save and return it
"""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

from jaxvl.processes import PARENT, grace
from jaxvl.progress import say

TERMINATED = 128 + signal.SIGTERM  # exit status of a run that was told to stop: saved, not finished
INTERRUPTED = 128 + signal.SIGINT  # the same, told by Ctrl-C
ORPHAN_POLL = 1.0  # seconds between two looks at the parent


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """told(): the exit status that a signal asks for, 0 before one has come.

    Called after every step by every process; it answers on all of them at the same step. Outside of the block a signal ends
    the process, which has nothing to save there.
    """
    seen: list[int] = []
    if jax.process_count() > 1:
        # JAX's own service catches SIGTERM of any process and agrees with all others on a call. The calls are numbered from 1,
        # not by step: of a signal that came before the first call the service expects it at number 1, and would miss it in a
        # resumed run.
        calls = itertools.count(1)
        with _handled(signal.SIGINT, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            yield lambda: TERMINATED if multihost_utils.reached_preemption_sync_point(next(calls)) else 0
        return
    with _handled(signal.SIGINT, lambda: seen.append(INTERRUPTED)):
        before = signal.signal(signal.SIGTERM, lambda *_: seen.append(TERMINATED))
        try:
            yield lambda: seen[0] if seen else 0
        finally:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _handled(number: signal.Signals, first: Callable[[], None]) -> Iterator[None]:
    """Call `first` at the first such signal; from then on the system's own action, which ends the process even in a step that
    never ends."""
    # A job started in the background of a script ignores Ctrl-C, and goes on doing so.
    if signal.getsignal(number) == signal.SIG_IGN:
        yield
        return

    def handle(*_: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        say("interrupted: saving after this step; Ctrl-C again ends the run at once, without saving")
        first()

    before = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)


def end_with_parent() -> None:
    """Have this process end, a grace period after the process that started it as its own has gone.

    Linux sends it SIGTERM at that moment (processes.py), which a run answers by saving and leaving. One that hangs cannot,
    and would hold the workdir's lock for ever.
    """
    if parent := os.environ.pop(PARENT, ""):
        number, seconds = int(parent.partition(":")[0]), grace(parent)
        threading.Thread(target=_outlive, args=(number, seconds), name="parent", daemon=True).start()


def _outlive(parent: int, seconds: float) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_POLL)
    time.sleep(seconds)
    say(f"process {os.getpid()} ends: {parent}, which started it, has been gone for {seconds:g} s and it has not stopped since")
    os.kill(os.getpid(), signal.SIGKILL)
