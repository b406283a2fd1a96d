"""Processes that are started for a run: tied to the one that starts them, and with their share of the GPUs.

    python -m jaxvl.processes PARENT:GRACE COMMAND...

runs COMMAND tied to the process PARENT: where that is killed in a way it cannot answer, Linux sends SIGTERM to the command,
which then saves and ends. The tie survives exec, so COMMAND need know nothing of it. `jaxvl train` also finds PARENT:GRACE in
its environment, and ends itself where it has not stopped GRACE seconds later. Elsewhere than on Linux the command is run untied.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PARENT = "JAXVL_PARENT"  # PARENT:GRACE in the environment of a tied command
GRACE = 30.0  # seconds that a process is given to save and leave


def tied(command: list[str], grace: float = GRACE) -> list[str]:
    """`command` tied to this process; to be started by its main thread, whose end counts as that of the process.

    grace: seconds after this process's end in which the command may still save.
    """
    return [sys.executable, "-m", "jaxvl.processes", f"{os.getpid()}:{grace:g}", *command]


def grace(parent: str) -> float:
    """The seconds of PARENT:GRACE."""
    return float(parent.partition(":")[2] or GRACE)


def gpu_shares(parts: int, env: Mapping[str, str], gpus: Sequence[str] | None = None) -> list[dict[str, str]]:
    """What each of `parts` processes at a time adds to its environment to see its own GPUs: an equal part of CUDA_VISIBLE_DEVICES, or of this machine's.

    Nothing for one process, and without GPUs. Raises ValueError where they do not divide: two processes on one GPU would take each other's memory.
    """
    if gpus is None:
        listed = env.get("CUDA_VISIBLE_DEVICES")
        count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
        gpus = [name for name in listed.split(",") if name] if listed is not None else [str(i) for i in range(count)]
    if parts == 1 or not gpus or env.get("JAX_PLATFORMS") == "cpu":
        return [{}] * parts
    if len(gpus) % parts:
        raise ValueError(
            f"{parts} processes at a time cannot share {len(gpus)} GPUs ({', '.join(gpus)}) equally; their number must divide that of the GPUs"
        )
    each = len(gpus) // parts
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(parts)]


def end_with(parent: int, number: signal.Signals) -> None:
    """Have Linux send this process the signal `number` at the end of `parent`, which has started it; ends it at once where that was before."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            sys.exit(f"process {parent}, which asked for this one, is gone")


if __name__ == "__main__":
    if sys.platform == "linux":
        end_with(int(sys.argv[1].partition(":")[0]), signal.SIGTERM)
        os.environ[PARENT] = sys.argv[1]
    os.execvp(sys.argv[2], sys.argv[2:])
