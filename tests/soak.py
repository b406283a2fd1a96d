"""A run of several processes under a random fault a minute, and the proof that it lost nothing.

    python tests/soak.py --minutes 30 --processes 4 --workdir /tmp/soak

Faults: SIGKILL of a member, a member that hangs (SIGSTOP), SIGTERM to the launcher and to a member, SIGKILL of the launcher, a full
disk, a damaged newest checkpoint. What stops a run for good is started again here, as a scheduler or a person would. The proof is
taken from the ids that every process logged of the samples it fed: the history that survives has every row of every global batch
once, in the order that an undisturbed run has, and each epoch has each sample once. With --compare the undisturbed run is made as
well, and every logged number and every bit of the last state must be the same.
"""

import argparse
import atexit
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = str(ROOT)
import conftest  # noqa: E402, F401, the environment of the tests, before jax is imported
import numpy as np  # noqa: E402
import running  # noqa: E402

from jaxvl import config as configs, manifest  # noqa: E402
from jaxvl.data.dataset import open_data  # noqa: E402
from jaxvl.data.places import sample_places  # noqa: E402
from jaxvl.report.metrics import read_metrics  # noqa: E402
from jaxvl.report.samples import read_samples  # noqa: E402

# Nothing that a step computes may depend on how many are to come: the undisturbed run is asked for as many as there were.
OPTIONS = ("optim.schedule=constant", "optim.warmup_steps=1", "checkpoint.every=10", "log.samples=True")
LIMIT = 900.0  # seconds after which a run that has not come back is given up


class Struck(NamedTuple):
    """A fault: what was done at which step, after how many seconds the launcher said so, and after how many a new step was made."""

    fault: str
    step: int
    noticed: float
    resumed: float
    words: str
    lost: int


class Soak:
    """The run, its launcher, and what the launcher says with the time it was said at."""

    def __init__(self, workdir: Path, processes: int, overrides: list[str], grace: float) -> None:
        self.workdir, self.disk = workdir, workdir / "checkpoints"
        train = [
            sys.executable,
            "-m",
            "jaxvl.cli",
            "train",
            f"--config={running.CONFIG}",
            f"--workdir={workdir}",
            *(f"--config.{o}" for o in overrides),
        ]
        self.command = [sys.executable, "-m", "jaxvl.group", f"--processes={processes}", f"--grace={grace}", "--", *train]
        self.launcher: subprocess.Popen | None = None
        self.out = workdir.with_suffix(".out")

    def start(self) -> None:
        with open(self.out, "a") as out:
            self.launcher = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, env=running.environment(XLA_FLAGS=running.FAST)
            )
        atexit.register(self.launcher.kill)  # whatever fails here, nothing trains on

    def members(self) -> list[int]:
        """Process ids, in the order of the run."""
        assert self.launcher
        listed = subprocess.run(["pgrep", "-P", str(self.launcher.pid)], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in listed]

    def said(self, since: int) -> str:
        return self.out.read_text()[since:] if self.out.exists() else ""

    def ended(self) -> bool:
        return self.launcher is not None and self.launcher.poll() is not None


def newest(disk: Path) -> int:
    return max(manifest.whole_steps(disk), default=0)


def kill(soak: Soak, rng: random.Random) -> str:
    return _signal(soak, rng, signal.SIGKILL)


def hang(soak: Soak, rng: random.Random) -> str:
    return _signal(soak, rng, signal.SIGSTOP)


def term_member(soak: Soak, rng: random.Random) -> str:
    return _signal(soak, rng, signal.SIGTERM)


def _signal(soak: Soak, rng: random.Random, number: signal.Signals) -> str:
    members = soak.members()
    i = rng.randrange(len(members))
    os.kill(members[i], number)
    return f"{number.name} to process {i}"


def term(soak: Soak, _: random.Random) -> str:
    assert soak.launcher
    soak.launcher.terminate()
    return "SIGTERM to the launcher"


def kill_launcher(soak: Soak, _: random.Random) -> str:
    assert soak.launcher
    soak.launcher.kill()
    return "SIGKILL to the launcher"


