"""Tie a command to the process that starts it: python -m jaxvl.sweep.child PARENT COMMAND...

Where the parent is killed in a way it cannot answer, Linux sends SIGTERM to the command, which then saves and ends. The
tie survives exec, so COMMAND need know nothing of it. Elsewhere than on Linux the command is run untied.
"""
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tied(command: list[str]) -> list[str]:
    """`command` tied to this process; to be started by its main thread, whose end counts as that of the process."""
    return [sys.executable, "-m", "jaxvl.sweep.child", str(os.getpid()), *command]


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(sys.argv[1]):
            sys.exit(f"process {sys.argv[1]}, which asked for this one, is gone")
    os.execvp(sys.argv[2], sys.argv[2:])
