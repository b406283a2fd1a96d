"""A run, or what `jaxvl export --format safetensors` made of one, opened to embed; and what tells its embeddings from another's."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from jaxvl import assembly, config as configs, manifest
from jaxvl.data.lists import read_object
from jaxvl.evals.embed import Model
from jaxvl.interop import exported as exports, tensors
from jaxvl.mesh import make_mesh, shardings
from jaxvl.methods.method import for_faces
from jaxvl.parts import Parts

SEEN = ("method", "image", "text", "lora", "tokenizer", "augment")  # sections on which an embedding depends, besides two keys of data


class Identity(NamedTuple):
    """recipe: of the sections that embeddings depend on. words: of the lexicon, "" without. weights: of the checkpoint or the exported file; hex sha256."""

    recipe: str
    words: str
    weights: str
    step: int


class Opened(NamedTuple):
    """A model with its identity. pieces: the words of its vectors' coordinates, empty where they have none."""

    model: Model
    identity: Identity
    pieces: tuple[str, ...]


def open_run(run: Path, overrides: Sequence[str] = (), *, step: int | None = None, ema: bool = False) -> Opened:
    """The model of the run, or of the folder exported from one, in `run`, over the mesh that its config asks for.

    Raises ValueError where it is neither, or where step or ema is asked of an export, which has one set of weights.
    """
    file = run / "config.json"
    if not file.is_file():
        raise ValueError(f"{run} is no run and no export of one: it has no config.json")
    content = read_object(file)
    exported = content.get("format") == "jaxvl"
    if not exported and "method" not in content:
        raise ValueError(f"{file} is no config of jaxvl; of exports, search reads those of --format safetensors")
    if exported and (missing := {"config", "step"} - content.keys()):
        raise ValueError(f"{file} has no {' and no '.join(sorted(missing))}: export the run anew")
    if exported and (step is not None or ema):
        raise ValueError(f"{run} is an export, which has one set of weights; --step and --ema are of runs")
    weights = exports.check(content, run) if exported else ""
    recipe = _exported_recipe(content, overrides) if exported else assembly.read_recipe(run, list(overrides))
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        parts = assembly.build(recipe, run, None)
        if exported:
            found, params = content["step"], _exported_params(parts, run, mesh)
        else:
            restored = assembly.read_params(parts, run, mesh, step=step, ema=ema)
            found, params = restored.step, restored.state
            seal = manifest.step_folder(run / "checkpoints", found) / manifest.FILE
            weights = hashlib.sha256(seal.read_bytes() + (b"ema" if ema else b"")).hexdigest()
    done = parts.recipe
    words = getattr(parts.tokenizer, "lexicon", None) if getattr(done.method, "words", ()) else None
    identity = Identity(_recipe_hash(done), words.sha256 if words else "", weights, found)
    return Opened(Model(parts.method, params, parts.tokenizer, done.data, done.augment, mesh), identity, words.pieces if words else ())


def same(mine: Identity, theirs: Identity, run: Path, index: Path) -> None:
    """Raises ValueError where an index is not of the model that is to embed the queries."""
    told = {
        "words": "its coordinates are other words", "recipe": "the recipe differs in what embeddings depend on", "step": f"it is of step {theirs.step}, not {mine.step}",
        "weights": "the parameters are others",
    }  # fmt: skip
    if wrong := [why for key, why in told.items() if getattr(mine, key) != getattr(theirs, key)]:
        raise ValueError(
            f"the index {index} is not of the model in {run}: {'; '.join(wrong)}. Give the run it was made from as --run, or index anew"
        )


def _exported_recipe(content: dict[str, Any], overrides: Sequence[str]) -> configs.Recipe:
    config = configs.complete(ConfigDict(content["config"]))
    config.lora.rank = 0  # adapters are merged in an export
    for section in ("image", "text"):
        config[section].dtype = "float32"
    return configs.read(configs.override(config, overrides))


def _exported_params(parts: Parts, folder: Path, mesh: Mesh) -> Any:
    shapes = for_faces(parts.method, *jax.eval_shape(lambda: parts.method.init(jax.random.key(0), parts.spec)))
    where = flax.traverse_util.flatten_dict(shardings({"params": shapes}, parts.method.rules, mesh)["params"], sep="/")
    wanted, stored = flax.traverse_util.flatten_dict(shapes, sep="/"), tensors.find(folder)
    if wrong := sorted(
        k for k in wanted.keys() | stored.keys() if k not in wanted or k not in stored or wanted[k].shape != stored[k].shape
    ):
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit its own config, {wrong[0]} for one")
    params = {path: _placed(stored[path], where[path]) for path in wanted}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _placed(stored: tensors.Stored, where: NamedSharding) -> jax.Array:
    value = tensors.read(stored)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def _recipe_hash(recipe: configs.Recipe) -> str:
    seen = {name: getattr(recipe, name)._asdict() for name in SEEN} | {"image_size": recipe.data.image_size, "fit": recipe.data.fit}
    return hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()
