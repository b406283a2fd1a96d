"""The steps between two lines of the log: their mean, and what it cost in time.

A checkpoint can fall into the middle of a window. The values seen so far are then kept beside it, so that the line that
a resumed run writes at the end of the window is the line of a run that was never stopped.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxvl.progress import say
from jaxvl.report.clock import STEP
from jaxvl.report.metrics import cut, decode, encode, jsonl_writer, mend, read_lines


class Plan(NamedTuple):
    """What turns steps into samples, epochs and a share of the peak. peak: FLOP/s of one chip, None if unknown."""

    steps: int
    batch_size: int
    samples_per_epoch: int
    flops_per_sample: float
    chips: int
    peak: float | None


def mean(rows: Sequence[Mapping[str, float | int]]) -> dict[str, float | int]:
    """The values of several steps as one row: floats averaged over the steps that have them, integers as at last.

    A step with a value that is not finite does not spoil the mean: the finite ones are averaged, and `nonfinite` counts
    the steps left out. Where no value is finite the mean is nan.
    """
    out: dict[str, float | int] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if isinstance(values[-1], int):
            out[name] = values[-1]
        else:
            finite = [v for v in values if math.isfinite(v)]
            out[name] = math.fsum(finite) / len(finite) if finite else math.nan
    bad = sum(not all(map(math.isfinite, row.values())) for row in rows)
    return out | ({"nonfinite": bad} if bad else {})


class Window:
    """The window a run is in; kept in `path` whenever `save` is called, and found there by a run resumed at `step`."""

    def __init__(self, plan: Plan, path: Path, step: int) -> None:
        mend(path, step=int, rows=list)
        cut(path, step)
        kept = [row["rows"] for _, row in read_lines(path) if row["step"] == step]
        self._rows: list[dict[str, float | int]] = []
        try:
            self._rows = [decode(line) for line in kept[-1]] if kept else []
        except (ValueError, TypeError) as error:
            say(f"{path}: the steps before step {step} are missing from the next line of metrics, since they cannot be read ({error})")
        self._plan, self._step, self._file = plan, step, jsonl_writer(path)
        self._seconds: dict[str, float] = defaultdict(float)
        self._timed = 0  # steps of this process: those before a resume have no times

    def add(self, step: int, values: dict[str, float | int], seconds: Mapping[str, float]) -> None:
        """Take in a step: its metrics, and its seconds by phase."""
        self._rows.append(values)
        self._step = step
        self._timed += 1
        for name in STEP:
            self._seconds[name] += seconds.get(name, 0.0)

    def take(self) -> dict[str, float | int]:
        """The row of the window, which then begins anew."""
        samples = self._step * self._plan.batch_size
        row = {"samples": samples, "epoch": samples / self._plan.samples_per_epoch, **mean(self._rows), **self._speed()}
        self._rows, self._timed = [], 0
        self._seconds.clear()
        return row

    def save(self) -> None:
        """Put what is in the window on disk."""
        if self._rows:
            self._file.write(self._step, {"rows": [encode(row) for row in self._rows]})
            self._file.flush()

    def note(self) -> str:
        """The newest step in a few words."""
        loss = f"loss {self._rows[-1]['loss']:.4g}  " if "loss" in self._rows[-1] else ""
        epoch = self._step * self._plan.batch_size / self._plan.samples_per_epoch
        return f"epoch {epoch:.1f}  {loss}{self._speed()['samples_per_s']:,.4g} samples/s"

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _speed(self) -> dict[str, float]:
        """Throughput, MFU and the parts of the mean step; pauses are left out."""
        plan = self._plan
        each = {name: self._seconds[name] / self._timed for name in STEP}
        step = max(sum(each.values()), 1e-9)
        rate = plan.batch_size / step
        row = {"samples_per_s": rate, "samples_per_s_chip": rate / plan.chips}
        if plan.peak and plan.flops_per_sample:
            row["mfu"] = plan.flops_per_sample * rate / (plan.chips * plan.peak)
        return row | {"time/step_ms": 1e3 * step} | {f"time/{name}_ms": 1e3 * seconds for name, seconds in each.items()}
