"""The seal of a folder that `jaxvl export --format safetensors` wrote: what decides its embeddings, hashed in its own config.json."""

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxvl import seal
from jaxvl.interop import tensors
from jaxvl.manifest import DamagedError
from jaxvl.progress import say

KEY = "sha256"


def sealed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The hashes of a config, of the tensors and of the other files in `folder`, as config.json keeps them under KEY."""
    return {"config": _of(config), "weights": weights(folder), "files": seal.stamp(folder)}


def check(content: dict[str, Any], folder: Path) -> str:
    """The sha256 of the weights in `folder`, whose config.json holds `content`. Raises DamagedError naming what is not as it was exported."""
    found, wanted = weights(folder), content.get(KEY)
    if not isinstance(wanted, dict):
        say(f"note: {folder / 'config.json'} has no hashes of what was exported, so a damaged file cannot be noticed; export the run anew")
        return found
    seal.same(folder, wanted.get("files") or {}, "the export")
    for what, name, now in (("config", "config.json", _of(content["config"])), ("weights", tensors.SINGLE, found)):
        if now != wanted.get(what):
            raise DamagedError(
                f"{folder / name} is not what was exported (sha256 {now[:12]}..., exported {str(wanted.get(what))[:12]}...); export the run anew"
            )
    return found


def weights(folder: Path) -> str:
    """Hex sha256 of the files that hold the tensors of a folder."""
    whole = hashlib.sha256()
    for path in sorted({tensor.file for tensor in tensors.find(folder).values()}):
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _of(config: Any) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
