"""Reading checkpoints: only what verifies is loaded, each leaf straight into the sharding that is asked for.

Nothing here writes, so it is safe beside a run that is going on.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxvl import manifest
from jaxvl.manifest import DamagedError, Manifest, whole_steps
from jaxvl.mesh import path_str

log = logging.getLogger(__name__)
# Orbax narrates every save through absl; what matters of it reaches the user through the errors of these modules.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def _told_elsewhere(error: object) -> bool:
    """Whether it is another write of a save that has failed already.

    Where one write fails, Orbax closes its event loop, and TensorStore and asyncio print a traceback for each of the other
    writes, whose errors nobody awaits any more: hundreds of lines that hide the one that matters.
    """
    return str(error) == "Event loop is closed" or str(error).startswith("RESOURCE_EXHAUSTED: Error writing")


def _unraisable(unraisable: Any) -> None:
    if not _told_elsewhere(unraisable.exc_value):
        _shown(unraisable)


_shown, sys.unraisablehook = sys.unraisablehook, _unraisable
logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and _told_elsewhere(record.exc_info[1])))


class Restored(NamedTuple):
    """step, the arrays in the shape of the abstract tree that was asked for, and the meta that was saved with them."""

    step: int
    state: Any
    meta: dict[str, Any]


def verified(folder: Path, step: int | None = None) -> Manifest | None:
    """The manifest of `step`, or else of the newest undamaged step; None where nothing was ever saved.

    Every byte of the step is read and hashed, the processes of a run sharing the files. A damaged step is logged by file and
    passed over. Raises DamagedError where `step` itself or every step is damaged, FileNotFoundError where `step` is not there.
    """
    folder = Path(folder).absolute()
    steps = steps_of_first_process(folder)
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{folder} has no checkpoint of step {step}; it has {steps or 'none'}")
    refused = ""
    for candidate in steps if step is None else [step]:
        found, faults = manifest.examine(folder, candidate, (jax.process_index(), jax.process_count()))
        if found and not faults:
            faults = _other_step(folder, found)
        if not _any_process(bool(faults)):
            return found
        more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
        what = f"{faults[0]}{more}" if faults else "found damaged by another process"
        refused = f"{folder}: checkpoint step {candidate} is damaged, {what}"
        if step is None:
            log.warning("%s; it is not used", refused)
    if refused:
        raise DamagedError(refused if step is not None else f"{folder}: all {len(steps)} checkpoints are damaged; the last: {refused}")
    return None


def restore(folder: Path, abstract: Any, step: int | None = None) -> Restored | None:
    """The state of `step`, or else of the newest undamaged step; None where nothing was ever saved.

    abstract: pytree of ShapeDtypeStruct; each leaf is read straight into its sharding, whatever mesh it was saved from, and
    into a numpy array where it has none. Raises what `verified` raises, and ValueError listing every leaf that differs.
    """
    return _restore(folder, abstract, step, "")


def restore_params(folder: Path, abstract_params: Any, *, ema: bool = False, step: int | None = None) -> Restored:
    """`restore` of the parameters alone, or of their moving average; reads nothing else of the state."""
    found = _restore(folder, abstract_params, step, "ema/" if ema else "params/")
    if found is None:
        raise FileNotFoundError(f"{folder} has no checkpoint")
    return found


def restore_memory(folder: Path, abstract_memory: Any, *, step: int | None = None) -> Restored:
    """`restore` of what the method remembers alone."""
    found = _restore(folder, abstract_memory, step, "memory/")
    if found is None:
        raise FileNotFoundError(f"{folder} has no checkpoint")
    return found


def _restore(folder: Path, abstract: Any, step: int | None, prefix: str) -> Restored | None:
    found = verified(folder, step)
    if found is None:
        return None
    wanted = leaves_by_path(abstract, prefix)
    saved = {k: v for k, v in found.leaves.items() if k.startswith(prefix)}
    if not saved and wanted:
        raise ValueError(
            f"{folder}: checkpoint step {found.step} has no {prefix}...; was the run's moving average off (config.optim.ema_decay=0)?"
        )
    _same_leaves(saved, {k: array_type(v) for k, v in wanted.items()}, f"{folder}: checkpoint step {found.step}")
    arrays = read_leaves(folder, found.step, wanted) if wanted else {}
    return Restored(found.step, jax.tree.unflatten(jax.tree.structure(abstract), [arrays[k] for k in wanted]), found.meta)


def read_leaves(folder: Path, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Leaves by path of a step that `verified` has passed, in the shapes and dtypes they were saved in.

    Each is read straight into its sharding, and into a numpy array where it has none.
    """
    solid = {k: v for k, v in wanted.items() if v.size}
    how = {
        k: ocp.RestoreArgs(restore_type=np.ndarray) if v.sharding is None else ocp.ArrayRestoreArgs(sharding=v.sharding)
        for k, v in solid.items()
    }
    args = ocp.args.PyTreeRestore(item=solid, restore_args=how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        arrays = orbax.restore(manifest.step_folder(Path(folder).absolute(), step) / "state", args=args)
    for k, v in wanted.items():
        if not v.size:  # Orbax takes no arrays without elements
            arrays[k] = np.zeros(v.shape, v.dtype) if v.sharding is None else jax.device_put(np.zeros(v.shape, v.dtype), v.sharding)
    return arrays


def leaves_by_path(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves by path, in the order of the tree."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {prefix + path_str(path): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise ValueError("two leaves of the state have the same path; a dict key may not contain '/'")
    return leaves


def array_type(leaf: Any) -> str:
    """ "float32[12,768]" of an array or a ShapeDtypeStruct."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _same_leaves(saved: dict[str, str], wanted: dict[str, str], where: str) -> None:
    lines = [
        f"{path}: saved {saved.get(path, 'nothing')}, wanted {wanted.get(path, 'nothing')}"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
    if lines:
        raise ValueError(f"{where} does not fit this config in {len(lines)} leaves:\n  " + "\n  ".join(lines))


def _any_process(mine: bool) -> bool:
    """Whether it is true of any process; also a barrier."""
    return mine if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.bool_(mine))))


def agree(error: Exception | None) -> None:
    """Raise on every process where one has failed, so that none is left waiting for it."""
    if _any_process(error is not None):
        raise error or OSError("another process of this run failed in its checkpoint; its own message says why")


def steps_of_first_process(folder: Path, keep: Callable[[int], bool] = lambda step: True) -> list[int]:
    """The whole steps that process 0 sees and keeps, newest first, on every process.

    Network file systems show a rename to other hosts a little later, so processes that each looked for themselves would
    restore different steps.
    """
    found: list[int] = []
    if jax.process_index() == 0:
        found = [step for step in whole_steps(folder) if keep(step)]
    if jax.process_count() == 1:
        return found
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(found))))
    return multihost_utils.broadcast_one_to_all(np.resize(np.asarray(found, np.int32), count)).tolist()


def _other_step(folder: Path, found: Manifest) -> list[str]:
    """A fault where the state of a run counts other steps than its manifest: hashes alone cannot tell, since whoever copies a
    step can hash it anew."""
    if "position" not in found.meta or found.leaves.get("step") != "int32[]":
        return []
    try:
        counted = int(read_leaves(folder, found.step, {"step": jax.ShapeDtypeStruct((), np.int32)})["step"])
    except Exception as error:  # whatever Orbax and TensorStore raise: these files cannot be read
        return [f"state: its step cannot be read ({str(error).splitlines()[0][:200] if str(error) else repr(error)})"]
    return [] if counted == found.step else [f"state: it is that of step {counted}"]
