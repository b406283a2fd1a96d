"""Where the time of a run goes: every second belongs to a phase of a step or to a named pause.

The host runs ahead of the device, so times taken around its calls say little about a step. What counts is what the
device did between the ends of two steps: it computed, or it stood still because the host waited for data, because the
batch was still on its way, or because of a pause (evaluation, checkpoint, compilation). `split` does that sum; its
inputs are times the host notes as it goes and the times at which batch and step are seen to be complete.
"""

import contextlib
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

STEP = ("data", "transfer", "compute", "other")  # phases of a step, in order
WAITS = ("data", "transfer")

# Dense bfloat16 FLOP/s of one JAX device, by the first name found in its device_kind. TPU: Google Cloud system pages (a
# device of v4 and v5p is a chip with two cores, of v7 one of a chip's two); GPU: NVIDIA data sheets, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7": 1153.5e12,
    "TPU v7": 1153.5e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None for a device that is not in the table."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_kind), None)


class Span(NamedTuple):
    """What the host did from `begin` to `end` (seconds of one monotonic clock)."""

    name: str
    begin: float
    end: float


def split(previous: float, dispatched: float, arrived: float, done: float, spans: Sequence[Span]) -> dict[str, float]:
    """The seconds from the end of the step before, `previous`, to `done`, by what the device did or waited for.

    dispatched: when the host started the step. arrived: when its batch was on the device. spans: what the host did
    since it started the step before. The values add up to done - previous.
    """
    start = min(max(previous, dispatched, arrived), done)
    handed = min(max(previous, dispatched), start)
    seconds: dict[str, float] = defaultdict(float)
    for name, begin, end in spans:
        seconds[name] += max(0.0, min(end, handed) - max(begin, previous))
    seconds["other"] += max(0.0, handed - previous - sum(seconds.values()))
    seconds["transfer"] += start - handed
    seconds["compute"] += done - start
    return dict(seconds)


class Activity(NamedTuple):
    """What a run is doing: the phase, since when, and how long it usually takes (None: never seen to end)."""

    phase: str
    since: float
    usual: float | None


class Clock:
    """Times of a run. The host thread notes spans; the thread that sees steps complete calls `end_step`.

    age: seconds that the process has already spent on the run; they count as its start.
    """

    def __init__(self, age: float = 0.0) -> None:
        self._beat = self._dispatched = time.perf_counter()
        self.begin = self._previous = self._beat - age
        self.seconds: dict[str, float] = defaultdict(float)
        self._names: list[str] = []
        self._since = self._beat
        self._spans: list[Span] = []
        self._steps: deque[float] = deque(maxlen=101)
        self._pauses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=11))
        self._in_flight = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what is done inside as `name`; an inner span is taken out of the outer one."""
        begin = self._close_span()
        self._names.append(name)
        self._since = begin
        try:
            yield
        finally:
            end = self._close_span()
            self._names.pop()
            self._since = self._dispatched = end
            if name not in WAITS:
                with self._lock:
                    self._pauses[name].append(end - begin)
                self._beat = end

    def dispatch(self) -> tuple[float, list[Span]]:
        """Note that a step is on its way: when it was started, and the spans since the step before."""
        with self._lock:
            self._in_flight += 1
        started, spans = self._dispatched, self._spans
        self._spans, self._dispatched = [], time.perf_counter()
        return started, spans

    def end_step(self, dispatched: float, arrived: float, done: float, spans: Sequence[Span]) -> dict[str, float]:
        """Account for a step that is complete; returns its seconds by phase, pauses included."""
        first = not self._steps
        seconds = split(self._previous, dispatched, arrived, done, spans)
        if first:  # all that precedes the first step and is no pause is the price of a start
            seconds["restart"] = seconds.get("restart", 0.0) + seconds.pop("other")
            seconds["other"] = 0.0
        self._previous = self._beat = done
        with self._lock:
            self._in_flight -= 1
            for name, value in seconds.items():
                self.seconds[name] += value
            self._steps.append(sum(seconds.get(name, 0.0) for name in STEP))
        return seconds

    def totals(self) -> dict[str, float]:
        """Seconds of this process so far by phase and pause; they add up to the time since the clock began."""
        now = time.perf_counter()
        with self._lock:
            seconds = defaultdict(float, self.seconds)
            rest = "compute" if self._in_flight else "other" if self._steps else "restart"
            for name, begin, end in [] if self._in_flight else list(self._spans):
                seconds[name] += max(0.0, end - max(begin, self._previous))
        seconds[rest] += max(0.0, now - self.begin - sum(seconds.values()))
        return dict(seconds)

    def stalls(self, name: str) -> tuple[list[float], float]:
        """(seconds of the last pauses of that name, seconds of the median step)."""
        with self._lock:
            return list(self._pauses[name]), statistics.median(self._steps) if self._steps else 0.0

    def activity(self) -> Activity:
        """What the run is doing now, for the watchdog."""
        names = tuple(self._names)
        name = names[-1] if names else ""
        with self._lock:
            seen = list(self._pauses[name] if name and name not in WAITS else self._steps)
        usual = statistics.median(seen) if seen else None
        if name and name not in WAITS:
            return Activity(name, self._since, usual)
        return Activity("compute" if self._in_flight else name or ("other" if self._steps else "restart"), self._beat, usual)

    def _close_span(self) -> float:
        """Note the open span up to now, and start its continuation (or the next one) from there."""
        now = time.perf_counter()
        if self._names:
            self._spans.append(Span(self._names[-1], self._since, now))
        self._since = now
        return now
