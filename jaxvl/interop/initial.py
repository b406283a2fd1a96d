"""Where parameters start: towers from imported folders or earlier runs, everything else from random numbers."""
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvl import checkpoint, manifest
from jaxvl.interop import importing, peft
from jaxvl.interop.positions import Method, resize_table
from jaxvl.mesh import path_str
from jaxvl.models import text as texts, vit as vits
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.progress import say

# Options that do not change what the weights of a tower mean: how it is trained and run, and what is read from its top.
FREE = {
    "variant", "head", "head_bias", "pooler", "pool", "vocab_size", "eos_id", "pad_id", "positions", "mask_token", "patch_dropout", "drop_remainder",
    "dropout", "attention_dropout", "drop_path", "init_std", "scan", "remat", "attention", "dtype",
}  # fmt: skip


class InitOptions(NamedTuple):
    """Where the parameters of a run's first step come from; a run that continues reads none of it.

    image, text: a folder of `jaxvl import` or the workdir of a run, whose tower of that name is taken; "" starts from random
    numbers. image_adapter, text_adapter: a PEFT adapter folder of the published model that the tower is imported from, where
    its LoRA adapters start; both may name one. skip: pattern of parameters that start anew all the same. differ: options in which
    a tower may depart from its source.
    """

    image: str = ""
    text: str = ""
    image_adapter: str = ""
    text_adapter: str = ""
    skip: str = ""
    differ: tuple[str, ...] = ()


class Leaf(NamedTuple):
    """How one parameter starts. change: saved values -> ours, None where they are taken as they are. adapter: values of one."""

    source: str  # checkpoint or adapter folder
    saved: jax.ShapeDtypeStruct
    change: Callable[[np.ndarray], np.ndarray] | None
    note: str
    adapter: np.ndarray | None = None


class Source(NamedTuple):
    """A folder's towers: options of each, and how its image positions are resized."""

    checkpoints: Path
    image: VitOptions | None
    text: TextOptions | None
    positions: Method


