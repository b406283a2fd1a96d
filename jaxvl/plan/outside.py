"""Compiling a step for devices that are not here, in a process of its own: a compiler that aborts or hangs takes nothing else with it.

    python -m jaxvl.plan.outside CONFIG.json TOPOLOGY RESULT.json

is that process. TPUs are described to libtpu by name; CPU devices are forced.
"""

import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl.plan import chips
from jaxvl.plan.chips import Topology
from jaxvl.plan.hlo import Collective

ABSENT = "libtpu, the compiler for TPUs, is not installed; it needs no TPU: pip install libtpu"


class Compiled(NamedTuple):
    """What the compiler said of a step. Bytes on each device; output counts what is not in the place of an argument.

    exceeded: what the compiler says that the program would take where it gave up because that is more than there is; then the parts are 0.
    seconds: of wall time, by phase. compiler: its name and version. notes: what was warned of on the way.
    """

    argument: int
    output: int
    temporary: int
    code: int
    collectives: tuple[Collective, ...]
    seconds: dict[str, float]
    compiler: str
    exceeded: int = 0
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.exceeded or self.argument + self.output + self.temporary + self.code


def compile_for(config: dict[str, Any], topology: Topology, *, limit: float) -> Compiled:
    """The step of a complete config (plain dict), compiled for a topology.

    Raises ValueError where the compiler is not here, refuses the config, dies, or takes longer than `limit` seconds.
    """
    if topology.chip.libtpu and not (importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")):
        raise ValueError(f"--topology={topology.name}: {ABSENT}")
    with tempfile.TemporaryDirectory() as folder:
        given, result, said = (Path(folder) / name for name in ("config.json", "result.json", "said"))
        given.write_text(json.dumps(config))
        command = [sys.executable, "-m", "jaxvl.plan.outside", str(given), topology.name, str(result)]
        with open(said, "w") as out:
            try:
                status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=_environment(topology), timeout=limit).returncode
            except subprocess.TimeoutExpired:
                raise ValueError(
                    f"--topology={topology.name}: the compiler took more than {limit:.0f} s and was stopped; give it longer with --limit"
                ) from None
        if not result.exists():
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise ValueError(f"--topology={topology.name}: the process that compiles {how}; its last words:\n{said.read_text()[-2000:]}")
        found = json.loads(result.read_text())
    if "error" in found:
        raise ValueError(found["error"])
    found["notes"] = tuple(found["notes"])
    found["collectives"] = tuple(Collective(**{**c, "axes": tuple(c["axes"])}) for c in found["collectives"])
    return Compiled(**found)


def _environment(topology: Topology) -> dict[str, str]:
    """Of the process: no accelerator that is here is touched, and libtpu asks no metadata server where it runs."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "NPROC": "64"}
    flags = [f for f in env.get("XLA_FLAGS", "").split() if "device_count" not in f]
    if topology.chip.libtpu:
        env |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_STDERR_LOG_LEVEL": "3",
        }
    else:
        flags.append(f"--xla_force_host_platform_device_count={topology.devices}")
    return {**env, "XLA_FLAGS": " ".join(flags)}


def main(config: str, name: str, result: str) -> None:
    """The process itself: writes what `Compiled` holds, or {"error": message}, to `result`."""
    begin = time.perf_counter()
    warned: list[str] = []
    heard = logging.Handler(logging.WARNING)
    heard.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("jaxvl").addHandler(heard)
    import jax

    from jaxvl import assembly, config as configs
    from jaxvl.mesh import check_batch, make_mesh
    from jaxvl.plan import hlo, shapes

    topology = chips.topology(name)
    try:
        devices: Any = jax.devices()
        compiler = f"XLA of jaxlib {importlib.metadata.version('jaxlib')}"
        if topology.chip.libtpu:
            from jax.experimental import topologies

            devices, compiler = topologies.get_topology_desc(name, "tpu").devices, _libtpu()
        if len(devices) != topology.devices:
            raise ValueError(f"--topology={name}: the compiler makes {len(devices)} devices of it, and {topology.devices} were expected")
        recipe = configs.read(configs.load(config))
        mesh = make_mesh(recipe.mesh, devices)
        with jax.set_mesh(mesh):
            plan = shapes.planned(recipe)
            check_batch(recipe.train.batch_size, mesh, recipe.train.accumulate)
            program = assembly.program(plan.parts, mesh, plan.steps)
            started = time.perf_counter()
            lowered = jax.jit(program.step, donate_argnums=0, out_shardings=program.out_shardings).lower(program.state, program.batch)
            traced = time.perf_counter()
            seconds = {"start": started - begin, "trace": traced - started}
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if not (used := exceeded(str(error), sum(shapes.held(program).values()))):
                    raise
                body = Compiled(0, 0, 0, 0, (), {**seconds, "compile": time.perf_counter() - traced}, compiler, used)
            else:
                memory: Any = compiled.memory_analysis()
                seconds["compile"] = time.perf_counter() - traced
                moved = tuple(hlo.collectives(compiled.as_text() or "", dict(mesh.shape)))
                body = Compiled(memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes, memory.temp_size_in_bytes,
                                memory.generated_code_size_in_bytes, moved, seconds, compiler)  # fmt: skip
        said = {**body._asdict(), "notes": warned, "collectives": [c._asdict() for c in body.collectives]}
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        said = {"error": f"--topology={name}: {str(error)[:4000]}" if isinstance(error, jax.errors.JaxRuntimeError) else str(error)}
    Path(result).write_text(json.dumps(said))


def exceeded(message: str, state: int) -> int:
    """Bytes that the compiler says a program would need, of its message that the memory does not suffice; 0 for another message. Where it tells of the
    temporaries alone, `state` is added."""
    amount = r"([\d.]+)([KMGT]?)"
    for pattern, beside in (
        (rf"Used {amount} of [\d.]+[KMGT]? hbm", 0),
        (rf"total memory required for HLO temporaries \({amount}\) exceeds", state),
    ):
        if found := re.search(pattern, message):
            return beside + round(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
    return 0


def _libtpu() -> str:
    """Name and version of libtpu, and whether it is the one that this jax was tested with."""
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "libtpu of TPU_LIBRARY_PATH"
    asked = next((r for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu") and "tpu" in r.partition(";")[2]), "")
    wanted = re.search(r"==([\d.]+)", asked)
    return f"libtpu {version}" + (
        f", but jax {importlib.metadata.version('jax')} asks for {wanted[1]}*"
        if wanted and not version.startswith(wanted[1].rstrip("."))
        else ""
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
