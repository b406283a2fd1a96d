"""Steps that are not finite: too many in a row take the run back, and on with other samples, whenever it is killed meanwhile."""

import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from running import CONFIG, leaves, metrics

from jaxvl import assembly, config as configs, manifest, report, restore, rollback, step as steps, train
from jaxvl.checkpoint import Restored
from jaxvl.report.samples import read_samples
from jaxvl.rollback import LATE, DivergedError, Skipped
from jaxvl.state import TrainState
from jaxvl.stopping import TERMINATED

BATCH = 8


def test_skipped_in_a_row():
    skipped = Skipped(3)
    totals = [0, 1, 1, 2, 3, 4]  # the second step, then the fourth to the sixth
    for i, total in enumerate([*totals, *[4] * LATE]):
        assert not skipped.too_many
        skipped.add(jnp.int32(total))
        assert skipped.too_many == (i == len(totals) + LATE - 1)
    assert skipped.row == 3
    early = Skipped(3)
    for total in totals:
        early.add(total)
    again = Skipped(3, early.note())
    assert again.note() == early.note() == [0, 0, *totals] and not early.too_many
    early.settle()
    assert early.too_many and Skipped(3, early.note()).too_many and not Skipped(0, early.note()).too_many
    assert [rollback._good(note) for note in ([], [0, 4], [0, 4, 4], [1, 4], [0, 4, 5, 5])] == [True, True, True, False, False]


@pytest.fixture
def poison(monkeypatch):
    """poison(first, end): the loss of a batch is nan if its first sample is in [first, end)."""
    span, seen = [0, 0], {}
    make, value_and_grad = steps.make_train_step, steps.value_and_grad

    def poisoned(*args, **kwargs):
        inner = make(*args, **kwargs)

        def train_step(state, batch):
            seen["bad"] = (state.position[1] >= span[0]) & (state.position[1] < span[1])
            return inner(state, batch)

        return train_step

    def with_nan(method, accumulate):
        inner = value_and_grad(method, accumulate)

        def grad_fn(*args):
            (loss, aux), grads = inner(*args)
            return (jnp.where(seen["bad"], jnp.nan, loss), aux), grads

        return grad_fn

    monkeypatch.setattr(assembly, "make_train_step", poisoned)
    monkeypatch.setattr(steps, "value_and_grad", with_nan)
    return lambda first, end: span.__setitem__(slice(None), [first, end])


def run(workdir, *overrides):
    settings = (
        "train.steps=24",
        f"train.batch_size={BATCH}",
        "mesh.data=8",
        "train.rollback=3",
        "log.samples=True",
        "log.tensorboard=False",
        "checkpoint.keep=9",
    )
    return train.train(configs.load(str(CONFIG), [*settings, *overrides]), workdir)


