"""Published weights into our parameters and back, tensor by tensor, each straight into or out of its sharding."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxvl.interop import albef, convnets, foreign, tensors
from jaxvl.interop.names import Layout, Name, layouts
from jaxvl.interop.positions import resize_table
from jaxvl.interop.published import Published, describe, shapes
from jaxvl.interop.tensors import Stored
from jaxvl.models.vit import grid

SHOWN = 30  # lines of a Mismatch
SIZES = (
    "width",
    "depth",
    "heads",
    "mlp_dim",
    "vocab_size",
    "positions",
    "head",
    "pooler",
    "registers",
    "token_types",
    "kv_heads",
    "head_dim",
)


class Mismatch(ValueError):
    """Files that do not hold the model; the message lists the tensors that are missing, unknown or of another shape."""


class Matched(NamedTuple):
    """Which published tensor fills which of our leaves."""

    layout: Layout
    prefix: str
    leaves: dict[str, tuple[Name, list[Stored]]]  # our path -> its name and one tensor a layer, or a single one
    dropped: tuple[str, ...]  # tensors of the files that are no weights of the model


class Imported(NamedTuple):
    """An imported model: params as `published.shapes` lays them out; layout and prefix write them back as they came."""

    model: Published
    params: dict[str, Any]
    layout: Layout
    prefix: str
    dropped: tuple[str, ...]


def load(
    source: str | Path,
    model: Published | None = None,
    *,
    dtype: str = "float32",
    heads: int = 0,
    place: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Imported:
    """The weights of a folder, an index or a file. The model is read from the config.json beside them unless it is given.

    heads: of towers of ALBEF and TCL, which do not tell it, where they are not of the usual width.
    place: the tree of ShapeDtypeStructs -> the same tree of shardings; without it everything goes to the first device.
    Host memory beyond the parameters stays within a few of the files' tensors. Nothing is read before everything fits.
    Raises tensors.FileError for damaged files, keys.ConfigError for an unknown model and Mismatch for tensors that
    do not fit it.
    """
    stored = tensors.find(source)
    if model is None:
        if albef.holds(stored):
            model, check = albef.describe(stored, heads), albef.check
        elif convnets.holds(stored):
            model, check = convnets.describe(stored), convnets.check
        else:
            model, check = describe(read_config(source), stored), None
        if check and config_of(source):
            check(read_config(source), model)
    return fill(model, stored, dtype=dtype, place=place)


def fill(
    model: Published, stored: dict[str, Stored], *, dtype: str = "float32", place: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Imported:
    """`load` of tensors that have been found already."""
    found = match(model, stored)
    kind = lambda leaf: leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.dtype(dtype)
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind(leaf)), shapes(model))
    sharding = place(tree) if place else jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)
    flat, where = (flax.traverse_util.flatten_dict(t, sep="/") for t in (tree, sharding))
    # The largest tensor first: a tensor lies in host memory twice while it is copied, which costs least while nothing else does.
    order = sorted(flat, key=lambda path: -max(math.prod(tensor.shape) for tensor in found.leaves[path][1]))
    params = {path: _leaf(*found.leaves[path], flat[path], where[path]) for path in order}
    return Imported(
        model, flax.traverse_util.unflatten_dict({path: params[path] for path in flat}, sep="/"), found.layout, found.prefix, found.dropped
    )


def config_of(source: str | Path) -> Path | None:
    """config.json (or open_clip_config.json) of a folder, or of the folder of a file."""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    return next((folder / name for name in ("config.json", "open_clip_config.json") if (folder / name).is_file()), None)


def read_config(source: str | Path) -> dict[str, Any]:
    """What `config_of` names."""
    path = config_of(source)
    if path is None:
        raise tensors.FileError(f"{Path(source)} holds no config.json: say which model the tensors are")
    return foreign.read_json(path)


def match(model: Published, stored: dict[str, Stored]) -> Matched:
    """Finds the layout and prefix that explain most of the files, and every leaf's tensors in it. Raises Mismatch."""
    _sized(model, stored)
    flat = flax.traverse_util.flatten_dict(shapes(model), sep="/")
    candidates = []
    for layout in layouts_of(model):
        for prefix in layout.prefixes:
            asked = {name for one in layout.names if one.ours in flat for name in _theirs(one, prefix, flat[one.ours])}
            candidates.append((len(asked & _renamed(layout, stored).keys()), layout, prefix))
    _, layout, prefix = max(candidates, key=lambda c: c[0])
    stored = _renamed(layout, stored)

    faults, leaves, used = [], {}, set()
    for one in layout.names:
        if one.ours not in flat:
            continue
        names, want = _theirs(one, prefix, flat[one.ours]), _their_shape(one, flat[one.ours])
        used.update(names)
        for name in names:
            if name not in stored:
                faults.append(f"missing: {name} {want}, for {one.ours}")
            elif not _fits(stored[name].shape, want) and f"{name} has" not in " ".join(faults):
                faults.append(f"wrong shape: {name} has {stored[name].shape}, the model needs {want}")
            elif jnp.issubdtype(flat[one.ours].dtype, jnp.floating) and not jnp.issubdtype(stored[name].dtype, jnp.floating):
                faults.append(f"wrong type: {name} holds {stored[name].dtype}, the model's are floats; quantized files cannot be read")
        leaves[one.ours] = (one, [stored[name] for name in names if name in stored])
    faults += [f"missing: no published tensor is known for {ours}" for ours in flat if ours not in leaves]

    dropped = [name for name in stored if name not in used and any(re.search(pattern, name) for pattern in layout.unread)]
    for theirs, original in layout.copies:
        name, other = theirs.replace("{p}", prefix), original.replace("{p}", prefix)
        if name in stored and name not in used and other in stored:
            dropped.append(name)
            if stored[name].shape != stored[other].shape or not np.array_equal(tensors.read(stored[name]), tensors.read(stored[other])):
                faults.append(f"untied: {name} differs from {other}, to which the config ties it")
    faults += [f"unknown: {name} {stored[name].shape}" for name in stored if name not in used and name not in dropped]
    if faults:
        shown = sorted(faults)[:SHOWN] + [f"and {len(faults) - SHOWN} more"] * (len(faults) > SHOWN)
        raise Mismatch(f"the files do not hold this {model.family} model:\n  " + "\n  ".join(shown))
    return Matched(layout, prefix, leaves, tuple(dropped))