def full_disk(soak: Soak, _: random.Random) -> str:
    with open(soak.disk / "filling", "wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            return "full disk"


def damage(soak: Soak, rng: random.Random) -> str:
    """Flip a bit in the largest file of the newest checkpoint while the members stand still, and kill one, so that it is wanted before there is a newer one."""
    members = soak.members()
    for pid in members:
        os.kill(pid, signal.SIGSTOP)
    step = newest(soak.disk)
    path = max((p for p in manifest.step_folder(soak.disk, step).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with open(path, "r+b") as file:
        at = rng.randrange(path.stat().st_size)
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1 << rng.randrange(8)]))
    what = kill(soak, rng)
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return f"checkpoint {step} damaged, then {what}"


FAULTS: dict[str, Callable[[Soak, random.Random], str]] = {
    "kill": kill, "hang": hang, "term": term, "term-member": term_member, "kill-launcher": kill_launcher, "disk": full_disk, "damage": damage,
}  # fmt: skip
NOTICED = (" was killed by ", " ended with exit status ", "terminated: step ", "could not be saved")


def strike(soak: Soak, name: str, rng: random.Random) -> Struck:
    """Do the fault, wait until it is noticed and until a step is made again."""
    mark = soak.out.stat().st_size
    step, begin = last_step(soak.workdir), time.monotonic()
    what = FAULTS[name](soak, rng)
    noticed, words = float("nan"), ""
    while not resumed(soak, mark):
        now = time.monotonic() - begin
        if noticed != noticed:
            words = next((line for line in soak.said(mark).splitlines() if any(sign in line for sign in NOTICED)), "")
            if words or soak.ended():
                noticed = now
        if soak.ended():
            while left := _stragglers(soak):  # of a launcher that was killed: they save and leave on their own
                if time.monotonic() - begin > LIMIT:
                    raise SystemExit(f"{what}: {left} live on without their launcher\n{soak.said(mark)[-4000:]}")
                time.sleep(0.2)
            (soak.disk / "filling").unlink(missing_ok=True)
            soak.start()
        if now > LIMIT:
            raise SystemExit(f"{what}: no new step after {LIMIT:.0f} s\n{soak.said(mark)[-4000:]}")
        time.sleep(0.05)
    lost = max(0, step - first_step(soak.said(mark)))
    return Struck(what, step, noticed, time.monotonic() - begin, words.strip()[:150], lost)


def resumed(soak: Soak, mark: int) -> bool:
    """Whether a start since `mark` has made a step."""
    start = first_step(soak.said(mark))
    return 0 <= start < last_step(soak.workdir)


def first_step(said: str) -> int:
    """The step at which the last start went on, 0 where there was no checkpoint yet; -1 where there was no start."""
    found = re.findall(r"(?:continuing|starting) at step (\d+)", said)
    return int(found[-1]) if found else -1


def last_step(workdir: Path) -> int:
    return max((int(row["step"]) for row in read_metrics(workdir) if "loss" in row), default=0)


def _stragglers(soak: Soak) -> list[str]:
    found = subprocess.run(
        ["pgrep", "-f", f"^{sys.executable} .*jaxvl.cli train .*--workdir={soak.workdir}( |$)"], capture_output=True, text=True
    )
    return found.stdout.split()


