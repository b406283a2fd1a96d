"""An index on disk: arrays as raw files, appended to while they are made, and the sealed manifest that makes it whole.

It is written beside its place and renamed when every byte is on disk and hashed, as a checkpoint is (manifest.py), so a folder of its name is an
index or damaged, and damage is told by file.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxvl import manifest
from jaxvl.manifest import DamagedError
from jaxvl.new_files import new_folder

NAMES = "names"  # the items' names, UTF-8 one after another; "names.ends" has where each ends


class Index(NamedTuple):
    """meta: what it was made of. measured: recalls against exact search. arrays: by file name, mapped from disk."""

    folder: Path
    step: int
    meta: dict[str, Any]
    measured: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def total(self) -> int:
        return self.meta["total"]

    @property
    def lexical(self) -> bool:
        return self.meta["kind"] == "lexical"

    def name(self, item: int) -> str:
        """What an item is called: the place of an image, or a text itself."""
        ends, blob = self.array(f"{NAMES}.ends"), self.array(NAMES)
        return bytes(blob[ends[item - 1] if item else 0 : ends[item]]).decode()

    def array(self, name: str, *shape: int) -> np.ndarray:
        """An array by its file's name. Raises DamagedError where the index has none, or one of another `shape`."""
        found = self.arrays.get(name)
        if found is None or (shape and found.shape != shape):
            raise DamagedError(
                f"{self.folder}: the index is damaged, its {name} is {'missing' if found is None else f'of shape {found.shape}'}; index anew"
            )
        return found

    def needs(self, **kinds: type) -> None:
        """Raises DamagedError where its meta lacks a key, or has it of another kind; of an options tuple its fields."""
        for key, kind in kinds.items():
            value: Any = self.meta.get(key)
            if fields := getattr(kind, "_fields", None):
                good = isinstance(value, dict) and value.keys() == set(fields)
            else:
                good = type(value) is kind
            if not good:
                raise DamagedError(
                    f"{self.folder}: the index is damaged or of another version, {key!r} of its {manifest.FILE} is missing or malformed; index anew"
                )


class Draft:
    """An index that is being written. Arrays grow along their first axis."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._known: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._end = 0

    def append(self, name: str, rows: np.ndarray) -> None:
        """Add rows to the array of this name; its dtype and the shape of a row are those of the first."""
        if name not in self._files:
            self._files[name] = open(self.folder / name, "wb")  # noqa: SIM115, closed by `close`
            self._known[name] = rows.dtype, (0, *rows.shape[1:])
        dtype, shape = self._known[name]
        if rows.dtype != dtype or rows.shape[1:] != shape[1:]:
            raise ValueError(f"{name} is of {dtype} rows {shape[1:]}, not {rows.dtype} {rows.shape[1:]}")
        self._files[name].write(np.ascontiguousarray(rows).data.cast("B") if rows.size else b"")
        self._known[name] = dtype, (shape[0] + len(rows), *shape[1:])

    def append_names(self, names: list[str]) -> None:
        encoded = [name.encode(errors="replace") for name in names]
        ends = self._end + np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self._end = int(ends[-1]) if len(ends) else self._end
        self.append(NAMES, np.frombuffer(b"".join(encoded), np.uint8))
        self.append(f"{NAMES}.ends", ends)

    def read(self, name: str) -> np.ndarray:
        """The array as far as it goes, mapped from disk."""
        self._files[name].flush()
        return _mapped(self.folder / name, *self._known[name])

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def leaves(self) -> dict[str, str]:
        return {name: f"{dtype.name}[{','.join(map(str, shape))}]" for name, (dtype, shape) in self._known.items()}


@contextlib.contextmanager
def drafting(out: Path) -> Iterator[Draft]:
    """A draft of the index `out`, which `finish` makes whole; whatever ends the block before leaves nothing behind.

    Raises FileExistsError where `out` is taken.
    """
    with new_folder(out, "--index") as partial, contextlib.closing(Draft(partial)) as draft:
        yield draft


def finish(draft: Draft, out: Path, step: int, meta: Mapping[str, Any], measured: Mapping[str, float | None]) -> Index:
    """Hash and rename the draft. Files that others wrote into its folder belong to the index as well."""
    draft.close()
    manifest.write(draft.folder, step, dict(meta), dict(measured), draft.leaves())
    manifest.commit(draft.folder, out)
    return open_index(out)


def open_index(folder: Path) -> Index:
    """The index in `folder`, its arrays mapped from disk, after every byte was compared with the manifest.

    Raises ValueError where there is none, and DamagedError naming the file that is missing, cut short or changed.
    """
    if not (folder / manifest.FILE).is_file():
        raise ValueError(f"{folder} is no index: it has no {manifest.FILE}; `jaxvl search index RUN SOURCE --index {folder}` makes one")
    try:
        found = manifest.read_at(folder)
    except DamagedError as error:
        raise DamagedError(f"{folder}: the index is damaged, {error}") from None
    if faults := manifest.faults(folder, found):
        raise DamagedError(
            f"{folder}: the index is damaged, {faults[0]}" + (f" (and {len(faults) - 1} more files)" if len(faults) > 1 else "")
        )
    if found.meta.get("kind") not in ("lexical", "dense"):
        raise ValueError(f"{folder} is no index: its manifest is of kind {found.meta.get('kind')!r}")
    arrays = {}
    for name, text in found.leaves.items():
        dtype, _, shape = text.rstrip("]").partition("[")
        try:
            arrays[name] = _mapped(folder / name, np.dtype(dtype), tuple(map(int, shape.split(","))))
        except (ValueError, TypeError) as error:  # no dtype, no shape, or more of them than the file has bytes
            raise DamagedError(f"{folder}: the index is damaged, {name} cannot hold {text} ({error})") from None
    index = Index(folder, found.step, found.meta, found.metrics, arrays)
    index.needs(total=int, width=int, also=list)
    index.array(f"{NAMES}.ends", index.total)
    if index.lexical and "pieces" in index.meta:
        index.needs(pieces=list)
        if len(index.meta["pieces"]) != index.meta["width"]:
            raise DamagedError(
                f"{folder}: the index is damaged, it has {len(index.meta['pieces'])} words for vectors of {index.meta['width']}"
            )
    return index


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if not np.prod(shape, dtype=np.int64):  # an empty file cannot be mapped
        return np.zeros(shape, dtype)
    return np.asarray(np.memmap(path, dtype, "r", shape=shape))
