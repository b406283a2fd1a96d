"""Which checkpoint steps are whole: the folder names, the manifest of a step, and its verification. No JAX, no Orbax.

A step is the folder `00001000` (its number, eight digits or more) of the checkpoint folder. It is written as `00001000.saving`
and renamed when its manifest is on disk, and renamed to `00001000.deleting` before it is deleted. So a folder named by digits
alone has been whole, whenever the run was killed, and whatever its manifest does not confirm now is damage.
"""

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

FILE = "manifest.json"
FORMAT = 1
SEAL = ',\n "sha256": "{}"\n}}\n'
SEAL_BYTES = len(SEAL.format("0" * 64))
LARGEST = 256 << 20  # bytes of a manifest; that of a model of a million leaves has less
LAST_STEP = 2**31 - 1  # the train state counts steps in int32
LEAF = re.compile(r"[a-z][a-z0-9_]*\[(\d+(,\d+)*)?\]", re.ASCII)
DIGEST = re.compile(r"[0-9a-f]{64}")
THREADS = min(8, os.cpu_count() or 1)

log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A checkpoint step that is not what was saved; the message names the step, the file and what is wrong with it."""


class LockedError(OSError):
    """Another run is writing to the folder; the message names its process and host."""


class Manifest(NamedTuple):
    """What a step must be.

    meta: the JSON the run saved beside its state. metrics: evaluation results of the step, null where they were not finite.
    leaves: "float32[12,768]" of each leaf path. files: {"bytes", "sha256"} of each file, by its path in the step's folder.
    """

    step: int
    meta: dict[str, Any]
    metrics: dict[str, float | None]
    leaves: dict[str, str]
    files: dict[str, dict[str, Any]]


def step_folder(folder: Path, step: int, suffix: str = "") -> Path:
    """The folder of `step`: bare for a whole one, with suffix ".saving", ".deleting" or ".aside" for any other."""
    return folder / f"{step:08d}{suffix}"


def whole_steps(folder: Path) -> list[int]:
    """The steps that were saved in full and not deleted since, newest first; `examine` tells whether one is undamaged.

    A name that `step_folder` gives no step, such as a date and time, is no step's. Raises OSError where `folder` is a file.
    """
    names = os.listdir(folder) if folder.exists() else []
    numbers = [int(name) for name in names if re.fullmatch(r"[0-9]{8,10}", name)]
    return sorted((n for n in numbers if n <= LAST_STEP and step_folder(folder, n).name in names), reverse=True)


def write(target: Path, step: int, meta: dict[str, Any], metrics: dict[str, float | None], leaves: dict[str, str]) -> None:
    """Put every file below `target` on disk, hash it, and write the manifest: the last file of a step."""
    paths = sorted(p for p in target.rglob("*") if p.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_digest, paths))
    files = {p.relative_to(target).as_posix(): {"bytes": size, "sha256": digest} for p, (size, digest) in zip(paths, digests, strict=True)}
    body = {"format": FORMAT, **Manifest(step, meta, metrics, leaves, files)._asdict()}
    with open(target / FILE, "wb") as file:
        file.write(_sealed(json.dumps(body, indent=1).encode()[: -len("\n}")]))
        file.flush()
        os.fsync(file.fileno())
    for path in [target, *(p for p in target.rglob("*") if p.is_dir())]:
        _sync_folder(path)


def commit(target: Path, final: Path) -> None:
    """Rename `target` to `final`: the one instant at which a step becomes whole, or stops being so."""
    os.rename(target, final)
    _sync_folder(final.parent)


def read(folder: Path, step: int) -> Manifest:
    """The manifest of a step. Raises DamagedError where it is missing, altered, of another step or of an unknown format."""
    found = read_at(step_folder(folder, step))
    if found.step != step:
        raise DamagedError(f"{FILE}: it belongs to step {found.step}; was the folder renamed?")
    return found


def read_at(target: Path) -> Manifest:
    """The manifest in `target`. Raises DamagedError where it is missing, altered, malformed or of an unknown format."""
    try:
        with open_inside(target, FILE) as file:
            text = file.read(LARGEST)
    except OSError as error:
        raise DamagedError(f"{FILE}: cannot be read ({error.strerror})") from error
    head = text[:-SEAL_BYTES]
    if _sealed(head) != text:
        raise DamagedError(f"{FILE}: its own sha256 does not match its content")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedError(f"{FILE}: it is no JSON object") from None
    if body.get("format") != FORMAT:
        raise DamagedError(f"{FILE}: format {body.get('format')!r}, but this version of jaxvl reads format {FORMAT}")
    found = Manifest(**{field: body.get(field) for field in Manifest._fields})
    if wrong := [field for field in Manifest._fields if not _legal(field, getattr(found, field))]:
        raise DamagedError(f"{FILE}: its {wrong[0]!r} is missing or malformed")
    return found


def _legal(field: str, value: Any) -> bool:
    """Whether a field of a manifest has the form that `Manifest` tells."""
    match field, value:
        case "step", int():
            return 0 <= value <= LAST_STEP and not isinstance(value, bool)
        case "meta", dict():
            return True
        case "metrics", dict():
            return all(v is None or isinstance(v, (int, float)) for v in value.values())
        case "leaves", dict():
            return all(isinstance(v, str) and LEAF.fullmatch(v) for v in value.values())
        case "files", dict():
            return all(_legal_file(v) for v in value.values())
    return False


def _legal_file(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        return False
    size, digest = entry["bytes"], entry["sha256"]
    return isinstance(size, int) and size >= 0 and isinstance(digest, str) and DIGEST.fullmatch(digest) is not None


def open_inside(target: Path, name: str) -> io.BufferedReader:
    """The regular file `name` of the folder `target`, opened to be read.

    Raises OSError for a path that leads out of the folder, for a link, since others may change what it leads to, and for what
    is no regular file: a pipe would never answer and a device never end.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise OSError(errno.EINVAL, "its path leads out of the folder")
    if any((target / Path(*path.parts[:depth])).is_symlink() for depth in range(1, len(path.parts) + 1)):
        raise OSError(errno.ELOOP, "it is reached by a symbolic link")
    return open_regular(target / path)


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, opened to be read. Raises OSError for anything else, without waiting for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def examine(folder: Path, step: int, share: tuple[int, int] = (0, 1)) -> tuple[Manifest | None, list[str]]:
    """(manifest, what is wrong with the step: "FILE: reason" each), by reading and hashing every byte of its files.

    share: (i, n) reads only files i, i + n, ... of the manifest, so that n processes verify a step together.
    """
    try:
        manifest = read(folder, step)
    except DamagedError as error:
        return None, [str(error)]
    return manifest, faults(step_folder(folder, step), manifest, share)


