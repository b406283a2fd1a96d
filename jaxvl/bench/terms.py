"""What the terms of a loss cost: share of the step's FLOPs, compiled memory, time; part of `jaxvl bench step`, and alone as `jaxvl bench terms`.

Alone it needs no step: the terms that can be run apart are compiled and run for the config's full batch on random unit vectors, which a
laptop can do where it could never hold the model.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxvl import config as configs
from jaxvl.bench.sizes import SMALL, tokenizer
from jaxvl.mesh import BATCH, make_mesh
from jaxvl.methods.method import Term, unit
from jaxvl.parts import assemble
from jaxvl.terminal import tell


def main(config: str | None, overrides: Sequence[str], *, rounds: int) -> int:
    """Print the terms of a config as JSON. Raises ValueError for a wrong config and for a method that names no terms."""
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; it must be at least 1")
    recipe = configs.read(configs.load(config or str(SMALL), overrides))
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        parts = assemble(recipe, tokenizer(recipe))
        if parts.method.terms is None:
            raise ValueError(f"config.method.name is {recipe.method.name!r}, whose loss is one term; TCL and CODIS name theirs")
        found = measure(parts.method.terms(parts.spec), mesh, rounds=rounds)
    tell(json.dumps({"config": config, "batch_size": recipe.train.batch_size, "devices": jax.device_count(), "terms": found}, indent=2))
    return 0


def measure(terms: Mapping[str, Term], mesh: jax.sharding.Mesh, *, rounds: int, step_s: float = 0.0) -> dict[str, dict[str, Any]]:
    """By term, with `step_s` also its time as a share of that of a step. Where a term cannot be run apart its time and memory are None."""
    total = sum(term.flops for term in terms.values())
    rows: dict[str, dict[str, Any]] = {}
    for name, term in terms.items():
        rows[name] = {"flops_per_sample": 3 * term.flops, "flops_share": term.flops / total, "temporary_bytes": None, "time_s": None}
        if term.run is None:
            continue
        place = [NamedSharding(mesh, BATCH if shape.shape else P()) for shape in term.shapes]
        drawn = lambda shapes=term.shapes: [
            unit(jax.random.normal(jax.random.key(i), s.shape)) if s.shape else jnp.float32(0.07) for i, s in enumerate(shapes)
        ]
        inputs = jax.jit(drawn, out_shardings=place)()
        program = jax.jit(term.run).lower(*inputs).compile()
        asked: Any = program.memory_analysis()
        jax.block_until_ready(program(*inputs))
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            times.append(time.perf_counter() - begin)
        rows[name] |= {"temporary_bytes": asked.temp_size_in_bytes, "time_s": statistics.median(times)}
        if step_s:
            rows[name]["time_share"] = statistics.median(times) / step_s
    return rows
