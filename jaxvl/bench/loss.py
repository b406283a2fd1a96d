"""`jaxvl bench loss`: the contrastive losses alone, all logits at once against the ring, in memory and time."""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from jaxvl.losses.infonce import infonce
from jaxvl.losses.sigmoid import sigmoid
from jaxvl.mesh import BATCH, MeshOptions, make_mesh
from jaxvl.terminal import tell

LOSSES: dict[Callable, tuple[float, ...]] = {infonce: (1 / 0.07,), sigmoid: (10.0, -10.0)}
IMPLS = ("global", "ring")


def main(config: str | None, overrides: Sequence[str], *, rounds: int) -> int:
    """Print JSON; on a CPU it is cut into eight devices. Raises ValueError for a config, which nothing here would read."""
    if config or overrides:
        raise ValueError("bench loss measures the losses alone: it takes neither --config nor overrides")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 8)
    on_cpu = jax.default_backend() == "cpu"
    tell(json.dumps(measure(batch=32768, timed_batch=4096 if on_cpu else 32768, width=512, rounds=rounds), indent=2))
    return 0


def measure(*, batch: int, timed_batch: int, width: int, rounds: int) -> dict[str, Any]:
    """Value and gradient of each loss: temporary memory of the program for `batch` rows, seconds for `timed_batch` rows.

    Raises RuntimeError where the two implementations do not agree to 1e-4, for then there is nothing to compare.
    """
    mesh = make_mesh(MeshOptions())
    rng = np.random.default_rng(0)
    image, noise = rng.standard_normal((2, timed_batch, width), np.float32)
    rows = []
    with jax.set_mesh(mesh):
        split = jax.sharding.NamedSharding(mesh, BATCH)
        x, y = (jax.device_put(v / np.linalg.norm(v, axis=1, keepdims=True), split) for v in (image, image / 2 + noise))
        for loss, scalars in LOSSES.items():
            args = (x, y, *map(jnp.float32, scalars))
            large = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=split)
            held = {i: temporary_bytes(program(loss, i, large, large, *args[2:])) for i in IMPLS}
            programs = {i: program(loss, i, *args) for i in IMPLS}
            checked = {i: digest(f(*args)) for i, f in programs.items()}
            if not np.allclose(checked["global"], checked["ring"], rtol=1e-4):
                raise RuntimeError(f"{loss.__name__}: value and gradient norms differ: {checked}")
            seconds: dict[str, list[float]] = {i: [] for i in IMPLS}
            cpu: dict[str, list[float]] = {i: [] for i in IMPLS}
            for _ in range(rounds):
                for i, f in programs.items():
                    begin, begin_cpu = time.perf_counter(), time.process_time()
                    jax.block_until_ready(f(*args))
                    seconds[i].append(time.perf_counter() - begin)
                    cpu[i].append(time.process_time() - begin_cpu)
            rows += [
                {"loss": loss.__name__, "impl": i, "temporary_bytes": held[i], "memory_ratio": held["global"] / held[i],
                 "wall_s": statistics.median(seconds[i]), "cpu_s": statistics.median(cpu[i]),
                 "wall_ratio": statistics.median(a / b for a, b in zip(seconds[i], seconds["global"], strict=True)),
                 "value": checked[i][0]}
                for i in IMPLS
            ]  # fmt: skip
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "width": width,
        "batch": batch,
        "timed_batch": timed_batch,
        "rounds": rounds,
        "losses": rows,
    }


def program(loss: Callable, impl: str, *args: Any) -> Compiled:
    return jax.jit(jax.value_and_grad(partial(loss, impl=impl), tuple(range(len(args))))).lower(*args).compile()


def temporary_bytes(compiled: Compiled) -> int:
    asked: Any = compiled.memory_analysis()
    return asked.temp_size_in_bytes


def digest(result: tuple[jax.Array, tuple]) -> list[float]:
    """Value, and the norm of each gradient."""
    value, grads = result
    return [float(value), *(float(jnp.linalg.norm(g)) for g in grads)]
