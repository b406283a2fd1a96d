"""safetensors files, one tensor at a time: a 7B model is read and written without ever lying whole in host memory.

The library maps files into memory, and what it has touched stays resident until the file is closed; plain reads do not.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxvl.interop import foreign
from jaxvl.interop.foreign import FileError

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FOREIGN = (
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "U16",
    "U32",
    "U64",
    "C64",
)  # known, not read
HEADER_LIMIT = 100_000_000  # bytes, as in the format's own reader
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What DistributedDataParallel, torch.compile, FSDP and checkpointing put into names, of the model or of a module inside it.
WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


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

    Names come without what training loops wrap models in (`module.`). Only headers are read. Raises FileError for files that are
    missing, truncated, damaged, of another format, or disagree with their index.
    """
    path = Path(source)
    if path.is_dir():
        path = _one_of(path)
    if not path.is_file():
        raise FileError(f"{path} does not exist")
    if path.suffix in foreign.PICKLES:
        raise FileError(foreign.told(path) or foreign.pickled([path], path.with_suffix(".safetensors")))
    stored = _indexed(path) if path.suffix == ".json" else _header(path)
    plain = {WRAPPER.sub("", name): name for name in stored}
    if len(plain) < len(stored):
        twice = next(name for name in stored if plain[WRAPPER.sub("", name)] != name)
        raise FileError(f"{path} holds both {twice} and {plain[WRAPPER.sub('', twice)]}, which are one tensor of the model")
    return {name: stored[theirs] for name, theirs in plain.items()}


def _one_of(folder: Path) -> Path:
    """The index or the file of a folder that is to be read."""
    found = (
        [folder / name for name in (INDEX, SINGLE) if (folder / name).is_file()]
        or sorted(folder.glob("*.safetensors.index.json"))
        or sorted(folder.glob("*.safetensors"))
    )
    if not found:
        raise FileError(foreign.without_safetensors(folder))
    if all(re.search(r"-\d+-of-\d+\.safetensors$", p.name) for p in found):
        raise FileError(f"{folder} holds parts of a model, such as {found[0].name}, and no {INDEX}, which says what is in each")
    if len(found) != 1 and found[0].name not in (INDEX, SINGLE):
        raise FileError(f"{folder} holds {', '.join(p.name for p in found)}: name one of them")
    return found[0]


def _indexed(path: Path) -> dict[str, Stored]:
    """The tensors of the shards that an index names, which lie beside it."""
    weight_map = foreign.read_json(path).get("weight_map")
    if not (isinstance(weight_map, dict) and all(isinstance(v, str) and v == Path(v).name for v in weight_map.values())):
        raise FileError(f"{path} is no index of safetensors files: its weight_map must give each tensor the name of a file beside it")
    shards = {name: _header(path.parent / name) for name in sorted(set(weight_map.values()))}
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
            what = f"{path} is no safetensors file or is truncated: {size} bytes cannot hold a header of {length}"
            raise FileError(foreign.told(path) or what)
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError(f"it is no JSON object but {type(header).__name__}")
        entries = {name: _entry(name, entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, RecursionError) as error:
        raise FileError(foreign.told(path) or f"{path} has a damaged header: {error}") from None
    spans = sorted((lo, hi) for *_, lo, hi in entries.values())
    edges = [0, *(hi for _, hi in spans)]
    if any(lo != edge for (lo, _), edge in zip(spans, edges, strict=False)):
        raise FileError(f"{path} has a damaged header: its tensors overlap or have gaps between them")
    if edges[-1] != size - 8 - length:
        raise FileError(f"{path} is truncated or damaged: its header tells of {edges[-1]} bytes of tensors, it holds {size - 8 - length}")
    if foreigners := [f"{name} ({dtype})" for name, (dtype, *_) in entries.items() if dtype not in DTYPES]:
        raise FileError(
            f"{path} holds {len(foreigners)} tensors of types that are not read, such as {foreigners[0]}, since 8 bits and less mean "
            f"nothing without scales; import the model's files of {', '.join(DTYPES)}"
        )
    return {name: Stored(path, 8 + length + lo, shape, DTYPES[dtype]) for name, (dtype, shape, lo, _) in entries.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name is in it twice, of {', '.join(list(found)[:5])}")
    return found


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte behind the last) of one tensor of a header. Raises ValueError where it cannot be meant."""
    whole = lambda values: isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
    found: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = found.get("dtype"), found.get("shape", ()), found.get("data_offsets", ())
    if not (isinstance(dtype, str) and whole(shape) and whole(offsets) and len(offsets) == 2 and (dtype in DTYPES or dtype in FOREIGN)):
        raise ValueError(f"{name} is no tensor with a dtype, a shape and two data_offsets: {str(entry)[:100]}")
    if dtype in DTYPES and offsets[1] - offsets[0] != DTYPES[dtype].itemsize * math.prod(shape):
        raise ValueError(f"{name} of {dtype} {tuple(shape)} cannot take the bytes {offsets[0]} to {offsets[1]}")
    return dtype, tuple(shape), *offsets


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
