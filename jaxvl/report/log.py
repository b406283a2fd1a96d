"""The log of a run: what a person watches while it goes and reads when it is over.

The trainer hands over device arrays and never waits for them. A thread of the log waits instead: it sees each batch
arrive and each step end, which gives exact times without a sync in the loop, and it writes the lines. The loop reads

    with report.open_log(options, workdir) as log:
        log.start(step=step, steps=steps, batch_size=256, samples_per_epoch=n, ...)
        while step < steps:
            with log.wait("data"): batch = next(stream)
            with log.wait("transfer"): arrays = place(batch)
            state, metrics = train_step(state, arrays)
            step += 1
            log.step(step, metrics, arrays)
            with log.pause("checkpoint"): save(state)
        log.finish()

In the workdir: metrics.jsonl, tensorboard/, report.html, stacks-*.txt where something hung, and report/ with what the
page is made from.
"""

import contextlib
import json
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl.gallery import Gallery
from jaxvl.progress import Bar, duration, progress, say, silence
from jaxvl.report import clock, goodput, metrics, samples, summary
from jaxvl.report.options import LogOptions, check
from jaxvl.report.page import save_galleries, write_report
from jaxvl.report.peers import Board, Peers
from jaxvl.report.watchdog import Watchdog
from jaxvl.report.window import Plan, Window
from jaxvl.secrets import public

IN_FLIGHT = 4  # steps the host may be ahead: enough to hide its jitter, few enough that waiting batches stay small in memory


class _Step(NamedTuple):
    """A step on its way: its metrics and batch as device arrays, and what the host did before it."""

    number: int
    values: Mapping[str, Any]
    batch: Any
    arrived: bool  # the batch was on the device when the step was handed in, so nothing waited for it
    dispatched: float
    spans: list[clock.Span]


@contextlib.contextmanager
def open_log(options: LogOptions, workdir: str | os.PathLike, process: int = 0, age: float = 0.0) -> Iterator["RunLog"]:
    """The log of a run in `workdir`; open it first, since the account of time starts here, or `age` seconds before.

    Process 0 writes and prints; the others keep their watchdog and their table of bad samples.
    """
    log = RunLog(check(options), Path(workdir), process, age)
    try:
        yield log
    except BaseException:
        log.close(wait=False)
        raise
    log.close()


