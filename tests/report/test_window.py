import math

import pytest

from jaxvl.report.window import Plan, Window, mean

PLAN = Plan(steps=100, batch_size=8, samples_per_epoch=32, flops_per_sample=5e9, chips=2, peak=1e12)


def test_floats_are_averaged_and_integers_kept():
    rows = [{"loss": 1.0, "skipped": 0}, {"loss": 2.0, "skipped": 1, "extra": 5.0}, {"loss": 6.0, "skipped": 1}]
    assert mean(rows) == {"loss": 3.0, "skipped": 1, "extra": 5.0}


def test_a_step_that_is_not_finite_is_counted_and_left_out():
    rows = [{"loss": 1.0, "norm": 2.0}, {"loss": math.nan, "norm": math.inf}, {"loss": 3.0, "norm": 4.0}]
    assert mean(rows) == {"loss": 2.0, "norm": 3.0, "nonfinite": 1}
    assert math.isnan(mean([{"loss": math.inf}])["loss"])


def test_one_step_is_not_rounded():
    assert mean([{"loss": 0.1 + 0.2}]) == {"loss": 0.1 + 0.2}


def test_speed_leaves_pauses_out(tmp_path):
    window = Window(PLAN, tmp_path / "w", 0)
    window.add(1, {"loss": 1.0}, {"compute": 0.25, "data": 0.0, "transfer": 0.0, "other": 0.0, "eval": 100.0})
    window.add(2, {"loss": 3.0}, {"compute": 0.5, "data": 0.125, "transfer": 0.0625, "other": 0.0625})
    assert "loss 3" in window.note() and "16 samples/s" in window.note()
    row = window.take()
    assert row == {
        "samples": 16,
        "epoch": 0.5,
        "loss": 2.0,
        "samples_per_s": 16.0,
        "samples_per_s_chip": 8.0,
        "mfu": 0.04,
        "time/step_ms": 500.0,
        "time/compute_ms": 375.0,
        "time/data_ms": 62.5,
        "time/transfer_ms": 31.25,
        "time/other_ms": 31.25,
    }
    window.add(3, {"loss": 7.0}, {"compute": 1.0})
    assert window.take()["time/step_ms"] == 1000.0


@pytest.mark.parametrize("plan", [PLAN._replace(peak=None), PLAN._replace(flops_per_sample=0.0)])
def test_no_mfu_without_its_parts(tmp_path, plan):
    window = Window(plan, tmp_path / "w", 0)
    window.add(1, {}, {"compute": 1.0})
    assert "mfu" not in window.take()


def test_a_window_cut_by_checkpoints_goes_on_after_a_resume(tmp_path):
    values = [0.1 * s + 1e-9 for s in range(10)]

    def run(path, first, last, saves=()):
        window = Window(PLAN, path, first)
        lines = {}
        for step in range(first + 1, last + 1):
            window.add(step, {"loss": values[step - 1], "nan": math.nan}, {"compute": 0.1})
            if step % 5 == 0:
                lines[step] = window.take()
            if step in saves:
                window.save()
        window.close()
        return lines

    whole = run(tmp_path / "whole", 0, 10)
    run(tmp_path / "cut", 0, 9, saves=(2, 5, 7, 8))
    resumed = run(tmp_path / "cut", 7, 10, saves=(8,))
    assert resumed[10]["loss"] == whole[10]["loss"] and resumed[10]["nonfinite"] == 5
    again = run(tmp_path / "cut", 2, 10)  # the newer checkpoints turned out to be damaged
    assert [again[s]["loss"] for s in (5, 10)] == [whole[s]["loss"] for s in (5, 10)]
