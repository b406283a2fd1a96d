"""SIGKILL at random moments, a good part of them while a checkpoint is written: the run that is left is the run that was not killed.

JAXVL_KILLS=20 JAXVL_KILL_SEED=1 pytest tests/test_kill.py     the acceptance test; 5 kills by default
"""

import contextlib
import os
import random
import time

import pytest
from running import RECIPE, STEPS, Progress, finish, references, same_run, start  # noqa: F401, references is a fixture

KILLS = int(os.environ.get("JAXVL_KILLS", "5"))
ASKED = "JAXVL_KILLS" in os.environ
RECIPES = [
    RECIPE,
    *(
        pytest.param(name, marks=pytest.mark.skipif(not ASKED, reason="minutes; asked for by JAXVL_KILLS"))
        for name in ("tcl_small", "codis_small")
    ),
]
SEED = int(os.environ.get("JAXVL_KILL_SEED", "0"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_kill(tmp_path, references, recipe):  # noqa: F811
    reference = references(recipe)
    workdir, rng, moments = tmp_path / "run", random.Random(SEED), []

    def half_saved() -> set[tuple[str, int]]:
        found = set()
        for path in (workdir / "checkpoints").glob("*.saving"):
            with contextlib.suppress(FileNotFoundError):  # whole by now
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    for kill in range(KILLS):
        before, progress, process = half_saved(), Progress(workdir), start(workdir, recipe=recipe)
        if kill % 5 == 4:  # anywhere from the first import on
            time.sleep(rng.uniform(0, 6))
        else:
            progress.wait(process, int(0.85 * STEPS * (kill + rng.random()) / KILLS))
            if kill % 2 == 0:
                while half_saved() <= before and process.poll() is None:
                    time.sleep(0.0005)
                time.sleep(rng.uniform(0, 0.03))
            else:
                time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        moments.append((progress.step(), *(name for name, _ in half_saved() - before)))
    in_save = sum(len(moment) > 1 for moment in moments)
    print(f"killed {KILLS} times, {in_save} of them in a save; last step logged and step being saved: {moments}")
    assert in_save >= KILLS // 4
    finish(start(workdir, recipe=recipe), workdir)
    same_run(workdir, reference)
