"""Runs of two and four real processes under every fault, with the time until it is noticed and until the run goes on.

JAXVL_FAULTS=1 pytest tests/test_faults.py -n 0 -s       prints the table; a quarter of an hour on two free cores
"""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import CONFIG, FAST, PATIENCE, ROOT, environment, finish, leaves, metrics, peers, said, start
from soak import FAULTS, OPTIONS, Soak, Struck, last_step, prove, resumed, same, strike

from jaxvl.manifest import whole_steps
from jaxvl.report.samples import read_samples

pytestmark = pytest.mark.skipif("JAXVL_FAULTS" not in os.environ, reason="many processes, started many times: asked for by JAXVL_FAULTS")
LONG = ("train.steps=100000", *OPTIONS)
NOTICED = 15.0  # seconds, the most
BATCH = 8
TABLE: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n\n" + "\n".join([f"{'fault':66} {'noticed':>9} {'resumed':>9}", *TABLE]))


def row(processes: int, fault: str, noticed: float, resumed: float | None = None) -> None:
    TABLE.append(f"{f'{processes} processes: {fault}':66} {noticed:7.1f} s" + (f" {resumed:7.1f} s" if resumed else ""))
    print("\n" + TABLE[-1], flush=True)


def ends(soak: Soak) -> int:
    """Stop the run; its last step."""
    soak.launcher.terminate()
    assert soak.launcher.wait(PATIENCE) in (143, 0), soak.said(0)
    return whole_steps(soak.disk)[0]


def until(true, words, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, words()
        time.sleep(0.05)


@pytest.mark.parametrize("processes", [2, 4])
def test_every_fault_loses_nothing(tmp_path, processes):
    """All faults of the soak, one after the other, and the bits of an undisturbed run at the end."""
    workdir, rng = tmp_path / "run", random.Random(processes)
    (workdir / "checkpoints").mkdir(parents=True)
    faults = dict(FAULTS)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(workdir / "checkpoints")], capture_output=True).returncode:
        faults.pop("disk")
    soak = Soak(workdir, processes, list(LONG), grace=5)
    try:
        soak.start()
        until(lambda: whole_steps(soak.disk) and last_step(workdir) > 12, lambda: soak.said(0))
        for name in faults:
            struck: Struck = strike(soak, name, rng)
            row(processes, struck.fault, struck.noticed, struck.resumed)
            assert struck.noticed == struck.noticed, f"{struck.fault}: nobody noticed"
            assert struck.noticed <= NOTICED or name in ("term", "term-member", "kill-launcher", "disk"), (
                struck
            )  # these wait for a step, or for the next save
        steps = ends(soak)
        print("\n".join(prove(workdir, steps)))
        alone = Soak(tmp_path / "alone", processes, [f"train.steps={steps}", *LONG[1:]], grace=5)
        alone.start()
        assert alone.launcher.wait(3 * PATIENCE) == 0, alone.said(0)
        same(workdir, alone.workdir, steps)
    finally:
        soak.launcher.kill()
        subprocess.run(["umount", "--lazy", str(workdir / "checkpoints")], check=False, capture_output=True)


def test_sigterm_before_the_first_step_of_a_resumed_run(tmp_path):
    workdir = tmp_path / "run"

    def stopped(when) -> float:
        mark = len(said(workdir)) if workdir.exists() else 0
        processes = [start(workdir, *LONG, **peer, XLA_FLAGS=FAST) for peer in peers(2)]
        until(lambda: when(said(workdir)[mark:]), lambda: said(workdir))
        begin = time.monotonic()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            finish(process, workdir, 143)
        assert f"terminated: step {whole_steps(workdir / 'checkpoints')[0]} is saved" in said(workdir)[mark:]
        return time.monotonic() - begin

    stopped(lambda text: "step 5/" in text)
    row(2, "SIGTERM while a resumed run compiles", stopped(lambda text: "compile ..." in text))


class Faulty(Soak):
    """A run with a fault in one process."""

    def __init__(self, workdir: Path, fault: str, *overrides: str) -> None:
        super().__init__(workdir, 2, [*LONG, *overrides], grace=5)
        at = self.command.index("jaxvl.cli")
        self.command[at - 1 : at + 2] = [str(ROOT / "tests" / "fault_member.py"), fault]


