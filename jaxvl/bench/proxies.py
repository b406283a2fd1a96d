"""`jaxvl bench proxies`: a step over many classes in time and bytes a device, and what a hierarchy adds to a whole train step.

A step is value and gradient of Proxy-Anchor and one of AdamW on the proxies, moments and all. "whole": one device has every class, which is
also what each of several would hold if they were replicated; "sharded": the classes are split over eight devices; "sampled": likewise, with a
twentieth of the classes as negatives and lazy rows. Devices of a CPU share its cores, so there times tell the work of all eight together.
The largest size is compiled from shapes alone and never allocated.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P
from jax.stages import Compiled

from jaxvl import config as configs
from jaxvl.assembly import program
from jaxvl.bench.step import random_batch, spread
from jaxvl.losses.classes import PER_DEVICE
from jaxvl.losses.proxy import proxy_anchor
from jaxvl.mesh import BATCH, MeshOptions, make_mesh, place, shardings
from jaxvl.methods.method import Run
from jaxvl.optim import OptimOptions, make_optimizer
from jaxvl.parts import assemble
from jaxvl.state import STATE_RULES
from jaxvl.terminal import tell

DEVICES, WIDTH, BATCH_SIZE, KEEP = 8, 128, 64, 0.05
CLASSES, ONLY_COMPILED = (10_000, 100_000, 1_000_000), 10_000_000
LAYOUTS = {"whole": (1, 1.0), "sharded": (DEVICES, 1.0), "sampled": (DEVICES, KEEP)}  # devices, share of the negatives
MODES = ("none", "frozen", "free", "tied")


class Step(NamedTuple):
    compiled: Compiled
    args: tuple  # shapes with shardings


def main(config: str | None, overrides: Sequence[str], *, rounds: int) -> int:
    """Print JSON. Raises ValueError for a config, which nothing here would read."""
    if config or overrides:
        raise ValueError("bench proxies measures steps of its own: it takes neither --config nor overrides")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", DEVICES)
    tell(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "width": WIDTH, "batch": BATCH_SIZE, "rounds": rounds,
                      "steps": steps(CLASSES, rounds), "only_compiled": compiled_only(ONLY_COMPILED), "hierarchy": hierarchy(rounds)}, indent=2))  # fmt: skip
    return 0


def steps(sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Bytes and seconds of a step for each number of classes and layout; of bytes the ratio to one device."""
    rows = []
    for classes in sizes:
        held = {}
        for layout in LAYOUTS:
            step = compile_step(classes, layout)
            held[layout] = per_device(step.compiled)
            wall, cpu = timed(step, classes, rounds)
            rows.append(
                {
                    "classes": classes,
                    "layout": layout,
                    "bytes_a_device": held[layout],
                    "less_than_whole": held["whole"] / held[layout],
                    "step_s": wall,
                    "cpu_s": cpu,
                }
            )
    return rows


def compiled_only(classes: int) -> list[dict[str, Any]]:
    return [
        {"classes": classes, "layout": layout, "bytes_a_device": per_device(compile_step(classes, layout).compiled)}
        for layout in ("sharded", "sampled")
    ]


def compile_step(classes: int, layout: str, width: int = WIDTH, batch: int = BATCH_SIZE) -> Step:
    """The donated step, ahead of time."""
    devices, keep = LAYOUTS[layout]
    mesh = make_mesh(MeshOptions(devices), jax.devices()[:devices])
    rows = -(-classes // DEVICES) * DEVICES
    p = {"proxies": jax.ShapeDtypeStruct((rows, width), jnp.float32)}
    tx = make_optimizer(OptimOptions(schedule="constant", clip_norm=0.0, decay="", lazy=("^proxies$",) if keep < 1 else ()), p, 2)
    state = jax.eval_shape(lambda p: (p, tx.init(p)), p)

    def step(state: tuple, x: jax.Array, labels: jax.Array, key: jax.Array) -> tuple:
        p, moments = state
        loss = partial(proxy_anchor, labels=labels, classes=classes, keep=keep, key=jax.random.wrap_key_data(key))
        value, (dx, dp) = jax.value_and_grad(lambda x, p: loss(x, p["proxies"]), (0, 1))(x, p)
        updates, moments = tx.update(dp, moments, p)
        return (optax.apply_updates(p, updates), moments), value, dx

    with jax.set_mesh(mesh):
        placed = shardings(state, ((r"proxies$", PER_DEVICE), *STATE_RULES), mesh)
        state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, placed)
        shape = lambda dims, dtype, spec: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))
        args = (state, shape((batch, width), jnp.float32, BATCH), shape((batch,), jnp.int32, P()), shape((2,), jnp.uint32, P()))
        outs = (placed, NamedSharding(mesh, P()), NamedSharding(mesh, BATCH))
        return Step(jax.jit(step, donate_argnums=0, out_shardings=outs).lower(*args).compile(), args)


