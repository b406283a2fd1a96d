"""Which trial runs when: so many at a time, watched through the files they write.

The scheduler never reaches into a run. It has `jaxvl train` started (here or elsewhere: a Launch), follows its
metrics.jsonl, has it end with SIGTERM (the run saves and leaves) and takes its exit status.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxvl.progress import Bar, say
from jaxvl.report.metrics import METRICS, decode
from jaxvl.sweep import folder as folders
from jaxvl.sweep.folder import LOG, Record
from jaxvl.sweep.options import SweepError, SweepOptions
from jaxvl.sweep.prune import falls_behind
from jaxvl.sweep.results import chosen

POLL = 0.2  # seconds between two looks at the trials
PATIENCE = 600.0  # seconds for which the run of a killed sweep may save and leave
TERMINATED = (143, -signal.SIGTERM)  # exit statuses of a run that SIGTERM ended: saved, not finished
STOPPED = "the sweep was stopped"


class Process(Protocol):
    """A run that was started. job: by which a later sweep finds it again, "" where it ends with this one."""

    job: str

    def poll(self) -> int | str | None:
        """None while it runs, then its exit status, or in words what became of it."""

    def end(self, kill: bool) -> None:
        """Ask it to save and leave, or kill it."""


Launch = Callable[[Path, int, str], Process]  # (run directory, worker, job of an earlier sweep or "") -> its process


class Source(NamedTuple):
    """Where trials come from. next: one that is to run, None when there are no more. over: told of each that ended. length: steps of a trial, for the bar."""

    next: Callable[[], Record | None]
    over: Callable[[Record], None]
    length: Callable[[str], int]


class Child:
    """A trial at work. step: the last one logged. ending: why it was asked to end, "" while it was not.

    It starts when nothing else writes to its run: what a sweep killed outright has left may still be saving.
    """

    def __init__(self, folder: Path, record: Record, launch: Launch, slot: int) -> None:
        self.run, self.ending, self.step = folder / record.name, "", 0
        self._folder, self._launch, self._slot = folder, launch, slot
        self._begin, self._before = time.monotonic(), record.seconds
        self._tail, self._asked, self._told = Tail(self.run / METRICS), set[bool](), False
        self._process: Process | None = None
        self.record = keep(folder, record._replace(status="running", reason=""))

    def poll(self) -> int | str | None:
        """See `Process`."""
        if self._process:
            return self._process.poll()
        if self.ending:
            return TERMINATED[0]
        if (writer := folders.writer(self.run)) and not self.record.job:
            if not self._told:
                say(f"{self.record.name}: waiting, {writer}")
            self._told = True
            return writer if time.monotonic() - self._begin > PATIENCE else None
        self._process = self._launch(self.run, self._slot, self.record.job)
        self.record = keep(self._folder, self.record._replace(job=self._process.job))
        return None

    def end(self, reason: str, *, kill: bool = False) -> None:
        """Have the run save and end; the first reason counts, and each way is asked once: a second SIGTERM would cut short what the first began."""
        self.ending = self.ending or reason
        if self._process and kill not in self._asked:
            self._asked.add(kill)
            self._process.end(kill)

    def news(self) -> list[dict[str, Any]]:
        """The evaluations logged since the last call."""
        rows = self._tail.read()
        self.step = max([self.step, *(row["step"] for row in rows)])
        return [row for row in rows if "samples" not in row]

    def seconds(self) -> float:
        """All seconds the trial has run."""
        return self._before + time.monotonic() - self._begin


class Tail:
    """Follows a JSON-lines file; begins anew where a resumed run has replaced it."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._offset = path, -1, 0

    def read(self) -> list[dict[str, Any]]:
        """The rows added since the last call, whole lines only."""
        try:
            with open(self._path, "rb") as file:
                if (inode := os.fstat(file.fileno()).st_ino) != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [decode(line) for line in whole.decode(errors="replace").splitlines()]


