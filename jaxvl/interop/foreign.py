"""Files of models that are not what they should be, told as what they are and with what to do about it."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxvl.data import lists

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
# Pickles that lie beside weights and are none.
BESIDE = re.compile(r"^(?:training_args|optimizer|scheduler|scaler|random_states|rng_state)")
OTHERS = {".h5": "TensorFlow", ".msgpack": "Flax", ".gguf": "llama.cpp", ".onnx": "ONNX", ".npz": "NumPy", ".ot": "Rust"}
AGAIN = "download it again"
# How files begin that are often found in another's place; compared in lower case, behind white space.
STARTS = (
    (b"version https://git-lfs.github.com/spec/", f"a Git LFS pointer and not the file itself: run `git lfs pull` in its repository, or {AGAIN}"),
    (b"<!doctype html", f"a web page and not the file itself: {AGAIN}"),
    (b"<html", f"a web page and not the file itself: {AGAIN}"),
    (b"<?xml", f"an XML answer of a server and not the file itself: {AGAIN}"),
    (b"gguf", "a GGUF file, which is not read; import the model's safetensors"),
    (b"\x89hdf", "an HDF5 file, which is not read; import the model's safetensors"),
    (b"\x1f\x8b\x08", "compressed with gzip: unpack it"),
)  # fmt: skip
PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05](?!.{2}\x00{4})", re.DOTALL)  # PyTorch's zip, or a pickle and no small header's length
RECIPE = """{told}, which could run any code and is not opened here. Where torch is, convert it:
  import argparse, torch, safetensors.torch as st; torch.serialization.add_safe_globals([argparse.Namespace]); parts = [torch.load(p, map_location="cpu", weights_only=True) for p in {files}]
  st.save_file({{k: v.clone().contiguous() for s in parts for k, v in next((s[n] for n in {keys} if isinstance(s.get(n), dict)), s).items() if torch.is_tensor(v)}}, {out!r})"""
KEYS = ("state_dict", "model_state_dict", "model", "module", "net")  # under which training checkpoints keep the weights


class FileError(ValueError):
    """A file that is not what it should be; the message names the file and what is wrong with it."""


def told(path: Path) -> str:
    """What a file is that could not be read, as a sentence; "" where its beginning does not tell."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return f"{path} is empty: {AGAIN}"
    if PICKLE.match(start):
        return pickled([path], path.with_suffix(".safetensors"))
    return next((f"{path} is {what}" for begin, what in STARTS if start.lstrip().lower().startswith(begin)), "")


def pickled(files: list[Path], out: Path) -> str:
    """That the files are pickles, and the two lines of Python that make one safetensors file `out` of them."""
    if out in files:
        out = out.with_name(out.stem + ".converted.safetensors")
    what = f"{files[0]} is a PyTorch pickle" if len(files) == 1 else f"{files[0]} is one of {len(files)} PyTorch pickles"
    return RECIPE.format(told=what, files=list(map(str, files)), keys=KEYS, out=str(out))


def weights(names: Collection[str]) -> list[str]:
    """Those of a folder's file names that are pickles of weights, the shards of one model before all others."""
    found = sorted(name for name in names if Path(name).suffix in PICKLES and not BESIDE.match(name))
    return [name for name in found if re.match(r"pytorch_model.*\.bin$", name)] or found


def without_safetensors(folder: Path) -> str:
    """What is to be said of a folder that holds no safetensors."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    if found := weights(names):
        shards = found if re.match(r"pytorch_model-\d", found[0]) else found[:1]
        return pickled([folder / name for name in shards], folder / "model.safetensors")
    others = [f"{name} ({OTHERS[Path(name).suffix]})" for name in names if Path(name).suffix in OTHERS]
    more = f"; {', '.join(others)} cannot be read" if others else ""
    return f"{folder} holds no model.safetensors and no model.safetensors.index.json{more}"


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises FileError where it is none, OSError where the file cannot be read."""
    try:
        return lists.read_object(path)
    except ValueError as error:
        raise FileError(told(path) or str(error)) from None
