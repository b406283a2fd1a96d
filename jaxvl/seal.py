"""The files beside the checkpoints that decide what a run computes, hashed into each checkpoint and compared at each open.

With another tokenizer or other classes the same arrays are another model, and nothing in the arrays tells.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxvl import manifest
from jaxvl.manifest import DamagedError, whole_steps
from jaxvl.progress import say

WHY = "the same arrays mean another model with it"
MEND = f"restore it from a copy, since {WHY.replace('with', 'without')}"
DECIDE = ("tokenizer", "classes.json")  # with the list of words of a lexicon in the first, the hierarchy in the second


def stamp(folder: Path) -> dict[str, str]:
    """The hex sha256 of each of the files that are in `folder`, by its path there, as checkpoints keep it under "files"."""
    found = (path for name in DECIDE for path in _files(folder / name))
    return {path.relative_to(folder).as_posix(): _digest(path) for path in sorted(found)}


def same(folder: Path, wanted: Mapping[str, str], whose: str) -> None:
    """Raises DamagedError naming the first file of `folder` that is not what was hashed; whose: what was saved with the hashes."""
    found = stamp(folder)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise DamagedError(f"{folder / name} is missing, with which {whose} was saved; {MEND}")
        if name not in wanted:
            raise DamagedError(f"{folder / name} was not there when {whose} was saved; move it away, since {WHY}")
        if found[name] != wanted[name]:
            now = found[name] if found[name].startswith("none") else f"{found[name][:12]}..."
            hashes = f"sha256 {now}, saved with {str(wanted[name])[:12]}..."
            raise DamagedError(f"{folder / name} is not the file that {whose} was saved with ({hashes}); {MEND}")


def check(workdir: Path) -> None:
    """`same` of a run, by the newest checkpoint whose manifest can be read; nothing for a run that has saved none."""
    for step in whole_steps(workdir / "checkpoints"):
        try:
            meta: Mapping[str, Any] = manifest.read(workdir / "checkpoints", step).meta
        except DamagedError:
            continue
        if isinstance(meta.get("files"), dict):
            same(workdir, meta["files"], f"checkpoint step {step}")
        else:
            say(f"note: checkpoint step {step} has no hashes of {' and '.join(DECIDE)}, so a damaged one cannot be noticed")
        return


def _files(path: Path) -> list[Path]:
    """The files of a folder, or the one file; hidden ones (of NFS, of file browsers) are nobody's."""
    if path.is_dir():
        return [p for p in path.rglob("*") if not p.is_dir() and not p.name.startswith(".")]
    return [path] if path.exists() or path.is_symlink() else []


def _digest(path: Path) -> str:
    try:
        with manifest.open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"none, {error.strerror}"
