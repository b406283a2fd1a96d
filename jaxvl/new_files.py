"""What a command makes appears when it is whole; one that is refused, breaks or is interrupted leaves nothing of it."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def new_folder(out: Path, flag: str = "--out") -> Iterator[Path]:
    """A folder beside `out` to write into, which the block renames to `out` once it is whole; without that nothing is left, nor folders made above it.

    Raises FileExistsError where `out` is taken.
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists; choose another {flag} or delete it")
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")  # of no other process, so that nothing of another's is removed
    missing = _missing(partial.parent)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not out.exists():
            _remove(missing)


@contextlib.contextmanager
def new_files(folder: Path, files: Sequence[Path]) -> Iterator[None]:
    """`folder`, made where it is missing, for `files` of it that the block writes; where it raises, all that it has made is removed."""
    missing, new = _missing(folder), [file for file in files if not file.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for file in new:
            file.unlink(missing_ok=True)
        _remove(missing)
        raise


def _missing(folder: Path) -> list[Path]:
    """`folder` and those above it that are not there, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # one that holds anything stays
        for folder in folders:
            folder.rmdir()