def run(folder: Path, options: SweepOptions, source: Source, bar: Bar, launch: Launch, *, workers: int) -> bool:
    """Run the trials of `source`, which is asked for the next one when a worker is free, until it has none. Returns whether a signal stopped it.

    Raises SweepError where the evaluations do not give the metric; the trials then end as by a signal.
    """
    free = list(range(workers))[::-1]
    running: dict[int, Child] = {}
    seen: dict[str, int] = {}  # step of each trial already in the bar
    error: Exception | None = None

    def advance(name: str, step: int) -> None:
        if (more := step - seen.get(name, 0)) > 0:
            seen[name] = seen.get(name, 0) + more
            bar.advance(more)

    exhausted = False
    with _signals() as signals:
        while True:
            try:
                while free and not (exhausted or signals or error):
                    if (record := source.next()) is None:
                        exhausted = True
                        break
                    slot = free.pop()
                    running[slot] = Child(folder, record, launch, slot)
                for slot, child in list(running.items()):
                    status = child.poll()
                    if status is not None:
                        del running[slot]
                        free.append(slot)
                    _follow(folder, options, child)
                    advance(
                        child.record.name, min(child.step, source.length(child.record.name) - 1)
                    )  # the last one counts when the process has ended
                    if status is not None:
                        record = keep(folder, _closed(options, child, status))
                        if record.status in folders.OVER:
                            advance(record.name, source.length(record.name))
                        source.over(record)
            except Exception as reason:  # the trials end in order before anyone hears of it
                error = error or reason
            if signals or error:
                for child in running.values():
                    child.end(STOPPED)
                    if len(signals) > 1:
                        child.end(STOPPED, kill=True)
            if not running and error:
                raise error
            if not running and (signals or exhausted):
                return bool(signals)
            bar.advance(0, note=", ".join(f"{c.record.name} at {c.step:,}" for c in running.values())[:60])
            time.sleep(POLL)


def _follow(folder: Path, options: SweepOptions, child: Child) -> None:
    """Look at new evaluations: is the metric among them, and does the trial fall behind?"""
    news = child.news()
    if not news:
        return
    for metric in (options.metric, *options.also):
        names = folders.known_metrics(news)
        if metric not in names and any(name.startswith(metric.partition("/")[0] + "/") for name in names):
            raise SweepError(f"the evaluations of trial {child.record.name!r} give no {metric!r}; they give: {', '.join(names)}")
    if not child.ending and options.keep < 1:
        others = {p.parent.name: folders.curve(p.parent, options.metric) for p in folder.glob("*/trial.json")}
        if reason := falls_behind(options, others, child.record.name):
            child.end(reason)


def _closed(options: SweepOptions, child: Child, status: int | str) -> Record:
    """The record of a trial whose process has ended."""
    if status == 0:
        found = chosen(options, folders.evaluations(child.run))[0] is not None
        verdict, reason = ("done", "") if found else ("failed", f"it ended without the metric {options.metric!r}")
    elif status in TERMINATED and child.ending and child.ending != STOPPED:
        verdict, reason = "pruned", child.ending
    elif status in TERMINATED or child.ending:
        verdict, reason = "stopped", child.ending or "SIGTERM from outside the sweep"
    else:
        verdict, reason = "failed", why(child.run / LOG, status)
    return child.record._replace(status=verdict, reason=reason, seconds=round(child.seconds(), 1))


def keep(folder: Path, record: Record) -> Record:
    """Write the record, and return it."""
    folders.write_record(folder, record)
    return record


def why(log: Path, status: int | str) -> str:
    """Why a process failed, in a line: what became of it, the signal, or the last words of its log."""
    if isinstance(status, str):
        return status
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()] if log.is_file() else []
    said = [line for line in lines if line and not line.startswith("(JAXVL_TRACEBACK")]
    return f"exit {status}: {said[-1][:300] if said else 'it said nothing'}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGINT and SIGTERM that have come; the first asks the trials to save and end, the second kills them."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
