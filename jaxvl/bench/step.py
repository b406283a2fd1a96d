"""`jaxvl bench step`: what one train step costs in time, compilation and memory, and what cutting the batch adds.

The programs are those a run of the config would compile, on random pixels and tokens. Plain and accumulated steps take
turns in every round, so that whatever else the machine does falls on both; a ratio is taken within a round and the median
of the rounds is reported.
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
from jaxvl.assembly import Parts, assemble, program
from jaxvl.bench import terms
from jaxvl.bench.sizes import SMALL, tokenizer
from jaxvl.config import Recipe
from jaxvl.mesh import make_mesh, place
from jaxvl.report.clock import peak_flops


class Timing(NamedTuple):
    """Seconds a step in one round, on the wall and of this process's processor time."""

    wall: float
    cpu: float


def main(config: str | None, overrides: Sequence[str], *, rounds: int) -> int:
    """Print the measurement of a config, or of a small built-in one, as JSON. Raises ValueError for a wrong config."""
    jax.config.update("jax_enable_compilation_cache", False)
    recipe = configs.read(configs.load(config or str(SMALL), overrides))
    print(json.dumps({"config": config or "built-in", **measure(recipe, rounds=rounds)}, indent=2))
    return 0


def measure(recipe: Recipe, *, rounds: int) -> dict[str, Any]:
    """Time, memory and compilation of the step of `recipe`; of the uncut step and one in microbatches, both.

    Raises ValueError where `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; it must be at least 1")
    mesh = make_mesh(recipe.mesh)
    batch_size, chosen = recipe.train.batch_size, recipe.train.accumulate
    other = microbatches(batch_size, mesh.shape["data"] * mesh.shape["fsdp"]) if chosen == 1 else 1
    with jax.set_mesh(mesh):
        parts = assemble(recipe, tokenizer(recipe))
        plan = program(parts, mesh, recipe.train.steps or 1)
        state = jax.jit(plan.init, out_shardings=plan.out_shardings[0])(jax.random.key(recipe.seed))
        batch = place(random_batch(parts), mesh)
        steps, rows, high = {}, {}, 0
        for accumulate in dict.fromkeys((chosen, other)):
            begin = time.perf_counter()
            steps[accumulate] = compile_step(parts, mesh, accumulate)
            compiled = time.perf_counter()
            state, _ = jax.block_until_ready(steps[accumulate](state, batch))
            high = high or high_water()  # of the chosen program alone: the marks of process and device never fall
            asked: Any = steps[accumulate].memory_analysis()
            rows[accumulate] = {
                "accumulate": accumulate,
                "compile_s": compiled - begin,
                "first_step_s": time.perf_counter() - compiled,
                "temporary_bytes": asked.temp_size_in_bytes,
                "argument_bytes": asked.argument_size_in_bytes,
            }
        timings, peak = alternate(steps, state, batch, rounds)
        step_s = statistics.median(t.wall for t in timings[chosen])
        apart = terms.measure(parts.method.terms(parts.spec), mesh, rounds=rounds, step_s=step_s) if parts.method.terms else None

    for accumulate, mine in timings.items():
        rows[accumulate] |= {
            "step_s": spread([t.wall for t in mine]),
            "cpu_s": spread([t.cpu for t in mine]),
            "samples_per_s": batch_size / statistics.median(t.wall for t in mine),
            "wall_ratio": spread([t.wall / one.wall for t, one in zip(mine, timings[1], strict=True)]),
            "cpu_ratio": spread([t.cpu / one.cpu for t, one in zip(mine, timings[1], strict=True)]),
        }
    flops = 3 * parts.method.flops(parts.spec)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "batch_size": batch_size,
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(plan.state.params)),
        "samples_per_s": rows[chosen]["samples_per_s"],
        "step_s": rows[chosen]["step_s"],
        "mfu": flops * rows[chosen]["samples_per_s"] / peak if peak else None,
        "flops_per_sample": flops,
        "peak_flops": peak,
        "peak_flops_source": "float32 matrix product in the same rounds" if on_cpu() else "data sheet, dense bfloat16",
        "compile_s": rows[chosen]["compile_s"],
        "peak_memory_bytes": high,
        "peak_memory_of": "the device" if jax.local_devices()[0].memory_stats() else "the process",
        "rounds": rounds,
        "steps": list(rows.values()),
        "terms": apart,
    }


def compile_step(parts: Parts, mesh: jax.sharding.Mesh, accumulate: int) -> Compiled:
    """The donated step of a run, ahead of time, with `accumulate` microbatches."""
    train = parts.recipe.train._replace(accumulate=accumulate)
    plan = program(parts._replace(recipe=parts.recipe._replace(train=train)), mesh, train.steps or 1)
    return jax.jit(plan.step, donate_argnums=0, out_shardings=plan.out_shardings).lower(plan.state, plan.batch).compile()


def alternate(steps: Mapping[int, Callable], state: Any, batch: Any, rounds: int) -> tuple[dict[int, list[Timing]], float | None]:
    """Every program in turn, about a second each, round after round; and the machine's peak FLOP/s where it is known.

    All programs work on one state, since each donates it and gives back another of the same layout.
    """
    timings: dict[int, list[Timing]] = {k: [] for k in steps}
    peak = 0.0 if on_cpu() else (peak_flops(jax.devices()[0].device_kind) or 0.0) * jax.device_count()
    for _ in range(rounds):
        for accumulate, step in steps.items():
            begin, cpu, done = time.perf_counter(), time.process_time(), 0
            while not done or time.perf_counter() - begin < 1:
                ahead = min(done, 8) or 1  # on an accelerator the host must run ahead of the device, as it does in a run
                for _ in range(ahead):
                    state, _ = step(state, batch)
                jax.block_until_ready(state)
                done += ahead
            timings[accumulate].append(Timing((time.perf_counter() - begin) / done, (time.process_time() - cpu) / done))
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
