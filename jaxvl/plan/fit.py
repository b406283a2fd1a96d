"""`jaxvl plan`: does a step fit, what does it send, how fast can it be at most, and what else could be tried."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxvl import assembly, config as configs
from jaxvl.mesh import check_batch
from jaxvl.plan import model, outside, shapes
from jaxvl.plan.chips import NETWORK, Chip, Topology
from jaxvl.plan.hlo import Collective
from jaxvl.plan.shapes import Layout, Planned

CLOSE = 1.03  # the largest batch is known well enough where the next that was tried is this much larger


TRACES = 2  # of the model from shapes, for the time of one compilation


class Batch(NamedTuple):
    """The largest global batch that was found to fit, 0 for none. tried: bytes a device of every batch that was tried. sure: whether the search was ended by
    a batch just above that does not fit, rather than by the number of compiles."""

    largest: int
    tried: dict[int, int]
    sure: bool


class Plan(NamedTuple):
    """What a run needs, in bytes on each device and in FLOPs and bytes a step.

    source: of the temporaries and collectives. held: the state by group and the batch, from shapes, without padding. temporary: activations, gradients and all
    else that lives inside a step. other: padding, code and results that replace nothing. hbm: 0 where the chip has no such figure.
    send_s: least seconds of sending, compute_s: of the model's FLOPs at the chip's peak; None without its figures.
    """

    config: str
    topology: str
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    source: str
    held: dict[str, int]
    temporary: int
    other: int
    total: int
    hbm: int
    collectives: tuple[Collective, ...]
    flops: float
    parameters: int
    compute_s: float | None
    send_s: float | None
    seconds: dict[str, float]
    batch: Batch | None
    layouts: tuple[Layout, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        return self.total <= self.hbm if self.hbm else None


class Asked(NamedTuple):
    """What one evaluation of a batch size says, compiled or modelled; the fields are those of `outside.Compiled`."""

    total: int
    temporary: int
    collectives: tuple[Collective, ...]
    source: str
    seconds: dict[str, float]
    exceeded: int = 0
    notes: tuple[str, ...] = ()


def make(config: ConfigDict, name: str, topology: Topology, *, compiles: int, limit: float, estimate: bool = False) -> Plan:
    """The plan of a complete config for a topology, with at most `compiles` compilations of at most `limit` seconds each; the first is that of the config,
    the others look for the largest batch. estimate: take the model from shapes also where a compiler could be asked.

    Raises ValueError for a config, mesh or batch that cannot run there, and for a compiler that is not here, dies or hangs.
    """
    if compiles < 1:
        raise ValueError(f"--compiles is {compiles}; it must be at least 1")
    recipe = configs.read(config)
    plan, mesh = shapes.planned(recipe), shapes.abstract(recipe.mesh, topology.devices)
    check_batch(recipe.train.batch_size, mesh, recipe.train.accumulate)
    program = assembly.program(plan.parts, mesh, plan.steps)
    estimate = estimate or topology.chip.node > 0
    ask = _modelled(plan, mesh) if estimate else _compiled(config, topology, limit)
    found = ask(recipe.train.batch_size)
    made = of(name, topology, plan, program, mesh, found)
    if topology.chip.hbm and compiles > 1:
        state = sum(size for group, size in made.held.items() if group != "batch")
        most = compiles * (TRACES if estimate else 1)
        made = made._replace(batch=search(ask, made.batch_size, made.total, state, topology.chip.hbm, step(recipe, mesh), most))
    return made._replace(layouts=tuple(shapes.layouts(plan, topology.devices)))


def of(name: str, topology: Topology, plan: Planned, program: assembly.Program, mesh: Any, found: Asked) -> Plan:
    """The plan of a step of which the compiler, or the model, has said what `found` holds."""
    recipe, held = plan.parts.recipe, shapes.held(program)
    temporary = found.exceeded - sum(held.values()) if found.exceeded else found.temporary
    flops = 3 * plan.parts.method.flops(plan.parts.spec) * recipe.train.batch_size
    moved = tuple(shapes.exchanged(plan, program, mesh)) if found.exceeded else found.collectives
    notes = [
        *plan.notes,
        *found.notes,
        *(["the compiler gave up, since memory does not suffice: collectives are estimated from shapes"] if found.exceeded else []),
    ]
    return Plan(
        config=name, topology=topology.name, mesh=dict(mesh.shape), batch_size=recipe.train.batch_size, accumulate=recipe.train.accumulate, source=found.source,
        held=held, temporary=temporary, other=found.total - temporary - sum(held.values()), total=found.total, hbm=topology.chip.hbm, collectives=moved, flops=flops,
        parameters=sum(math.prod(p.shape) for p in jax.tree.leaves(program.state.params)), compute_s=flops / topology.devices / topology.chip.peak if topology.chip.peak else None,
        send_s=send_seconds(moved, topology), seconds=found.seconds, batch=None, layouts=(), notes=tuple(notes),
    )  # fmt: skip


def _compiled(config: ConfigDict, topology: Topology, limit: float) -> Callable[[int], Asked]:
    def ask(batch_size: int) -> Asked:
        given = config.copy_and_resolve_references()
        given.train.batch_size = batch_size
        found = outside.compile_for(given.to_dict(), topology, limit=limit)
        where = "ahead of time for the absent TPU" if topology.chip.libtpu else "for forced CPU devices"
        return Asked(
            found.total,
            found.temporary,
            found.collectives,
            f"compiled {where} by {found.compiler}",
            found.seconds,
            found.exceeded,
            found.notes,
        )

    return ask


def _modelled(plan: Planned, mesh: Any) -> Callable[[int], Asked]:
    def ask(batch_size: int) -> Asked:
        mine = shapes.with_batch(plan, batch_size)
        program = assembly.program(mine.parts, mesh, mine.steps)
        temporary = model.temporaries(mine, program, mesh)
        total = temporary + sum(shapes.held(program).values())
        return Asked(total, temporary, tuple(shapes.exchanged(mine, program, mesh)), "a model from shapes alone; nothing was compiled", {})

    return ask


def step(recipe: configs.Recipe, mesh: Any) -> int:
    """What a global batch must be a multiple of: its devices, its microbatches, and the groups of the method."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"] * recipe.train.accumulate
    return math.lcm(devices, getattr(recipe.method, "group_size", 0) or 1)


