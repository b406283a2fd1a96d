"""Checkpoints: Orbax writes the arrays, a hash manifest makes a step whole, and only what verifies is ever loaded.

A checkpoint is one flat dict of arrays named by their path in the train state ("params/image/head/kernel"), so it can be
read in part and does not depend on the classes of the optimiser. `Saver` is the run's side, one per checkpoint folder;
`restore` and `restore_params` read only. The folder is on a POSIX file system that all processes of a run share.
"""

import contextlib
import json
import logging
import math
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxvl import manifest
from jaxvl.manifest import DamagedError, whole_steps
from jaxvl.restore import (
    Restored,
    agree,
    array_type,
    leaves_by_path,
    read_leaves,
    restore,
    restore_memory,
    restore_params,
    verified,
)

__all__ = [
    "CheckpointOptions",
    "Restored",
    "SaveError",
    "Saver",
    "best_step",
    "check",
    "open_saver",
    "read_leaves",
    "restore",
    "restore_memory",
    "restore_params",
    "verified",
    "whole_steps",
]

log = logging.getLogger(__name__)
# The operating system's words, which say it all; anything else is shown with its traceback through Orbax and TensorStore.
PLAIN = ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system", "Permission denied", "File exists")


class SaveError(OSError):
    """A step that could not be saved; names the folder, the bytes needed and free. Older steps are intact."""


class CheckpointOptions(NamedTuple):
    """When to save and what to keep.

    every: steps between saves. keep: how many of the newest steps stay. keep_every: steps divisible by it stay for ever
    (0: none). best: a metric of the evaluations ("val/r@1"); the step with its best value stays as well. best_mode: max or min.
    """

    every: int = 1000
    keep: int = 3
    keep_every: int = 0
    best: str = ""
    best_mode: str = "max"


def check(options: CheckpointOptions) -> None:
    """Raise ValueError naming a key of the checkpoint section whose value cannot be meant."""
    for key, least in (("every", 1), ("keep", 1), ("keep_every", 0)):
        if getattr(options, key) < least:
            raise ValueError(f"config.checkpoint.{key} is {getattr(options, key)}; it must be at least {least}")
    if options.best_mode not in ("max", "min"):
        raise ValueError(f"config.checkpoint.best_mode is {options.best_mode!r}; it must be 'max' or 'min'")


def open_saver(folder: Path, options: CheckpointOptions) -> "Saver":
    """Lock `folder` for this run and return its Saver.

    Called by every process. Raises LockedError where another run writes to the folder, ValueError for options that cannot be meant.
    """
    check(options)
    if ":/" in str(folder):
        raise ValueError(
            f"the checkpoint folder is {str(folder)!r}; it must be on a file system all processes share (NFS, Lustre, ...): a bucket cannot rename a folder at once"
        )
    folder, held, error = Path(folder).absolute(), None, None
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = manifest.lock(folder)
            _was_here(folder)
        except Exception as reason:
            error = reason
            if held:
                held.close()
    agree(error)
    return Saver(folder, options, held)


def _note(folder: Path, step: int) -> None:
    """Beside the folder, that a step was saved in it: an empty folder is then no beginning, but a disk that is not mounted."""
    with contextlib.suppress(OSError):  # the step itself is whole
        folder.with_name(f"{folder.name}.newest").write_text(f"{step}\n")


def _was_here(folder: Path) -> None:
    """Raises ValueError where a step was saved in `folder` and none is there any more."""
    note = folder.with_name(f"{folder.name}.newest")
    if note.is_file() and not whole_steps(folder):
        raise ValueError(
            f"{folder} has no checkpoint, though step {note.read_text().strip()} was saved there: is its disk mounted on this host? Where the run shall begin anew, delete {note}"
        )


