"""The run, read top to bottom: mesh, data, method, optimiser, shardings, restore, step, loop.

The order inside the loop is what makes a resumed run equal to one that was never stopped: step, then evaluate, then save.
An evaluation comes before the save of the same step, so that a run resumed there has its numbers and does not repeat it.
"""
import json
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ml_collections import ConfigDict

from jaxvl import checkpoint, config as configs, evals, facts, report
from jaxvl.data import lexicon
from jaxvl.data.dataset import Dataset, captions, decode_options, open_data
from jaxvl.data.decode import canvas_side
from jaxvl.data.stream import train_batches
from jaxvl.data.text import TRAINED, Tokenizer, load_tokenizer, train_tokenizer
from jaxvl.interop import initial
from jaxvl.mesh import BATCH, make_mesh, place, process_rows, shardings, start_processes
from jaxvl.methods import METHODS
from jaxvl.methods.method import Method, Run, for_faces
from jaxvl.models import lora
from jaxvl.optim import check_constant, frozen, learning_rate, make_optimizer
from jaxvl.progress import say
from jaxvl.state import STATE_RULES, TrainState, create, samples_seen
from jaxvl.step import make_train_step

# What may differ between two starts of one run; a change of anything else is pointed out.
MAY_CHANGE = ("mesh.", "checkpoint.", "log.", "evals.", "train.steps", "train.epochs", "data.workers", "data.threads")
TERMINATED = 143  # exit status of a run that SIGTERM stopped: saved, not finished


class Parts(NamedTuple):
    """What training and evaluating a run share. recipe: completed by the tokenizer, the adapters and `run`. tokenizer: None where the data
    have no captions. spec: shapes and dtypes of a global batch as the method sees it."""

    recipe: configs.Recipe
    tokenizer: Tokenizer | None
    method: Method
    spec: dict[str, jax.ShapeDtypeStruct]
    run: Run = Run()


class Program(NamedTuple):
    """What is compiled: init: key -> state. step: (state, batch) -> (state, metrics). state, batch: shapes with shardings.

    out_shardings: of the state and of the metrics; pinned, since the state of one step is the input of the next.
    """

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    out_shardings: tuple[TrainState, NamedSharding]


def train(config: ConfigDict, workdir: Path, *, age: float = 0.0) -> int:
    """Train the run in `workdir` from its newest whole checkpoint, or from the start, to its last step.

    age: seconds this process has spent on the run before, which count as its start.
    Returns 0, or TERMINATED where SIGTERM stopped it. Raises ValueError for what is wrong in the config, before any compile.
    """
    recipe = configs.read(config)
    start_processes()
    mesh = make_mesh(recipe.mesh)
    # The saver locks the workdir, so it comes before anything is written there.
    with (
        jax.set_mesh(mesh),
        checkpoint.open_saver(workdir / "checkpoints", recipe.checkpoint) as saver,
        report.open_log(recipe.log, workdir, jax.process_index(), age) as log,
    ):
        _keep_config(config, workdir)
        log.describe(config=config.to_json_best_effort(indent=2), mesh=", ".join(f"{k} {v}" for k, v in mesh.shape.items()), devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}")
        dataset = open_data(recipe.data)
        _same_everywhere(dataset)
        evals.check(recipe.evals, recipe.data)
        parts = build(recipe, workdir, dataset)
        batch_size = recipe.train.batch_size
        steps = parts.run.steps

        plan = program(parts, mesh, steps)
        fresh = not checkpoint.whole_steps(workdir / "checkpoints")
        start = initial.plan(parts.recipe, plan.state.params, parts.tokenizer.offset if parts.tokenizer else 0, plan.state.memory) if fresh else {}
        with log.pause("compile"):
            train_step = jax.jit(plan.step, donate_argnums=0, out_shardings=plan.out_shardings).lower(plan.state, plan.batch).compile()

        with _terminated() as stop, ExitStack() as stack:
            restored = saver.restore(plan.state)
            state = restored.state if restored else initial.fill(start, jax.jit(plan.init, out_shardings=plan.out_shardings[0])(jax.random.key(recipe.seed)))
            step = restored.step if restored else 0
            say(f"{'continuing at' if restored else 'starting at'} step {step} of {steps}, {sum(p.size for p in jax.tree.leaves(state.params)):,} parameters")
            log.start(step=step, steps=steps, batch_size=batch_size, samples_per_epoch=dataset.epoch,
                      flops_per_sample=3 * parts.method.flops(parts.spec), chips=jax.device_count(), device_kind=jax.devices()[0].device_kind)  # fmt: skip
            log.bad(dataset.bad)
            if restored:
                lexicon.same(parts.tokenizer, restored.meta, workdir)
            batches = stack.enter_context(closing(train_batches(
                dataset, parts.tokenizer, seed=recipe.seed, start=samples_seen(state.position), batch_size=batch_size, rows=process_rows(mesh, batch_size),
                views=recipe.augment.views, sides=recipe.augment.hflip == "unsided",
            )))  # fmt: skip

            def save(*, block: bool = False) -> None:
                meta = {"config": config.to_json_best_effort(), "position": {"seed": recipe.seed, "samples": samples_seen(state.position)}, **lexicon.stamp(parts.tokenizer)}
                with log.pause("checkpoint"):
                    saver.save(step, state, meta, values, block=block)

            while step < steps:
                with log.wait("data"):
                    batch = next(batches)
                with log.wait("transfer"):
                    arrays = place(batch.arrays, mesh)
                state, metrics = train_step(state, arrays)
                step += 1
                log.step(step, metrics, arrays)
                log.bad(batch.bad)
                values: dict[str, float] = {}
                due = {k: e for k, e in recipe.evals.items() if step == steps or (e.every and step % e.every == 0)}
                if due:
                    with log.pause("eval"):
                        values, galleries = evals.run(due, parts.method, for_faces(parts.method, state.params, state.memory), parts.tokenizer, recipe.data, recipe.augment)
                    log.write(step, values, galleries)
                if stop(step):
                    save(block=True)
                    if recipe.log.html and jax.process_index() == 0:
                        report.write_report(workdir)
                    say(f"terminated: step {step} is saved; the same command continues there")
                    return TERMINATED
                if step == steps or step % recipe.checkpoint.every == 0:
                    save(block=step == steps)
            log.finish()
    return 0


