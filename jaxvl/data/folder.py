"""A folder of images as a source without captions: folder://PATH, every image below it in the order of the paths."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxvl.data.cache import digest
from jaxvl.data.formats import unread
from jaxvl.data.source import Bad, Place, Record, Source, Want
from jaxvl.data.targroup import IMAGES
from jaxvl.progress import say

SCHEME = "folder://"


def images_below(folder: Path) -> tuple[str, ...]:
    """Paths of the images, relative to `folder`, ascending."""
    return tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix[1:].lower() in IMAGES and p.is_file()))


def folder_source(pattern: str, how: Place) -> Source:
    """The source of a folder, which counts as one shard. Raises ValueError where it holds no image, or where captions are asked for."""
    folder = Path(os.path.abspath(os.path.expanduser(pattern.removeprefix(SCHEME))))
    if how.captions:
        raise ValueError(
            f"data.source {pattern!r} is a folder of images without captions; `jaxvl data make` turns images with captions into shards"
        )
    if not folder.is_dir():
        raise ValueError(f"data.source {pattern!r}: {folder} is not a folder")
    names = images_below(folder)
    others = unread(sorted(p for p in folder.rglob("*") if p.is_file()))
    if not names:
        first = f"; {others[0]}, which is not read" if others else ""
        raise ValueError(f"data.source {pattern!r}: no image below {folder} (looked for {', '.join(IMAGES[:6])}, ...){first}")
    if others:
        say(f"data.source {pattern!r}: {len(others):,} images left out, of formats that are not read ({others[0]})")
    version = digest(repr([(name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for name in names]))
    counts = np.array([len(names)], np.int64)
    return Source(pattern, version, (str(folder),), counts, np.zeros_like(counts), functools.partial(_read, str(folder), names), _nothing)


def _nothing() -> Iterator[Bad]:
    return iter(())


def _read(folder: str, names: tuple[str, ...], shard: int, row: int, want: Want) -> Record | Bad:
    del shard
    try:
        return Record(names[row], Path(folder, names[row]).read_bytes() if want.image else b"", (), {})
    except OSError:
        return Bad(folder, names[row], "unreadable")
