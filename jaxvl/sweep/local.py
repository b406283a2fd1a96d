"""Trials as processes of this machine: so many at a time, watched through the files they write.

The sweep never reaches into a run. It starts `jaxvl train`, follows its metrics.jsonl, asks it to end with SIGTERM (the run
saves and leaves) and reads its exit status.
"""
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxvl.manifest import LockedError
from jaxvl.progress import Bar
from jaxvl.report.metrics import METRICS, decode
from jaxvl.sweep import folder as folders
from jaxvl.sweep.child import tied
from jaxvl.sweep.folder import LOG, Record
from jaxvl.sweep.options import SweepError, SweepOptions
from jaxvl.sweep.prune import falls_behind
from jaxvl.sweep.results import chosen

POLL = 0.2  # seconds between two looks at the trials
TERMINATED = (143, -signal.SIGTERM)  # exit statuses of a run that SIGTERM ended: saved, not finished
STOPPED = "the sweep was stopped"
Command = Callable[[Path], list[str]]


def train_command(run: Path) -> list[str]:
    """How a trial is run; the same line by hand continues it."""
    return [sys.executable, "-m", "jaxvl.cli", "train", f"--config={run / 'config.json'}", f"--workdir={run}"]


def share_devices(workers: int, env: Mapping[str, str], gpus: Sequence[str] | None = None) -> Callable[[int], dict[str, str]]:
    """Which GPUs worker i may see, as environment: this machine's, or CUDA_VISIBLE_DEVICES, in equal parts; nothing without GPUs.

    Raises SweepError where several workers do not divide them: two runs on one GPU would take each other's memory.
    """
    if gpus is None:
        listed = env.get("CUDA_VISIBLE_DEVICES")
        count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
        gpus = [name for name in listed.split(",") if name] if listed is not None else [str(i) for i in range(count)]
    if workers == 1 or not gpus or env.get("JAX_PLATFORMS") == "cpu":
        return lambda _: {}
    if len(gpus) % workers:
        raise SweepError(f"--workers is {workers}, and there are {len(gpus)} GPUs; it must divide them")
    each = len(gpus) // workers
    return lambda i: {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])}


class Child:
    """A trial that runs. step: the last one logged. ending: why it was asked to end, "" while it was not."""

    def __init__(self, folder: Path, record: Record, command: Command, env: dict[str, str]) -> None:
        self.run, self.record, self.ending = folder / record.name, record, ""
        folders.await_free(self.run)
        self._begin = time.monotonic()
        self.record = _keep(folder, record._replace(status="running", reason=""))
        self._tail, self._sent = Tail(self.run / METRICS), set[int]()
        self.step, self._first = 0, record.seconds
        with open(self.run / LOG, "a", encoding="utf-8") as log:
            # A group of its own: Ctrl-C reaches the sweep alone, which passes it on as SIGTERM.
            self.process = subprocess.Popen(tied(command(self.run)), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | env, start_new_session=True)

    def end(self, reason: str, number: int = signal.SIGTERM) -> None:
        """Ask the run to save and end; only the first reason counts."""
        self.ending = self.ending or reason
        if number not in self._sent and self.process.poll() is None:
            self._sent.add(number)  # once: a second SIGTERM would cut short what the first began
            os.killpg(self.process.pid, number)

    def news(self) -> list[dict[str, Any]]:
        """The evaluations logged since the last call."""
        rows = self._tail.read()
        self.step = max([self.step, *(row["step"] for row in rows)])
        return [row for row in rows if "samples" not in row]

    def seconds(self) -> float:
        """All seconds the trial has run."""
        return self._first + time.monotonic() - self._begin


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


def run(folder: Path, options: SweepOptions, waiting: Iterable[Record], bar: Bar, *, steps: dict[str, int], workers: int = 1,
        command: Command = train_command, env: Callable[[int], dict[str, str]] = lambda _: {}, ended: Callable[[Record], None] = lambda _: None) -> bool:  # fmt: skip
    """Run the records of `waiting`, which is asked for the next one when a worker is free, until none is left.

    Returns whether a signal stopped it. steps: of each trial, for the bar. env: of worker i, added to this process's. ended: told of every record that is over or stopped.
    Raises SweepError where the evaluations do not give the metric; the trials then end as by a signal.
    """
    queue, free = iter(waiting), list(range(workers))[::-1]
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
                    if (record := next(queue, None)) is None:
                        exhausted = True
                        break
                    try:
                        running[free[-1]] = Child(folder, record, command, env(free[-1]))
                        free.pop()
                    except LockedError as reason:
                        ended(_keep(folder, record._replace(status="failed", reason=str(reason))))
                for slot, child in list(running.items()):
                    status = child.process.poll()
                    if status is not None:
                        del running[slot]
                        free.append(slot)
                    _follow(folder, options, child)
                    advance(child.record.name, min(child.step, steps[child.record.name] - 1))  # the last one counts when the process has ended
                    if status is not None:
                        record = _keep(folder, _closed(options, child, status))
                        if record.status in folders.OVER:
                            advance(record.name, steps[record.name])
                        ended(record)
            except Exception as reason:  # the trials end in order before anyone hears of it
                error = error or reason
            if signals or error:
                for child in running.values():
                    child.end(STOPPED, signal.SIGTERM if len(signals) < 2 else signal.SIGKILL)
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


def _closed(options: SweepOptions, child: Child, status: int) -> Record:
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


def _keep(folder: Path, record: Record) -> Record:
    folders.write_record(folder, record)
    return record


def why(log: Path, status: int) -> str:
    """Why a process failed, in a line: the signal, or the last words of its log."""
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
