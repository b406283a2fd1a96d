"""What is trained: a recipe's method with its tokenizer and shapes, the step that is compiled, and how a run's arrays are read back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

from jaxvl import checkpoint, config as configs, facts, seal
from jaxvl.data import lexicon
from jaxvl.data.dataset import Dataset, captions, decode_options
from jaxvl.data.decode import canvas_side
from jaxvl.data.text import TRAINED, Tokenizer, load_tokenizer, train_tokenizer
from jaxvl.mesh import BATCH, shardings
from jaxvl.methods.method import for_faces
from jaxvl.optim import check_constant, learning_rate, make_optimizer
from jaxvl.parts import Parts, assemble
from jaxvl.progress import say
from jaxvl.state import STATE_RULES, TrainState, create
from jaxvl.step import make_train_step


class Program(NamedTuple):
    """What is compiled: init: key -> state. step: (state, batch) -> (state, metrics). state, batch: shapes with shardings.

    out_shardings: of the state and of the metrics; pinned, since the state of one step is the input of the next.
    """

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    out_shardings: tuple[TrainState, NamedSharding]


def program(parts: Parts, mesh: Mesh | AbstractMesh, steps: int) -> Program:
    """The step of a run of `steps` steps and the shapes and shardings it works on; makes no array."""
    recipe, method = parts.recipe, parts.method
    key = jax.eval_shape(lambda: jax.random.key(recipe.seed))  # of an absent mesh no device could hold one
    params_shape, _ = jax.eval_shape(lambda key: method.init(key, parts.spec), key)
    check_constant(recipe.optim, params_shape, method.constant)
    tx = make_optimizer(recipe.optim, params_shape, steps, method.renewed)

    def init(key: jax.Array) -> TrainState:
        params, memory = method.init(key, parts.spec)
        return create(params, memory, tx.init(params), key, ema=recipe.optim.ema_decay > 0)

    shapes = jax.eval_shape(init, key)
    placed = shardings(shapes, (*STATE_RULES, *method.rules), mesh)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placed)
    batch_size, side = recipe.train.batch_size, recipe.data.image_size
    on_device = recipe.data.resize == "device"
    canvas = canvas_side(decode_options(recipe.data)) if on_device else side
    host: dict[str, jax.ShapeDtypeStruct] = {}
    for suffix in [*("", "_aug")[: recipe.augment.views], *["_reference"] * bool(recipe.data.triplets)]:
        host[f"image{suffix}"] = jax.ShapeDtypeStruct((batch_size, canvas, canvas, 3), jnp.uint8)
        if on_device:
            host[f"frame{suffix}"] = jax.ShapeDtypeStruct((batch_size, 6), jnp.float32)
    if recipe.augment.hflip == "unsided":
        host["sided"] = jax.ShapeDtypeStruct((batch_size,), jnp.bool_)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, BATCH)) for k, v in {**parts.spec, **host}.items()}
    step = make_train_step(method, tx, recipe.augment, recipe.optim, learning_rate(recipe.optim, steps),
                           image_size=side, accumulate=recipe.train.accumulate, grad_shardings=placed.params)  # fmt: skip
    return Program(init, step, state, batch, (placed, NamedSharding(mesh, P())))


def build(recipe: configs.Recipe, workdir: Path, dataset: Dataset | None) -> Parts:
    """The parts of the run in `workdir`; its tokenizer is its own where it has one, else trained or loaded, and kept.

    Raises DamagedError where a file that decides what the run computes is not the one that its checkpoints were saved with.
    """
    seal.check(workdir)
    tokenizer = None if recipe.data.captions == "none" else _tokenizer(recipe, workdir, dataset)
    return assemble(recipe, tokenizer, facts.of_run(recipe, workdir, dataset))


def read_recipe(workdir: Path, overrides: list[str]) -> configs.Recipe:
    """The recipe of the run in `workdir`, changed by `overrides`. Raises ValueError where there is no run."""
    file = workdir / "config.json"
    if not file.is_file():
        raise ValueError(f"{workdir} is no run: it has no config.json")
    try:
        return configs.read(configs.load(str(file), overrides))
    except configs.ConfigError as error:
        raise configs.ConfigError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


def read_params(parts: Parts, workdir: Path, mesh: Mesh | None, *, step: int | None = None, ema: bool = False) -> checkpoint.Restored:
    """The parameters of a run's checkpoint as the method's faces take them, split over `mesh`, or as numpy arrays without one."""
    key = jax.random.key(parts.recipe.seed)
    params, memory = jax.eval_shape(lambda: parts.method.init(key, parts.spec))
    shapes = {"params": params, "memory": memory}
    if mesh is not None:
        placed = shardings(shapes, parts.method.rules, mesh)
        shapes = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placed)
    folder = workdir / "checkpoints"
    found = checkpoint.restore_params(folder, shapes["params"], ema=ema, step=step)
    lexicon.same(parts.tokenizer, found.meta, workdir)
    _tell_changes(workdir, found)
    if parts.method.with_memory is None:
        return found
    return found._replace(
        state=for_faces(parts.method, found.state, checkpoint.restore_memory(folder, shapes["memory"], step=found.step).state)
    )


def _tell_changes(workdir: Path, found: checkpoint.Restored) -> None:
    """Say where config.json asks for another model than the one that was saved: it may be damaged, or of a later start."""
    file = workdir / "config.json"
    if jax.process_index() != 0 or not file.is_file() or "config" not in found.meta:
        return
    now, then = (configs.flat(json.loads(text)) for text in (file.read_text(), found.meta["config"]))
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name) and name.startswith(("method.", "image.", "text.", "lora.", "tokenizer.")):
            say(f"note: config.{name} is {now.get(name)!r} in {file} and was {then.get(name)!r} when step {found.step} was saved")


def read_memory(parts: Parts, workdir: Path, *, step: int | None = None) -> Any:
    """What the method of a run's checkpoint remembers, as numpy arrays."""
    _, shapes = jax.eval_shape(lambda: parts.method.init(jax.random.key(parts.recipe.seed), parts.spec))
    return checkpoint.restore_memory(workdir / "checkpoints", shapes, step=step).state


def _tokenizer(recipe: configs.Recipe, workdir: Path, dataset: Dataset | None) -> Tokenizer:
    folder = workdir / "tokenizer"
    if not folder.is_dir() and jax.process_index() == 0:
        if recipe.tokenizer.name not in TRAINED:
            made = load_tokenizer(
                recipe.tokenizer,
                seen=captions(dataset, recipe.tokenizer.captions) if dataset and recipe.tokenizer.lexicon_min_count else (),
            )
        elif dataset is None:
            raise ValueError(f"{workdir} has no tokenizer folder, and the run's tokenizer was trained on its captions")
        else:
            made = train_tokenizer(captions(dataset, recipe.tokenizer.captions), recipe.tokenizer)
        partial = workdir / "tokenizer.partial"
        made.save(partial)
        partial.rename(folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tokenizer")
    return load_tokenizer(recipe.tokenizer, folder)
