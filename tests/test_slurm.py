"""A real Slurm of one node: a job of two processes that is preempted, cancelled and requeued, and ends as if nothing had happened.

JAXVL_FAULTS=1 pytest tests/test_slurm.py -s
"""

import os
import subprocess
import time

import pytest
from running import CONFIG, FAST, PATIENCE, ROOT, STEPS, environment, finish, metrics, peers, same_run, start
from slurm_node import missing, slurm

pytestmark = pytest.mark.skipif("JAXVL_FAULTS" not in os.environ, reason="minutes, and Slurm's daemons: asked for by JAXVL_FAULTS")


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Runs a command of Slurm."""
    if why := missing():
        pytest.skip(why)
    with slurm(tmp_path_factory.mktemp("slurm") / "node") as env:
        own = environment(XLA_FLAGS=FAST, PYTHONPATH=str(ROOT)) | {k: env[k] for k in ("SLURM_CONF", "PATH")}
        yield lambda *words: subprocess.run(words, env=own, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def until(true, said, seconds=2 * PATIENCE):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


def submit(node, out, workdir, *more):
    """A job of two processes on the one node; its number."""
    return node(
        "sbatch",
        "--parsable",
        "--nodes=1",
        "--ntasks-per-node=2",
        f"--output={out}",
        "launch/slurm",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        *more,
    )


def test_a_job_is_preempted_cancelled_and_requeued(node, tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "out"
    job = submit(node, out, workdir)
    steps = lambda: [row["step"] for row in metrics(workdir) if "loss" in row] if (workdir / "metrics.jsonl").exists() else []
    said = lambda: out.read_text() if out.exists() else "no output"
    state = lambda: node("squeue", "-h", "-j", job, "-t", "all", "-o", "%T")

    until(lambda: max(steps(), default=0) >= 12, said)
    begin = time.monotonic()
    node("scancel", "--signal=TERM", job)
    until(lambda: "terminated: step " in said(), said)
    noticed = time.monotonic()
    until(lambda: "continuing at step " in said(), said)
    print(f"\nscancel --signal=TERM: saved after {noticed - begin:.1f} s, continued after {time.monotonic() - begin:.1f} s")

    at = int(said().rpartition("continuing at step ")[2].split()[0])
    until(lambda: max(steps()) >= at + 8, said)
    begin = time.monotonic()
    node("scancel", job)
    until(lambda: state() == "CANCELLED", lambda: state() + said())
    noticed = time.monotonic()
    node("scontrol", "requeue", job)
    until(lambda: said().count("continuing at step ") == 2, said)
    print(f"scancel: ended after {noticed - begin:.1f} s, requeued and continued after {time.monotonic() - begin:.1f} s")

    until(lambda: state() == "COMPLETED", lambda: state() + said())
    alone = tmp_path / "undisturbed"
    for process in [start(alone, **peer, XLA_FLAGS=FAST) for peer in peers(2)]:
        finish(process, alone)
    assert max(steps()) == STEPS
    same_run(workdir, alone)


def test_a_job_whose_config_is_wrong_is_not_requeued(node, tmp_path):
    out = tmp_path / "out"
    job = submit(node, out, tmp_path / "run", "--config.optim.learning_rat=1")
    state = lambda: node("squeue", "-h", "-j", job, "-t", "all", "-o", "%T %r")
    until(lambda: state().startswith("FAILED"), lambda: state() + out.read_text())
    assert "learning_rat" in out.read_text() and "restart" not in out.read_text()
