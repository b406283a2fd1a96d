"""Where parameters start: towers or whole methods from imported folders or earlier runs, everything else from random numbers.

Paths are those of the parameters ("image/pos"); what a method keeps besides, where a whole method is taken over, is "memory/...".
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvl import checkpoint, manifest
from jaxvl.data import lexicon
from jaxvl.data.lists import read_json
from jaxvl.interop import importing, peft
from jaxvl.interop.positions import Method, resize_table
from jaxvl.mesh import path_str
from jaxvl.models import kinds, vit as vits
from jaxvl.models.vit import VitOptions
from jaxvl.patterns import check_pattern
from jaxvl.progress import say

STATISTICS = "memory/batch_stats/"  # running averages of normalisation, by the path of their layer
STEP, FILLED = "memory/step", "memory/filled"  # a method's own count of steps, and of queue entries that were written
# Options that do not change what the weights of a tower mean: how it is trained and run, and what is read from its top.
FREE = {
    "variant", "head", "head_bias", "pooler", "pool", "vocab_size", "eos_id", "pad_id", "mask_id", "positions", "mask_token", "patch_dropout", "drop_remainder",
    "dropout", "attention_dropout", "drop_path", "init_std", "scan", "remat", "attention", "dtype", "statistics",
}  # fmt: skip


class InitOptions(NamedTuple):
    """Where the parameters of a run's first step come from; a run that continues reads none of it.

    image, text: a folder of `jaxvl import` or the workdir of a run, whose tower of that name is taken; "" starts from random
    numbers. A BERT of as many layers as text tower and fusion layers have together gives its lower ones to the one and its upper ones to
    the other, and its word head. whole: such a folder or workdir, from which everything starts that is there under the same name:
    parameters, teacher and queues; image and text come after it. The count of steps starts anew. image_adapter, text_adapter: a PEFT adapter folder of the published model that the tower is imported from, where
    its LoRA adapters start; both may name one. skip: pattern of parameters that start anew all the same. differ: options in which
    a tower may depart from its source.
    """

    image: str = ""
    text: str = ""
    whole: str = ""
    image_adapter: str = ""
    text_adapter: str = ""
    skip: str = ""
    differ: tuple[str, ...] = ()


def check(options: InitOptions) -> None:
    """Raises ValueError for a pattern that cannot be compiled."""
    check_pattern("init.skip", options.skip)


class Leaf(NamedTuple):
    """How one leaf starts. change: saved values -> ours, None where they are taken as they are. values: those given outright, such
    as an adapter's. path: of what was saved, where it is not ours."""

    source: str  # checkpoint or adapter folder
    saved: jax.ShapeDtypeStruct
    change: Callable[[np.ndarray], np.ndarray] | None
    note: str
    values: np.ndarray | None = None
    path: str = ""


class Source(NamedTuple):
    """A folder's towers: options of each, and how its image positions are resized."""

    checkpoints: Path
    image: Any  # options of a tower of any kind, or None
    text: Any
    positions: Method


