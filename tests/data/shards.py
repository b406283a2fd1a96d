"""Small shards: pictures that tell which sample they are, tars of any members, a tokenizer of letters."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from jaxvl.data.stream import DataOptions


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (12, 9), **save: object) -> bytes:
    """A picture of one colour, which is `number`: red the low eight bits, green the next."""
    out = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 77)).save(out, kind, **save)
    return out.getvalue()


def number_of(pixels: np.ndarray) -> int:
    """The number of the picture that these decoded pixels [S, S, 3] show."""
    return int(pixels[0, 0, 0]) + 256 * int(pixels[0, 0, 1])


def members(number: int, key: str | None = None, **fields: object) -> list[tuple[str, bytes]]:
    """The three members of sample `number`, with captions "number N" and "also N"."""
    key = f"{number:06d}" if key is None else key
    meta = {"captions": [f"number {number}", f"also {number} in more words"], "class": f"c{number % 3}", **fields}
    return [
        (f"{key}.png", picture(number)),
        (f"{key}.txt", f"number {number}".encode()),
        (f"{key}.json", json.dumps(meta).encode()),
    ]


def tar_bytes(entries: Iterable[tuple[str, bytes] | tarfile.TarInfo], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of members (name, data), and of bare TarInfo entries such as links."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            tar.addfile(info, io.BytesIO(entry[1]))
    return out.getvalue()


def write_shards(folder: Path, counts: Iterable[int], first: int = 0) -> str:
    """Shards of so many samples each, numbered through from `first`; returns the pattern that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        entries = [m for n in range(first, first + count) for m in members(n)]
        (folder / f"{shard:04d}.tar").write_bytes(tar_bytes(entries))
        first += count
    return str(folder)


def options(source: str | tuple[str, ...], folder: Path, **changes: object) -> DataOptions:
    """Options for quick tests: 8-pixel images, two threads, no processes, indexes under `folder`."""
    quick = {
        "image_size": 8,
        "crop_scale": (1.0, 1.0),
        "threads": 2,
        "workers": 0,
        "group_shards": 2,
        "chunk": 3,
        "cache": str(folder / "cache"),
    }
    return DataOptions(source=source, **(quick | changes))


class Letters:
    """A tokenizer of bytes: ids are the caption's first bytes."""

    context_length = 16

    def encode_batch(self, captions: list[str]) -> np.ndarray:
        """int32 [b, 16]."""
        tokens = np.zeros((len(captions), self.context_length), np.int32)
        for row, caption in zip(tokens, captions, strict=True):
            data = caption.encode()[: self.context_length]
            row[: len(data)] = list(data)
        return tokens
