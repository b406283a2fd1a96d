import json
import math
import struct
import sys
import types

import pytest
from hypothesis import given, settings, strategies as st

from jaxvl.report import metrics


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.one_of(st.floats(), st.integers(), st.text(max_size=6).filter(lambda s: s not in ("nan", "inf", "-inf"))),
    )
)
def test_a_line_gives_back_every_bit(row):
    line = metrics.encode(row)
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not legal JSON"))
    assert "\n" not in line
    back = metrics.decode(line)
    assert list(back) == list(row)
    for old, new in zip(row.values(), back.values(), strict=True):
        same = struct.pack("d", old) == struct.pack("d", new) if isinstance(old, float) and not math.isnan(old) else old == new
        assert type(old) is type(new) and (same or (math.isnan(old) and math.isnan(new)))


def test_a_resumed_file_reads_as_one_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for first, killed_at, restored in ((0, 7, 0), (0, 9, 4), (4, 6, 6), (6, 10, 10)):
        metrics.cut(path, first)
        writer = metrics.jsonl_writer(path)
        for step in range(first + 1, killed_at + 1):
            writer.write(step, {"loss": step / 3})
        writer.close()
        if killed_at < 10:
            with open(path, "a") as file:
                file.write('{"step": 99, "lo')  # the line that was being written at the kill
        metrics.cut(path, restored)
    assert metrics.read_metrics(tmp_path) == [{"step": s, "loss": s / 3} for s in range(1, 11)]
    assert metrics.read_metrics(tmp_path / "nowhere") == []


def test_damage_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step":\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        metrics.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="no JSON object"):
        metrics.cut(tmp_path / "metrics.jsonl", 3)


def test_a_full_disk_is_an_error_not_a_hole():
    writer = metrics.jsonl_writer("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        writer.write(1, {"loss": 0.5})


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.json"
    metrics.write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        metrics.write_atomic(path, "new \ud800")
    assert path.read_text() == "old"


def events(folder):
    """(step, {name: value} or "start") of every event in the TensorBoard files of a folder, oldest file first."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                yield event.step, "start"
            elif event.HasField("summary"):
                yield event.step, {v.tag: v.simple_value for v in event.summary.value}


def test_tensorboard_hides_what_a_resume_repeats(tmp_path):
    for first in (0, 2):
        writer = metrics.tensorboard_writer(tmp_path, first)
        for step in range(first + 1, first + 4):
            writer.write(step, {"loss": 0.5 * step, "val/i2t/r@1": 0.25})
        writer.flush()
        writer.close()
    found = list(events(tmp_path))
    second = [i for i, (_, what) in enumerate(found) if what == "start"][-1]
    assert found[second][0] == 3  # everything from step 3 on is superseded
    kept = [e for e in found[:second] if e[1] != "start" and e[0] < 3] + found[second + 1 :]
    assert [e for e in kept if "loss" in e[1]] == [(s, {"loss": 0.5 * s}) for s in range(1, 6)]
    assert (5, {"val/i2t/r_at_1": 0.25}) in kept


def test_wandb_goes_on_with_the_run_it_began(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        metrics.need_wandb("project")

    calls = []
    log = lambda values, step: calls.append((step, values))
    run = types.SimpleNamespace(id="abc", log=log, finish=lambda: calls.append("finish"))
    fake = types.SimpleNamespace(init=lambda **kw: calls.append((kw["project"], kw["id"], kw["resume"])) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        writer = metrics.wandb_writer("project", tmp_path, "seed: 0")
        writer.write(3, {"loss": 1.0})
        writer.close()
    assert calls == [
        ("project", None, "allow"),
        (3, {"loss": 1.0}),
        "finish",
        ("project", "abc", "allow"),
        (3, {"loss": 1.0}),
        "finish",
    ]
