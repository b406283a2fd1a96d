"""Trials as processes: failures, stops, kills, pruning, and what is told at the end. The runs are fakes that take a second."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_sweep import command
from test_plan import ROOT, write

from jaxvl import cli, manifest
from jaxvl.manifest import LockedError
from jaxvl.sweep import folder as folders, plan, run, scheduler
from jaxvl.sweep.options import SweepError, SweepOptions
from jaxvl.sweep.prune import falls_behind

SHORT = "'train.steps': 8, 'optim.warmup_steps': 1, 'evals.val.every': 2, 'log.every': 5"
LONG = "'train.steps': 400, 'evals.val.every': 100, 'log.every': 10"


def sweep(path: str, folder: Path, **kw) -> int:
    return run.run(path, folder, [], command=command, **kw)


def starts(folder: Path, name: str) -> list[str]:
    return [line for line in (folder / name / folders.LOG).read_text().splitlines() if line.startswith("starting")]


def statuses(folder: Path) -> dict[str, str]:
    return {name: folders.read_record(folder, name).status for name in folders.read_options(folder)[1]}


def until(condition) -> None:
    deadline = time.monotonic() + 400  # of a busy machine; a second else
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failed_trial_stops_nothing_and_is_told(tmp_path, capsys):
    path, folder = (
        write(
            tmp_path,
            f"{{'metric': 'val/score', 'also': ('val/also',), 'rows': {{'good': {{{SHORT}}}, 'bad, <b>': {{{SHORT}, 'method.temperature': 0.5}}}}, 'seeds': (3, 5)}}",
        ),
        tmp_path / "s",
    )
    assert sweep(path, folder, workers=4) == 1
    assert statuses(folder) == {"good-seed3": "done", "good-seed5": "done", "bad,_b_-seed3": "failed", "bad,_b_-seed5": "failed"}
    said = capsys.readouterr().out
    assert "exit 1: the loss was 3 apples" in said and str(folder / "bad,_b_-seed5" / folders.LOG) in said
    with open(folder / "rows.csv") as file:
        good, bad = csv.DictReader(file)
    assert (good["val/also mean"], good["val/also std"], good["val/also min"], good["val/also max"]) == ("4.0", str(2**0.5), "3.0", "5.0")
    assert (bad["trials"], bad["done"], bad["val/score mean"]) == ("2", "0", "")
    with open(folder / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(line["status"], line["step"], line["seed"]) for line in lines] == [
        ("done", "8", "3"),
        ("done", "8", "5"),
        ("failed", "4", "3"),
        ("failed", "4", "5"),
    ]
    page = (folder / "sweep.html").read_text()
    assert "the loss was 3 apples" in page and "bad, &lt;b&gt;" in page and "<b>-seed" not in page and "4 (3..5)" in page

    assert sweep(path, folder, workers=4) == 1  # nothing left to run
    assert [len(starts(folder, name)) for name in statuses(folder)] == [1, 1, 1, 1]
    assert sweep(path, folder, workers=4, retry=True) == 1
    assert [len(starts(folder, name)) for name in statuses(folder)] == [1, 1, 2, 2]


def test_a_sweep_that_is_told_to_stop_goes_on_where_it_stopped(tmp_path):
    path, folder = (
        write(tmp_path, f"{{'metric': 'val/score', 'rows': {{'a': {{{SHORT}}}, 'b': {{{LONG}}}, 'c': {{{SHORT}}}}}}}"),
        tmp_path / "s",
    )

    def stop() -> None:
        until(lambda: folders.curve(folder / "b", "val/score"))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert sweep(path, folder, workers=1) == run.STOPPED
    thread.join()
    assert statuses(folder) == {"a": "done", "b": "stopped", "c": "waiting"}
    saved = int((folder / "b" / "saved").read_text())
    assert 100 <= saved < 400
    Path(path).write_text(Path(path).read_text().replace("'log.every': 10", "'log.every': 1"))  # may change, and makes it quick
    assert sweep(path, folder, workers=1) == 0
    assert [starts(folder, name) for name in "abc"] == [["starting at 0"], ["starting at 0", f"starting at {saved}"], ["starting at 0"]]
    assert list(folders.curve(folder / "b", "val/score")) == [100, 200, 300, 400]

    Path(path).write_text(Path(path).read_text().replace("'train.steps': 8", "'train.steps': 9"))
    with pytest.raises(SweepError, match=r"a was run with config.train.steps=8; the sweep now says 9"):
        sweep(path, folder)


def test_a_sweep_that_is_refused_has_changed_nothing(tmp_path):
    """The last trial's folder is of another config: nothing of the first, which could go on, nor of the sweep is written."""
    path, folder = write(tmp_path, f"{{'metric': 'val/score', 'rows': {{'a': {{{SHORT}}}, 'b': {{{SHORT}}}}}}}"), tmp_path / "s"
    trials = plan.trials(plan.load(path))
    folder.mkdir()
    folders.keep_options(folder, plan.load(path).options, [trial.name for trial in trials])
    for trial in trials:
        folders.write_record(folder, folders.prepare(folder, trial, retry=False)._replace(status="stopped"))
    other = folder / "b" / "config.json"
    other.write_text(other.read_text().replace('"steps": 8', '"steps": 9'))
    contents = lambda: {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "LOCK"}
    Path(path).write_text(Path(path).read_text().replace("'val/score'", "'val/score', 'also': ('val/other',)"))
    before = contents()
    with pytest.raises(SweepError, match="b was run with config.train.steps=9"):
        sweep(path, folder)
    assert contents() == before
    other.write_text("[]")
    with pytest.raises(SweepError, match="config.json is no config"):
        folders.begun(folder, trials[1], retry=False)