def search(ask: Callable[[int], Asked], batch: int, total: int, state: int, hbm: int, step: int, compiles: int) -> Batch:
    """The largest multiple of `step` whose program fits: bisection between a batch that fits and one that does not, each next guess where a straight line
    through what is known crosses `hbm`, or in the middle. `total`: bytes of `batch`, which counts as the first compile."""
    tried = {0: state, batch: total}
    low, high = (batch, 0) if total <= hbm else (0, batch)
    while len(tried) <= compiles and not (high and (high - low <= step or (low and high <= low * CLOSE))):
        points = sorted(tried) if high else sorted(tried)[-2:]
        a, b = (low, high) if high else (points[0], points[-1])
        slope = max(tried[b] - tried[a], 1) / (b - a)
        guess = int((a + (hbm - tried[a]) / slope) / step) * step
        if high and len(tried) % 2:  # every other time in the middle: on a curve the line comes closer from one side alone
            guess = (low + high) // (2 * step) * step
        guess = min(max(guess, low + step), high - step) if high else min(max(guess, low + step), 8 * low)
        if guess in tried or guess <= 0:
            break
        try:
            tried[guess] = ask(guess).total
        except ValueError:
            if not high:  # a larger batch that the method refuses ends the search above
                break
            raise
        low, high = (guess, high) if tried[guess] <= hbm else (low, guess)
    del tried[0]
    return Batch(low, tried, bool(high) and (high - low <= step or high <= low * CLOSE))


def send_seconds(collectives: tuple[Collective, ...], topology: Topology) -> float | None:
    """Seconds in which a device can send what every step sends: over its links, or over the network where GPUs are more than a node holds."""
    link = bandwidth(topology.chip, topology.devices)
    return sum(c.sent for c in collectives if c.sure) / link if link else None


def bandwidth(chip: Chip, devices: int) -> float:
    """Bytes a second that a device can send to the others."""
    return NETWORK if chip.node and devices > chip.node else chip.link


def mfu_bounds(plan: Plan) -> tuple[float, float] | None:
    """The MFU if all sending hides behind computing, and if none does; recomputation and memory traffic make it lower yet."""
    if not plan.compute_s or plan.send_s is None:
        return None
    return plan.compute_s / max(plan.compute_s, plan.send_s), plan.compute_s / (plan.compute_s + plan.send_s)


def advice(plan: Plan) -> list[tuple[Layout, int, bool | None]]:
    """Meshes to try, with estimated bytes and whether they fit: temporaries scaled by the rows of a device. The one that fits and sends least comes first."""
    rows = lambda mesh: plan.batch_size / (mesh["data"] * mesh["fsdp"])
    estimated = []
    for layout in plan.layouts:
        total = layout.state + plan.other + round((plan.held["batch"] + plan.temporary) * rows(layout.mesh) / rows(plan.mesh))
        estimated.append((layout, total, total <= plan.hbm if plan.hbm else None))
    return sorted(estimated, key=lambda e: (e[2] is False, e[0].mesh["tensor"], e[1] if e[2] is False else e[0].sent))


def cuts(plan: Plan) -> int | None:
    """The least train.accumulate with which the step would fit, by scaling its temporaries; None where none would, or it fits."""
    room = plan.hbm - plan.total + plan.temporary
    if plan.fits is not False or room <= 0:
        return None
    rows = plan.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    now = plan.accumulate
    return next((k for k in range(now + 1, rows + 1) if rows % k == 0 and plan.temporary * now / k <= room), None)