def save(
    path: Path, model: Published, params: dict[str, Any], *, layout: Layout | None = None, prefix: str | None = None, dtype: str = "float32"
) -> None:
    """Writes params as one safetensors file in a published layout: the family's own, if none is given, with the prefix that
    transformers gives a model with the same heads.

    What `load` read comes out with the same bytes, if the layout, prefix and dtype are those it came with.
    """
    layout = layout or layouts_of(model)[0]
    if prefix is None:
        headed = model.head != "none" or bool(model.family == "vit" and model.image and model.image.head)
        prefix = layout.prefixes[1] if headed and len(layout.prefixes) > 1 else layout.prefixes[0]
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    groups: dict[str, list[tuple[Name, int | None]]] = {}
    for one in layout.names:
        if one.ours in flat:
            for layer, name in enumerate(_theirs(one, prefix, flat[one.ours])):
                groups.setdefault(name, []).append((one, layer if _stacked(one) else None))
    lost = set(flat) - {one.ours for one in layout.names}
    if lost:
        raise Mismatch(f"no published tensor is known for {', '.join(sorted(lost))}")
    kind = lambda leaf: np.dtype(np.int64 if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.dtype(dtype))
    plan = {name: (_their_shape(parts[0][0], flat[parts[0][0].ours]), kind(flat[parts[0][0].ours])) for name, parts in groups.items()}
    named = lambda pair: (pair[0].replace("{p}", prefix), pair[1].replace("{p}", prefix))
    # A copy belongs to a head, which the model has where something else of it is written.
    beside = lambda name: any(other.startswith(name.rpartition("decoder.")[0]) for other in groups)
    copies = {theirs: original for theirs, original in map(named, layout.copies) if layout.repeats and beside(theirs)}
    counts = {theirs: plan[other][0][0] for theirs, other in map(named, layout.counts) if other in plan}
    plan |= {theirs: plan[original] for theirs, original in copies.items()} | {
        theirs: ((1, n), np.dtype(np.int64)) for theirs, n in counts.items()
    }

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name, parts in groups.items():
            parts = sorted(parts, key=lambda part: part[0].part)
            values = [one.transform.theirs(np.asarray(flat[one.ours] if layer is None else flat[one.ours][layer])) for one, layer in parts]
            value = np.asarray(np.concatenate(values) if len(values) > 1 else values[0]).astype(plan[name][1])
            for each in (name, *(theirs for theirs, original in copies.items() if original == name)):
                yield each, value
        for name, n in counts.items():
            yield name, np.arange(n)[None]

    tensors.write(path, plan, stream())


