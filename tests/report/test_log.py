import json
import math
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl import report
from jaxvl.progress import silence
from jaxvl.report import LogOptions, log as run_log, metrics

QUIET = LogOptions(every=1, tensorboard=False, watchdog=0.0)
START = {"batch_size": 4, "samples_per_epoch": 16}


@jax.jit
def train_step(state, batch):
    state = state * jnp.float32(0.9) + batch.mean()
    return state, {"loss": jnp.sin(state * 7), "skipped": jnp.int32(state > 0.5)}


def run(workdir, options, first, last, steps, *, saves=(), kill=False):
    """Steps (first, last] of a run whose state is kept at `saves`; a killed run leaves a torn line."""
    kept = workdir / "state.json"
    state = jnp.float32(json.loads(kept.read_text())[str(first)] if first else 1.0)
    with report.open_log(options, workdir) as log:
        log.start(step=first, steps=steps, **START)
        for step in range(first + 1, last + 1):
            with log.wait("data"):
                batch = np.full(4, math.cos(step), np.float32)
            with log.wait("transfer"):
                batch = jax.device_put(batch)
            state, values = train_step(state, batch)
            log.step(step, values, batch)
            if step in saves:
                with log.pause("checkpoint"):
                    states = json.loads(kept.read_text()) if kept.exists() else {}
                    kept.write_text(json.dumps(states | {step: float(state)}))
                    assert max(row["step"] for row in report.read_metrics(workdir)) == step - step % options.every
        if last == steps:
            log.finish()
    if kill:
        with open(workdir / "metrics.jsonl", "a") as file:
            file.write('{"step": 77')


def numbers(workdir):
    """The rows without what depends on the clock."""
    timed = ("time/", "samples_per_s", "mfu")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in report.read_metrics(workdir)]


@pytest.mark.parametrize("every", [1, 4])
def test_a_killed_run_logs_what_a_run_that_was_never_killed_logs(tmp_path, every):
    options = QUIET._replace(every=every)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, options, 0, 22, 22)
    run(cut, options, 0, 9, 22, saves=(4, 7), kill=True)
    run(cut, options, 7, 15, 22, saves=(8, 14), kill=True)
    run(cut, options, 14, 22, 22)
    assert numbers(cut) == numbers(whole)
    assert [row["step"] for row in numbers(cut)] == ([*range(1, 23)] if every == 1 else [4, 8, 12, 16, 20, 22])
    assert {"samples", "epoch", "loss", "skipped"} == set(numbers(cut)[0]) - {"step"}
    sessions = json.loads((cut / "report" / "sessions.json").read_text())
    assert [(s["first"], s["last"], s["kept"]) for s in sessions] == [(0, 9, 7), (7, 15, 14), (14, 22, 22)]
    assert (cut / "report.html").exists()


class Slow:
    """A device value that is there when `ready` is set; only the log's thread may look at it."""

    def __init__(self, ready, value=0.5, error=None):
        self.ready, self.value, self.error, self.copied = ready, value, error, False

    def copy_to_host_async(self):
        self.copied = True

    def is_ready(self):
        return self.ready.is_set()

    def block_until_ready(self):
        assert threading.current_thread() is not threading.main_thread(), "the loop has waited for the device"
        self.ready.wait()
        if self.error:
            raise self.error
        return self

    def __array__(self, dtype=None, copy=None):
        assert self.copied, "the copy to the host was not started early"
        self.block_until_ready()
        return np.float32(self.value)


def test_the_loop_waits_for_nothing_until_too_many_steps_are_on_their_way(tmp_path):
    ready = threading.Event()
    with report.open_log(QUIET, tmp_path) as log:
        log.start(step=0, steps=100, **START)
        log.step(1, {"loss": Slow(ready)}, Slow(ready))
        for step in range(2, run_log.IN_FLIGHT + 2):  # one is with the thread, the others in the queue
            log.step(step, {"loss": Slow(ready)}, Slow(ready))
        assert report.read_metrics(tmp_path) == []
        more = threading.Thread(target=log.step, args=(step + 1, {"loss": Slow(ready)}))
        more.start()
        more.join(0.1)
        assert more.is_alive()
        ready.set()
        more.join(5.0)
        log.drain()
        assert [row["loss"] for row in report.read_metrics(tmp_path)] == [0.5] * (run_log.IN_FLIGHT + 2)


