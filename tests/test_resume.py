"""Runs that are stopped, starved of disk or moved to other hosts: each ends as the run that was left alone."""

import os
import re
import signal
import subprocess

import numpy as np
import pytest
from running import FAST, RECIPE, STEPS, Progress, finish, metrics, peers, reference, references, said, same_run, start  # noqa: F401

from jaxvl import manifest
from jaxvl.manifest import whole_steps
from jaxvl.stopping import TERMINATED


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        pytest.param("tcl_small", marks=pytest.mark.skipif("JAXVL_KILLS" not in os.environ, reason="minutes; asked for by JAXVL_KILLS")),
    ],
)
def test_sigterm_saves(tmp_path, references, recipe):  # noqa: F811
    """The run that goes on from there reads its samples in worker processes, which changes nothing."""
    workdir = tmp_path / "run"
    progress, process = Progress(workdir), start(workdir, recipe=recipe)
    progress.wait(process, 13)
    process.send_signal(signal.SIGTERM)
    finish(process, workdir, TERMINATED)
    stopped = metrics(workdir)[-1]["step"]
    assert whole_steps(workdir / "checkpoints")[0] == stopped < STEPS
    finish(start(workdir, "data.workers=2", recipe=recipe), workdir)
    same_run(workdir, references(recipe))


def test_second_run_is_refused(tmp_path):
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    with manifest.lock(workdir / "checkpoints"):
        finish(start(workdir), workdir, 2)
    assert f"is being written by process {os.getpid()} on" in said(workdir)
    assert [p.name for p in workdir.iterdir()] == ["checkpoints"]  # refused before it touches what the first run writes


def test_full_disk(tmp_path, reference):  # noqa: F811
    workdir, disk = tmp_path / "run", tmp_path / "run" / "checkpoints"
    disk.mkdir(parents=True)
    kilobytes = (
        sum(p.stat().st_size for p in (reference / "checkpoints").rglob("*") if p.is_file()) >> 10
    )  # three steps, and no room beside
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here; test_checkpoint.py limits the size of files instead")
    try:
        finish(start(workdir), workdir, 2)
        assert "Traceback" not in said(workdir)
        failed = int(
            re.search(rf"step (\d+) could not be saved in {disk}: No space left on device; it needs at least [\d,]+ bytes", said(workdir))[
                1
            ]
        )
        assert whole_steps(disk) == list(range(failed - 4, 0, -4))[:3] != []
        assert not list(disk.glob("*.saving"))
        subprocess.run(["mount", "-o", f"remount,size={20 * kilobytes}k", str(disk)], check=True)
        finish(start(workdir), workdir)
        same_run(workdir, reference)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_other_hosts(tmp_path, reference):  # noqa: F811
    """Two processes see the global batches of one; SIGTERM to either stops both at one step; one process goes on from there."""
    workdir = tmp_path / "run"
    progress, processes = Progress(workdir), [start(workdir, **peer, XLA_FLAGS=FAST) for peer in peers(2)]
    progress.wait(processes[0], 3)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        finish(process, workdir, TERMINATED)
    stopped = metrics(workdir)[-1]["step"]
    assert whole_steps(workdir / "checkpoints")[0] == stopped < STEPS
    finish(start(workdir), workdir)
    assert f"continuing at step {stopped} of {STEPS}" in said(workdir)
    ours, alone = metrics(workdir), metrics(reference)
    assert [row["step"] for row in ours] == [row["step"] for row in alone]
    # Sums over devices round differently, and training amplifies that; other samples would differ by a tenth in the first step.
    np.testing.assert_allclose([row["loss"] for row in ours[:4]], [row["loss"] for row in alone[:4]], rtol=1e-4)
