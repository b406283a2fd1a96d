"""Checkpoint folders as no run leaves them: what can happen to the files of a step, each a function of its folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxvl import manifest
from jaxvl.checkpoint import CheckpointOptions, open_saver

STEPS = (40, 44, 48)
META = {"position": {"seed": 0, "samples": 0}, "skipped": []}


def state(step: int) -> dict:
    """A small state of a run at `step`."""
    rng = np.random.default_rng(step)
    params = {"a": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "b": jnp.asarray(rng.normal(size=9), jnp.float32)}
    return {"step": jnp.int32(step), "params": params}


def abstract() -> dict:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state(0))


def save(folder: Path) -> None:
    """A folder with three steps of a run."""
    with open_saver(folder, CheckpointOptions()) as saver:
        for step in STEPS:
            saver.save(step, state(step), META, block=True)


def same(found: dict, step: int) -> bool:
    """Whether a restored state is that of the step, bit for bit."""
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state(step)), strict=True)
    )


def forge(step: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest of a step and seal it anew."""
    body = json.loads((step / manifest.FILE).read_bytes())
    body.pop("sha256")
    change(body)
    (step / manifest.FILE).write_bytes(manifest._sealed(json.dumps(body, indent=1).encode()[: -len("\n}")]))


def resealed(text: bytes) -> Callable[[Path], None]:
    return lambda step: (step / manifest.FILE).write_bytes(manifest._sealed(text)) and None


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(step: Path) -> None:
        (step / name).unlink()
        make(step / name)

    return change


def forged(**fields: object) -> Callable[[Path], None]:
    return lambda step: forge(step, lambda body: body.update(fields))


def lacking(field: str) -> Callable[[Path], None]:
    return lambda step: forge(step, lambda body: body.pop(field) and None)


def naming(name: str, size: object = 1, digest: object = "0" * 64) -> Callable[[Path], None]:
    return lambda step: forge(step, lambda body: body["files"].__setitem__(name, {"bytes": size, "sha256": digest}))


def older_as(step: Path) -> None:
    """Step 44 under the number of this one, hashed anew."""
    number = int(step.name)
    shutil.rmtree(step)
    shutil.copytree(step.parent / "00000044", step)
    forge(step, lambda body: body.update(step=number))


def linked_out(step: Path) -> None:
    """A file that is a link to the same bytes elsewhere, which anybody may change."""
    outside = step.parent.parent / "outside"
    shutil.copyfile(step / "state/_METADATA", outside)
    (step / "state/_METADATA").unlink()
    (step / "state/_METADATA").symlink_to(outside)


ODD: dict[str, Callable[[Path], object]] = {
    "manifest is a pipe": replaced(manifest.FILE, os.mkfifo),
    "manifest is a device": replaced(manifest.FILE, lambda path: path.symlink_to("/dev/zero")),
    "manifest is a folder": replaced(manifest.FILE, Path.mkdir),
    "a file is a pipe": replaced("state/_METADATA", os.mkfifo),
    "a file is a device": replaced("state/_METADATA", lambda path: path.symlink_to("/dev/zero")),
    "a file is a link": linked_out,
    "a file is a link to itself": replaced("state/_METADATA", lambda path: path.symlink_to(path.name)),
    "a file is a folder": replaced("state/_METADATA", Path.mkdir),
    "a path leads out": naming("../../../etc/passwd"),
    "a path is absolute": naming("/dev/zero"),
    "a size is no number": naming("state/x", "1"),
    "a size is negative": naming("state/x", -1),
    "a hash is no hash": naming("state/x", 1, None),
    "files is a list": forged(files=[1, 2]),
    "files is empty": forged(files={}),
    "leaves is null": forged(leaves=None),
    "a leaf has no type": forged(leaves={"step": "x"}),
    "meta is a list": forged(meta=[]),
    "metrics has text": forged(metrics={"r": "x"}),
    "step is text": forged(step="48"),
    "step is true": forged(step=True),
    "format is none": forged(format=None),
    **{f"manifest lacks {field}": lacking(field) for field in ("format", *manifest.Manifest._fields)},
    "manifest is deep": resealed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000),
    "manifest is no JSON": resealed(b"not json"),
    "manifest is an array": resealed(b"[1"),
    "manifest is not UTF-8": resealed(b'{"a": "\xff\xfe"'),
    "an older step hashed anew": older_as,
    "a strange file beside the arrays": lambda step: (
        (step / "state/d").mkdir(exist_ok=True) or (step / "state/d/ffffffff").write_bytes(b"x")
    ),
    "a step without files": lambda step: shutil.rmtree(step) or step.mkdir(),
    "a step that is a file": lambda step: shutil.rmtree(step) or step.write_text("x"),
    "a step that is a link to another": lambda step: shutil.rmtree(step) or step.symlink_to(step.parent / "00000044"),
}
NO_STEPS = ("202601011200", "99999999999999999999", "2147483648", "٠٠٠٠٠٠٩٩", "000000099", "+0000099")
