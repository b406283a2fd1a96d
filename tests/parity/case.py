"""What a parity file is to its checker: named arrays or a parsed JSON, which remember what was read of them."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Case(Mapping):
    """The arrays of `x.npz`, the content of `x.json`, or of a model folder its `io.npz`, with the rest under `folder`.

    `case["name"]` gives an array and `case.file("model.safetensors")` a path; `case.unread()` the names nobody asked for: what a
    checker left out is not parity.
    """

    def __init__(self, path: Path):
        self.path = path
        self.folder = path if path.is_dir() else None
        source = path / "io.npz" if self.folder else path
        self._content: Mapping[str, Any] = (
            json.loads(source.read_text()) if source.suffix == ".json" else np.load(source, allow_pickle=False)
        )
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text()) if self.folder else {}
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __contains__(self, name: object) -> bool:
        return name in self._content

    def file(self, name: str) -> Path:
        self._read.add(name)
        return self.path / name

    def unread(self) -> list[str]:
        files = (
            {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()} - {"io.npz", "config.json"}
            if self.folder
            else set()
        )
        return sorted((set(self._content) | files) - self._read)


class Check(NamedTuple):
    """A kind of parity file. `fits` tells it by its content, whatever it is called; `run` fails where a number differs."""

    fits: Callable[[Case], bool]
    run: Callable[[Case], None]


def has(*names: str) -> Callable[[Case], bool]:
    """Fits a case in which all these arrays are present."""
    return lambda case: all(name in case for name in names)
