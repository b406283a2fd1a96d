"""Trials as processes of this machine, tied to the sweep: where that is killed, they save and leave."""
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxvl.sweep import folder as folders
from jaxvl.sweep.child import tied
from jaxvl.sweep.folder import LOG
from jaxvl.sweep.options import SweepError
from jaxvl.sweep.scheduler import Launch

Command = Callable[[Path], list[str]]


def train_command(run: Path) -> list[str]:
    """How a trial is run; the same line by hand continues it."""
    return [sys.executable, "-m", "jaxvl.cli", "train", f"--config={run / 'config.json'}", f"--workdir={run}"]


def launcher(command: Command, workers: int, env: Mapping[str, str]) -> Launch:
    """Starts trials here, with `env` added to the environment and the GPUs divided among `workers`."""
    share = share_devices(workers, os.environ)
    return lambda run, slot, _: LocalProcess(run, command(run), {**os.environ, **env, **share(slot)})


class LocalProcess:
    """A run in a process group of its own: Ctrl-C reaches the sweep alone, which passes it on as SIGTERM."""

    job = ""

    def __init__(self, run: Path, command: list[str], env: Mapping[str, str]) -> None:
        folders.await_free(run)
        with open(run / LOG, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(tied(command), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True)

    def poll(self) -> int | None:
        """See `scheduler.Process`."""
        return self._process.poll()

    def end(self, kill: bool) -> None:
        """See `scheduler.Process`."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL if kill else signal.SIGTERM)


def share_devices(workers: int, env: Mapping[str, str], gpus: Sequence[str] | None = None) -> Callable[[int], dict[str, str]]:
    """Which GPUs worker i may see, as environment: this machine's, or CUDA_VISIBLE_DEVICES, in equal parts; nothing without GPUs.

    Raises SweepError where several workers do not divide them: two runs on one GPU would take each other's memory.
    """
    if gpus is None:
        listed = env.get("CUDA_VISIBLE_DEVICES")
        count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
        gpus = [name for name in listed.split(",") if name] if listed is not None else [str(i) for i in range(count)]
    if workers == 1 or not gpus or env.get("JAX_PLATFORMS") == "cpu":
        return lambda _: {}
    if len(gpus) % workers:
        raise SweepError(f"--workers is {workers}, and there are {len(gpus)} GPUs; it must divide them")
    each = len(gpus) // workers
    return lambda i: {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])}
