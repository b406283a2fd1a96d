import io
import re
import subprocess
import sys

import pytest

from jaxvl import progress as module
from jaxvl.progress import duration, progress, say, silence


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    at = [50.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: at[0])
    return at


def test_without_a_terminal_a_line_now_and_then(now, capsys):
    for _ in progress(range(40), "index", unit="shards"):
        now[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "index: 6/40 shards  ETA 0:34",
        "index: 22/40 shards  ETA 0:18",
        "index: 38/40 shards  ETA 0:02",
        "index: 40/40 shards in 0:40",
    ]


def test_short_work_and_silence_print_nothing(now, capsys):
    for _ in progress(range(4), "index"):
        now[0] += 1
    with progress(text="train", total=100, plain=False) as bar:
        now[0] += 60
        bar.advance(50)
    silence()
    try:
        say("nobody hears this")
        for _ in progress(range(4), "index"):
            now[0] += 60
    finally:
        silence(False)
    assert capsys.readouterr() == ("", "")


def test_eta_leaves_out_what_is_before_the_first_advance(now):
    with progress(text="train", total=110, done=100, plain=False) as bar:
        assert bar.eta() is None
        bar.advance(0, note="compile")
        now[0] += 1000
        bar.advance()
        assert bar.eta() is None
        now[0] += 6
        bar.advance(3)
        assert bar.eta() == 12.0
    with progress(iter(range(3)), "no length") as bar:
        bar.advance(), bar.advance()
        assert bar.eta() is None


def test_bars_nest_on_a_terminal(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(text="train [x]", total=5, done=2, unit="steps") as outer:
        outer.advance(note="loss 0.5 [/y]")
        assert list(progress(range(3), "eval")) == [0, 1, 2]
        say("a line [above]")
        with pytest.raises(ZeroDivisionError), progress(text="inner", total=1):
            raise ZeroDivisionError
    assert module._live is None and module._open == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "train [x]" in text and "3/5 steps" in text and "loss 0.5 [/y]" in text and "a line [above]" in text
    say("after")
    assert screen.getvalue().endswith("after\n")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01"), (90061, "1 d 1:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_log_imports_nothing_heavy():
    heavy = "rich matplotlib tensorboardX jax numpy wandb importlib.metadata"
    code = f"import sys, jaxvl.report, jaxvl.progress; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        == "[]\n"
    )
