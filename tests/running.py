"""Runs of `jaxvl train` as a user starts them, for the tests that kill, stop, starve and compare them."""

import atexit
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxvl import manifest
from jaxvl.report.metrics import METRICS, read_metrics
from jaxvl.restore import restore

STEPS = 48
PATIENCE = float(os.environ.get("JAXVL_PATIENCE", "400"))  # seconds; a run takes ten on a free machine
ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "tests" / "tiny_config.py"
RECIPE = "clip_vitb16_cc12m"
FAST = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)  # of conftest.py, for quick compiles
CLOCKED = ("time/", "samples_per_s", "mfu")  # what a clock measures is never the same twice


def environment(**extra: str) -> dict[str, str]:
    """For a process of its own: two devices, every compiled program cached, and byte code kept, which makes a start three times cheaper."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    cached = {"PYTHONPYCACHEPREFIX": str(ROOT / ".cache" / "pycache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**kept, **cached, "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {FAST}", **extra}


def peers(processes: int) -> list[dict[str, str]]:
    """What each process of a run of several on this machine finds in its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [{"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(i)} for i in range(processes)]


def start(workdir: Path, *overrides: str, recipe: str = RECIPE, **env: str) -> subprocess.Popen:
    """`jaxvl train` of the tiny config of a recipe, its output in `workdir`.out."""
    command = [
        sys.executable,
        "-m",
        "jaxvl.cli",
        "train",
        f"--config={CONFIG}:{recipe}",
        f"--workdir={workdir}",
        *(f"--config.{o}" for o in overrides),
    ]
    with open(f"{workdir}.out", "a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment(**env))
    atexit.register(process.kill)  # where a test fails before it has waited
    return process


def finish(process: subprocess.Popen, workdir: Path, status: int = 0) -> None:
    """Wait for the process; its whole output is shown where it ends in any other way than `status`."""
    assert process.wait(PATIENCE) == status, said(workdir)


def said(workdir: Path) -> str:
    """What the runs in `workdir` have printed."""
    return Path(f"{workdir}.out").read_text()


class Progress:
    """The last step logged by the process that `start` started after this was made; -1 before it has logged one."""

    def __init__(self, workdir: Path) -> None:
        self._path = workdir / METRICS
        self._before = self._identity()

    def step(self) -> int:
        if self._identity() == self._before:
            return -1
        rows = [row for row in read_metrics(self._path.parent) if "loss" in row]
        return int(rows[-1]["step"]) if rows else 0

    def wait(self, process: subprocess.Popen, step: int) -> None:
        """Return when `process` has logged `step`; fails with its output where it ends before."""
        deadline = time.monotonic() + PATIENCE
        while self.step() < step:
            assert process.poll() is None and time.monotonic() < deadline, said(self._path.parent)
            time.sleep(0.002)

    def _identity(self) -> Any:
        return self._path.stat().st_ino if self._path.exists() else None


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Everything a run logged that does not come from a clock, in the order it was logged."""
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in read_metrics(workdir)]


def leaves(workdir: Path, step: int = STEPS) -> dict[str, bytes]:
    """The bits of every leaf of a checkpoint."""
    folder = workdir / "checkpoints"
    types = manifest.read(folder, step).leaves
    shape = lambda text: tuple(int(n) for n in text.rstrip("]").split("[")[1].split(",") if n)
    found = restore(folder, {k: jax.ShapeDtypeStruct(shape(t), np.dtype(t.split("[")[0])) for k, t in types.items()}, step)
    return {k: v.tobytes() for k, v in found.state.items()}


def same_run(workdir: Path, reference: Path) -> None:
    """Every logged number of every step, and every bit of the final state."""
    ours, theirs = metrics(workdir), metrics(reference)
    assert [row["step"] for row in ours if "loss" in row] == list(range(1, STEPS + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert one == other
    final, wanted = leaves(workdir), leaves(reference)
    assert final.keys() == wanted.keys()
    assert [k for k in wanted if final[k] != wanted[k]] == []


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a recipe that nothing disturbed; made once, also where several test processes share the work."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared

    def run(recipe: str) -> Path:
        workdir = shared / f"reference-{recipe}"
        with open(shared / f"{recipe}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (workdir / "done").exists():
                finish(start(workdir, recipe=recipe), workdir)
                (workdir / "done").touch()
        return workdir

    return run


@pytest.fixture(scope="session")
def reference(references: Callable[[str], Path]) -> Path:
    return references(RECIPE)
