"""`jaxvl bench step`: what one train step costs in time, compilation and memory, and what cutting the batch adds.

The programs are those a run of the config would compile, on random pixels and tokens. Plain and accumulated steps take
turns in every round, so that whatever else the machine does falls on both; a ratio is taken within a round and the median
of the rounds is reported. Beside them stand the steps without each way in which the method computes the same for less.
"""

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from jaxvl import config as configs
from jaxvl.assembly import program
from jaxvl.bench import terms
from jaxvl.bench.sizes import SMALL, tokenizer
from jaxvl.config import Recipe
from jaxvl.mesh import make_mesh, place
from jaxvl.methods import METHODS
from jaxvl.parts import Parts, assemble
from jaxvl.report.clock import peak_flops
from jaxvl.terminal import tell

REUSE = "features of frozen towers computed once"


class Timing(NamedTuple):
    """Seconds a step in one round, on the wall and of this process's processor time."""

    wall: float
    cpu: float


def main(config: str | None, overrides: Sequence[str], *, rounds: int) -> int:
    """Print the measurement of a config, or of a small built-in one, as JSON. Raises ValueError for a wrong config."""
    jax.config.update("jax_enable_compilation_cache", False)
    recipe = configs.read(configs.load(config or str(SMALL), overrides))
    tell(json.dumps({"config": config or "built-in", **measure(recipe, rounds=rounds)}, indent=2))
    return 0


class Form(NamedTuple):
    """A program that takes the same step. parts: of it; accumulate: microbatches."""

    parts: Parts
    accumulate: int


def measure(recipe: Recipe, *, rounds: int) -> dict[str, Any]:
    """Time, memory and compilation of the step of `recipe`; of the uncut step and one in microbatches, both, and without each cheap equivalent.

    With `rounds` 0 programs are compiled and nothing is run or allocated. Raises ValueError where `rounds` is below that.
    """
    if rounds < 0:
        raise ValueError(f"--rounds is {rounds}; it must be at least 1, or 0 to compile alone")
    mesh = make_mesh(recipe.mesh)
    batch_size, chosen = recipe.train.batch_size, recipe.train.accumulate
    other = microbatches(batch_size, mesh.shape["data"] * mesh.shape["fsdp"]) if chosen == 1 else 1
    with jax.set_mesh(mesh):
        parts = assemble(recipe, tokenizer(recipe))
        plan = program(parts, mesh, recipe.train.steps or 1)
        every = forms(parts, chosen, other)
        state: Any = None
        batch: Any = None
        if rounds:
            state = jax.jit(plan.init, out_shardings=plan.out_shardings[0])(jax.random.key(recipe.seed))
            batch = place(random_batch(parts), mesh)
        steps: dict[str, Compiled] = {}
        rows: dict[str, dict[str, Any]] = {}
        high = 0
        for name, form in every.items():
            begin = time.perf_counter()
            steps[name] = compile_step(form.parts, mesh, form.accumulate)
            compiled = time.perf_counter()
            asked: Any = steps[name].memory_analysis()
            rows[name] = {
                "accumulate": form.accumulate,
                "compile_s": compiled - begin,
                "temporary_bytes": asked.temp_size_in_bytes,
                "argument_bytes": asked.argument_size_in_bytes,
            }
            if rounds:
                begin = time.perf_counter()
                state, _ = jax.block_until_ready(steps[name](state, batch))
                rows[name]["first_step_s"] = time.perf_counter() - begin
                high = high or high_water()  # of the chosen program alone: the marks of process and device never fall
        timings: dict[str, list[Timing]] = {}
        peak: float | None = None
        if rounds:
            timings, peak = alternate(steps, state, batch, rounds)
        step_s = statistics.median(t.wall for t in timings[f"{chosen}"]) if rounds else 0.0
        apart = terms.measure(parts.method.terms(parts.spec), mesh, rounds=rounds, step_s=step_s) if parts.method.terms and rounds else None

    for name, mine in timings.items():
        rows[name] |= {
            "step_s": spread([t.wall for t in mine]),
            "cpu_s": spread([t.cpu for t in mine]),
            "samples_per_s": batch_size / statistics.median(t.wall for t in mine),
            "wall_ratio": spread([t.wall / one.wall for t, one in zip(mine, timings["1"], strict=True)]),
            "cpu_ratio": spread([t.cpu / one.cpu for t, one in zip(mine, timings["1"], strict=True)]),
        }
    flops = 3 * parts.method.flops(parts.spec)
    own = rows[f"{chosen}"]
    ran = {
        "samples_per_s": own["samples_per_s"],
        "step_s": own["step_s"],
        "mfu": flops * own["samples_per_s"] / peak if peak else None,
        "peak_flops": peak,
        "peak_flops_source": "float32 matrix product in the same rounds" if on_cpu() else "data sheet, dense bfloat16",
        "peak_memory_bytes": high,
        "peak_memory_of": "the device" if jax.local_devices()[0].memory_stats() else "the process",
        "terms": apart,
    } if rounds else {}  # fmt: skip
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "batch_size": batch_size,
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(plan.state.params)),
        "flops_per_sample": flops,
        "compile_s": own["compile_s"],
        "rounds": rounds,
        "steps": [rows[f"{accumulate}"] for accumulate in dict.fromkeys((chosen, other))],
        "equivalents": [compared(name, *(rows[key] for key in pair)) for name, pair in pairs(every, chosen, other).items()],
        **ran,
    }