def test_times_are_those_of_the_device(tmp_path):
    """A late batch is transfer, a step that ends late is compute, a wait behind a busy device is nothing."""
    with report.open_log(QUIET._replace(peak_flops=1e9), tmp_path) as log:
        log.start(step=0, steps=9, **START, flops_per_sample=1e6, chips=2)
        for step in (1, 2):
            with log.wait("data"):
                time.sleep(0.3)  # after the first step, the device is busy for longer than this
            arrived, done = threading.Event(), threading.Event()
            threading.Timer(0.2, arrived.set).start()
            threading.Timer(0.8, done.set).start()
            log.step(step, {"loss": Slow(done)}, Slow(arrived))
        with log.pause("eval"):
            time.sleep(0.5)
        done.clear()
        threading.Timer(0.3, done.set).start()
        log.step(3, {"loss": Slow(done)})
        log.drain()
        with log.wait("transfer"):
            pass
        time.sleep(0.3)  # a CPU computes the step while the host starts it
        log.step(4, {"loss": Slow(done)}, Slow(done))
    first, second, third, fourth = report.read_metrics(tmp_path)
    near = lambda ms: pytest.approx(ms, abs=140)  # other work on the machine
    assert (first["time/data_ms"], first["time/transfer_ms"], first["time/compute_ms"]) == (
        near(300),
        near(200),
        near(600),
    )
    assert (second["time/data_ms"], second["time/transfer_ms"], second["time/compute_ms"]) == (
        near(0),
        near(0),
        near(300),
    )
    assert (third["time/step_ms"], third["time/compute_ms"]) == (
        near(300),
        near(300),
    )  # the pause is no part of the step
    assert (fourth["time/transfer_ms"], fourth["time/compute_ms"]) == (near(0), near(300))
    assert third["samples_per_s"] == pytest.approx(4e3 / third["time/step_ms"])
    assert third["mfu"] == pytest.approx(third["samples_per_s"] * 1e6 / 2e9)
    seconds = json.loads((tmp_path / "report" / "sessions.json").read_text())[0]["seconds"]
    assert seconds["eval"] == pytest.approx(0.5, abs=0.14) and seconds["compute"] == pytest.approx(1.5, abs=0.5)


def test_a_step_that_fails_stops_the_run(tmp_path):
    ready = threading.Event()
    ready.set()
    with pytest.raises(RuntimeError, match="out of memory"), report.open_log(QUIET, tmp_path) as log:
        log.start(step=0, steps=100, **START)
        log.step(1, {"loss": Slow(ready)})
        log.step(2, {"loss": Slow(ready, error=RuntimeError("out of memory"))})
        with log.pause("checkpoint"):
            pytest.fail("a checkpoint of a failed step")
    assert [row["step"] for row in report.read_metrics(tmp_path)] == [1]


def test_the_loop_learns_of_a_failed_step_while_it_goes_on(tmp_path):
    ready = threading.Event()
    ready.set()
    with pytest.raises(RuntimeError, match="out of memory"), report.open_log(QUIET, tmp_path) as log:
        log.start(step=0, steps=100, **START)
        log.step(1, {"loss": Slow(ready, error=RuntimeError("out of memory"))})
        for step in range(2, 500):
            log.step(step, {"loss": Slow(ready)})
            time.sleep(0.01)
        pytest.fail("the loop went on after a failed step")


def test_a_full_disk_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        metrics,
        "jsonl_writer",
        lambda path, real=metrics.jsonl_writer: real("/dev/full" if path.name == "metrics.jsonl" else path),
    )
    with pytest.raises(OSError, match="No space left"), report.open_log(QUIET, tmp_path) as log:
        log.start(step=0, steps=100, **START)
        log.step(1, {"loss": np.float32(1.0)})
        log.drain()


