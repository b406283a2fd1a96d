"""safetensors files, one tensor at a time: a 7B model is read and written without ever lying whole in host memory.

The library maps files into memory, and what it has touched stays resident until the file is closed; plain reads do not.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, as in the format's own reader
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_PICKLE = """{0} is a PyTorch pickle, which could run any code and is not opened here. Where torch is, convert it:
  import torch, safetensors.torch; state = torch.load("{0}", map_location="cpu", weights_only=True)
  safetensors.torch.save_file({{k: v.clone() for k, v in state.get("model", state).items()}}, "{1}")"""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class FileError(ValueError):
    """A file that is not what it should be; the message names the file and what is wrong with it."""


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: np.dtype


def read(tensor: Stored) -> np.ndarray:
    """The tensor's values. Raises FileError where the file has become shorter."""
    count = int(np.prod(tensor.shape, dtype=np.int64))
    with open(tensor.file, "rb") as file:
        file.seek(tensor.offset)
        values = np.fromfile(file, tensor.dtype, count)
    if values.size != count:
        raise FileError(f"{tensor.file} ends inside a tensor of {count} values at byte {tensor.offset}")
    return values.reshape(tensor.shape)


def find(source: str | Path) -> dict[str, Stored]:
    """All tensors of a folder (an index with its shards, or its one file), of an index file or of a single file, by name.

    Only headers are read. Raises FileError for files that are missing, truncated, damaged or disagree with their index.
    """
    path = Path(source)
    if path.is_dir():
        found = (
            [path / name for name in (INDEX, SINGLE) if (path / name).is_file()]
            or sorted(path.glob("*.safetensors.index.json"))
            or sorted(path.glob("*.safetensors"))
        )
        if len(found) != 1 and (not found or found[0].name not in (INDEX, SINGLE)):
            holds = f"holds {', '.join(p.name for p in found)}: name one of them" if found else f"holds no {SINGLE} and no {INDEX}"
            raise FileError(f"{path} {holds}")
        path = found[0]
    if not path.is_file():
        raise FileError(f"{path} does not exist")
    if path.suffix in PICKLES:
        raise FileError(_PICKLE.format(path, path.with_suffix(".safetensors")))
    if path.suffix != ".json":
        return _header(path)
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        shards = {name: _header(path.parent / name) for name in sorted(set(weight_map.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is no index of safetensors files: {error!r}") from None
    lost = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    unlisted = sorted(name for shard, tensors in shards.items() for name in tensors if weight_map.get(name) != shard)
    if lost or unlisted:
        raise FileError(
            f"{path} disagrees with its files: not where it says: {', '.join(lost) or 'none'}; not in it: {', '.join(unlisted) or 'none'}"
        )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file: 8 bytes of header length, a JSON header, then the values without gaps."""
    if not path.is_file():
        raise FileError(f"{path} does not exist")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise FileError(f"{path} is no safetensors file or is truncated: {size} bytes cannot hold a header of {length}")
        try:
            header = json.loads(file.read(length))
            tensors = {
                name: (DTYPES[t["dtype"]], tuple(t["shape"]), *t["data_offsets"]) for name, t in header.items() if name != "__metadata__"
            }
            spans = sorted((lo, hi) for _, _, lo, hi in tensors.values())
            wrong = [
                name for name, (dtype, shape, lo, hi) in tensors.items() if hi - lo != dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{path} has a damaged header: {error!r}") from None
    edges = [0, *(hi for _, hi in spans)]
    if wrong or any(lo != edge for (lo, _), edge in zip(spans, edges, strict=False)):
        raise FileError(f"{path} has a damaged header: tensors of wrong size ({', '.join(wrong) or 'none'}), or gaps between them")
    if edges[-1] != size - 8 - length:
        raise FileError(f"{path} is truncated or damaged: its header tells of {edges[-1]} bytes of tensors, it holds {size - 8 - length}")
    return {name: Stored(path, 8 + length + lo, shape, dtype) for name, (dtype, shape, lo, _) in tensors.items()}


def write(path: Path, plan: dict[str, tuple[tuple[int, ...], np.dtype]], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """One file from a stream of (name, values) in any order; `plan` gives every tensor's shape and dtype beforehand.

    The file appears under its name only when it is whole. Raises ValueError where the stream and the plan disagree.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # readers ask for a framework here; the layout is PyTorch's
    end = 0
    for name in sorted(plan):
        shape, dtype = plan[name]
        start, end = end, end + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values are aligned to 8 bytes
    missing, partial = set(plan), path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
            for name, values in tensors:
                if name not in missing or (values.shape, values.dtype) != plan[name]:
                    raise ValueError(f"tensor {name} {values.shape} {values.dtype} is not as planned: {plan.get(name)}, or came twice")
                missing.remove(name)
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
            if missing:
                raise ValueError(f"tensors never came: {', '.join(sorted(missing))}")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
