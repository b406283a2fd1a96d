"""What a Slurm job of a sweep runs. Imports nothing heavy: the command it starts is a process of its own."""

import contextlib
import os
import signal
import subprocess
import time
from typing import Any


class Task:
    """The command of a trial with its output in `log`; SIGTERM, a file named `stop`, preemption and the end of the job's time have it save and end."""

    def __init__(self, command: list[str], env: dict[str, str], log: str, stop: str) -> None:
        self.command, self.env, self.log, self.stop = command, env, log, stop
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """The exit status of the command."""
        with open(self.log, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | self.env,
                start_new_session=True,
            )
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        asked = False
        while self._process.poll() is None:
            if not asked and os.path.exists(self.stop):
                asked = True
                self._end()
            time.sleep(0.2)
        return self._process.returncode

    def checkpoint(self) -> Any:
        """Called by submitit before the job is requeued: the run saves and ends, and the same command continues it."""
        from submitit.helpers import DelayedSubmission

        self._end()
        if self._process:
            self._process.wait()
        return DelayedSubmission(Task(self.command, self.env, self.log, self.stop))

    def _end(self) -> None:
        if self._process and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