def test_a_run_goes_back_and_on_with_other_samples(tmp_path, poison, capsys, monkeypatch):
    """Samples of the steps 10 to 13 are bad: the third of them is known at step 12 + LATE = 18, or at the save of step 16, which comes first."""
    poison(9 * BATCH, 13 * BATCH)
    assert run(tmp_path / "a", "checkpoint.every=8") == 0
    assert (
        f"3 steps in a row up to step 16 had a loss or gradient that is not finite: back to step 8, going on with sample {16 * BATCH}"
        in capsys.readouterr().err
    )
    rows = [row for row in metrics(tmp_path / "a") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert all(np.isfinite(row["loss"]) for row in rows) and [row["skipped"] for row in rows] == [0] * 8 + [4] * 16
    given = read_samples(tmp_path / "a" / "report", BATCH)
    undisturbed = read_samples_of(tmp_path / "a", 32)
    assert [given[s] for s in given] == undisturbed[:8] + undisturbed[16:]
    lost = report.goodput.account(report.goodput.read_sessions(tmp_path / "a" / "report"))["lost"]
    assert lost > 0


@pytest.mark.skipif("JAXVL_FAULTS" not in os.environ, reason="the run above three times: asked for by JAXVL_FAULTS")
def test_a_run_that_is_stopped_amid_bad_steps_has_the_same_end(tmp_path, poison, monkeypatch):
    poison(9 * BATCH, 13 * BATCH)
    assert run(tmp_path / "a", "checkpoint.every=8") == 0
    fed = report.log.RunLog.fed

    def stop_at_12(self, number, *args):
        fed(self, number, *args)
        if number == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(report.log.RunLog, "fed", stop_at_12)
    assert run(tmp_path / "b", "checkpoint.every=8") == TERMINATED
    monkeypatch.setattr(report.log.RunLog, "fed", fed)
    assert run(tmp_path / "b", "checkpoint.every=8") == 0
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    assert leaves(tmp_path / "b", 24) == leaves(tmp_path / "a", 24)


class Folder:
    """A saver that has these steps; the state is a number."""

    def __init__(self, folder, notes):
        self.folder = folder
        for step, note in notes.items():
            target = manifest.step_folder(folder, step)
            target.mkdir()
            manifest.write(target, step, {"skipped": note}, {}, {})

    def wait(self):
        pass

    def restore(self, abstract, step):
        return Restored(step, abstract._replace(step=step), {})


STATE = TrainState(0, {}, (), {}, {}, None, np.array([0, 512], np.uint32), 7)


def test_the_checkpoint_that_is_gone_back_to(tmp_path, capsys):
    saver, skipped, tries = Folder(tmp_path, {8: [0, 4], 16: [0, 4, 5], 24: [2, 6]}), Skipped(3, [3, 7]), {}
    found = rollback.go_back(saver, STATE._replace(position=None, skipped=None), STATE, skipped, 30, tries)
    assert found.step == 8 and found.state.step == 8 and found.state.skipped == 7 and found.state.position is STATE.position
    assert "back to step 8, going on with sample 512" in capsys.readouterr().err
    for _ in range(rollback.TRIES - 1):
        rollback.go_back(saver, STATE, STATE, skipped, 30, tries)
    with pytest.raises(DivergedError, match="going back to step 8 has not helped 3 times"):
        rollback.go_back(saver, STATE, STATE, skipped, 30, tries)
    (manifest.step_folder(tmp_path, 8) / manifest.FILE).write_text("damaged")
    with pytest.raises(DivergedError, match="no checkpoint was saved before them: lower config.optim.learning_rate"):
        rollback.go_back(saver, STATE, STATE, skipped, 30, {})


def read_samples_of(workdir, count):
    """The ids of the first `count` batches of an undisturbed run."""
    from jaxvl.data.dataset import open_data
    from jaxvl.data.places import sample_places

    recipe = assembly.read_recipe(workdir, [])
    dataset = open_data(recipe.data)
    shards, rows = sample_places(dataset, recipe.seed).at(np.arange(count * BATCH))
    return (dataset.starts[shards] + rows).reshape(count, BATCH).tolist()


def test_processes_go_back_to_the_step_that_the_first_one_sees(monkeypatch, tmp_path):
    """A slow shared file system shows this process other steps than process 0, whose list all of them take."""
    sent = iter([np.int32(2), np.asarray([16, 8], np.int32)])
    monkeypatch.setattr(restore.jax, "process_count", lambda: 2)
    monkeypatch.setattr(restore.jax, "process_index", lambda: 1)
    monkeypatch.setattr(restore.multihost_utils, "broadcast_one_to_all", lambda mine: next(sent))
    (tmp_path / "00000024").mkdir()
    looked = []
    assert restore.steps_of_first_process(tmp_path, looked.append) == [16, 8]
    assert looked == []


def test_rollback_asks_for_the_list_of_the_first_process(monkeypatch, tmp_path):
    saver = Folder(tmp_path, {8: [], 16: [1, 1, 1], 24: []})
    monkeypatch.setattr(rollback, "steps_of_first_process", lambda folder, keep: [step for step in (24, 16, 8) if keep(step)][1:])
    found = rollback.go_back(saver, STATE, STATE, Skipped(1), 30, {})
    assert found.step == 8  # 24 is whole here, and 16 was saved amid skipped steps