class Saver:
    """Saves one run's state. All methods are called by every process, at the same step; `with` closes it.

    Training waits in `save` only while arrays are copied to the host and, where it has not ended, for the save before. The rest
    (writing, hashing, the manifest, deleting old steps) happens in a thread, whose failure the next call raises.
    """

    def __init__(self, folder: Path, options: CheckpointOptions, held: IO[str] | None) -> None:
        self.folder, self.options = folder, options
        self._held = held
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))  # zstd gains 7 % on float32
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._last = -1

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any], metrics: Mapping[str, Any] | None = None, *, block: bool = False
    ) -> None:
        """Save `state` as `step`, whole once the thread has written its manifest; with `block`, on return.

        state: pytree of arrays, free to be donated on return. meta: JSON. metrics: evaluation results of this very step.
        Nothing is done where `step` is the one last saved or restored. Raises SaveError, also for the save before this one.
        """
        self.wait()
        if step != self._last:
            leaves = leaves_by_path(state)
            body = (step, json.loads(json.dumps(meta)), self._finite(metrics or {}), {k: array_type(v) for k, v in leaves.items()})
            needed = sum(math.prod(v.shape) * v.dtype.itemsize for v in leaves.values())
            error = None
            try:
                if jax.process_index() == 0:
                    self._make_room(step)
            except OSError as reason:
                error = self._failed(step, needed, reason)
            agree(error)
            target = manifest.step_folder(self.folder, step, ".saving")
            solid = {k: v for k, v in leaves.items() if v.size}  # restore makes arrays without elements from their shape
            self._orbax.save(target / "state", args=ocp.args.PyTreeSave(solid))
            self._thread = threading.Thread(target=self._finish, args=(target, body, needed), name="checkpoint")
            self._thread.start()
        if block:
            self.wait()

    def restore(self, abstract: Any, step: int | None = None) -> Restored | None:
        """`restore` from this run's folder; what killed runs have left half done is removed.

        The steps after the restored one are set aside at the next save.
        """
        found = restore(self.folder, abstract, step)
        if jax.process_index() == 0:
            manifest.clean(self.folder)
        if found:
            self._last = found.step
        return found

    def wait(self) -> None:
        """Return when no save is under way on any process. Raises SaveError where the last one failed."""
        self._join()
        error, self._error = self._error, None
        agree(error)

    def close(self) -> None:
        """Wait for the save under way and free the folder for other runs."""
        try:
            self.wait()
        finally:
            self._release()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # the other processes may be anywhere, so nothing here waits for them
            self._join()
            self._release()

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _release(self) -> None:
        self._orbax.close()
        if self._held:
            self._held.close()

    def _make_room(self, step: int) -> None:
        for old in whole_steps(self.folder):
            if old >= step:
                manifest.set_aside(self.folder, old)
        target = manifest.step_folder(self.folder, step, ".saving")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()

    def _finish(self, target: Path, body: tuple[Any, ...], needed: int) -> None:
        step = body[0]
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write(target, *body)
                manifest.commit(target, manifest.step_folder(self.folder, step))
                _note(self.folder, step)
            self._last = step
        except Exception as reason:
            self._error = self._failed(step, needed, reason)
            log.error("%s", self._error)
            return
        if jax.process_index() == 0:
            self._prune()

    def _failed(self, step: int, needed: int, reason: Exception) -> SaveError:
        """Remove the half-written step and say what happened; the bytes free are those without it."""
        if jax.process_index() == 0:
            shutil.rmtree(manifest.step_folder(self.folder, step, ".saving"), ignore_errors=True)
        free = shutil.disk_usage(self.folder).free
        plain = next((words for words in PLAIN if words in str(reason)), "")
        error = SaveError(
            f"step {step} could not be saved in {self.folder}: {plain or repr(reason)[:300]}; it needs at least {needed:,} bytes, {free:,} are free; "
            f"the steps saved before are intact: {whole_steps(self.folder) or 'none'}"
        )
        error.__cause__ = None if plain else reason
        return error

    def _prune(self) -> None:
        options, steps = self.options, whole_steps(self.folder)
        kept = {*steps[: options.keep], best_step(self.folder, options)}
        for step in steps:
            if step not in kept and not (options.keep_every and step % options.keep_every == 0):
                try:
                    manifest.delete(self.folder, step)
                except OSError as error:
                    log.warning("checkpoint step %d cannot be deleted: %s", step, error)

    def _finite(self, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        best = self.options.best
        if best and metrics and best not in metrics and best_step(self.folder, self.options) is None:
            log.warning("config.checkpoint.best is %r, which no evaluation has given yet; this one gives %s", best, sorted(metrics))
        return {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}


def best_step(folder: Path, options: CheckpointOptions) -> int | None:
    """The step with the best `options.best` of those saved with a finite value of it, the newer of equals; None where there is none."""
    scored = []
    for step in whole_steps(folder) if options.best else []:
        try:
            value = manifest.read(folder, step).metrics.get(options.best)
        except DamagedError:
            continue
        if value is not None:
            scored.append((value if options.best_mode == "max" else -value, step))
    return max(scored)[1] if scored else None
