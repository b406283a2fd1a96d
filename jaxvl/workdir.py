"""The folder of a run, which changes only once a start has been accepted: a refused one leaves it as it was."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from jaxvl import checkpoint
from jaxvl.checkpoint import CheckpointOptions, Saver


class Workdir(NamedTuple):
    """An open run folder. saver: of its checkpoints. accept: called once nothing of the config can be refused any more."""

    saver: Saver
    accept: Callable[[], None]


@contextlib.contextmanager
def open_workdir(folder: Path, options: CheckpointOptions) -> Iterator[Workdir]:
    """Lock `folder` for this run, by every process.

    Where the block raises before `accept` was called, what it has added to the folder is removed, and the folder itself where it was
    not there before. Files that were there are the caller's to leave alone until then. Raises as checkpoint.open_saver does.
    """
    checkpoints, first = folder / "checkpoints", jax.process_index() == 0
    made = [path for path in (checkpoints, *checkpoints.absolute().parents) if not path.exists()]  # innermost first
    accepted: list[bool] = []
    lock = checkpoints / "LOCK"
    owner = lock.read_bytes() if first and lock.is_file() else b""
    with checkpoint.open_saver(checkpoints, options) as saver:
        there = set(folder.iterdir()) if first else set()
        try:
            yield Workdir(saver, lambda: accepted.append(True))
        except BaseException:
            # The lock is still held, so that nobody else has put anything here.
            if first and not accepted:
                with contextlib.suppress(OSError):
                    _take_back(folder, there, made)
                    if not made:
                        lock.write_bytes(owner)  # whose the folder was before
            raise


def _take_back(folder: Path, there: set[Path], made: list[Path]) -> None:
    for path in set(folder.iterdir()) - there:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if made:
        (folder / "checkpoints" / "LOCK").unlink(missing_ok=True)
    for path in made:  # one that holds anything stays
        path.rmdir()