def plan(recipe: Any, params: Any, offset: int, memory: Any = ()) -> dict[str, Leaf]:
    """What `fill` will load for a config.Recipe, by path. params, memory: shapes. offset: rows that the tokenizer puts in front of the source's ids.

    Reads no weights but those of adapters. Raises ValueError listing every option and every parameter in which a source differs, and DamagedError.
    """
    options = recipe.init
    wanted = {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    kept = {f"memory/{path_str(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(memory)}
    image = kinds.of(recipe.image).resolve(recipe.image, "image")
    text = (
        recipe.text if recipe.data.captions == "none" else kinds.of(recipe.text).resolve(recipe.text, "text")
    )  # without captions there is no text tower
    leaves: dict[str, Leaf] = {}
    faults: list[str] = []
    unread: list[str] = []
    grid = vits.grid(image, recipe.data.image_size, recipe.data.image_size) if isinstance(image, VitOptions) else (0, 0)

    def take(key: str, source: Source, names: dict[str, str]) -> None:
        """Plans the leaves of `names`, our path -> the saved one."""
        saved, folder = _saved(source.checkpoints), getattr(options, key)
        for path, theirs in names.items():
            if theirs not in saved or (options.skip and re.search(options.skip, path)):
                continue
            have, want = saved[theirs], {**wanted, **kept}[path].shape
            change, note = _change(path, theirs, have.shape, want, source, grid, offset)
            if (change is None and have.shape != want) or have.shape[1:] != want[1:]:
                faults.append(
                    f"config.init.{key}: {path} has {have.shape} in {folder}; this config makes it {want}{_remedy(path, have, offset)}"
                )
            leaves[path] = Leaf(str(source.checkpoints), have, change, note, path=theirs)
        unread.extend(f"{folder}: {path}" for path in saved if path not in names.values() and _of(path, key))

    if options.whole:
        source = _open(options.whole, "whole")
        for name, ours in (("image", image), ("text", text)):
            if getattr(source, name) is not None:
                faults += _differences(name, options.whole, ours, getattr(source, name), options.differ)
        take("whole", source, {path: path for path in (*wanted, *kept) if path != STEP})
        _queues(leaves, kept)
        _same_words(source, leaves, recipe, offset)
    for name, folder, ours in (("image", options.image, image), ("text", options.text, text)):
        if not folder:
            continue
        source = _open(folder, name)
        theirs = getattr(source, name)
        if theirs is None:
            raise ValueError(f"config.init.{name}: {folder} has no {name} tower")
        # Running statistics are parameters of a tower whose normalisation is frozen, and in the memory of one that takes the batch's.
        saved, layer = _saved(source.checkpoints), lambda path: path.removeprefix(STATISTICS)
        names = {
            path: layer(path) if layer(path) in saved else STATISTICS + layer(path)
            for path in (*wanted, *kept)
            if layer(path).startswith(name + "/")
        }
        fused = next((leaf.shape[0] for path, leaf in wanted.items() if path.startswith("fusion/blocks/")), 0)
        if name == "text" and fused and theirs.depth == ours.depth + fused:
            theirs = theirs._replace(depth=ours.depth)
            names |= {path: path.replace("fusion/blocks/", "text/blocks/") for path in wanted if path.startswith("fusion/blocks/")}
            names |= {path: path for path in wanted if path.startswith("mlm/")}
        faults += _differences(name, folder, ours, theirs, options.differ)
        take(name, source, names)
        if name == "text":
            leaves |= _codebooks(source, recipe, wanted, offset)
    for name in ("image", "text"):
        if getattr(options, f"{name}_adapter"):
            try:
                leaves |= _adapters(name, recipe, wanted)
            except ValueError as error:
                faults.append(f"config.init.{name}_adapter: {error}")
    if faults:
        raise ValueError("the imported towers do not fit this config:\n  " + "\n  ".join(faults))
    if (options.image or options.text or options.whole) and not leaves:
        raise ValueError(f"config.init.skip {options.skip!r} leaves nothing to load")
    if leaves:
        _table({**wanted, **kept} if options.whole else wanted, leaves, unread)
    return leaves


def fill(leaves: dict[str, Leaf], state: Any) -> Any:
    """`state` (with params, ema and memory) with what `plan` found, each leaf read straight into its sharding and dtype.

    A copy that the state keeps of a loaded parameter, a moving average or a teacher of the same path, starts from it too where the
    source has none of its own. Every byte of a source is hashed first; raises DamagedError where one is not what was saved.
    """
    if not leaves:
        return state
    flat = {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    flat |= {f"memory/{path_str(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.memory)}
    values: dict[str, jax.Array] = {}
    put = lambda path, value: jax.make_array_from_callback(value.shape, flat[path].sharding, lambda index: value[index]).astype(
        flat[path].dtype
    )
    read_from = [(path, leaf) for path, leaf in leaves.items() if leaf.values is None]
    for folder in sorted({leaf.source for _, leaf in read_from}):
        found = checkpoint.verified(Path(folder))
        if found is None:
            raise ValueError(f"{folder} has no checkpoint")
        mine = [(path, leaf) for path, leaf in read_from if leaf.source == folder]
        # What is changed comes to the host and may serve several leaves; the rest is read where it stays.
        for changed in (False, True):
            some = [(path, leaf) for path, leaf in mine if bool(leaf.change) == changed]
            place = lambda path, changed=changed: None if changed else flat[path].sharding
            wanted = {
                _key(leaf.path): jax.ShapeDtypeStruct(leaf.saved.shape, leaf.saved.dtype, sharding=place(path)) for path, leaf in some
            }
            read = checkpoint.read_leaves(Path(folder), found.step, wanted) if wanted else {}
            for path, leaf in some:
                value = read[_key(leaf.path)]
                values[path] = put(path, leaf.change(value)) if leaf.change else value.astype(flat[path].dtype)
    given = {path: leaf.values for path, leaf in leaves.items() if leaf.values is not None}
    values |= {path: put(path, value) for path, value in given.items()}
    for path in [path for path in given if path.endswith("/a")]:
        # Where A and B are both zero neither has a gradient, so ranks and layers that the folder lacks keep their random A.
        there = np.asarray(np.any(given[path], -2) | np.any(given[path.removesuffix("a") + "b"], -1))[..., None, :]
        values[path] = jax.jit(jnp.where, out_shardings=flat[path].sharding)(there, values[path], flat[path])

    def copy(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_str(path)
        if name in values:
            return values[name]
        found = next((p for p in values if name.endswith("/" + p) and values[p].shape == leaf.shape), None)
        return jax.jit(lambda x: jnp.asarray(x, leaf.dtype, copy=True), out_shardings=leaf.sharding)(values[found]) if found else leaf

    copies = {name: jax.tree_util.tree_map_with_path(copy, {name: getattr(state, name)})[name] for name in ("ema", "memory")}
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: values.get(path_str(path), leaf), state.params)
    return state._replace(params=params, **copies)


def _open(folder: str, key: str) -> Source:
    root = Path(folder)
    if (root / importing.FILE).is_file():
        model = importing.read(root).model
        return Source(root / "checkpoints", model.image, model.text, model.positions)
    if not (root / "config.json").is_file() or not (root / "checkpoints").is_dir():
        raise ValueError(f"config.init.{key}: {folder} is neither a folder of `jaxvl import` nor the workdir of a run")
    config = read_json(root / "config.json")
    image, text = (importing.tower_options(name, config[name]) for name in ("image", "text"))
    return Source(root / "checkpoints", image, text, "bicubic")


def _codebooks(source: Source, recipe: Any, wanted: dict[str, Any], offset: int) -> dict[str, Leaf]:
    """Codebooks start as the rows that an imported decoder's output matrix has for their words, or its embeddings where it is tied."""
    saved, words = _saved(source.checkpoints), np.array(getattr(recipe.method, "words", ()), np.int64) - offset
    paths = [
        path
        for path in ("text_codebook", "image_codebook")
        if path in wanted and not (recipe.init.skip and re.search(recipe.init.skip, path))
    ]
    theirs = next((path for path in ("lm_head/kernel", "text/embed") if path in saved), None)
    if theirs is None or not paths:
        return {}
    tied = theirs == "text/embed"
    rows, width = saved[theirs].shape if tied else saved[theirs].shape[::-1]
    total, wide = wanted[paths[0]].shape
    if wide != width or len(words) == 0 or words.max() >= rows:
        last = words.max(initial=-1)
        raise ValueError(
            f"config.init.text: {theirs} has {rows} rows of {width}; the codebooks are of {len(words)} words up to id {last} and {wide} wide"
        )
    change = lambda x: np.pad((x if tied else x.T)[words], ((0, total - len(words)), (0, 0)))
    return {path: Leaf(str(source.checkpoints), saved[theirs], change, f"{len(words)} rows of {theirs}", path=theirs) for path in paths}


def _same_words(source: Source, leaves: dict[str, Leaf], recipe: Any, offset: int) -> None:
    """Raises ValueError where a run whose codebooks are loaded has them of other words than this one."""
    if not any(path.endswith("_codebook") for path in leaves):
        return
    file = source.checkpoints.parent / "tokenizer" / lexicon.FILE
    theirs = np.array(json.loads(file.read_text())["ids"]) + offset if file.is_file() else np.zeros(0)
    if theirs.tolist() != list(recipe.method.words):
        raise ValueError(
            f"config.init.whole: the codebooks in {source.checkpoints.parent} are of {len(theirs)} words, which are not the {len(recipe.method.words)} of this run; "
            f"give both one tokenizer and one config.tokenizer.lexicon, or start codebooks anew with config.init.skip='_codebook$'"
        )


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
    taken = {
        path: np.asarray(value)
        for path, value in found.items()
        if not (recipe.init.skip and re.search(recipe.init.skip, path.rpartition("/")[0]))
    }
    return {path: Leaf(folder, jax.ShapeDtypeStruct(value.shape, value.dtype), None, "loaded", value) for path, value in taken.items()}


def _saved(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters and the memory in the newest checkpoint, from its manifest alone."""
    steps = manifest.whole_steps(folder)
    if not steps:
        raise ValueError(f"{folder} has no checkpoint")
    out = {}
    for path, kind in manifest.read(folder, steps[0]).leaves.items():
        if path.startswith("params/lora/"):
            raise ValueError(
                f"{folder} holds adapters of its {path.split('/')[2]} tower; export the run, which merges them, and import that"
            )
        if path.startswith(("params/", "memory/")):
            dtype, _, shape = kind.rstrip("]").partition("[")
            out[path.removeprefix("params/")] = jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split(",") if n), jnp.dtype(dtype))
    return out


def _key(path: str) -> str:
    """How a checkpoint names a leaf that has this path here."""
    return path if path.startswith("memory/") else f"params/{path}"


def _of(path: str, key: str) -> bool:
    """Whether a saved leaf is of what `config.init.key` takes over."""
    return path != STEP if key == "whole" else path.startswith(key + "/")


def _change(
    path: str, theirs: str, have: tuple[int, ...], want: tuple[int, ...], source: Source, grid: tuple[int, int], offset: int
) -> tuple[Callable | None, str]:
    """How a saved leaf becomes ours, None where it is taken as it is, and what to tell of it; the teacher's tables are as the student's."""
    table = "/".join(path.split("/")[-2:])
    if table == "image/pos" and have != want and source.image is not None:
        return _resized(have, grid, source.image.class_tokens, source.positions)
    if table == "text/pos" and have[0] > want[0]:
        return (lambda x: x[: want[0]]), f"the first {want[0]} of {have[0]} rows"
    if table == "text/embed" and have[0] + offset == want[0] and offset and source.text is not None:
        pad = source.text.pad_id
        return (lambda x: np.concatenate([x[pad : pad + 1], x])), f"a copy of row {pad} in front, for padding"
    if theirs.startswith("text/blocks/") and have[0] > want[0] and have[1:] == want[1:]:
        first = have[0] - want[0] if path.startswith("fusion/") else 0
        return (lambda x: x[first : first + want[0]]), f"layers {first} to {first + want[0] - 1} of {have[0]}"
    return None, "loaded"


def _queues(leaves: dict[str, Leaf], kept: dict[str, Any]) -> None:
    """A place in a queue means nothing without its entries; entries that come without a count are all real."""
    queues = [path for path in kept if path.endswith("_queue") and not path.endswith("id_queue")]
    if all(path in leaves for path in queues):
        if queues and FILLED in kept and FILLED not in leaves:
            first = leaves[queues[0]]
            leaves[FILLED] = Leaf(
                first.source,
                jax.ShapeDtypeStruct((), jnp.int32),
                None,
                "all entries",
                np.asarray(first.saved.shape[0], np.int32),
                path=FILLED,
            )
        return
    for path in (*queues, "memory/pointer", "memory/id_queue", FILLED):
        leaves.pop(path, None)


def _differences(name: str, folder: str, ours: Any, theirs: Any, allowed: tuple[str, ...]) -> list[str]:
    if ours.kind != theirs.kind:
        return [f"config.{name}.kind is {ours.kind!r}; {folder} holds a {theirs.kind!r}"]
    # The pool is free, and a run's config leaves the id that one of them needs, and the vocabulary, to its tokenizer.
    left = {"pool": ours.pool} | ({} if name == "image" else {"vocab_size": theirs.vocab_size or ours.vocab_size})
    left |= {"pool": "mean"} if ours.kind in ("vit", "transformer") else {}
    theirs = kinds.of(theirs).resolve(theirs._replace(**left), name)

    def same(o: Any) -> dict[str, Any]:
        if o.kind not in ("vit", "transformer"):
            return o._asdict()
        alike = {
            "kv_heads": getattr(o, "kv_heads", 0) or o.heads,
            "layer_scale": o.layer_scale > 0,
            "head_dim": getattr(o, "head_dim", 0) or o.width // o.heads,
        }
        return {**o._asdict(), **{k: v for k, v in alike.items() if k in o._fields}}

    mine, other = same(ours), same(theirs)
    if mine.get("causal"):
        mine["mask_padding"] = other["mask_padding"]  # padding comes after a causal caption, so nothing reads it
    return [f"config.{name}.{key} is {getattr(ours, key)!r}; {folder} was trained with {getattr(theirs, key)!r}"
            for key in mine if key not in FREE and key not in allowed and mine[key] != other[key]]  # fmt: skip


def _resized(shape: tuple[int, ...], grid: tuple[int, int], front: int, method: Method) -> tuple[Callable, str]:
    side = round((shape[0] - front) ** 0.5)
    return (
        lambda x: resize_table(np.asarray(x, np.float32), front, grid, method)
    ), f"resized from {side} x {side} to {grid[0]} x {grid[1]}, {method}"


def _remedy(path: str, have: jax.ShapeDtypeStruct, offset: int) -> str:
    if path.endswith("_queue"):
        return f"; set config.method.queue={have.shape[0]}, or start it anew with config.init.skip"
    rows = {"text/pos": ("positions", have.shape[0]), "text/embed": ("vocab_size", have.shape[0] + offset)}
    return "; set config.text.{}={}".format(*rows[path]) if path in rows else ""


def _table(wanted: dict[str, Any], leaves: dict[str, Leaf], unread: list[str]) -> None:
    width = max(map(len, wanted))
    for path, leaf in wanted.items():
        say(f"init  {path:{width}}  {tuple(leaf.shape)!s:22}  {leaves[path].note if path in leaves else 'new'}")
    for what in unread:
        say(f"init  left out: {what}")