def faults(target: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the files of `target`, as `examine` tells it; files that were not saved with it count too."""
    first, stride = share
    if first == 0 and (strange := _strangers(target, manifest)):
        return [f"{name}: it was not saved with this step" for name in strange]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda item: _fault(target, *item), list(manifest.files.items())[first::stride])
    return [fault for fault in found if fault]


def delete(folder: Path, step: int) -> None:
    """Delete a step so that it never looks whole when only half of it is left."""
    tombstone = step_folder(folder, step, ".deleting")
    commit(step_folder(folder, step), tombstone)
    shutil.rmtree(tombstone)


def set_aside(folder: Path, step: int) -> None:
    """Rename a step so that no run resumes from it. Its files stay for a person to judge."""
    taken = {p.name for p in folder.iterdir()}
    aside = next(p for i in range(len(taken) + 1) if (p := step_folder(folder, step, f".aside{i or ''}")).name not in taken)
    log.warning(
        "checkpoint step %d was there before this run reached it (damaged, or of another branch); moved to %s, delete it once unneeded",
        step,
        aside,
    )
    commit(step_folder(folder, step), aside)


def clean(folder: Path) -> None:
    """Remove what saves and deletions that were cut short have left; the caller holds the folder's lock."""
    for path in folder.iterdir():
        if re.fullmatch(r"\d{8,}\.(saving|deleting)", path.name):
            log.info("removing %s, left by a run that was killed", path)
            shutil.rmtree(path)


def lock(folder: Path) -> IO[str]:
    """Take the folder for this process until the returned file is closed or the process ends, even by SIGKILL.

    Raises LockedError while another process holds it. The lock is flock's, which Linux carries over NFS to other hosts too.
    """
    file = open(folder / "LOCK", "a+")  # noqa: SIM115, the open file is the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise LockedError(f"{folder} is being written by {owner}; stop that run or choose another --workdir") from None
    except OSError as error:
        log.warning("%s: this file system has no locks (%s), so a second run writing here cannot be noticed", folder, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


def _sealed(head: bytes) -> bytes:
    """`head`, an unclosed JSON object, closed by its own sha256: one flipped bit anywhere breaks the equality."""
    return head + SEAL.format(hashlib.sha256(head).hexdigest()).encode()


def _digest(path: Path) -> tuple[int, str]:
    """(bytes, hex sha256) of a file that this process has written, put on disk first."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _strangers(target: Path, manifest: Manifest) -> list[str]:
    """Files of the step that its manifest does not name, which a reader of arrays might take for its own; hidden ones (of NFS, of
    file browsers) are nobody's."""
    try:
        there = (p.relative_to(target) for p in target.rglob("*") if not p.name.startswith(".") and not p.is_dir())
        return sorted({p.as_posix() for p in there} - manifest.files.keys() - {FILE})
    except OSError:
        return []  # a folder that cannot be listed: its files cannot be read either, which is told by name


def _fault(target: Path, name: str, wanted: dict[str, Any]) -> str | None:
    try:
        with open_inside(target, name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != wanted["bytes"]:
                return f"{name}: {size} bytes, saved with {wanted['bytes']}"
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror})"
    if digest != wanted["sha256"]:
        return f"{name}: sha256 {digest[:12]}..., saved with {wanted['sha256'][:12]}..."
    return None


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # file systems whose folders need no sync, or know none
            raise
    finally:
        os.close(descriptor)
