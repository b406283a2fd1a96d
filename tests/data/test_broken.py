"""Broken shards: what is whole comes out, the rest does not, all counts, nothing crashes, hangs or eats memory.

JAXVL_BROKEN_DIR names a folder with manifest.json, {"shards": [{file, problem, expected, good_keys, bad_keys,
free_keys}]}. By default broken_shards.py makes one.
"""

import collections
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxvl.data import tools
from jaxvl.data.source import Record, Want
from jaxvl.data.stream import BadData, eval_batches, open_data, read_samples, train_batches
from tests.data.broken_shards import write
from tests.data.shards import Letters, options

pytestmark = pytest.mark.broken
SECONDS = 300  # for any one of these tests
MEMORY = 1 << 29  # bytes above what the process had; the bombs among the shards would take gigabytes


class Entry(NamedTuple):
    path: str
    problem: str
    good: frozenset[str]
    bad: frozenset[str]
    free: frozenset[str]


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    folder = Path(
        os.environ["JAXVL_BROKEN_DIR"] if os.environ.get("JAXVL_BROKEN_DIR") else write(tmp_path_factory.mktemp("broken") / "shards")
    )
    listed = json.loads((folder / "manifest.json").read_text())["shards"]
    assert listed, f"{folder} lists no shards"
    return [
        Entry(
            str(folder / s["file"]),
            s.get("problem", ""),
            *(frozenset(map(str, s.get(k) or ())) for k in ("good_keys", "bad_keys", "free_keys")),
        )
        for s in listed
    ]


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Fail if the process's peak of resident memory in here is more than MEMORY above what it had."""
    status = Path("/proc/self/status")
    kilobytes = lambda name: int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    yield
    taken = (kilobytes("VmHWM") - before) * 1024
    assert taken < MEMORY, f"took {taken:,} bytes"


def delivered_by_eval(path: str, folder: Path) -> tuple[collections.Counter, collections.Counter]:
    """Keys delivered and keys reported bad, of one shard; the sums of both are checked against the index."""
    try:
        dataset = open_data(options(path, folder, max_bad_rate=1.0))
    except BadData as error:
        assert path in str(error) or "0 of 0" in str(error), "the error names neither reason nor shard"
        found = tools.known_counts(tools.open_sources([path], "", str(folder / "cache"))[0])[0]
        assert found.good == 0
        return collections.Counter(), collections.Counter(key for keys in found.bad.values() for key in keys)
    known = [b for b in dataset.bad if b.key]
    delivered, bad = collections.Counter(), collections.Counter(b.key for b in known)
    for batch in eval_batches(dataset, Letters(), batch_size=8):
        ids = batch.ids[batch.arrays["valid"]]
        delivered.update(r.key for r in read_samples(dataset, ids, Want(image=False)) if isinstance(r, Record))
        bad.update(b.key for b in batch.bad)
    assert delivered.total() + bad.total() == len(dataset) + len(known)
    return delivered, bad


def test_each_shard_alone(entries: list[Entry], tmp_path: Path) -> None:
    wrong, free = [], collections.Counter()
    folders = {Path(e.path).parent for e in entries} | {tmp_path}
    before = {p for folder in folders for p in folder.iterdir()}
    with bounded_memory():
        for entry in entries:
            delivered, reported = delivered_by_eval(entry.path, tmp_path)
            lost, leaked = sorted(entry.good - set(delivered)), sorted(entry.bad & set(delivered))
            if lost or leaked:
                wrong.append(f"{entry.path} ({entry.problem}): good but not delivered {lost}, bad but delivered {leaked}")
            free.update("delivered" if key in delivered else "refused" if key in reported else "not in the file" for key in entry.free)
    print(f"{len(entries)} shards, free keys: {dict(free)}")
    assert not wrong, "\n".join(wrong)
    assert {p for folder in folders for p in folder.iterdir()} - before == {tmp_path / "cache"}, "names in a tar lead nowhere"


def test_check_adds_up_shard_by_shard(entries: list[Entry], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths, cache = [e.path for e in entries], str(tmp_path / "cache")
    tools.index(paths, json=True, cache=cache)
    indexed = json.loads(capsys.readouterr().out)["shards"]
    tools.check(paths, json=True, cache=cache)
    checked = json.loads(capsys.readouterr().out)["shards"]
    tools.check(paths, json=True, cache=cache, record=True)
    capsys.readouterr()
    tools.index(paths, json=True, cache=cache)
    recorded = json.loads(capsys.readouterr().out)["shards"]
    for entry, before, after, kept in zip(entries, indexed, checked, recorded, strict=True):
        total = before["good"] + sum(map(len, before["bad"].values()))
        assert after["good"] + sum(map(len, after["bad"].values())) == total, entry
        kept["bad"], after["bad"] = ({reason: sorted(keys) for reason, keys in c["bad"].items()} for c in (kept, after))
        assert kept == after, f"{entry.path}: what was recorded is not what was found"
        assert after["good"] >= len(entry.good), entry
        if entry.good or total:
            delivered, _ = delivered_by_eval(entry.path, tmp_path)
            assert delivered.total() == after["good"], entry


def test_all_shards_in_training(entries: list[Entry], tmp_path: Path) -> None:
    with bounded_memory():
        dataset = open_data(options(tuple(e.path for e in entries), tmp_path, max_bad_rate=1.0, chunk=8))
        batches = train_batches(dataset, Letters(), seed=5, start=0, batch_size=64)
        delivered = set()
        for _, batch in zip(range(-(-len(dataset) // 64)), batches, strict=False):  # an epoch: each good sample has its place
            assert batch.arrays["image"].shape == (64, 8, 8, 3)
            shards = (dataset.starts.searchsorted(batch.ids, "right") - 1).tolist()
            keys = (r.key for r in read_samples(dataset, batch.ids, Want(image=False)) if isinstance(r, Record))
            delivered |= {(entries[s].path, key) for s, key in zip(shards, keys, strict=True)}
        batches.close()
    wanted = {(e.path, key) for e in entries for key in e.good}
    refused = {(e.path, key) for e in entries for key in e.bad}
    assert not wanted - delivered
    assert not refused & delivered


def test_shards_with_nothing_usable_stop_with_reasons(entries: list[Entry], tmp_path: Path) -> None:
    """No usable sample in the index, or none that decodes: training says so, and does not look forever."""
    for entry in (e for e in entries if not e.good and not e.free):
        with pytest.raises(BadData, match=r"none can be used|substitutes|max_bad_rate"):
            batches = train_batches(open_data(options(entry.path, tmp_path)), Letters(), seed=0, start=0, batch_size=64)
            next(batches)