def prove(workdir: Path, steps: int) -> list[str]:
    """What the logged ids show. Raises AssertionError where a sample was lost, repeated or out of order."""
    recipe = configs.read(configs.load(str(workdir / "config.json"), []))
    batch = recipe.train.batch_size
    given = read_samples(workdir / "report", batch)
    assert list(given) == list(range(1, steps + 1)), f"steps {sorted(set(range(1, steps + 1)) ^ set(given))[:10]} are missing or too many"
    dataset = open_data(recipe.data)
    shards, rows = sample_places(dataset, recipe.seed).at(np.arange(steps * batch))
    wanted = dataset.starts[shards] + rows
    seen = np.concatenate(list(given.values()))
    assert np.array_equal(seen, wanted), (
        f"{np.sum(seen != wanted)} samples are not those of an undisturbed run, first at sample {np.flatnonzero(seen != wanted)[0]}"
    )
    epochs = len(seen) // dataset.epoch
    for epoch in range(epochs):
        times = Counter(seen[epoch * dataset.epoch : (epoch + 1) * dataset.epoch].tolist())
        assert len(times) == dataset.epoch and set(times.values()) == {1}, (
            f"epoch {epoch}: {len(times)} of {dataset.epoch} samples, seen {set(times.values())} times"
        )
    logged = [int(row["step"]) for row in read_metrics(workdir) if "loss" in row]
    assert logged == list(range(1, steps + 1)), "metrics.jsonl has not every step once"
    return [
        f"{steps:,} steps, {len(seen):,} samples: each row of each batch once, in the order of an undisturbed run",
        f"{epochs} whole epochs of {dataset.epoch} samples: each sample once in each",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument(
        "--every",
        type=float,
        default=60.0,
        help="seconds between faults, counted from the resumption after the one before where that took longer",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, of " + ",".join(FAULTS))
    parser.add_argument("--megabytes", type=int, default=40, help="of the file system for the checkpoints")
    parser.add_argument("--compare", action="store_true", help="make the undisturbed run too")
    args = parser.parse_args()
    rng, names = random.Random(args.seed), args.faults.split(",")
    disk = args.workdir.absolute() / "checkpoints"
    disk.mkdir(parents=True)
    mounted = (
        "disk" in names
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={args.megabytes}m", "tmpfs", str(disk)], capture_output=True
        ).returncode
    )
    if "disk" in names and not mounted:
        print("cannot mount a small tmpfs here: no full disk in this soak")
        names.remove("disk")
    overrides = ["train.steps=10000000", *OPTIONS]
    soak = Soak(args.workdir.absolute(), args.processes, overrides, grace=5)
    struck: list[Struck] = []
    try:
        begin = time.monotonic()
        soak.start()
        while newest(disk) == 0:
            assert soak.launcher and soak.launcher.poll() is None and time.monotonic() - begin < LIMIT, soak.said(0)
            time.sleep(0.1)
        print(f"running after {time.monotonic() - begin:.0f} s", flush=True)
        due, deck = time.monotonic() + rng.uniform(1, 10), []
        begin = time.monotonic()
        while time.monotonic() - begin < 60 * args.minutes:
            if time.monotonic() < due:
                time.sleep(0.05)
                continue
            if not deck:  # every fault comes up before any comes again
                deck = rng.sample(names, len(names))
            hit = time.monotonic()
            struck.append(strike(soak, deck.pop(), rng))
            print(f"{time.monotonic() - begin:6.0f} s  {struck[-1]}", flush=True)
            due = max(hit + args.every, time.monotonic() + rng.uniform(1, 10))
        assert soak.launcher
        soak.launcher.terminate()
        status = soak.launcher.wait(LIMIT)
        steps = newest(disk)
        print(f"\nended with {status} at step {steps} after {(time.monotonic() - begin) / 60:.1f} minutes and {len(struck)} faults\n")
        print(f"{'fault':58} {'at step':>8} {'noticed':>9} {'resumed':>9} {'steps again':>12}")
        for s in struck:
            print(f"{s.fault:58} {s.step:8} {s.noticed:7.1f} s {s.resumed:7.1f} s {s.lost:12}")
        print("\n" + "\n".join(prove(soak.workdir, steps)))
        if args.compare:
            alone = soak.workdir.with_name(soak.workdir.name + "-undisturbed")
            other = Soak(alone, args.processes, [f"train.steps={steps}" if o.startswith("train.steps") else o for o in overrides], grace=5)
            alone.mkdir()
            other.start()
            assert other.launcher and other.launcher.wait(3600) == 0, other.said(0)[-4000:]
            same(soak.workdir, alone, steps)
            print("every logged number and every bit of the last state are those of an undisturbed run")
    finally:
        if soak.launcher and soak.launcher.poll() is None:
            soak.launcher.kill()
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=False)


def same(workdir: Path, alone: Path, steps: int) -> None:
    """Raises AssertionError where the two runs differ."""
    for one, other in zip(running.metrics(workdir), running.metrics(alone), strict=True):
        assert one == other, f"{one} is {other} in the undisturbed run"
    final, wanted = (running.leaves(w, steps) for w in (workdir, alone))
    assert final.keys() == wanted.keys() and [k for k in wanted if final[k] != wanted[k]] == []


if __name__ == "__main__":
    main()
