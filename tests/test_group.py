"""The members of a run live, die and restart together. They are fakes here, except in the last test."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from running import CONFIG, ROOT, STEPS, Progress, environment

from jaxvl import manifest
from jaxvl.group import run
from jaxvl.processes import gpu_shares

MEMBER = """
import json, os, signal, sys, time
folder, index = sys.argv[1].removeprefix("--workdir="), int(os.environ["JAX_PROCESS_ID"])
plan = json.loads(sys.argv[2])  # what each member does at each start
starts = os.path.join(folder, f"starts-{index}")
n = os.path.getsize(starts) if os.path.exists(starts) else 0
open(starts, "a").write(".")
todo = plan[index][min(n, len(plan[index]) - 1)]
if todo == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if todo == "polite":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
open(os.path.join(folder, f"ready-{index}"), "w").write(os.environ["JAX_COORDINATOR_ADDRESS"] + " " + os.environ["JAX_NUM_PROCESSES"])
if todo in ("deaf", "polite", "wait"):
    time.sleep(600)
if todo == "killed":
    while len([f for f in os.listdir(folder) if f.startswith("ready")]) < len(plan):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(todo if isinstance(todo, int) else 0)
"""


def group(folder, plan, **kw):
    """(exit status, starts of each member, seconds)."""
    begin = time.monotonic()
    command = [sys.executable, "-c", MEMBER, f"--workdir={folder}", json.dumps(plan)]
    status = run(command, processes=len(plan), **{"restarts": 3, "grace": 0.3, **kw})
    return status, [(folder / f"starts-{i}").stat().st_size for i in range(len(plan))], time.monotonic() - begin


def test_a_member_that_is_killed_takes_the_others_along_and_all_start_again(tmp_path, capsys):
    (tmp_path / "checkpoints" / "00000040").mkdir(parents=True)
    status, starts, seconds = group(tmp_path, [["deaf", 0], ["killed", 0], ["wait", 0]])
    assert (status, starts) == (0, [2, 2, 2]) and seconds < 400
    said = capsys.readouterr().err
    assert "process 1 of 3 was killed by SIGKILL" in said and "restart 1 of 3, from step 40" in said
    address, count = (tmp_path / "ready-2").read_text().split()
    assert address.startswith("127.0.0.1:") and count == "3"


def test_restarts_are_bounded(tmp_path, capsys):
    status, starts, _ = group(tmp_path, [["wait"], [7]], restarts=2)
    assert (status, starts[1]) == (7, 3)
    assert capsys.readouterr().err.count("process 1 of 2 ended with exit status 7") == 3


def test_a_run_that_saves_may_fail_for_ever(tmp_path, capsys):
    """Each member makes a newer checkpoint before it fails; the fourth and fifth do not."""
    saves = "import os, sys; f = os.path.join(sys.argv[2], 'checkpoints'); n = len(os.listdir(f)) if os.path.isdir(f) else 0; n < 3 and os.makedirs(os.path.join(f, f'{n:08}')); sys.exit(7)"
    assert run([sys.executable, "-c", saves, "--workdir", str(tmp_path)], processes=1, restarts=1, grace=0.3, pause=0.2) == 7
    assert (
        capsys.readouterr().err.count("process 0 of 1 ended with exit status 7") == 4
        and len(list((tmp_path / "checkpoints").iterdir())) == 3
    )


@pytest.mark.parametrize("last, status", [(2, 2), (143, 143)], ids=["for a person", "terminated"])
def test_what_a_restart_cannot_mend_is_not_tried_again(tmp_path, last, status):
    assert group(tmp_path, [["polite"], [last]])[:2] == (status, [1, 1])


def test_a_signal_is_passed_on_and_a_second_one_kills(tmp_path):
    for plan, sent, wanted in (([["polite"], ["polite"]], 1, 143), ([["deaf"], ["polite"]], 2, 143)):
        for file in tmp_path.glob("ready-*"):
            file.unlink()
        code = f"import sys; from jaxvl.group import main; sys.exit(main(['--processes=2', '--', sys.executable, '-c', {MEMBER!r}, {f'--workdir={tmp_path}'!r}, {json.dumps(plan)!r}]))"
        launcher = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 400
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(sent):
            launcher.send_signal(signal.SIGTERM)
            time.sleep(0.4)
        assert launcher.wait(400) == wanted


def test_gpus_are_divided():
    assert gpu_shares(2, {"CUDA_VISIBLE_DEVICES": "3,5,6,7"}) == [{"CUDA_VISIBLE_DEVICES": "3,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert gpu_shares(1, {}, ["0", "1"]) == [{}] and gpu_shares(2, {"JAX_PLATFORMS": "cpu"}, ["0"]) == [{}, {}]
    with pytest.raises(ValueError, match="2 processes at a time cannot share 3 GPUs"):
        gpu_shares(2, {}, ["0", "1", "2"])


@pytest.mark.skipif("JAXVL_KILLS" not in os.environ, reason="two processes, started twice: the acceptance test, with JAXVL_KILLS")
def test_a_run_of_two_processes_outlives_a_killed_member(tmp_path):
    workdir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "jaxvl.group",
        "--processes=2",
        "--grace=5",
        "--",
        sys.executable,
        "-m",
        "jaxvl.cli",
        "train",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
    ]
    with open(tmp_path / "out", "w") as out:
        launcher = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment())
        Progress(workdir).wait(launcher, STEPS // 2)
        listed = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True).stdout.split()
        os.kill(int(listed[1]), signal.SIGKILL)
        assert launcher.wait(400) == 0, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert "was killed by SIGKILL" in said and "restart 1 of 3, from step" in said
    assert manifest.whole_steps(workdir / "checkpoints")[0] == STEPS
