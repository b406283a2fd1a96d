"""Steps whose loss or gradient is not finite: counted in a row, and, when there are too many, the way back.

The step itself skips such an update on the device (step.py). Here its count of skipped steps is read once the step is known to be done,
LATE steps on, so nothing waits for a device; the same values are read at the same step on every process, which therefore go back together.

Going back takes parameters, optimiser and memory from the newest checkpoint that was not saved amid skipped steps. The samples consumed
since are not seen again: the run goes on with the next ones, since the same ones would give the same numbers. The count of skipped steps
goes on too. All of this is a function of the run's history alone, so that a run killed at any moment of it ends in the same state.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

from jaxvl import manifest
from jaxvl.checkpoint import Restored, Saver
from jaxvl.manifest import DamagedError
from jaxvl.progress import say
from jaxvl.report.log import IN_FLIGHT
from jaxvl.restore import steps_of_first_process
from jaxvl.state import TrainState, samples_seen

LATE = IN_FLIGHT + 2  # steps after which the log has seen one to its end
TRIES = 3  # how often a run goes back to one checkpoint


class DivergedError(ValueError):
    """Steps are not finite, and going back has not helped or cannot; names the steps and what to change."""


class Skipped:
    """The steps skipped in a row, out of the running totals of a run. limit: that many are too many; 0: never. note: of a checkpoint, [] for none."""

    def __init__(self, limit: int, note: Sequence[int] = ()) -> None:
        self.limit = limit
        self.row, self._total, *waiting = note or (0, 0)
        self._waiting: deque[Any] = deque(waiting)

    @property
    def too_many(self) -> bool:
        """Whether `limit` steps in a row, of those read so far, were skipped."""
        return 0 < self.limit <= self.row

    def add(self, total: Any) -> None:
        """Take in a step's total, an int32 [] on the device, and read that of the step LATE before."""
        self._waiting.append(total)
        self._read(LATE)

    def settle(self) -> None:
        """Read all that is left; waits for the steps under way."""
        self._read(0)

    def note(self) -> list[int]:
        """All of this for a checkpoint; waits for the steps under way."""
        return [self.row, self._total, *(int(total) for total in self._waiting)]

    def _read(self, leave: int) -> None:
        while len(self._waiting) > leave and not self.too_many:
            total = int(self._waiting.popleft())
            self.row = self.row + 1 if total > self._total else 0
            self._total = total


def _good(note: Sequence[int]) -> bool:
    """Whether the last steps before the checkpoint with this note were not skipped."""
    return not note or (note[0] == 0 and set(note[1:]) == {note[1]})


def go_back(saver: Saver, abstract: TrainState, state: TrainState, skipped: Skipped, step: int, tries: dict[int, int]) -> Restored:
    """The state to go on from, at an earlier step with the position and the count of `state`. tries: how often each step was gone back to.

    Called by every process at the same step. Raises DivergedError where there is no checkpoint, or where this one has not helped TRIES times.
    """
    saver.wait()
    what = f"{skipped.row} steps in a row up to step {step} had a loss or gradient that is not finite"
    mend = "lower config.optim.learning_rate, set config.optim.clip_norm, or look at the samples"
    steps = steps_of_first_process(saver.folder, lambda at: at <= step and _usable(saver, at))
    found = next(filter(None, (_restore(saver, abstract, at) for at in steps)), None)
    if found is None:
        raise DivergedError(f"{what}, and no checkpoint was saved before them: {mend}")
    tries[found.step] = tries.get(found.step, 0) + 1
    if tries[found.step] > TRIES:
        raise DivergedError(f"{what}; going back to step {found.step} has not helped {TRIES} times: {mend}")
    say(f"{what}: back to step {found.step}, going on with sample {samples_seen(state.position):,}")
    return found._replace(state=found.state._replace(position=state.position, skipped=state.skipped))


def _usable(saver: Saver, step: int) -> bool:
    """Whether the checkpoint of `step` has a manifest and was not saved amid skipped steps."""
    try:
        return _good(manifest.read(saver.folder, step).meta.get("skipped", []))
    except DamagedError as error:
        say(f"checkpoint step {step} is not used: {error}")
        return False


def _restore(saver: Saver, abstract: TrainState, step: int) -> Restored | None:
    """The checkpoint of `step`; None, on all processes, where it is damaged."""
    try:
        return saver.restore(abstract, step)
    except DamagedError as error:
        say(f"checkpoint step {step} is not used: {error}")
        return None
