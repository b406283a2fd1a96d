"""The stream: the same batches for any hosts, workers and threads, exact resume, choices, substitutes, a clean end."""

import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxvl.data import stream
from jaxvl.data.dataset import captions
from jaxvl.data.reasons import REASONS
from jaxvl.data.source import Record
from jaxvl.data.stream import BadData, Batch, DataOptions, eval_batches, open_data, read_samples, train_batches
from tests.data.shards import Letters, members, number_of, options, picture, tar_bytes, write_shards

COUNTS = (7, 5, 9, 1, 8)  # 30 samples
BROKEN = (3, 11, 12, 20)  # of which these cannot be decoded


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("whole"), COUNTS)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same samples, some with an image that the index cannot know to be bad."""
    folder, first = tmp_path_factory.mktemp("broken"), 0
    for shard, count in enumerate(COUNTS):
        entries = [m for n in range(first, first + count) for m in members(n)]
        entries = [(name, b"no image" if name.endswith("png") and int(name[:6]) in BROKEN else data) for name, data in entries]
        (folder / f"{shard:04d}.tar").write_bytes(tar_bytes(entries))
        first += count
    return str(folder)


def take(batches: Iterator[Batch], number: int) -> list[Batch]:
    """So many batches, and the end of the iterator."""
    taken = [next(batches) for _ in range(number)]
    batches.close()
    return taken


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.arrays.keys() == b.arrays.keys() and a.bad == b.bad
        for name, array in a.arrays.items():
            np.testing.assert_array_equal(array, b.arrays[name])
            assert array.dtype == b.arrays[name].dtype
        np.testing.assert_array_equal(a.ids, b.ids)


def assert_resumes_everywhere(make: Callable[[int], Iterator[Batch]], batch_size: int, number: int) -> None:
    """make(start) restarted after each of `number` batches gives the rest of what make(0) gives."""
    every = take(make(0), number)
    for done in range(number):
        assert_same(take(make(done * batch_size), number - done), every[done:])


def glued(parts: list[list[Batch]]) -> list[Batch]:
    """Global batches out of the batches of several hosts."""
    return [
        Batch(
            {k: np.concatenate([b.arrays[k] for b in row]) for k in row[0].arrays},
            np.concatenate([b.ids for b in row]),
            sum((b.bad for b in row), ()),
        )
        for row in zip(*parts, strict=True)
    ]


def test_what_a_batch_holds(shards: str, tmp_path: Path) -> None:
    dataset = open_data(options(shards, tmp_path, label="class"))
    assert len(dataset) == 30 and dataset.classes == ("c0", "c1", "c2") and not list(dataset.bad)
    for batch in take(train_batches(dataset, Letters(), seed=0, start=0, batch_size=10), 3):
        image, tokens, label = (batch.arrays[k] for k in ("image", "tokens", "label"))
        assert (image.shape, image.dtype, tokens.shape, tokens.dtype) == ((10, 8, 8, 3), np.uint8, (10, 16), np.int32)
        assert label.dtype == np.int32 and batch.ids.dtype == np.int64 and batch.bad == ()
        numbers = [number_of(pixels) for pixels in image]
        assert numbers == batch.ids.tolist(), "the shards are numbered through"
        assert label.tolist() == [n % 3 for n in numbers]
        np.testing.assert_array_equal(tokens, Letters().encode_batch([f"number {n}" for n in numbers]))


@pytest.mark.parametrize("changes", [{}, {"captions": "random", "label": "class", "threads": 5, "chunk": 1, "group_shards": 0}])
def test_hosts_threads_and_pieces_do_not_matter(broken: str, tmp_path: Path, changes: dict) -> None:
    dataset = open_data(options(broken, tmp_path, **changes))
    alone = take(train_batches(dataset, Letters(), seed=4, start=6, batch_size=12), 6)
    assert sum(len(b.bad) for b in alone) > 4
    for hosts in (2, 4):
        edges = [12 * h // hosts for h in range(hosts + 1)]
        other = open_data(options(broken, tmp_path, **changes | {"chunk": 4, "threads": 1}))
        parts = [
            take(train_batches(other, Letters(), seed=4, start=6, batch_size=12, rows=(a, b)), 6) for a, b in itertools.pairwise(edges)
        ]
        assert_same(glued(parts), alone)


def test_workers_do_not_matter_and_go(broken: str, tmp_path: Path) -> None:
    seen = {p.pid for p in multiprocessing.active_children()}
    batches, shared = [], {p.name for p in Path("/dev/shm").iterdir()}
    for workers in (0, 2):
        dataset = open_data(options(broken, tmp_path, workers=workers, image_size=200))
        batches.append(take(train_batches(dataset, Letters(), seed=4, start=5, batch_size=12), 4))
    assert_same(*batches)
    assert {p.pid for p in multiprocessing.active_children()} == seen
    assert {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith("psm")} <= shared


ORPHANS = """
import multiprocessing, os, sys
from pathlib import Path
from jaxvl.data.stream import open_data, train_batches
from tests.data.shards import Letters, options