def forms(parts: Parts, chosen: int, other: int) -> dict[str, Form]:
    """The programs: "1" and the like in so many microbatches, and the chosen one without each cheap equivalent of its method, by name."""
    every = {f"{accumulate}": Form(parts, accumulate) for accumulate in dict.fromkeys((chosen, other))}
    for name, options in METHODS[parts.recipe.method.name].plain(parts.recipe.method).items():
        every[name] = Form(assemble(parts.recipe._replace(method=options), parts.tokenizer, parts.run), chosen)
    if parts.method.features is not None and max(chosen, other) > 1:
        every[REUSE] = Form(parts._replace(method=parts.method._replace(features=None)), max(chosen, other))
    return every


def pairs(every: Mapping[str, Form], chosen: int, other: int) -> dict[str, tuple[str, str]]:
    """By the name of an equivalent, the programs with it and without it."""
    cut = f"{max(chosen, other)}"
    found = {name: (cut if name == REUSE else f"{chosen}", name) for name in every if not name.isdigit()}
    return found | ({"two-pass accumulation": (cut, "1")} if cut != "1" else {})


def compared(name: str, on: Mapping[str, Any], off: Mapping[str, Any]) -> dict[str, Any]:
    """Memory and, where they were run, time with and without an equivalent; ratios are without to with, of medians."""
    row: dict[str, Any] = {"name": name, "accumulate": on["accumulate"]}
    for key, value in (
        ("temporary_bytes", lambda r: r["temporary_bytes"]),
        ("step_s", lambda r: r["step_s"]["median"]),
        ("cpu_s", lambda r: r["cpu_s"]["median"]),
    ):
        if key in on:
            row |= {f"{key}_with": value(on), f"{key}_without": value(off), f"{key}_ratio": value(off) / value(on)}
    return row


def compile_step(parts: Parts, mesh: jax.sharding.Mesh, accumulate: int) -> Compiled:
    """The donated step of a run, ahead of time, with `accumulate` microbatches."""
    train = parts.recipe.train._replace(accumulate=accumulate)
    plan = program(parts._replace(recipe=parts.recipe._replace(train=train)), mesh, train.steps or 1)
    return jax.jit(plan.step, donate_argnums=0, out_shardings=plan.out_shardings).lower(plan.state, plan.batch).compile()


def alternate(steps: Mapping[str, Callable], state: Any, batch: Any, rounds: int) -> tuple[dict[str, list[Timing]], float | None]:
    """Every program in turn, about a second each, round after round; and the machine's peak FLOP/s where it is known.

    All programs work on one state, since each donates it and gives back another of the same layout.
    """
    timings: dict[str, list[Timing]] = {k: [] for k in steps}
    peak = 0.0 if on_cpu() else (peak_flops(jax.devices()[0].device_kind) or 0.0) * jax.device_count()
    for _ in range(rounds):
        for name, step in steps.items():
            begin, cpu, done = time.perf_counter(), time.process_time(), 0
            while not done or time.perf_counter() - begin < 1:
                ahead = min(done, 8) or 1  # on an accelerator the host must run ahead of the device, as it does in a run
                for _ in range(ahead):
                    state, _ = step(state, batch)
                jax.block_until_ready(state)
                done += ahead
            timings[name].append(Timing((time.perf_counter() - begin) / done, (time.process_time() - cpu) / done))
        if on_cpu():
            peak = max(peak, product_flops())
    return timings, peak or None


def product_flops(width: int = 1536) -> float:
    """FLOP/s of the best of three products of two float32 [width, width] matrices on the first device."""
    a = jnp.ones((width, width))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(product(a, a))
        times.append(time.perf_counter() - begin)
    return 2 * width**3 / min(times)


def high_water() -> int:
    """The most bytes in use so far: on the first device where it keeps count, else in this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def microbatches(batch_size: int, devices: int) -> int:
    """4, 2 or 3 microbatches, the first that divides the rows of a device; 1 where none does."""
    return next((k for k in (4, 2, 3) if batch_size % (k * devices) == 0), 1)


def random_batch(parts: Parts) -> dict[str, np.ndarray]:
    """Pixels of every view, and captions, labels and ids where the method reads them."""
    rng = np.random.default_rng(0)
    below = {"tokens": parts.tokenizer.vocab_size if parts.tokenizer else 0, "label": getattr(parts.recipe.method, "classes", 0)}
    batch = {}
    for name, leaf in parts.spec.items():
        if name.startswith("image"):
            batch[name] = rng.integers(0, 256, leaf.shape, dtype=np.uint8)
        else:
            batch[name] = rng.integers(int(name == "tokens"), below.get(name) or leaf.shape[0], leaf.shape).astype(np.int32)
    return batch


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"
