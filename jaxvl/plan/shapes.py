"""What shapes and shardings alone tell of a step: what each device holds of the state, and what its gradients cost to exchange."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxvl import assembly, config as configs
from jaxvl.assembly import Program
from jaxvl.bench.sizes import tokenizer as sizes_of_tokenizer
from jaxvl.data.text import TRAINED, load_tokenizer
from jaxvl.mesh import AXES, MeshOptions, ShardingError, check_batch, shardings, sizes
from jaxvl.methods.method import Run
from jaxvl.optim import frozen
from jaxvl.parts import Parts, assemble
from jaxvl.plan.hlo import Collective
from jaxvl.rehearsal import STEPS, Sizes
from jaxvl.state import STATE_RULES, TrainState

GROUPS = {"params": "parameters", "ema": "averaged parameters", "opt_state": "optimiser", "memory": "memory"}


class Planned(NamedTuple):
    """A recipe as far as it can be planned without its data. notes: what is planned otherwise than it will run, for a person."""

    parts: Parts
    steps: int
    notes: tuple[str, ...]


def planned(recipe: configs.Recipe) -> Planned:
    """The parts of a recipe whose data and tokenizer need not be here. Raises ValueError for what is wrong in the config."""
    notes = []
    tokenizer: Any = None
    if recipe.data.captions != "none":
        here = recipe.tokenizer.name not in TRAINED and Path(recipe.tokenizer.name).is_dir()
        tokenizer = load_tokenizer(recipe.tokenizer) if here else sizes_of_tokenizer(recipe)
        if recipe.tokenizer.prompt and isinstance(tokenizer, Sizes):
            notes.append(f"the tokenizer {recipe.tokenizer.name} is not here: its prompt counts a token a word")
    classes = getattr(recipe.method, "classes", 0)
    steps = recipe.train.steps or STEPS + 2 * recipe.optim.warmup_steps  # of epochs of unknown data; only the learning rate would differ
    return Planned(assemble(recipe, tokenizer, Run(steps=steps, classes=classes)), steps, tuple(notes))


def with_batch(plan: Planned, batch_size: int) -> Planned:
    """The same recipe with another global batch. Raises ValueError where its microbatches would not divide it."""
    recipe = plan.parts.recipe
    if batch_size % recipe.train.accumulate:
        raise ValueError(f"config.train.accumulate is {recipe.train.accumulate}; it must divide train.batch_size {batch_size}")
    spec = {k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for k, v in plan.parts.spec.items()}
    recipe = recipe._replace(train=recipe.train._replace(batch_size=batch_size))
    return plan._replace(parts=plan.parts._replace(recipe=recipe, spec=spec))


def abstract(options: MeshOptions, devices: int) -> AbstractMesh:
    """The mesh of a run on devices that nobody has. Raises ValueError where the sizes do not multiply to their number."""
    return AbstractMesh(sizes(options, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def bytes_of(leaves: Iterable[Any]) -> int:
    """Bytes on each device of arrays or shapes with shardings, without padding."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def held(program: Program) -> dict[str, int]:
    """Bytes a device of every group of the state and of the batch; groups that are empty are left out."""
    state = program.state._asdict()
    found = {group: bytes_of(jax.tree.leaves(state[group])) for group in GROUPS}
    found["counters"] = bytes_of(leaf for name in state if name not in GROUPS for leaf in jax.tree.leaves(state[name]))
    found["batch"] = bytes_of(program.batch.values())
    return {group: size for group, size in found.items() if size}


def exchanged(plan: Planned, program: Program, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """What gradients and split parameters make a step send, estimated: no program is compiled for it.

    A trained leaf is summed over the axes of the batch that it is not split over; what `fsdp` splits is gathered for the forward and for the
    backward pass, and its gradient is scattered. What the loss gathers and what `tensor` sums inside layers is not counted.
    """
    still = frozen(plan.parts.recipe.optim, program.state.params)
    rows: dict[tuple, Collective] = {}
    passes = 2 * plan.parts.recipe.train.accumulate

    def add(kind: str, axes: tuple[str, ...], count: int, size: int, share: float) -> None:
        n = math.prod(mesh.shape[a] for a in axes)
        if n > 1:
            before = rows.get((kind, axes), Collective(kind, axes, n, 0, 0, 0))
            rows[kind, axes] = before._replace(
                times=before.times + count, bytes=before.bytes + count * size, sent=before.sent + round(count * size * share * (n - 1) / n)
            )

    for leaf, hold in zip(jax.tree.leaves(program.state.params), jax.tree.leaves(still), strict=True):
        split = {axis for part in leaf.sharding.spec for axis in ((part,) if isinstance(part, str) else part or ())}
        shard = bytes_of([leaf])
        whole = shard * (mesh.shape["fsdp"] if "fsdp" in split else 1)
        if "fsdp" in split:
            add("all-gather", ("fsdp",), passes, whole, 1)
        if hold is not True:
            if "fsdp" in split:
                add("reduce-scatter", ("fsdp",), plan.parts.recipe.train.accumulate, whole, 1)
            add("all-reduce", tuple(a for a in ("data", "fsdp") if a not in split and mesh.shape[a] > 1), 1, shard, 2)
    return sorted(rows.values(), key=lambda c: -c.sent)


class Layout(NamedTuple):
    """A mesh, bytes a device of the state on it, and bytes a device sends for gradients and parameters, estimated."""

    mesh: dict[str, int]
    state: int
    sent: int


def layouts(plan: Planned, devices: int) -> list[Layout]:
    """Every mesh of `devices` in powers of two (and what is left) that the rules and the batch allow, those without `tensor` first."""
    program = assembly.program(plan.parts, abstract(MeshOptions(), devices), plan.steps)
    rules = (*STATE_RULES, *plan.parts.method.rules)
    found = []
    for tensor in (1, 2, 4, 8):
        fsdp = 1
        while fsdp * tensor <= devices:
            if devices % (fsdp * tensor) == 0:
                mesh = abstract(MeshOptions(-1, fsdp, tensor), devices)
                try:
                    check_batch(plan.parts.recipe.train.batch_size, mesh, plan.parts.recipe.train.accumulate)
                    placed = shardings(program.state, rules, mesh)
                except (ShardingError, ValueError):
                    fsdp *= 2
                    continue
                state: TrainState = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), program.state, placed)
                here = program._replace(state=state)
                found.append(Layout(dict(mesh.shape), bytes_of(jax.tree.leaves(state)), sum(c.sent for c in exchanged(plan, here, mesh))))
            fsdp *= 2
    return found