if __name__ == "__main__":
    dataset = open_data(options(sys.argv[1], Path(sys.argv[2]), workers=1))
    batches = train_batches(dataset, Letters(), seed=0, start=0, batch_size=4)
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid, 15)  # as a scheduler does to every process of a job
    for _ in range(50):
        next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_workers_outlive_a_sigterm_but_not_their_parent(shards: str, tmp_path: Path) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, script, shards, tmp_path], env=where, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == -9 and run.stdout.split(), run.stderr
    left = {int(pid) for pid in run.stdout.split()}
    for _ in range(100):
        left = {pid for pid in left if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]}
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"processes {left} outlive their parent")


def test_resume_at_every_batch(broken: str, tmp_path: Path) -> None:
    dataset = open_data(options(broken, tmp_path, captions="random"))
    assert_resumes_everywhere(lambda start: train_batches(dataset, Letters(), seed=1, start=start, batch_size=11), 11, 8)


def test_resume_of_a_mixture(shards: str, broken: str, tmp_path: Path) -> None:
    dataset = open_data(options((shards, broken), tmp_path, weights=(1.0, 3.0), max_bad_rate=0.5, chunk=50))
    make = lambda start: train_batches(dataset, Letters(), seed=1, start=start, batch_size=250)
    assert_resumes_everywhere(make, 250, 4)
    ids = np.concatenate([b.ids for b in take(make(0), 4)])
    assert (ids < 30).sum() == 250


def test_resume_within_a_batch_size_of_another_run(shards: str, tmp_path: Path) -> None:
    """The position is a number of samples: it may be continued with other batches."""
    dataset = open_data(options(shards, tmp_path))
    small = take(train_batches(dataset, Letters(), seed=1, start=0, batch_size=5), 12)
    large = take(train_batches(dataset, Letters(), seed=1, start=15, batch_size=15), 3)
    np.testing.assert_array_equal(np.concatenate([b.ids for b in small[3:]]), np.concatenate([b.ids for b in large]))


def test_each_epoch_has_every_sample_once(shards: str, tmp_path: Path) -> None:
    dataset = open_data(options(shards, tmp_path))
    ids = np.concatenate([b.ids for b in take(train_batches(dataset, Letters(), seed=2, start=0, batch_size=20), 6)])
    for epoch in ids.reshape(4, 30):
        assert sorted(epoch.tolist()) == list(range(30))
    assert len({tuple(epoch) for epoch in ids.reshape(4, 30).tolist()}) == 4


def test_substitutes_and_their_account(broken: str, tmp_path: Path) -> None:
    dataset = open_data(options(broken, tmp_path))
    for batch in take(train_batches(dataset, Letters(), seed=0, start=0, batch_size=30), 3):
        assert not set(batch.ids.tolist()) & set(BROKEN)
        assert [number_of(p) for p in batch.arrays["image"]] == batch.ids.tolist()
        assert {b.reason for b in batch.bad} == {"notimage"}
        assert {int(b.key) for b in batch.bad} == set(BROKEN), "each was met in its place"
        assert all(Path(b.shard).parent == Path(broken) for b in batch.bad)
        assert set(range(30)) - set(BROKEN) <= set(batch.ids.tolist())


