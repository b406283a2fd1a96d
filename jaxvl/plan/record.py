"""The plan that is kept with a run: what its own compiled step needs and sends, on the devices it began on."""

import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxvl.assembly import Program
from jaxvl.parts import Parts
from jaxvl.plan import chips, fit, hlo, shapes, tell
from jaxvl.plan.shapes import Planned

FILE = "plan.json"


def save(workdir: Path, parts: Parts, program: Program, step: Compiled, mesh: Mesh, steps: int) -> None:
    """Write `workdir`/plan.json, what `jaxvl plan --json` prints; of a run of several processes the first writes it.

    What the compiler does not tell is a note in it and never stops a run: without its memory only the state is known, from shapes.
    """
    if jax.process_index():
        return
    device, notes = jax.local_devices()[0], []
    topology = chips.here(device.device_kind, mesh.size, (device.memory_stats() or {}).get("bytes_limit", 0))
    memory: Any = None
    moved: tuple[hlo.Collective, ...] = ()
    try:
        memory = step.memory_analysis()
        moved = tuple(hlo.collectives(step.as_text() or "", dict(mesh.shape)))
    except Exception as error:  # whatever a compiler's text holds, training does not depend on it
        notes.append(f"the program could not be read: {type(error).__name__}: {error}")
    if memory is None:
        notes.append("this compiler does not tell what memory a program needs")
        asked = fit.Asked(sum(shapes.held(program).values()), 0, moved, "shapes of the state alone", {})
    else:
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )
        asked = fit.Asked(total, memory.temp_size_in_bytes, moved, "the run's own program", {})
    plan = fit.of(workdir.name, topology, Planned(parts, steps, tuple(notes)), program, mesh, asked)
    partial = workdir / f"{FILE}.partial"
    partial.write_text(json.dumps(tell.as_json(plan), indent=1))
    partial.rename(workdir / FILE)