def plan(recipe: Any, params: Any, offset: int) -> dict[str, Leaf]:
    """What `fill` will load for a config.Recipe, by path. params: shapes. offset: rows that the tokenizer puts in front of the source's ids.

    Reads no weights but those of adapters. Raises ValueError listing every option and every parameter in which a source differs, and DamagedError.
    """
    options = recipe.init
    if options.skip:
        _compiles(options.skip)
    wanted = {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    image, text = vits.resolve(recipe.image), texts.resolve(recipe.text)
    leaves: dict[str, Leaf] = {}
    faults: list[str] = []
    unread: list[str] = []
    grid = vits.grid(image, recipe.data.image_size, recipe.data.image_size)
    for name, folder, ours in (("image", options.image, image), ("text", options.text, text)):
        if not folder:
            continue
        source = _open(folder)
        theirs = getattr(source, name)
        if theirs is None:
            raise ValueError(f"config.init.{name}: {folder} has no {name} tower")
        faults += _differences(name, folder, ours, theirs, options.differ)
        saved = _saved(source.checkpoints, name)
        for path in [path for path in wanted if path.startswith(name + "/")]:
            if path not in saved or (options.skip and re.search(options.skip, path)):
                continue
            have, want = saved.pop(path), wanted[path].shape
            change, note = None, "loaded"
            if path == "image/pos" and have.shape != want:
                change, note = _resized(have.shape, grid, theirs.class_tokens, source.positions)
            elif path == "text/pos" and have.shape[0] > want[0]:
                change, note = (lambda x, n=want[0]: x[:n]), f"the first {want[0]} of {have.shape[0]} rows"
            elif path == "text/embed" and have.shape[0] + offset == want[0] and offset:
                change, note = (lambda x, pad=theirs.pad_id: np.concatenate([x[pad : pad + 1], x])), f"a copy of row {theirs.pad_id} in front, for padding"
            if (change is None and have.shape != want) or have.shape[1:] != want[1:]:
                faults.append(f"config.init.{name}: {path} has {have.shape} in {folder}; this config makes it {want}{_remedy(path, have, offset)}")
            leaves[path] = Leaf(str(source.checkpoints), have, change, note)
        unread += [f"{folder}: {path}" for path in saved]
    for name in ("image", "text"):
        if getattr(options, f"{name}_adapter"):
            try:
                leaves |= _adapters(name, recipe, wanted)
            except ValueError as error:
                faults.append(f"config.init.{name}_adapter: {error}")
    if faults:
        raise ValueError("the imported towers do not fit this config:\n  " + "\n  ".join(faults))
    if (options.image or options.text) and not leaves:
        raise ValueError(f"config.init.skip {options.skip!r} leaves nothing to load")
    if leaves:
        _table(wanted, leaves, unread)
    return leaves


def fill(leaves: dict[str, Leaf], state: Any) -> Any:
    """`state` (with params, ema and memory) with what `plan` found, each parameter read straight into its sharding and dtype.

    A copy that the state keeps of a loaded parameter, a moving average or a teacher of the same path, starts from it too.
    Every byte of a source is hashed first; raises DamagedError where one is not what was saved.
    """
    if not leaves:
        return state
    flat = {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    values: dict[str, jax.Array] = {}
    put = lambda path, value: jax.make_array_from_callback(value.shape, flat[path].sharding, lambda index: value[index]).astype(flat[path].dtype)
    for folder in sorted({leaf.source for leaf in leaves.values() if leaf.adapter is None}):
        mine = {path: leaf for path, leaf in leaves.items() if leaf.source == folder and leaf.adapter is None}
        place = lambda path, leaf: None if leaf.change else flat[path].sharding
        wanted = {f"params/{p}": jax.ShapeDtypeStruct(x.saved.shape, x.saved.dtype, sharding=place(p, x)) for p, x in mine.items()}
        found = checkpoint.verified(Path(folder))
        if found is None:
            raise ValueError(f"{folder} has no checkpoint")
        read = checkpoint.read_leaves(Path(folder), found.step, wanted)
        for path, leaf in mine.items():
            value = read.pop(f"params/{path}")
            values[path] = put(path, leaf.change(value)) if leaf.change else value.astype(flat[path].dtype)
    adapters = {path: leaf.adapter for path, leaf in leaves.items() if leaf.adapter is not None}
    values |= {path: put(path, value) for path, value in adapters.items()}
    for path in [path for path in adapters if path.endswith("/a")]:
        # Where A and B are both zero neither has a gradient, so ranks and layers that the folder lacks keep their random A.
        given = np.asarray(np.any(adapters[path], -2) | np.any(adapters[path.removesuffix("a") + "b"], -1))[..., None, :]
        values[path] = jax.jit(jnp.where, out_shardings=flat[path].sharding)(given, values[path], flat[path])

    def copy(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_str(path)
        found = next((p for p in values if name.endswith("/" + p) and values[p].shape == leaf.shape), None)
        return jax.jit(lambda x: jnp.asarray(x, leaf.dtype, copy=True), out_shardings=leaf.sharding)(values[found]) if found else leaf

    copies = {name: jax.tree_util.tree_map_with_path(copy, {name: getattr(state, name)})[name] for name in ("ema", "memory")}
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: values.get(path_str(path), leaf), state.params)
    return state._replace(params=params, **copies)


def _open(folder: str) -> Source:
    root = Path(folder)
    if (root / importing.FILE).is_file():
        model = importing.read(root).model
        return Source(root / "checkpoints", model.image, model.text, model.positions)
    if not (root / "config.json").is_file() or not (root / "checkpoints").is_dir():
        raise ValueError(f"config.init: {folder} is neither a folder of `jaxvl import` nor the workdir of a run")
    config = json.loads((root / "config.json").read_text())
    image, text = importing.options_of(VitOptions, config["image"]), importing.options_of(TextOptions, config["text"])
    return Source(root / "checkpoints", image, text, "bicubic")


def _adapters(name: str, recipe: Any, wanted: dict[str, Any]) -> dict[str, Leaf]:
    """The leaves of a tower's adapters. Raises ValueError listing what of the folder has no place."""
    folder, base = getattr(recipe.init, f"{name}_adapter"), getattr(recipe.init, name)
    if not recipe.lora.rank:
        raise ValueError(f"{folder} is read into adapters, and config.lora.rank is 0")
    if not base or not (Path(base) / importing.FILE).is_file():
        raise ValueError(f"{folder} changes a published model; set config.init.{name} to the `jaxvl import` of that model, not {base!r}")
    whole = peft.read(folder, importing.read(base).model, recipe.lora)
    found = {f"lora/{path}": value for path, value in whole.items() if path.startswith(name + "/")}
    if not found:
        raise ValueError(f"{folder} has no adapters of the {name} tower")
    faults = []
    for path, value in found.items():
        if path not in wanted and path.endswith("/a"):
            faults.append(f"{folder} changes {path[5:-2]}, which config.lora.targets {recipe.lora.targets!r} leaves out")
        elif path in wanted and wanted[path].shape != value.shape:
            faults.append(f"{path} has {value.shape} in {folder}; this config makes it {wanted[path].shape}")
    if faults:
        raise ValueError("\n  ".join(faults))
    taken = {path: value for path, value in found.items() if not (recipe.init.skip and re.search(recipe.init.skip, path.rpartition("/")[0]))}
    return {path: Leaf(folder, jax.ShapeDtypeStruct(value.shape, value.dtype), None, "loaded", value) for path, value in taken.items()}


def _saved(folder: Path, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a tower's leaves in the newest checkpoint, from its manifest alone."""
    steps = manifest.whole_steps(folder)
    if not steps:
        raise ValueError(f"{folder} has no checkpoint")
    out = {}
    for path, kind in manifest.read(folder, steps[0]).leaves.items():
        if path.startswith(f"params/lora/{name}/"):
            raise ValueError(f"{folder} holds adapters of its {name} tower; export the run, which merges them, and import that")
        if path.startswith(f"params/{name}/"):
            dtype, _, shape = kind.rstrip("]").partition("[")
            out[path.removeprefix("params/")] = jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split(",") if n), jnp.dtype(dtype))
    return out


def _differences(name: str, folder: str, ours: Any, theirs: Any, allowed: tuple[str, ...]) -> list[str]:
    # The pool is free, and a run's config leaves the id that one of them needs to its tokenizer.
    theirs = (vits if name == "image" else texts).resolve(theirs._replace(pool="mean"))

    def same(o: Any) -> dict[str, Any]:
        alike = {"kv_heads": getattr(o, "kv_heads", 0) or o.heads, "layer_scale": o.layer_scale > 0, "head_dim": getattr(o, "head_dim", 0) or o.width // o.heads}
        return {**o._asdict(), **{k: v for k, v in alike.items() if k in o._fields}}

    mine, other = same(ours), same(theirs)
    if mine.get("causal"):
        mine["mask_padding"] = other["mask_padding"]  # padding comes after a causal caption, so nothing reads it
    return [f"config.{name}.{key} is {getattr(ours, key)!r}; {folder} was trained with {getattr(theirs, key)!r}"
            for key in mine if key not in FREE and key not in allowed and mine[key] != other[key]]  # fmt: skip


def _resized(shape: tuple[int, ...], grid: tuple[int, int], front: int, method: Method) -> tuple[Callable, str]:
    side = round((shape[0] - front) ** 0.5)
    return (lambda x: resize_table(np.asarray(x, np.float32), front, grid, method)), f"resized from {side} x {side} to {grid[0]} x {grid[1]}, {method}"


def _remedy(path: str, have: jax.ShapeDtypeStruct, offset: int) -> str:
    rows = {"text/pos": ("positions", have.shape[0]), "text/embed": ("vocab_size", have.shape[0] + offset)}
    return "; set config.text.{}={}".format(*rows[path]) if path in rows else ""


def _table(wanted: dict[str, Any], leaves: dict[str, Leaf], unread: list[str]) -> None:
    width = max(map(len, wanted))
    for path, leaf in wanted.items():
        say(f"init  {path:{width}}  {tuple(leaf.shape)!s:22}  {leaves[path].note if path in leaves else 'new'}")
    for what in unread:
        say(f"init  left out: {what}")


def _compiles(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"config.init.skip: {pattern!r} is not a regular expression: {error}") from None