def test_a_slow_host_is_named(tmp_path):
    soak = Faulty(tmp_path / "run", "slow:1:1.0")
    soak.start()
    until(lambda: last_step(soak.workdir) > 1, lambda: soak.said(0))
    begin = time.monotonic()
    until(lambda: "slow host: process 1 on" in soak.said(0), lambda: soak.said(0))
    row(2, "a host that waits 1 s for each batch", time.monotonic() - begin)
    line = next(line for line in soak.said(0).splitlines() if "slow host" in line)
    print(line)
    assert soak.said(0).count("slow host") == 1 and "waiting for data" in line
    ends(soak)


def test_a_host_that_hangs_but_lives_is_named(tmp_path):
    soak = Faulty(tmp_path / "run", "hang:1:12", "log.watchdog_floor=15.0", "log.watchdog=2.0")
    soak.start()
    until(lambda: last_step(soak.workdir) >= 11, lambda: soak.said(0))
    begin = time.monotonic()
    until(lambda: "watchdog: the others wait for process 1 on" in soak.said(0), lambda: soak.said(0))
    row(2, "a host that hangs but lives, watchdog_floor 15 s", time.monotonic() - begin)
    print(line := re.search("watchdog: the others wait.*", soak.said(0))[0])
    assert "in data for" in line and "after step 11" in line
    soak.launcher.terminate()
    time.sleep(1)  # two at once may arrive as one
    soak.launcher.terminate()
    until(soak.ended, lambda: soak.said(0))


def test_clock_skew_changes_nothing(tmp_path):
    runs = [
        Faulty(tmp_path / name, f"clock:{process}:{seconds}", "train.steps=24")
        for name, process, seconds in (("ahead", 1, 86400), ("behind", 0, -86400), ("none", 1, 0))
    ]
    for soak in runs:
        soak.start()
        assert soak.launcher.wait(PATIENCE) == 0, soak.said(0)
        prove(soak.workdir, 24)
    for soak in runs[:2]:
        same(soak.workdir, runs[2].workdir, 24)


def test_elastic(tmp_path):
    """A run of four processes goes on as one, two and eight, and on another mesh: the state exactly, the samples of every batch, the loss up to rounding."""
    first, at, steps = tmp_path / "four", 12, 24
    # In float32: in bfloat16 the rounding of a batch depends on how it is cut, by 1e-3 of the loss in one step.
    options = (
        "optim.warmup_steps=1",
        "checkpoint.every=4",
        "checkpoint.keep=9",
        "log.samples=True",
        "image.dtype=float32",
        "text.dtype=float32",
    )

    def run(workdir: Path, processes: int, *overrides: str, devices: int = 1) -> None:
        flags = f"--xla_force_host_platform_device_count={devices} {FAST}"
        members = (
            [start(workdir, *options, *overrides, **peer, XLA_FLAGS=flags) for peer in peers(processes)]
            if processes > 1
            else [start(workdir, *options, *overrides, XLA_FLAGS=flags)]
        )
        for member in members:
            finish(member, workdir)

    run(first, 4, f"train.steps={at}")
    shutil.copytree(first, tmp_path / "whole")
    for last in (at + 1, steps):  # as below, since the learning rate depends on it
        run(tmp_path / "whole", 4, f"train.steps={last}")
    wanted = read_samples(tmp_path / "whole" / "report", BATCH)
    assert list(wanted) == list(range(1, steps + 1))
    trace = lambda workdir: np.array([line["loss"] for line in metrics(workdir) if "loss" in line])
    for name, processes, overrides, devices in (
        ("one", 1, (), 1),
        ("two", 2, (), 1),
        ("eight", 8, (), 1),
        ("mesh", 2, ("mesh.data=2", "mesh.fsdp=2"), 2),
    ):
        workdir = tmp_path / name
        shutil.copytree(first, workdir)
        run(workdir, processes, f"train.steps={at + 1}", *overrides, devices=devices)
        assert leaves(workdir, at) == leaves(first, at)  # what was saved by four is what is there, bit for bit
        run(workdir, processes, f"train.steps={steps}", *overrides, devices=devices)
        given = read_samples(workdir / "report", BATCH)
        assert given == wanted
        difference = np.abs(trace(workdir) - trace(tmp_path / "whole")) / trace(tmp_path / "whole")
        print(
            f"4 -> {processes} processes{' with mesh ' + str(overrides) if overrides else ''}: largest difference of the loss in {steps - at} steps {difference.max():.1e}"
        )
        assert (difference[:at] == 0).all() and difference[at : at + 4].max() < 1e-4


