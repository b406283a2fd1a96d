"""Damaged files of a report stop no run: what can be read is kept, what cannot is set aside and told."""

import json
import os

import pytest

from jaxvl.report import goodput, metrics, page, samples
from jaxvl.report.window import Plan, Window

LINES = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
DAMAGE = (
    "{",
    "[]\n",
    "null\n",
    '{"loss": 1}\n',
    '{"step": "2"}\n',
    '{"step": true}\n',
    "\xff\xfe\n",
    "\0" * 40 + "\n",
    "[" * 100_000 + "\n",
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_log_keeps_the_lines_that_can_be_read(damage, tmp_path, capsys):
    path = tmp_path / metrics.METRICS
    text = "".join([LINES[0], damage, "\n" if not damage.endswith("\n") else "", *LINES[1:]])
    path.write_text(text, encoding="latin-1")
    metrics.mend(path, step=int)
    metrics.cut(path, 2)
    assert path.read_text() == "".join(LINES[:2])
    assert (tmp_path / f"{metrics.METRICS}.damaged").read_text(encoding="latin-1") == text
    assert "1 of 4 lines are damaged" in capsys.readouterr().err


def test_a_torn_last_line_is_no_damage(tmp_path, capsys):
    path = tmp_path / metrics.METRICS
    path.write_text("".join(LINES) + '{"st')
    metrics.mend(path, step=int)
    assert not list(tmp_path.glob("*.damaged")) and not capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[1]", "[{}]", '[{"began": "x"}]', "[" * 100_000, "null", "\0"])
def test_an_account_that_is_damaged_is_begun_anew(text, tmp_path, capsys):
    (tmp_path / "sessions.json").write_text(text)
    assert goodput.read_sessions(tmp_path) == []
    assert (tmp_path / "sessions.json.damaged").read_text() == text
    assert "sessions.json is damaged" in capsys.readouterr().err
    assert goodput.read_sessions(tmp_path) == []  # told once


@pytest.mark.parametrize("name", ["facts.json", "galleries.json", "sessions.json"])
@pytest.mark.parametrize("text", ["{", "[1]", '{"a": {"queries": [{}]}}', '{"a": 1}'])
def test_a_page_is_made_without_what_is_damaged(name, text, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / metrics.METRICS).write_text("".join(LINES))
    (tmp_path / "report" / name).write_text(text)
    assert page.write_report(tmp_path).stat().st_size > 1000


def test_samples_and_windows_of_a_damaged_run_go_on(tmp_path):
    (tmp_path / "samples-0.jsonl").write_text('{"step": 1, "row": 0, "ids": [1]}\n{"step": 2}\n')
    samples.open_samples(tmp_path, 0, 1, 2).close()
    assert samples.read_samples(tmp_path, 1) == {1: [1]}
    (tmp_path / "window.jsonl").write_text('{"step": 4, "rows": ["{", 3]}\n')
    window = Window(Plan(8, 1, 1, 0.0, 1, None), tmp_path / "window.jsonl", 4)
    window.close()


@pytest.mark.parametrize("name, line, told", [
    (metrics.METRICS, '{"loss": 1}', "its 'step' is None; it must be int"),
    (metrics.METRICS, '{"step": 1e400, "loss": 1}', "its 'step' is inf"),
    (metrics.METRICS, '{"step": 2, "loss": null}', "its 'loss' is None; it must be a number"),
    (metrics.METRICS, '{"step": 2, "val/i2t/r@1": {}}', "its 'val/i2t/r@1' is {}"),
    (metrics.METRICS, "[" * 5000, "nest|recursion"),
    ("report/bad-0.jsonl", '{"a": 1}', "its 'shard' is None; it must be str"),
    ("report/bad-0.jsonl", '{"shard": "x", "reason": [1]}', "its 'reason' is"),
])  # fmt: skip
def test_a_page_of_damaged_lines_is_refused_by_file_and_line(name, line, told, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / metrics.METRICS).write_text("".join(LINES[:1]))
    with open(tmp_path / name, "a") as file:
        file.write(line + "\n")
    number = 2 if name == metrics.METRICS else 1
    with pytest.raises(ValueError, match=rf"{name}, line {number}: .*({told})"):
        page.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("text", ['{"config": 5}', '{"versions": 3}'])
def test_facts_of_another_form_are_set_aside(text, tmp_path, capsys):
    (tmp_path / "report").mkdir()
    (tmp_path / metrics.METRICS).write_text('{"step": 1, "samples": 3}\n')
    (tmp_path / "report" / "facts.json").write_text(text)
    assert page.write_report(tmp_path).is_file() and "facts.json is damaged" in capsys.readouterr().err


def test_a_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / metrics.METRICS)
    with pytest.raises(OSError, match="no regular file"):
        metrics.read_metrics(tmp_path)


def test_what_has_no_number_is_legal_json():
    assert json.loads(metrics.encode({"a": float("nan"), "b": 1.5}, indent=2), parse_constant=pytest.fail) == {"a": "nan", "b": 1.5}
