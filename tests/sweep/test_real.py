"""Twelve real trials on the glyphs with pruning, killed once and continued: on this machine, and as jobs of a real Slurm.

JAXVL_FAULTS=1 pytest tests/sweep/test_real.py -n 0 -s
"""

import atexit
import csv
import os
import signal
import subprocess
import sys
import time

import pytest
from running import FAST, PATIENCE, ROOT, environment
from slurm_node import missing, slurm

from jaxvl.report.metrics import read_metrics
from jaxvl.sweep import folder as folders

pytestmark = pytest.mark.skipif("JAXVL_FAULTS" not in os.environ, reason="twelve trainings, twice: asked for by JAXVL_FAULTS")
STEPS = 48
SMALL = (f"train.steps={STEPS}", "train.batch_size=16", "optim.warmup_steps=4", "evals.val.every=12", "evals.val.source=glyphs://val-seen?size=60", "data.source=glyphs://train?size=200",
         "image.depth=1", "image.width=48", "text.width=48", "method.width=32", "checkpoint.every=12", "log.every=6", "log.tensorboard=False", "log.html=False")  # fmt: skip


@pytest.fixture(params=["local", "slurm"])
def where(request, tmp_path_factory):
    """(environment, flags) of `jaxvl sweep`."""
    env = environment(XLA_FLAGS=FAST, PYTHONPATH=str(ROOT))
    if request.param == "local":
        yield env, ["--workers=2"]
        return
    pytest.importorskip("submitit")
    if why := missing():
        pytest.skip(why)
    with slurm(tmp_path_factory.mktemp("slurm") / "node") as node:
        yield {**env, "SLURM_CONF": node["SLURM_CONF"], "PATH": node["PATH"]}, ["--workers=3", "--slurm=timeout_min=60,cpus_per_task=1"]


def test_twelve_trials_killed_once(where, tmp_path):
    env, flags = where
    workdir, out = tmp_path / "sweep", tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "jaxvl.cli",
        "sweep",
        "--config=configs/sweeps/quickstart_search.py",
        f"--workdir={workdir}",
        *flags,
        *(f"--config.{o}" for o in SMALL),
    ]
    over = lambda: [
        path.parent.name for path in workdir.glob("*/trial.json") if folders.read_record(workdir, path.parent.name).status in folders.OVER
    ]
    with open(out, "a") as file:
        sweep = subprocess.Popen(command, env=env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        atexit.register(sweep.kill)
        deadline = time.monotonic() + 3 * PATIENCE
        while len(over()) < 4:
            assert sweep.poll() is None and time.monotonic() < deadline, out.read_text()[-3000:]
            time.sleep(0.2)
        before = {name: read_metrics(workdir / name) for name in over()}
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
        begin = time.monotonic()
        assert subprocess.run(command, env=env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=4 * PATIENCE).returncode == 0, (
            out.read_text()[-3000:]
        )
    after = {name: folders.read_record(workdir, name) for name in over()}
    statuses = [record.status for record in after.values()]
    print(
        f"\n{flags}: {len(before)} trials over when killed; {statuses.count('done')} done and {statuses.count('pruned')} pruned {time.monotonic() - begin:.0f} s later"
    )
    assert len(after) == 12 and set(statuses) == {"done", "pruned"}
    assert all(read_metrics(workdir / name) == rows for name, rows in before.items())  # what was over was not run again
    reached: dict[str, list[int]] = {"done": [], "pruned": []}
    for name, record in after.items():
        steps = [row["step"] for row in read_metrics(workdir / name) if "loss" in row]
        assert steps == sorted(set(steps)) and (max(steps) == STEPS or record.status == "pruned")
        reached[record.status].append(max(steps))
    assert min(reached["pruned"]) < STEPS  # one may have been at its last step when it was told to stop, but not all
    with open(workdir / "results.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 13
    assert (workdir / "sweep.html").stat().st_size > 1000