def test_a_trial_of_an_older_version_goes_on(tmp_path):
    """Its config lacks a key that has come since, or has one that is gone."""
    path, folder = write(tmp_path, f"{{'metric': 'val/score', 'rows': {{'a': {{{SHORT}}}}}}}"), tmp_path / "s"
    (trial,) = plan.trials(plan.load(path))
    folder.mkdir()
    folders.write_record(folder, folders.prepare(folder, trial, retry=False)._replace(status="stopped"))
    file = folder / "a" / "config.json"
    old = json.loads(file.read_text())
    del old["optim"]["warmup_steps"]  # 1 here, and 0 where nothing is said
    file.write_text(json.dumps(old))
    with pytest.raises(SweepError, match="config.optim.warmup_steps="):
        folders.prepare(folder, trial, retry=False)
    del old["optim"]["ema_decay"]  # as it is where nothing is said
    file.write_text(json.dumps(old | {"optim": old["optim"] | {"warmup_steps": 1}}))
    assert folders.prepare(folder, trial, retry=False).status == "stopped"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"gone": {}}))
    with pytest.raises(SweepError, match="does not read: config.gone"):
        folders.prepare(folder, trial, retry=False)


def test_a_sweep_killed_outright_takes_its_trials_along_and_goes_on(tmp_path):
    path, folder = (
        write(tmp_path, f"{{'metric': 'val/score', 'grid': {{'optim.learning_rate': (1e-3, 3e-3)}}, 'rows': {{'': {{{LONG}}}}}}}"),
        tmp_path / "s",
    )
    names = ["learning_rate=0.001", "learning_rate=0.003"]
    sweeper = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fake_sweep.py")), path, str(folder), "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    until(lambda: all(folders.curve(folder / name, "val/score") for name in names))
    with pytest.raises(LockedError, match=f"process {sweeper.pid}"):
        sweep(path, folder)
    sweeper.kill()
    sweeper.wait()
    if sys.platform == "linux":
        until(lambda: all((folder / name / "saved").exists() for name in names))
    assert set(statuses(folder).values()) == {"running"}
    Path(path).write_text(Path(path).read_text().replace("'log.every': 10", "'log.every': 1"))
    assert sweep(path, folder, workers=2) == 0
    assert statuses(folder) == dict.fromkeys(names, "done")
    assert all(len(starts(folder, name)) == 2 and starts(folder, name)[1] != "starting at 0" for name in names)


def test_a_trial_waits_for_the_run_that_still_saves(tmp_path, monkeypatch):
    path, folder = write(tmp_path, f"{{'metric': 'val/score', 'rows': {{'a': {{{SHORT}}}, 'b': {{{SHORT}}}}}}}"), tmp_path / "s"
    for trial in plan.trials(plan.load(path)):
        folder.mkdir(exist_ok=True)
        folders.prepare(folder, trial, retry=False)
        (folder / trial.name / "checkpoints").mkdir()
    saving, stuck = (manifest.lock(folder / name / "checkpoints") for name in "ab")
    monkeypatch.setattr(scheduler, "PATIENCE", 2.0)

    def release() -> None:
        until(lambda: folders.read_record(folder, "a").status == "running")
        time.sleep(0.5)
        assert not (folder / "a" / folders.LOG).exists()
        saving.close()

    thread = threading.Thread(target=release)
    thread.start()
    assert sweep(path, folder, workers=2) == 1
    thread.join()
    stuck.close()
    assert statuses(folder) == {"a": "done", "b": "failed"}
    assert f"is being written by process {os.getpid()}" in folders.read_record(folder, "b").reason
    assert sweep(path, folder, retry=True) == 0 and len(starts(folder, "a")) == 1