def program(parts: Parts, mesh: Mesh, steps: int) -> Program:
    """The step of a run of `steps` steps and the shapes and shardings it works on; makes no array."""
    recipe, method = parts.recipe, parts.method
    key = jax.random.key(recipe.seed)
    params_shape, _ = jax.eval_shape(lambda: method.init(key, parts.spec))
    check_constant(recipe.optim, params_shape, method.constant)
    tx = make_optimizer(recipe.optim, params_shape, steps)

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
    """The parts of the run in `workdir`; its tokenizer is its own where it has one, else trained or loaded, and kept."""
    tokenizer = None if recipe.data.captions == "none" else _tokenizer(recipe, workdir, dataset)
    return assemble(recipe, tokenizer, facts.of_run(recipe, workdir, dataset))


def assemble(recipe: configs.Recipe, tokenizer: Tokenizer | None, run: Run = Run()) -> Parts:
    """Method and batch spec of a recipe for a tokenizer (None without captions) and a run. Raises ValueError for towers that cannot be."""
    text = recipe.text
    if tokenizer is not None:
        known = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos, "mask_id": tokenizer.mask or 0}
        text = text._replace(**{key: getattr(text, key) or value for key, value in known.items() if key in text._fields})
        if text.vocab_size < tokenizer.vocab_size:
            raise ValueError(f"config.text.vocab_size is {text.vocab_size}; the tokenizer has {tokenizer.vocab_size} ids")
        run = run._replace(**lexicon.facts(tokenizer))
    optim = recipe.optim._replace(groups=lora.groups(recipe.optim.groups)) if recipe.lora.rank else recipe.optim
    choice = METHODS[recipe.method.name]
    options = choice.complete(recipe.method, run)
    method = lora.wrap(choice.build(recipe.image, text, options), recipe.lora, partial(frozen, optim))
    evals.suits(recipe.evals, recipe.method.name, method)
    size, batch = recipe.data.image_size, recipe.train.batch_size
    spec = {"image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)}
    if tokenizer is not None:
        spec["tokens"] = jax.ShapeDtypeStruct((batch, tokenizer.context_length), jnp.int32)
    if recipe.data.label:
        spec["label"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if recipe.augment.views == 2:
        spec["image_aug"] = spec["image"]
    if recipe.data.triplets:
        if method.compose is None:
            raise ValueError(f"config.data.triplets is {recipe.data.triplets!r}, but the method {recipe.method.name} composes no queries; leave it empty")
        for name, plain in (("augment.views", recipe.augment.views == 1), ("augment.hflip", recipe.augment.hflip != "unsided"), ("data.id", not recipe.data.id)):
            if not plain:
                raise ValueError(f"config.{name} cannot be set with data.triplets, whose batches have two images and three texts a row")
        spec["image_reference"] = spec["image"]
        spec |= {f"tokens_{name}": spec["tokens"] for name in ("reference", "modification")}
        spec |= {name: jax.ShapeDtypeStruct((batch,), jnp.int32) for name in ("id", "id_reference")}
    if recipe.data.id:
        spec["id"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if missing := {"tokens", "label"} & set(method.reads) - set(spec):
        key = {"tokens": "data.captions must not be none", "label": "data.label must name a field"}
        raise ValueError(f"config.method.name is {recipe.method.name!r}, which reads {' and '.join(sorted(missing))}: {'; '.join(key[k] for k in sorted(missing))}")
    return Parts(recipe._replace(text=text, optim=optim, method=options), tokenizer, method, spec, run)


def evaluate(workdir: Path, overrides: list[str], *, step: int | None = None, ema: bool = False) -> int:
    """Evaluate a checkpoint of the run in `workdir` with the code the run itself uses; prints the table and writes eval.json."""
    recipe = read_recipe(workdir, overrides)
    start_processes()
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        parts = build(recipe, workdir, None)
        found = read_params(parts, workdir, mesh, step=step, ema=ema)
        values, _ = evals.run(recipe.evals, parts.method, found.state, parts.tokenizer, recipe.data, recipe.augment)
    if jax.process_index() == 0:
        (workdir / "eval.json").write_text(json.dumps({"step": found.step, "ema": ema, **values}, indent=2))
        report.print_values(values)
    return 0


def read_recipe(workdir: Path, overrides: list[str]) -> configs.Recipe:
    """The recipe of the run in `workdir`, changed by `overrides`. Raises ValueError where there is no run."""
    file = workdir / "config.json"
    if not file.is_file():
        raise ValueError(f"{workdir} is no run: it has no config.json")
    return configs.read(configs.load(str(file), overrides))


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
    if parts.method.with_memory is None:
        return found
    return found._replace(state=for_faces(parts.method, found.state, checkpoint.restore_memory(folder, shapes["memory"], step=found.step).state))


def read_memory(parts: Parts, workdir: Path, *, step: int | None = None) -> Any:
    """What the method of a run's checkpoint remembers, as numpy arrays."""
    _, shapes = jax.eval_shape(lambda: parts.method.init(jax.random.key(parts.recipe.seed), parts.spec))
    return checkpoint.restore_memory(workdir / "checkpoints", shapes, step=step).state


def _tokenizer(recipe: configs.Recipe, workdir: Path, dataset: Dataset | None) -> Tokenizer:
    folder = workdir / "tokenizer"
    if not folder.is_dir() and jax.process_index() == 0:
        if recipe.tokenizer.name not in TRAINED:
            made = load_tokenizer(recipe.tokenizer, seen=captions(dataset, recipe.tokenizer.captions) if dataset and recipe.tokenizer.lexicon_min_count else ())
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


def _same_everywhere(dataset: Dataset) -> None:
    """Raises ValueError where a process sees other samples than process 0: the global batches would be none that anyone meant."""
    if jax.process_count() == 1:
        return
    names = [Path(shard).name for source in dataset.sources for shard in source.shards]
    mine = zlib.crc32(dataset.counts.tobytes() + repr(names).encode())
    digests = np.atleast_1d(multihost_utils.process_allgather(np.uint32(mine)))
    if others := np.flatnonzero(digests != digests[0]).tolist():
        raise ValueError(f"processes {others} see other samples in config.data.source than process 0, for one where only some hosts have recorded "
                         f"bad samples; give all hosts one folder as config.data.indexes, and the same shards")  # fmt: skip


def _keep_config(config: ConfigDict, workdir: Path) -> None:
    """Save the whole config with the run; where the run had another, say what differs and may make it another run."""
    file = workdir / "config.json"
    if file.is_file():
        old, new = (configs.flat(json.loads(text)) for text in (file.read_text(), config.to_json_best_effort()))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name) and not name.startswith(MAY_CHANGE):
                say(f"config.{name} was {old.get(name)!r} when this run began and is {new.get(name)!r} now")
    if jax.process_index() == 0:
        file.write_text(config.to_json_best_effort(indent=2))


@contextmanager
def _terminated() -> Iterator[Any]:
    """stop(step): whether SIGTERM has come, on all processes at the same step."""
    seen: list[int] = []
    if jax.process_count() > 1:
        # JAX's own service catches the signal of any process and agrees with all others on the step.
        yield multihost_utils.reached_preemption_sync_point
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        yield lambda _: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)
