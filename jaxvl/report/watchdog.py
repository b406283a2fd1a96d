"""A thread that notices when nothing ends: it dumps all stacks, says which phase is stuck, and kills nothing."""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jaxvl.progress import duration
from jaxvl.report.clock import Activity
from jaxvl.terminal import tell


class Watchdog:
    """Compares `activity()` with its usual length, and dumps once per stall.

    A stall: the phase has lasted more than max(floor, factor * usual) seconds. The stacks go to standard error and to
    `folder`/stacks-<process>-<number>.txt. `step` tells how far the run is, for the message, and `missing` which other
    processes are waited for.

    Where a thread holds the interpreter for good this thread cannot run either; for that case it keeps a timer of
    `faulthandler` armed, which needs no interpreter, and puts it off each time it looks.
    """

    def __init__(
        self,
        activity: Callable[[], Activity],
        step: Callable[[], int],
        folder: Path,
        process: int = 0,
        *,
        factor: float,
        floor: float,
        missing: Callable[[], str] = lambda: "",
    ) -> None:
        self._activity, self._step, self._folder = activity, step, folder
        self._factor, self._floor, self._process, self._missing = factor, floor, process, missing
        self._stalled: tuple[str, float] | None = None
        self._quit = threading.Event()
        self._frozen = open(folder / f"stacks-{process}-frozen.txt", "a")  # noqa: SIM115
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._quit.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if os.fstat(self._frozen.fileno()).st_size == 0:
            Path(self._frozen.name).unlink(missing_ok=True)
        self._frozen.close()

    def _watch(self) -> None:
        pause = min(5.0, self._floor / 4)
        while not self._quit.wait(pause):
            faulthandler.dump_traceback_later(2 * self._floor + pause, file=self._frozen)
            now = self._activity()
            key = (now.phase, now.since)
            lasted = time.perf_counter() - now.since
            limit = max(self._floor, self._factor * (now.usual or 0.0))
            if lasted > limit and key != self._stalled:
                self._stalled = key
                self._dump(now, lasted)

    def _dump(self, now: Activity, lasted: float) -> None:
        usual = "" if now.usual is None else f", {lasted / max(now.usual, 1e-9):,.0f} times the median of {now.usual:.3g} s"
        where = f"phase: {now.phase}, after step {self._step():,}"
        head = f"watchdog: process {self._process} on {socket.gethostname()}: nothing has ended for {duration(lasted)}{usual}; {where}"
        tell(head, error=True)  # at once; to learn what the others do takes two looks
        number = sum(1 for _ in self._folder.glob(f"stacks-{self._process}-[0-9]*.txt"))
        path = self._folder / f"stacks-{self._process}-{number}.txt"
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {head}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        stacks = path.read_text().partition("\n")[2]
        if who := self._missing():
            tell(f"watchdog: {who}", error=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{who}\n")
        tell(f"{stacks}these stacks are in {path}; the run goes on", error=True)