def test_an_unreadable_checkpoint_folder(tmp_path):
    """Refused by both processes with one clear line, and nothing in it is touched."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").write_text("not a folder")
    processes = [start(workdir, *LONG, **peer, XLA_FLAGS=FAST) for peer in peers(2)]
    begin = time.monotonic()
    for process in processes:
        finish(process, workdir, 2)
    row(2, "the checkpoint folder cannot be read", time.monotonic() - begin)
    assert "checkpoints" in said(workdir) and "Traceback" not in said(workdir)
    assert (workdir / "checkpoints").read_text() == "not a folder"


@pytest.fixture
def network(tmp_path):
    """Two network namespaces joined by a cable: (commands to run inside each, cut, mend)."""
    names, ip = (
        [f"jaxvl{os.getpid()}{side}" for side in "ab"],
        lambda *words: subprocess.run(["ip", *words], capture_output=True, text=True),
    )
    made = ip("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
    try:
        steps = [
            ("netns", "add", names[1]),
            ("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1]),
        ]
        for i, name in enumerate(names):
            link = ["va", "vb"][i]
            steps += [
                ("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", link),
                ("-n", name, "link", "set", "lo", "up"),
                ("-n", name, "link", "set", link, "up"),
            ]
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n10.77.0.{i + 1} {socket.gethostname()}\n")  # the address that gloo tells its peers
        for words in steps:
            if (done := ip(*words)).returncode:
                pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")
        yield (
            [["ip", "netns", "exec", name] for name in names],
            lambda: ip("-n", names[0], "link", "set", "va", "down"),
            lambda: ip("-n", names[0], "link", "set", "va", "up"),
        )
    finally:
        for name in names:
            ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def test_the_network_between_two_hosts_is_cut(network, tmp_path):
    inside, cut, mend = network
    workdir = tmp_path / "run"
    train = [sys.executable, "-m", "jaxvl.cli", "train", f"--config={CONFIG}", f"--workdir={workdir}", *(f"--config.{o}" for o in LONG)]
    launchers, outs = [], [tmp_path / f"out-{i}" for i in range(2)]
    for i in range(2):
        env = environment(XLA_FLAGS=FAST, JAX_COORDINATOR_ADDRESS="10.77.0.1:12321", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i))
        with open(outs[i], "w") as out:
            launchers.append(
                subprocess.Popen(
                    [*inside[i], sys.executable, "-m", "jaxvl.group", "--processes=1", "--grace=5", "--pause=20", "--", *train],
                    env=env,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    texts = lambda: "\n".join(out.read_text()[-3000:] for out in outs)
    try:
        until(lambda: whole_steps(workdir / "checkpoints") and last_step(workdir) > 12, texts)
        mark, begin, noticed = outs[0].stat().st_size, time.monotonic(), {}
        cut()
        while len(noticed) < 2:
            assert time.monotonic() - begin < 60, texts()
            for i, out in enumerate(outs):
                if i not in noticed and re.search(r"process 0 of 1 (was killed|ended)", out.read_text()):
                    noticed[i] = time.monotonic() - begin
            time.sleep(0.05)
        time.sleep(5)
        mend()
        mended = time.monotonic() - begin
        again = Soak(workdir, 1, [], 0)
        again.out = outs[0]
        until(lambda: resumed(again, mark), texts)
        row(
            2,
            f"network cut, mended after {mended:.0f} s; sides noticed {noticed[0]:.1f} and {noticed[1]:.1f}",
            max(noticed.values()),
            time.monotonic() - begin,
        )
        assert max(noticed.values()) <= NOTICED
        for launcher in launchers:
            launcher.terminate()
        assert [launcher.wait(PATIENCE) for launcher in launchers] == [143, 143], texts()
        prove(workdir, whole_steps(workdir / "checkpoints")[0])
    finally:
        for launcher in launchers:
            launcher.kill()
