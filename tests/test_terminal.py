"""What is printed commands no terminal, whoever named the files, keys and captions in it; and nothing is printed but through one module."""

import ast
import csv
import io
import json
import logging
import random
import re
import sys
import warnings
from pathlib import Path

from jaxvl import cli, terminal
from jaxvl.progress import progress, say
from jaxvl.report import summary
from jaxvl.sweep import results
from jaxvl.sweep.folder import Record
from jaxvl.sweep.options import SweepOptions

SOURCES = sorted((Path(__file__).parent.parent / "jaxvl").rglob("*.py"))
EVIL = "\x1b]52;c;Y3VybA==\x07 \x1b[31m \x9b2J \x7f\r\b \u202etxt.exe\u2066 \u2028 \udce9 \U000e0041 [bold]b[/bold] :dog:"


def clean(out: str) -> str:
    assert not terminal.OBEYED.search(out), ascii(out)
    return out


def test_nothing_prints_but_terminal():
    """`print` and rich's console are called in jaxvl/terminal.py alone; so are the ways around them."""
    others = {"Console", "print_exc", "print_exception", "print_stack", "basicConfig", "StreamHandler"}
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called == "print" or called.split(".")[-1] in others or re.search(r"std(out|err)(\.buffer)?\.write", called):
                wrong.append((path.name, called))
    assert wrong == [("terminal.py", "print"), ("terminal.py", "Console")]


def test_visible_keeps_text_and_json():
    draw = random.Random(0)
    points = [*range(0x180), *range(0x2000, 0x2070), 0x61C, 0xD800, 0xDFFF, 0x1F600, 0xE0001, 0xE007F, 0x4E2D]
    for _ in range(300):
        text = "".join(chr(draw.choice(points)) for _ in range(20))
        assert json.loads(clean(terminal.visible(json.dumps(text, ensure_ascii=False)))) == json.loads(json.dumps(text))
        assert "\n" not in terminal.visible(text, line=True)
    kept = "caf\u00e9\t\u4e2d\u6587 \U0001f468\u200d\U0001f469 \u05d0\u05d1 n\u0303\nsecond line"
    assert terminal.visible(kept) == kept


def test_lines_tables_bars_logs_and_warnings(capsys, monkeypatch):
    terminal.guard()
    terminal.guard()
    say(EVIL)
    terminal.tell(EVIL)
    terminal.table(EVIL, ("name", EVIL), [(EVIL, "1"), (f"{EVIL}\n", "2")], total=True)
    summary.print_values({f"val/r@1 {EVIL}": 0.5})
    log = logging.getLogger("jaxvl.somewhere")
    for handler in (logging.lastResort, logging.StreamHandler(sys.stderr)):  # where none was set, and as libraries set them
        monkeypatch.setattr(log, "callHandlers", handler.handle)
        try:
            raise ValueError(EVIL)
        except ValueError:
            log.exception("%s", EVIL)
    log.error("%d", EVIL)
    say(warnings.formatwarning(EVIL, UserWarning, EVIL, 1))
    assert warnings.formatwarning(EVIL, UserWarning, "f", 1).count("\\u001b") == 2
    out = capsys.readouterr()
    assert "[bold]b[/bold] :dog:" in clean(out.out) and clean(out.err).count("\\u001b]52;c") >= 7 and "Traceback" in out.err
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress(text=EVIL, total=3, unit=EVIL) as bar:
        bar.advance(note=EVIL)
        say(EVIL)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "")  # what rich itself draws with
    assert "\\u001b]52" in clean(shown) and ":dog:" in shown and "\x1b[31m" not in screen.getvalue()


def test_a_stream_that_cannot_print_a_letter(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    terminal.tell("caf\u00e9 \u4e2d")
    assert raw.getvalue() == b"caf\xe9 \\u4e2d\n"


def test_commands_and_their_errors(tmp_path, capsys, monkeypatch):
    """Names of shards in tables, names of files in errors, arguments that are none, and tracebacks."""
    name = EVIL.replace("/", "").encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    (tmp_path / f"{name}.tar").write_bytes(b"no tar")
    (tmp_path / name).mkdir()
    (tmp_path / name / "x.png").write_bytes(b"")
    (tmp_path / name / "captions.csv").write_text('image,text\n"x.png')
    for call in (
        ["data", "check", str(tmp_path / f"{name}.tar"), f"--indexes={tmp_path / 'i'}"],
        ["data", "check", str(tmp_path / f"{name}.tar"), f"--indexes={tmp_path / 'i'}", "--json"],
        ["data", "make", str(tmp_path / name), f"--out={tmp_path / 'o'}"],
        ["search", "query", str(tmp_path / name), "--text", "a"],
        ["data", "make", "x", "--out=y", f"--{EVIL}"],
        ["report", EVIL],
    ):
        try:
            assert cli.main(call) in (1, 2)
        except SystemExit as left:
            assert left.code == 2
        out = capsys.readouterr()
        assert "\\u001b]52;c" in clean(out.out) + clean(out.err), call
    monkeypatch.setitem(cli.RUN, "report", lambda *_: {}[EVIL])
    assert cli.main(["report", "x"]) != 0
    clean(capsys.readouterr().err)


def test_cells_of_a_sweep(tmp_path, capsys):
    """No text of results.csv or rows.csv is a formula; numbers stay numbers. The table of the terminal is clean."""
    formulas = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "-", EVIL]
    plain = ["a=1", "-0.5", "+1e-3", "", "1", "x-1"]
    rows = [
        results.Row(text, [results.Result(Record(text, text, None, {"k": text, "n": -2.5}, "failed", text), 3, {"m": -1.5})], {})
        for text in formulas + plain
    ]
    found = results.Found(SweepOptions(metric="m"), rows, {"k": "k", "n": "n"})
    for path in results.write_tables(tmp_path, found):
        with open(path, newline="") as file:
            _, *lines = csv.reader(file)
        for line, text in zip(lines, (text.replace("\r", "\n").replace("\udce9", "?") for text in formulas + plain), strict=True):
            assert line[0] == (f"'{text}" if text and text[0] in "=+-@\t\n" and text not in plain else text)
            assert not any(cell[:1] in tuple("=+@\t\r") and cell != "+1e-3" for cell in line)
    assert lines and "-1.5" in (tmp_path / "results.csv").read_text() and ",-2.5," in (tmp_path / "results.csv").read_text()
    results.print_found(tmp_path, found)
    assert "\\u001b]52" in clean(capsys.readouterr().out)