def test_misuse_is_told(tmp_path):
    with report.open_log(QUIET, tmp_path) as log:
        with pytest.raises(ValueError, match="data or transfer"):
            log.wait("eval")
        with pytest.raises(RuntimeError, match=r"before log\.start"):
            log.step(1, {})
    with pytest.raises(ValueError, match=r"'loss' has shape \(2,\)"), report.open_log(QUIET, tmp_path) as log:
        log.start(step=0, steps=1, **START)
        log.step(1, {"loss": jnp.zeros(2)})


@pytest.mark.parametrize(("key", "value"), [("every", 0), ("peak_flops", -1.0), ("watchdog", 0.5), ("watchdog_floor", 0.0)])
def test_wrong_options_are_named(tmp_path, key, value):
    with (
        pytest.raises(ValueError, match=rf"config\.log\.{key} is {value}; it must be "),
        report.open_log(LogOptions(**{key: value}), tmp_path),
    ):
        pass


def test_an_unknown_device_has_no_mfu_and_one_note(tmp_path, capsys):
    with report.open_log(QUIET, tmp_path) as log:
        log.start(step=0, steps=2, **START, flops_per_sample=1.0, device_kind="Abacus 3000")
        for step in (1, 2):
            log.step(step, {"loss": np.float32(1.0)})
    assert all("mfu" not in row for row in report.read_metrics(tmp_path))
    assert capsys.readouterr().err.count("Abacus 3000") == 1


def test_bad_samples_count_once_over_processes_epochs_and_restarts(tmp_path):
    rows = [("a.tar", "k1", "empty"), ("a.tar", "k2", "bomb")]
    for process, new in ((0, rows), (0, rows), (1, [("b.tar", "k", "empty")])):
        with report.open_log(QUIET, tmp_path, process) as log:
            log.start(step=0, steps=1, **START)
            log.bad(new)
            log.bad(new[:1])
    silence(False)
    kept = {p.name: [row for _, row in metrics.read_lines(p)] for p in sorted((tmp_path / "report").glob("bad-*"))}
    assert [len(v) for v in kept.values()] == [2, 1]
    assert kept["bad-0.jsonl"][1] == {"shard": "a.tar", "key": "k2", "reason": "bomb"}


def test_other_processes_write_no_metrics_but_wait_and_watch(tmp_path, capsys):
    try:
        with report.open_log(QUIET._replace(watchdog=2.0), tmp_path, 3) as log:
            log.describe(config="x")
            log.start(step=0, steps=1, **START)
            log.step(1, {"loss": np.float32(1.0)})
            with log.pause("eval"):
                assert any(t.name == "watchdog" for t in threading.enumerate())
            log.write(1, {"val/i2t/r@1": 0.5})
            assert log.finish() is None
    finally:
        silence(False)
    assert os.listdir(tmp_path) == ["report"] and os.listdir(tmp_path / "report") == []
    assert capsys.readouterr() == ("", "")


def test_finish_prints_the_recalls_last(tmp_path, capsys):
    values = {f"val/{way}/r@{k}": 0.25 for way in ("i2t", "t2i") for k in (1, 5, 10)}
    with report.open_log(QUIET._replace(tensorboard=True), tmp_path / "run") as log:
        log.describe(config="seed: 0", devices="1 x cpu")
        with log.pause("compile"):
            pass
        log.start(step=0, steps=1, **START)
        log.step(1, {"loss": np.float32(1.0)})
        with log.pause("eval"):
            pass
        log.write(1, values | {"val/t2i/r@10": np.float32(0.25), "val/images": np.int64(4)})
        path = log.finish()
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "val: image-to-text R@1/5/10 25.0/25.0/25.0 %, text-to-image R@1/5/10 25.0/25.0/25.0 %"
    assert out.splitlines()[-2] == f"report: {path}" and path.read_text().startswith("<!doctype html>")
    assert "step 1/1 (epoch 0.25)  loss 1  " in err and "compile took" in err
    assert os.listdir(tmp_path / "run" / "tensorboard")
    assert threading.active_count() == 1 or not {t.name for t in threading.enumerate()} & {"log", "watchdog"}