def test_too_many_bad_samples_stop_the_run(broken: str, tmp_path: Path) -> None:
    batches = train_batches(open_data(options(broken, tmp_path, max_bad_rate=0.05)), Letters(), seed=0, start=0, batch_size=30)
    with pytest.raises(BadData, match=r"(?s)above data.max_bad_rate=0.05.*notimage.*0000.tar") as error:
        for number, _ in enumerate(batches):
            assert number < 60
    assert "jaxvl data check" in str(error.value)


def test_too_many_known_bad_samples_stop_it_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([*members(0), *members(1)[:1], *members(2)[1:2]]))
    with pytest.raises(BadData, match=r"(?s)2 of 3 samples are bad, above data.max_bad_rate=0.1:.*nocaption.*x.tar"):
        open_data(options(str(tmp_path / "x.tar"), tmp_path))
    dataset = open_data(options(str(tmp_path / "x.tar"), tmp_path, max_bad_rate=0.7))
    assert len(dataset) == 1 and {(b.key, b.reason) for b in dataset.bad} == {
        ("000001", "nocaption"),
        ("000002", "noimage"),
    }


def test_nothing_but_bad_samples_is_an_error_not_a_loop(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(
        tar_bytes([(name, b"<html>" if name.endswith("png") else data) for n in range(9) for name, data in members(n)])
    )
    batches = train_batches(
        open_data(options(str(tmp_path / "x.tar"), tmp_path, max_bad_rate=1.0)),
        Letters(),
        seed=0,
        start=0,
        batch_size=4,
    )
    with pytest.raises(BadData, match=r"(?s)sample \d and 16 substitutes.*notimage.*x.tar"):
        next(batches)


def test_errors_in_workers_are_the_readers_own(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([(name, b"no image" if name.endswith("png") else data) for n in range(9) for name, data in members(n)]))
    dataset = open_data(options(str(path), tmp_path, max_bad_rate=1.0, workers=1))
    with pytest.raises(BadData, match="16 substitutes"):
        next(train_batches(dataset, Letters(), seed=0, start=0, batch_size=4))


def test_a_shard_that_changes_under_the_run(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [4])
    dataset = open_data(options(str(tmp_path / "s"), tmp_path))
    (tmp_path / "s" / "0000.tar").write_bytes(tar_bytes([m for n in range(9) for m in members(n)]))
    with pytest.raises(OSError, match=r"0000.tar has changed since it was indexed"):
        next(train_batches(dataset, Letters(), seed=0, start=0, batch_size=4))


@pytest.mark.parametrize("how", ["first", "random", "longest"])
def test_choice_of_captions(shards: str, tmp_path: Path, how: str) -> None:
    dataset = open_data(options(shards, tmp_path, captions=how))
    batches = take(train_batches(dataset, Letters(), seed=0, start=0, batch_size=30), 8)
    chosen = [(bytes(row[row > 0].tolist()).decode(), n) for b in batches for row, n in zip(b.arrays["tokens"], b.ids, strict=True)]
    long = [text.startswith("also") for text, _ in chosen]
    assert all(text.split()[1].startswith(str(n)[:4]) for text, n in chosen)
    assert np.mean(long) == {"first": 0, "longest": 1}.get(how) or (how == "random" and 0.3 < np.mean(long) < 0.7)


def test_captions_in_a_field(tmp_path: Path) -> None:
    fields = [json.dumps({"alt": text}).encode() for text in ("one", ["two", "deux"], "", 4)]
    (tmp_path / "x.tar").write_bytes(
        tar_bytes([m for n, data in enumerate(fields) for m in ((f"{n}.png", picture(n)), (f"{n}.json", data))])
    )
    dataset = open_data(options(str(tmp_path / "x.tar"), tmp_path, caption_field="alt", captions="random"))
    found = list(read_samples(dataset, range(4)))
    assert [r.captions for r in found[:2]] == [("one",), ("two", "deux")]
    assert [(b.key, b.reason) for b in found[2:]] == [("2", "nocaption"), ("3", "nocaption")]
    with pytest.raises(BadData, match="nocaption"):
        open_data(options(str(tmp_path / "x.tar"), tmp_path))


def test_images_without_captions_and_number_labels(tmp_path: Path) -> None:
    entries = [
        (f"{n}.{e}", data) for n in range(6) for e, data in (("webp", picture(n, "WEBP", lossless=True)), ("cls", b"%d\n" % (n + 40)))
    ]
    (tmp_path / "x.tar").write_bytes(tar_bytes([*entries, ("6.webp", picture(6))]))
    dataset = open_data(options(str(tmp_path / "x.tar"), tmp_path, captions="none", label="cls"))
    batch = take(train_batches(dataset, None, seed=0, start=0, batch_size=7), 1)[0]
    assert set(batch.arrays) == {"image", "label"} and dataset.classes == ()
    assert batch.arrays["label"].tolist() == (batch.ids + 40).tolist()
    assert {(b.key, b.reason) for b in batch.bad} == {("6", "unlabelled")}
    with pytest.raises(ValueError, match=r"data\.label is 'species', a field that no sample"):
        open_data(options(str(tmp_path / "x.tar"), tmp_path, captions="none", label="species"))


@pytest.mark.parametrize("nothing", [b"", b" \n", b"\0\0", b"\xef\xbb\xbf\n", "\u200b\u3000".encode(), b"caf\xe9"])
def test_a_label_with_nothing_to_read_is_no_class(tmp_path: Path, nothing: bytes) -> None:
    """In KEY.cls and in a field, where all classes are taken and where labels are words."""
    labels = [b"cat", b"dog\n", nothing, b"\xef\xbb\xbfcat"]
    entries = [m for n, label in enumerate(labels) for m in ((f"{n}.png", picture(n)), (f"{n}.cls", label))]
    entries += [
        (f"{n}.json", json.dumps({"kind": label.decode("utf-8-sig", "ignore").strip() if n != 2 else " \ufeff"}).encode())
        for n, label in enumerate(labels)
    ]
    (tmp_path / "x.tar").write_bytes(tar_bytes(entries))
    for field in ("cls", "kind"):
        every = open_data(options(str(tmp_path / "x.tar"), tmp_path, captions="none", label=field, classes="all", max_bad_rate=0.5))
        assert every.classes == ("cat", "dog") and len(every) == 3 and [b.reason for b in every.bad] == ["unlabelled"]
        words = open_data(options(str(tmp_path / "x.tar"), tmp_path, captions="none", label=field))
        (batch,) = eval_batches(words, None, batch_size=4)
        assert words.classes == ("cat", "dog") and [(b.key, b.reason) for b in batch.bad] == [("2", "unlabelled")]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_has_every_good_sample_once_in_order(broken: str, tmp_path: Path, hosts: int) -> None:
    dataset, edges = open_data(options(broken, tmp_path, label="class")), [8 * h // hosts for h in range(hosts + 1)]
    parts = [list(eval_batches(dataset, Letters(), batch_size=8, rows=(a, b), captions=3)) for a, b in itertools.pairwise(edges)]
    batches = glued(parts)
    assert len(batches) == 4
    whole = {k: np.concatenate([b.arrays[k] for b in batches]) for k in batches[0].arrays}
    ids, good = np.concatenate([b.ids for b in batches]), [n for n in range(30) if n not in BROKEN]
    assert ids[whole["valid"]].tolist() == good and (ids[~whole["valid"]] == -1).all() and len(ids) == 32
    assert [number_of(p) for p in whole["image"][whole["valid"]]] == good
    assert whole["captions"].tolist() == [2 if n in good else 0 for n in range(32)]
    texts = Letters().encode_batch([t for n in good for t in (f"number {n}", f"also {n} in more words")]).reshape(len(good), 2, -1)
    np.testing.assert_array_equal(whole["tokens"][whole["valid"], :2], texts)
    assert not whole["tokens"][:, 2].any() and not whole["tokens"][~whole["valid"]].any()
    assert whole["label"][whole["valid"]].tolist() == [n % 3 for n in good]
    assert sorted(int(b.key) for batch in batches for b in batch.bad) == sorted(BROKEN)


def test_closing_leaves_no_threads(shards: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    batches = train_batches(open_data(options(shards, tmp_path)), Letters(), seed=0, start=0, batch_size=6)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    for _ in range(100):
        if not set(threading.enumerate()) - before:
            return
        time.sleep(0.05)
    raise AssertionError(f"left behind: {set(threading.enumerate()) - before}")


def test_samples_and_captions_as_they_are(shards: str, tmp_path: Path) -> None:
    dataset = open_data(options(shards, tmp_path))
    records = list(read_samples(dataset, [29, 0, 7]))
    assert [r.key for r in records if isinstance(r, Record)] == ["000029", "000000", "000007"]
    assert records[0].image == picture(29) and records[0].meta["class"] == "c2"
    assert list(captions(dataset, 3)) == ["number 0", "number 10", "number 20"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, r"data.source is ''"),
        ({"source": ("a", "")}, r"data.source is"),
        ({"source": "nowhere/*.tar"}, r"'nowhere/\*.tar' matches no file"),
        ({"weights": (1.0, 2.0)}, r"data.weights has 2 entries for 1"),
        ({"captions": "best"}, r"data.captions is 'best'; it must be first, random, longest, optional or none"),
        ({"chunk": 0}, r"data.chunk is 0"),
        ({"workers": -2}, r"data.workers is -2"),
        ({"max_bad_rate": 1.5}, r"data.max_bad_rate is 1.5; it must be from 0.0 to 1.0"),
        ({"image_size": 0}, r"data.*size is 0"),
        ({"crop_scale": (0.0, 1.0)}, r"data.crop_scale is \(0.0, 1.0\)"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(DataOptions(**{"source": "x.tar", "cache": str(tmp_path)} | changes))


def test_a_share_for_nothing_is_an_error(shards: str, tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(b"")
    source = (shards, str(tmp_path / "empty.tar"))
    assert len(open_data(options(source, tmp_path, max_bad_rate=0.2))) == 30
    with pytest.raises(BadData, match=r"gives .*empty\.tar a share, but none of its samples"):
        open_data(options(source, tmp_path, weights=(1.0, 1.0), max_bad_rate=0.2))


def test_the_same_shard_twice_is_an_error(shards: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0000.tar is in data.source .* and again in"):
        open_data(options((shards, shards + "/0000.tar"), tmp_path))


@pytest.mark.parametrize("rows", [(0, 0), (4, 2), (0, 9), (-1, 3)])
def test_rows_outside_the_batch(shards: str, tmp_path: Path, rows: tuple[int, int]) -> None:
    dataset = open_data(options(shards, tmp_path))
    with pytest.raises(ValueError, match="of a global batch of 8"):
        train_batches(dataset, Letters(), seed=0, start=0, batch_size=8, rows=rows)


def test_every_reason_that_is_raised_is_known() -> None:
    folder = Path(stream.__file__).parent
    word = re.compile(r"""(?:Undecodable|Uncaptioned|Bad|Damage)\((?:[^()\n]*, )?"(\w+)"(?: if .+ else "(\w+)")?""")
    raised = {w for f in folder.glob("*.py") for found in word.findall(f.read_text()) for w in found if w}
    assert {"blank", "corrupt", "bomb", "notimage"} <= raised
    assert raised <= set(REASONS), raised - set(REASONS)