def test_trials_that_fall_behind_are_pruned(tmp_path):
    body = f"{{'metric': 'val/score', 'keep': 0.5, 'keep_least': 2, 'keep_from': 4, 'rows': {{'': {{{SHORT}}}}}, 'grid': {{'optim.learning_rate': (4e-3, 3e-3, 2e-3, 5e-3)}}}}"
    path, folder = (
        write(tmp_path, body.replace("'log.every': 5", "'log.every': 50").replace("'train.steps': 8", "'train.steps': 40")),
        tmp_path / "s",
    )
    assert sweep(path, folder) == 0
    assert list(statuses(folder).values()) == ["done", "pruned", "pruned", "done"]
    pruned = folders.read_record(folder, "learning_rate=0.003")
    assert re.fullmatch(r"step \d+: 1 of 1 others were better at that step; the best 1 go on", pruned.reason)
    assert list(folders.curve(folder / pruned.name, "val/score"))[-1] < 40
    assert sweep(path, folder) == 0 and len(starts(folder, pruned.name)) == 1


def test_the_pruning_rule():
    o = SweepOptions("m", keep=0.5, keep_from=2, keep_least=3)
    nan = float("nan")
    curves = {"a": {1: 0.9, 2: 0.1}, "b": {1: 0.2, 2: 0.5, 3: 0.9}, "c": {1: 0.1, 2: 0.3}, "d": {1: nan, 2: nan}}
    assert falls_behind(o, curves, "a") == ""  # its best so far counts, 0.9
    assert falls_behind(o, curves, "b") == ""  # alone at step 3
    assert "2 of 3 others were better" in falls_behind(o, curves, "c")
    assert "3 of 3 others were better" in falls_behind(o, curves, "d")
    assert falls_behind(o._replace(mode="min"), curves, "c") == ""
    assert "2 of 3 others" in falls_behind(o._replace(mode="min"), {**curves, "a": {2: 0.9}}, "a")
    assert (
        falls_behind(o._replace(keep_from=3), curves, "c")
        == falls_behind(o._replace(keep_least=5), curves, "c")
        == falls_behind(o._replace(keep=1.0), curves, "c")
        == ""
    )
    ties = {str(i): {2: 0.5} for i in range(9)}
    assert not any(falls_behind(o, ties, name) for name in ties)


def test_an_unknown_metric_stops_the_sweep_and_lists_the_known(tmp_path):
    path, folder = (
        write(tmp_path, f"{{'metric': 'val/score', 'rows': {{'fine': {{{LONG}}}, 'other': {{{SHORT}, 'method.width': 7}}}}}}"),
        tmp_path / "s",
    )
    with pytest.raises(SweepError, match=r"trial 'other' give no 'val/score'; they give: val/also, val/other"):
        sweep(path, folder, workers=2)
    assert statuses(folder)["fine"] == "stopped" and (folder / "fine" / "saved").exists()


def test_two_real_trials(tmp_path, capsys):
    """The command itself: two tiny runs of a shipped recipe, and the report once more."""
    path, folder = write(tmp_path, "{'metric': 'val/i2t/r@1', 'pick': 'best', 'seeds': (0, 1)}"), tmp_path / "s"
    command = ["sweep", f"--config={path}", f"--workdir={folder}", "--tiny", "--workers=2", "--config.log.html=False"]
    assert cli.main(command) == 0
    assert statuses(folder) == {"seed0": "done", "seed1": "done"}
    assert (folder / "seed1" / "checkpoints" / "00000002").is_dir()
    table = (folder / "rows.csv").read_text()
    assert cli.main(["sweep", f"--report={folder}"]) == 0
    assert (folder / "rows.csv").read_text() == table
    said = capsys.readouterr().out
    assert "2 done" in said and str(folder / "sweep.html") in said