def per_device(compiled: Compiled) -> int:
    """Bytes that a program needs on a device: what it is given, what it makes, and what it holds in between."""
    m: Any = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def timed(step: Step, classes: int, rounds: int) -> tuple[float, float]:
    """Median seconds of a step, on the wall and of this process's processors."""
    rng = np.random.default_rng(0)

    def fill(a: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(a.dtype, jnp.integer):
            return jax.device_put(rng.integers(0, classes if a.ndim and a.dtype == jnp.int32 else 1, a.shape).astype(a.dtype), a.sharding)
        made = jax.jit(lambda: jax.random.normal(jax.random.key(0), a.shape) * 0.01, out_shardings=a.sharding)
        return made() if a.shape else jax.device_put(np.zeros((), a.dtype), a.sharding)

    state, *rest = jax.tree.map(fill, step.args)
    wall, cpu = [], []
    for _ in range(rounds + 1):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        state, *_ = jax.block_until_ready(step.compiled(state, *rest))
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
    return statistics.median(wall[1:]), statistics.median(cpu[1:])


def hierarchy(rounds: int, classes: int = CLASSES[0]) -> dict[str, Any]:
    """A whole train step, ViT and optimiser in it, with sqrt(classes) coarse proxies over the same step with none, round by round.

    Refreshes come every hundred steps or more and are not in these steps; `refresh_s` is what one costs.
    """
    runs = {mode: _train_step(mode, classes) for mode in MODES}
    cpu: dict[str, list[float]] = {mode: [] for mode in MODES}
    wall: dict[str, list[float]] = {mode: [] for mode in MODES}
    states = {}
    for mode, (step, state, batch, _) in runs.items():
        states[mode] = jax.block_until_ready(step(state, batch))[0]
    for _ in range(max(rounds, 3)):
        for mode, (step, _, batch, _) in runs.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for _ in range(3):
                states[mode], _ = jax.block_until_ready(step(states[mode], batch))
            wall[mode].append((time.perf_counter() - begin) / 3)
            cpu[mode].append((time.process_time() - begin_cpu) / 3)
    ratio = lambda of, mode: spread([a / b - 1 for a, b in zip(of[mode], of["none"], strict=True)])
    rows = {
        mode: {"step_s": statistics.median(wall[mode]), "overhead": ratio(wall, mode), "cpu_overhead": ratio(cpu, mode)}
        for mode in MODES[1:]
    }
    refresh, state = runs["frozen"][3], states["frozen"]
    jax.block_until_ready(refresh(state.params, state.memory))
    begin = time.perf_counter()
    jax.block_until_ready(refresh(state.params, state.memory))
    return {
        "classes": classes,
        "coarse": round(classes**0.5),
        "base_step_s": statistics.median(wall["none"]),
        "refresh_s": time.perf_counter() - begin,
        "modes": rows,
    }


def _train_step(mode: str, classes: int) -> tuple[Callable, Any, Any, Callable]:
    """The compiled step of a run on one device, its state and a batch, and a program that does nothing but refresh."""
    learned = mode != "none"
    config = configs.load(str(Path(__file__).with_name("small.py")))
    config.method = dict(name="hpl", width=WIDTH, classes=classes, hierarchy="learned" if learned else "none", hierarchy_start=0, refresh_every=1000,
                         coarse_mode=mode if learned else "auto")  # fmt: skip
    config.data.update(captions="none", label="class", classes="all")
    config.optim.update(decay="", clip_norm=0.0)
    recipe = configs.read(config)
    mesh = make_mesh(MeshOptions(1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        parts = assemble(recipe, None, Run(steps=100, epoch=100, classes=classes))
        plan = program(parts, mesh, 100)
        # One step in, so that a learned hierarchy's first clustering is not what is measured.
        state = jax.jit(plan.init, out_shardings=plan.out_shardings[0])(jax.random.key(0))
        state = state._replace(step=state.step + 1)
        if learned:
            state.memory["refreshed"] = state.memory["refreshed"] + 1
        step = jax.jit(plan.step, donate_argnums=0, out_shardings=plan.out_shardings).lower(plan.state, plan.batch).compile()
        batch = place(random_batch(parts), mesh)
        due = jnp.int32(1000)
        refresh = parts.method.refresh
        return step, state, batch, jax.jit(lambda p, m: refresh(p, m, due)[:2]) if refresh else lambda p, m: None
