"""Ctrl-C, SIGTERM, and a parent that is gone."""

import os
import signal
import subprocess
import sys
import time

from running import Progress, finish, said, start

from jaxvl.manifest import whole_steps
from jaxvl.report.metrics import read_metrics
from jaxvl.stopping import INTERRUPTED

LOOP = """
import time
from jaxvl.stopping import stopping
with stopping() as told:
    print("ready", flush=True)
    while not (status := told()):
        time.sleep(0.01)
    print("told", status, flush=True)
    while True:  # a save that never ends
        time.sleep(0.01)
"""
# A run that hangs: SIGTERM, which it gets when its parent ends, does nothing.
MEMBER = """
import os, signal, time
from jaxvl.stopping import end_with_parent
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(100)
"""
LAUNCHER = """
import subprocess, sys, time
from jaxvl.processes import tied
subprocess.Popen(tied([sys.executable, "-c", sys.argv[1]], grace=0.5), start_new_session=True)
time.sleep(100)
"""


def test_ctrl_c_saves_and_says_so(tmp_path):
    workdir = tmp_path / "run"
    progress, process = Progress(workdir), start(workdir, "train.steps=100000", "train.epochs=0.0", "checkpoint.every=100000")
    progress.wait(process, 3)
    process.send_signal(signal.SIGINT)
    finish(process, workdir, INTERRUPTED)
    last = [row["step"] for row in read_metrics(workdir) if "loss" in row][-1]
    assert whole_steps(workdir / "checkpoints") == [last]
    assert "interrupted: saving" in said(workdir) and f"terminated: step {last} is saved" in said(workdir)


def test_a_second_ctrl_c_ends_at_once():
    with subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"told {INTERRUPTED}\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


def test_a_member_that_hangs_does_not_outlive_its_launcher():
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, MEMBER], stdout=subprocess.PIPE, text=True) as launcher:
        member = int(launcher.stdout.readline())
        launcher.kill()
        deadline = time.monotonic() + 20
        while _lives(member):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
        return True
    except ProcessLookupError:
        return False