def at_resolution(model: Published, params: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """params with the image positions resized for images of height x width pixels, as the model's own code does it.

    Raises ValueError where the model has no image tower, or its patches do not divide the images.
    """
    if model.image is None:
        raise ValueError(f"this {model.family} model has no image tower whose positions could be resized")
    table = params["image"]["pos"]
    target = grid(model.image, height, width)
    resized = resize_table(np.asarray(table, np.float32), model.image.class_tokens, target, model.positions)
    return {**params, "image": {**params["image"], "pos": jnp.asarray(resized, table.dtype)}}


def layouts_of(model: Published) -> tuple[Layout, ...]:
    """Every layout in which the model is published; the first is the one to export."""
    text = model.text
    if model.family in ("resnet", "mobilenet"):
        return (convnets.layout(model),)
    return layouts(
        model.family, gated=bool(model.image and model.image.gated), tied=model.head != "mlm",
        heads=text.heads if text else 1, kv_heads=(text.kv_heads or text.heads) if text else 1,
        depth=text.depth if text else 0,
    )  # fmt: skip


def _sized(model: Published, stored: dict[str, Stored]) -> None:
    """Raises Mismatch for a config that tells of more layers than there are tensors, or of a size that all of them together have not."""
    numbers = sum(math.prod(tensor.shape) for tensor in stored.values())
    for section in ("image", "text"):
        options = getattr(model, section)
        told = {key: getattr(options, key, 0) for key in SIZES}
        if section == "image" and options and getattr(options, "patch", 0):
            told |= {"patches": (model.image_size // options.patch) ** 2, "channels": model.channels}
        for key, value in told.items():
            most, what = (len(stored), "tensors") if key == "depth" else (numbers, "numbers")
            if value > most:
                raise Mismatch(f"the config tells of {value:,} for the {section} tower's {key}, and the files hold {most:,} {what} in all")


def _fits(shape: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether a tensor of a shape is the one that is wanted; a single number may be stored as () or as (1,)."""
    return shape == want or {shape, want} == {(), (1,)}


def _renamed(layout: Layout, stored: dict[str, Stored]) -> dict[str, Stored]:
    for pattern, replacement in layout.renames:
        stored = {re.sub(pattern, replacement, name): tensor for name, tensor in stored.items()}
    return stored


def _stacked(one: Name) -> bool:
    return "/blocks/" in one.ours


def _theirs(one: Name, prefix: str, leaf: Any) -> list[str]:
    """The published names of one of our leaves, one a layer."""
    name = one.theirs.replace("{p}", prefix)
    return [name.replace("{i}", str(one.first + layer)) for layer in range(leaf.shape[0])] if _stacked(one) else [name]


def _their_shape(one: Name, leaf: Any) -> tuple[int, ...]:
    ours = leaf.shape[1:] if _stacked(one) else leaf.shape
    shape = one.transform.theirs(np.broadcast_to(np.float32(0), ours)).shape
    return (shape[0] * one.parts, *shape[1:]) if one.parts > 1 else shape


def _leaf(one: Name, stored: list[Stored], leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
    """One of our leaves on its devices, filled a layer at a time in place."""

    def values(tensor: Stored) -> np.ndarray:
        whole = tensors.read(tensor)
        rows = len(whole) // one.parts if one.parts > 1 else 0
        part = whole[one.part * rows : (one.part + 1) * rows] if rows else whole.reshape(_their_shape(one, leaf))
        return np.asarray(one.transform.ours(part)).astype(leaf.dtype)

    def put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if not _stacked(one):
        return put(values(stored[0]), sharding)
    one_layer = sharding
    if isinstance(sharding, jax.NamedSharding):
        one_layer = jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))
    out = _zeros(sharding)(leaf.shape, leaf.dtype)
    for i, tensor in enumerate(stored):
        out = _filler(sharding)(out, put(values(tensor), one_layer), i)
    return out


@functools.cache
def _filler(sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    """(whole, one layer, its index) -> whole, in place."""
    fill = lambda out, layer, i: jax.lax.dynamic_update_index_in_dim(out, layer, i, 0)
    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _zeros(sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)
