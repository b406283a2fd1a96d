"""Trials as processes of this machine, tied to the sweep: where that is killed, they save and leave."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxvl.processes import gpu_shares, tied
from jaxvl.sweep.folder import LOG
from jaxvl.sweep.scheduler import Launch

Command = Callable[[Path], list[str]]


def train_command(run: Path) -> list[str]:
    """How a trial is run; the same line by hand continues it."""
    return [sys.executable, "-m", "jaxvl.cli", "train", f"--config={run / 'config.json'}", f"--workdir={run}"]


def launcher(command: Command, workers: int, env: Mapping[str, str]) -> Launch:
    """Starts trials here, with `env` added to the environment and the GPUs divided among `workers`."""
    shares = gpu_shares(workers, os.environ)
    return lambda run, slot, _: LocalProcess(run, command(run), {**os.environ, **env, **shares[slot]})


class LocalProcess:
    """A run in a process group of its own: Ctrl-C reaches the sweep alone, which passes it on as SIGTERM."""

    job = ""

    def __init__(self, run: Path, command: list[str], env: Mapping[str, str]) -> None:
        with open(run / LOG, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                tied(command), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )

    def poll(self) -> int | None:
        """See `scheduler.Process`."""
        return self._process.poll()

    def end(self, kill: bool) -> None:
        """See `scheduler.Process`."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL if kill else signal.SIGTERM)
