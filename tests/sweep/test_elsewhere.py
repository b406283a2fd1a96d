"""Trials drawn by a study, and trials as jobs of submitit, here with its local executor. The runs are fakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_sweep import command
from test_local import LONG, SHORT, starts, statuses, until
from test_plan import RECIPE, ROOT, write

from jaxvl.manifest import LockedError
from jaxvl.sweep import folder as folders, plan, run, slurm
from jaxvl.sweep.options import SweepError


def study(folder: Path, trials: int, *, slow: bool = False, **more) -> str:
    """A study of the learning rate on eight steps: more is better, up to 1."""
    body = {"metric": "val/score", "sampler": "tpe", "trials": trials, **more}
    space = "{'optim.learning_rate': Uniform(1e-3, 1.0, log=True), 'optim.weight_decay': Choice((0.1, 0.2)), 'text.depth': Integer(1, 4)}"
    file = folder / "study.py"
    file.write_text(
        "from jaxvl.sweep import Choice, Integer, Uniform\nimport runpy\n"
        f"def get_config():\n    config = runpy.run_path({str(RECIPE)!r})['get_config']()\n    config.train.steps, config.optim.warmup_steps, config.evals.val.every, config.log.every = 8, 4, 2, {40 if slow else 1}\n    return config\n"
        f"def sweep():\n    return dict(space={space}, **{body!r})\n"
    )
    return str(file)


def test_a_study_draws_towards_the_better_and_goes_on(tmp_path):
    optuna = pytest.importorskip("optuna")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    folder = tmp_path / "s"
    assert run.run(study(tmp_path, 6), folder, [], workers=2, command=command) == 0
    assert run.run(study(tmp_path, 24, slow=True, keep=0.5), folder, [], workers=4, command=command) == 0
    records = [folders.read_record(folder, name) for name in folders.read_options(folder)[1]]
    assert len(records) == 24 and {r.status for r in records} == {"done", "pruned"}
    told = optuna.load_study(study_name="sweep", storage=JournalStorage(JournalFileBackend(str(folder / "study.log")))).get_trials()
    assert [{TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned"}[t.state] for t in told] == [r.status for r in records]
    assert all(t.value == pytest.approx(t.params["optim.learning_rate"]) for t in told if t.state == TrialState.COMPLETE)
    assert all(t.intermediate_values for t in told)
    rates = [r.overrides["optim.learning_rate"] for r in records]
    assert len(set(rates)) == 24  # a study that goes on draws no point twice
    drawn = [rates[i] for i in range(8, 24)]
    assert sum(r > 10**-1.5 for r in drawn) > 8  # more than half above the middle of the scale
    assert (folder / "results.csv").read_text().count("\n") == 25
    with pytest.raises(SweepError, match="mode is 'min', but the study in .* has 'max'"):
        run.run(study(tmp_path, 24, mode="min"), folder, [], command=command)
    with pytest.raises(SweepError, match="--retry"):
        run.run(study(tmp_path, 24), folder, [], command=command, retry=True)


def test_two_workers_share_a_study(tmp_path):
    pytest.importorskip("optuna")
    path, folder = study(tmp_path, 12, slow=True), tmp_path / "s"
    command_line = [sys.executable, str(Path(__file__).with_name("fake_sweep.py")), path, str(folder), "1"]
    other = subprocess.Popen(
        command_line, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    until(lambda: (folder / "t000" / folders.LOG).exists())
    assert run.run(path, folder, [], command=command) == 0
    theirs = [line for line in other.communicate(timeout=400)[1].splitlines() if line.endswith(": done")]
    assert other.returncode == 0 and 0 < len(theirs) < 12
    assert statuses(folder) == {f"t{i:03}": "done" for i in range(12)}
    assert all(len(starts(folder, name)) == 1 for name in statuses(folder))

    with folders.lock(tmp_path / "other"), pytest.raises(LockedError, match="another sweep"):
        run.run(path, tmp_path / "other", [], command=command)


def test_trials_as_jobs(tmp_path):
    pytest.importorskip("submitit")
    path, folder = (
        write(tmp_path, f"{{'metric': 'val/score', 'rows': {{'good': {{{SHORT}}}, 'bad': {{{SHORT}, 'method.temperature': 0.5}}}}}}"),
        tmp_path / "s",
    )
    assert run.run(path, folder, [], workers=2, slurm="cluster=local", command=command) == 1
    good, bad = (folders.read_record(folder, name) for name in ("good", "bad"))
    assert good.status == "done" and good.job and bad.reason == "exit 1: the loss was 3 apples"


def test_a_job_is_asked_to_end_and_goes_on(tmp_path):
    pytest.importorskip("submitit")
    path, folder = write(tmp_path, f"{{'metric': 'val/score', 'rows': {{'a': {{{LONG}}}}}}}"), tmp_path / "s"
    launch = slurm.launcher(command, folder, {}, "cluster=local")
    (trial,) = plan.trials(plan.load(path))
    folders.prepare(folder, trial, retry=False)
    process = launch(folder / "a", 0, "")
    until(lambda: folders.curve(folder / "a", "val/score"))
    process.end(kill=False)
    until(lambda: process.poll() is not None)
    assert process.poll() == 143
    saved = (folder / "a" / "saved").read_text()
    (folder / "a" / "config.json").write_text((folder / "a" / "config.json").read_text().replace('"every": 10', '"every": 1'))
    again = launch(folder / "a", 0, process.job)
    until(lambda: again.poll() is not None)
    assert again.poll() == 0 and starts(folder, "a")[1] == f"starting at {saved}"


@pytest.mark.parametrize(
    "text, says", [("gpus", "'gpus' is no KEY=VALUE"), ("cluster=local,nodes=2", "only one node"), ("colour=red,cluster=local", "colour")]
)
def test_parameters_that_submitit_does_not_know(tmp_path, text, says):
    pytest.importorskip("submitit")
    with pytest.raises(SweepError, match=says):
        slurm.launcher(command, tmp_path, {}, text)
