from pathlib import Path

from jaxvl.report import summary
from jaxvl.report.goodput import Session

VALUES = {
    f"val/{way}/r@{k}": r
    for way, rs in (("i2t", (0.521, 0.8, 0.902)), ("t2i", (0.25, 0.5, 1.0)))
    for k, r in zip((1, 5, 10), rs, strict=True)
}
LINE = "val: image-to-text R@1/5/10 52.1/80.0/90.2 %, text-to-image R@1/5/10 25.0/50.0/100.0 %"


def test_last_line():
    assert summary.last_line(VALUES | {"val/i2t/median_rank": 2.0}) == LINE
    assert summary.last_line({"i2t/r@1": 0.5}) == "image-to-text R@1 50.0 %"
    assert summary.last_line({"zeroshot/accuracy": 0.123456, "n": 12345}) == "zeroshot/accuracy 0.1235  n 12,345"


def test_finals_know_which_way_is_better():
    rows = [
        {"step": 1, "samples": 8, "epoch": 0.1, "loss": 3.0},
        {"step": 1, "val/r": 0.5, "val/median_rank": 9.0},
        {"step": 2, "samples": 16, "epoch": 0.2, "loss": 2.0},
        {"step": 2, "val/r": 0.7, "val/median_rank": 4.0},
        {"step": 3, "val/r": 0.6, "val/median_rank": 5.0},
    ]
    assert summary.finals(rows) == {"loss": (2.0, None, None), "val/r": (0.6, 0.7, 2), "val/median_rank": (5.0, 4.0, 2)}


def test_the_summary_ends_with_the_recalls(capsys):
    rows = [{"step": 7, "samples": 1, "epoch": 1.0, "loss": 0.25, "time/step_ms": 1.0}, {"step": 7, **VALUES}]
    sessions = [Session(1000.0, 0, 7, 7, {"compute": 90.0, "data": 9.99, "eval": 0.01, "lost": 0.0})]
    summary.print_summary(rows, sessions, Path("runs/x/report.html"))
    out = capsys.readouterr().out
    *_, goodput, page, last = out.splitlines()
    assert goodput == "goodput 90.0 % of 1:40 (compute 90.0 %, waiting for data 10.0 %)"
    assert page == "report: runs/x/report.html" and last == LINE
    assert "val/i2t/r@10" in out and "0.902" in out and "time/" not in out
    summary.print_values(VALUES)
    assert capsys.readouterr().out.splitlines()[-1] == LINE


def test_a_restarted_run_tells_how_long_it_had_no_process():
    kill = [Session(1000.0, 0, 8, 4, {"compute": 80.0}), Session(1125.0, 4, 8, 8, {"compute": 40.0, "restart": 20.0})]
    words = "goodput 57.1 % of 2:20 (compute 57.1 %, work lost in a kill 28.6 %, start and restart 14.3 %)"
    assert summary.goodput_line(kill) == f"{words}; 0:45 between its 2 processes"


def test_log_line_splits_the_step():
    row = {
        "samples": 64,
        "epoch": 0.5,
        "skipped": 1000,
        "loss": 1.2345678,
        "samples_per_s": 1234.5,
        "samples_per_s_chip": 600.0,
        "mfu": 0.41,
    }
    row |= {f"time/{k}_ms": v for k, v in (("step", 10.0), ("data", 1.0), ("transfer", 2.0), ("compute", 6.5), ("other", 0.5))}
    assert summary.log_line(1500, 6000, row) == (
        "step 1,500/6,000 (epoch 0.50)  loss 1.235  skipped 1,000  1,234 samples/s"
        "  step 10.0 ms = data 1.0 + transfer 2.0 + compute 6.5 + other 0.5  mfu 41.0 %"
    )


def test_what_a_save_costs():
    assert summary.stall_line([0.05, 0.04, 0.9], 0.1) == "checkpoint stall 50 ms a save, 0.5 steps (median of 3)"
    assert summary.stall_line([], 0.1) == "" and summary.stall_line([1.0], 0.0) == ""