class RunLog:
    """See the module; made by `open_log`. All methods are for the thread that runs the loop."""

    def __init__(self, options: LogOptions, workdir: Path, process: int, age: float) -> None:
        if options.wandb and not process:
            metrics.need_wandb(options.wandb)
        self._options, self._workdir = options, workdir
        self._folder = workdir / "report"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process, self._main = process, process == 0
        silence(not self._main)
        self._clock = clock.Clock(age)
        self._plan: Plan | None = None
        self._writers: list[metrics.Writer] = []
        self._window: Window | None = None
        self._files = contextlib.ExitStack()
        self._sessions: list[goodput.Session] = []
        self._saved = 0.0
        self._step = 0
        self._bar: Bar | None = None
        self._error: BaseException | None = None
        self._queue: queue.Queue[_Step | None] = queue.Queue(IN_FLIGHT)
        self._thread: threading.Thread | None = None
        self._facts: dict[str, str] = {}
        self._bad_path = self._folder / f"bad-{process}.jsonl"
        self._bad: set[tuple[str, str, str]] = set()
        self._fed: metrics.Writer | None = None
        self._peers: Peers | None = None
        self._processes = 1
        self._past: dict[str, float] = {}
        self._dog: Watchdog | None = None
        if options.watchdog:
            limits = {"factor": options.watchdog, "floor": options.watchdog_floor}
            missing = lambda: self._peers.missing() if self._peers else ""
            self._dog = Watchdog(self._clock.activity, lambda: self._step, workdir, process, **limits, missing=missing)

    def describe(self, **facts: Any) -> None:
        """Facts for the head of the page, e.g. config=str(config), devices="8 x TPU v4"; versions are added."""
        self._facts |= {name: str(fact) for name, fact in facts.items()}
        if self._main:
            metrics.write_atomic(self._folder / "facts.json", json.dumps(self._facts | {"versions": _versions()}, indent=1))

    def start(
        self,
        *,
        step: int,
        steps: int,
        batch_size: int,
        samples_per_epoch: int,
        flops_per_sample: float = 0.0,
        chips: int = 1,
        device_kind: str = "",
        processes: int = 1,
        board: Board | None = None,
    ) -> None:
        """Begin the loop at `step`, the one restored, or 0: what earlier processes logged after it is cut.

        batch_size: global. flops_per_sample: of training, forward and backward; 0 leaves MFU out. chips: devices of the
        whole run, all of `device_kind`, in `processes` processes, which tell each
        other what they do on `board`.
        """
        peak = self._options.peak_flops or clock.peak_flops(device_kind)
        if flops_per_sample and not peak:
            say(f"note: no peak FLOP/s is known for {device_kind!r}; MFU is left out unless config.log.peak_flops is set")
        self._plan = Plan(steps, batch_size, samples_per_epoch, flops_per_sample, chips, peak or None)
        self._step = step
        self._processes = processes
        metrics.mend(self._bad_path, shard=str, key=str, reason=str)
        self._bad |= {(row["shard"], row["key"], row["reason"]) for _, row in metrics.read_lines(self._bad_path)}
        self._open(step)
        if board:
            self._peers = Peers(board, self._process, processes, self._clock.activity, lambda: self._step, lambda: self._clock.seconds)
        if self._main:
            self._bar = progress(text="train", total=steps, unit="steps", done=step, plain=False).__enter__()
        self._thread = threading.Thread(target=self._follow, name="log", daemon=True)
        self._thread.start()

    def back(self, step: int) -> None:
        """The run goes on from `step`, an earlier one: what was logged after it is cut, and its time counts as lost."""
        self.drain()
        self._files.close()
        self._writers, self._step, self._past = [], step, self._clock.totals()
        self._open(step)
        if self._bar:
            self._bar.done = step

    def _open(self, step: int) -> None:
        """The files of a run that goes on from `step`, and an account for it."""
        if self._options.samples:
            self._fed = samples.open_samples(self._folder, self._process, self._processes, step)
            self._files.callback(self._fed.close)
        if self._main and self._plan:
            self._window = Window(self._plan, self._folder / "window.jsonl", step)
            self._files.callback(self._window.close)
            self._open_writers(step)
            self._sessions = goodput.resume(goodput.read_sessions(self._folder), step)
            spent = sum(self._past.values()) if self._past else 0.0
            began = time.time() - (time.perf_counter() - self._clock.begin) + spent
            self._sessions.append(goodput.Session(began, step, step, step, {}))

    def wait(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time a part of the step in which the host waits: "data" or "transfer"."""
        if name not in clock.WAITS:
            raise ValueError(f"log.wait({name!r}): a step waits for {' or '.join(clock.WAITS)}; other work is a pause")
        return self._clock.span(name)

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Time work that is no part of a step, e.g. "eval", "checkpoint", "compile".

        It starts when the steps handed in are done and all that was logged is on disk, so that a checkpoint never knows
        more than metrics.jsonl.
        """
        self.drain()
        with self._clock.span(name), self._shown(name):
            yield

    def step(self, step: int, values: Mapping[str, Any], batch: Any = ()) -> None:
        """Hand in a step just started: its metrics (name -> scalar device array) and its batch, neither donated later.

        Returns at once unless IN_FLIGHT steps are on their way. Raises what an earlier step has failed with.
        """
        self._raise()
        if self._thread is None:
            raise RuntimeError("log.step before log.start")
        for value in values.values():
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        dispatched, spans = self._clock.dispatch()
        self._queue.put(_Step(step, values, batch, _ready(batch), dispatched, spans))

    def bad(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Note bad samples, (shard, key, reason); one already noted, by this or an earlier process, counts once."""
        new = {(public(shard), key, reason) for shard, key, reason, *_ in rows} - self._bad
        if new:
            self._bad.update(new)
            with open(self._bad_path, "a", encoding="utf-8") as file:
                file.writelines(metrics.encode(dict(zip(("shard", "key", "reason"), row, strict=True))) + "\n" for row in sorted(new))

    def fed(self, step: int, row: int, ids: Iterable[int]) -> None:
        """Note, with log.samples, that the rows of the global batch of `step` from `row` on are the samples `ids`."""
        if self._fed:
            self._fed.write(step, {"row": row, "ids": [int(i) for i in ids]})

    def write(self, step: int, values: Mapping[str, float | int], galleries: Sequence[Gallery] = ()) -> None:
        """Log host values, e.g. of an evaluation, as a line of their own, and keep galleries for the page."""
        self.drain()
        if self._main:
            values = {name: _scalar(name, value) for name, value in values.items()}
            with self._clock.span("log"):
                for writer in self._writers:
                    writer.write(step, values)
                save_galleries(self._folder, step, galleries)
            say(f"step {step:,}: {summary.last_line(values)}")

    def drain(self) -> None:
        """Wait until all steps handed in are done and logged and the log is on disk. Raises what a step failed with."""
        self._queue.join()
        self._raise()
        if self._fed:
            self._fed.flush()
        if self._window:
            with self._clock.span("log"):
                self._window.save()
                for writer in self._writers:
                    writer.flush()
                self._save_session()

    def finish(self) -> Path | None:
        """Print the final table, where the time went and the recalls; write the page, and return its path."""
        self.drain()
        if not self._main:
            return None
        self._close_bar()
        path = None
        if self._options.html:
            path = write_report(self._workdir)
        saves, step = self._clock.stalls("checkpoint")
        # The last save is waited for, and holds up no step.
        stall = summary.stall_line(saves[:-1], step)
        summary.print_summary(metrics.read_metrics(self._workdir), self._sessions, path, stall)
        return path

    def close(self, wait: bool = True) -> None:
        """Stop the threads and close the files; with `wait`, after all steps handed in are logged."""
        try:
            if wait:
                self.drain()
        finally:
            self._close_bar()
            if self._peers:
                self._peers.close()
            if self._dog:
                self._dog.close()
                self._dog = None
            if self._thread:
                with contextlib.suppress(queue.Full):
                    self._queue.put(None, timeout=1.0)
                self._thread.join(timeout=5.0)
                self._thread = None
            # On the way out of an error, e.g. a full disk, a file that cannot be closed must not hide it.
            with contextlib.suppress(*(() if wait else (OSError,))):
                self._files.close()
            self._writers, self._window = [], None

    def _open_writers(self, step: int) -> None:
        path = self._workdir / metrics.METRICS
        metrics.mend(path, step=int)
        metrics.cut(path, step)
        opened = [lambda: metrics.jsonl_writer(path)]
        if self._options.tensorboard:
            opened.append(lambda: metrics.tensorboard_writer(self._workdir / "tensorboard", step))
        if self._options.wandb:
            opened.append(lambda: metrics.wandb_writer(self._options.wandb, self._folder, self._facts.get("config", "")))
        for make in opened:
            self._writers.append(make())
            self._files.callback(self._writers[-1].close)

    def _follow(self) -> None:
        """The log's thread: sees every step to its end, in order. After an error it only empties the queue."""
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._end_step(item)
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _end_step(self, item: _Step) -> None:
        import jax

        jax.block_until_ready(item.batch)
        arrived = item.dispatched if item.arrived else time.perf_counter()
        jax.block_until_ready(item.values)
        seconds = self._clock.end_step(item.dispatched, arrived, time.perf_counter(), item.spans)
        self._step = item.number
        if not (self._window and self._plan and self._bar):
            return
        values = {name: _scalar(name, value) for name, value in jax.device_get(dict(item.values)).items()}
        self._window.add(item.number, values, seconds)
        bad = f"  {len(self._bad):,} bad" if self._bad else ""
        self._bar.advance(note=self._window.note() + bad)
        if item.number % self._options.every == 0 or item.number == self._plan.steps:
            row = self._window.take()
            for writer in self._writers:
                writer.write(item.number, row)
            if not sys.stderr.isatty():
                eta = self._bar.eta()
                say(summary.log_line(item.number, self._plan.steps, row) + ("" if eta is None else f"  ETA {duration(eta)}"))
            if time.perf_counter() - self._saved > 30.0:
                self._save_session()

    def _save_session(self) -> None:
        self._saved = time.perf_counter()
        last = self._sessions[-1]
        self._sessions[-1] = last._replace(last=self._step, kept=self._step, seconds=self._spent())
        goodput.save_sessions(self._folder, self._sessions)

    def _spent(self) -> dict[str, float]:
        """Seconds by kind since the start, or since the run went back."""
        return {kind: seconds - self._past.get(kind, 0.0) for kind, seconds in self._clock.totals().items()}

    @contextlib.contextmanager
    def _shown(self, name: str) -> Iterator[None]:
        """Show that a pause goes on: beside the count of steps, or before the first as a bar of its own."""
        if self._bar:
            self._bar.advance(0, note=name)
            yield
        elif sys.stderr.isatty():
            with progress(text=name):
                yield
        else:
            say(f"{name} ...")
            begin = time.perf_counter()
            yield
            say(f"{name} took {duration(time.perf_counter() - begin)}")

    def _close_bar(self) -> None:
        if self._bar:
            self._bar.__exit__()
            self._bar = None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def _ready(batch: Any) -> bool:
    import jax

    return all(leaf.is_ready() for leaf in jax.tree.leaves(batch) if hasattr(leaf, "is_ready"))


def _scalar(name: str, value: Any) -> float | int:
    """A host scalar as the Python number that holds all its bits."""
    if getattr(value, "shape", ()):
        raise ValueError(f"metric {name!r} has shape {value.shape}; a metric must be a scalar")
    number = value.item() if hasattr(value, "item") else value
    return number if isinstance(number, float) else int(number)


def _versions() -> dict[str, str]:
    import importlib.metadata

    names = ("jaxvl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
