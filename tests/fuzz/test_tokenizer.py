"""Damage in the files that decide a run's ids and classes: refused by name where a checkpoint has sealed them, and read without a crash where none has."""

import random
import shutil
import time

import pytest

from jaxvl import manifest, seal
from jaxvl.data.text import TokenizerOptions, load_tokenizer, train_tokenizer
from jaxvl.manifest import DamagedError

LIMIT = 20.0  # seconds
CAPTIONS = ["a small red boat on the lake", "two boats, one lake", "the old man and the sea", "Ein Bär läuft"] * 5
OPTIONS = TokenizerOptions(vocab_size=300 + 256, context_length=12)
WORDS = TokenizerOptions(name="words", context_length=12, lexicon="all")
TOLD = (ValueError, OSError)


@pytest.fixture(scope="module", params=[OPTIONS, WORDS], ids=["pieces", "words"])
def base(request, tmp_path_factory):
    """A run with a tokenizer and classes, and a checkpoint of no arrays that has sealed them."""
    folder, options = tmp_path_factory.mktemp("run"), request.param
    train_tokenizer(CAPTIONS, options).save(folder / "tokenizer")
    (folder / "classes.json").write_text('{"classes": ["x", "y"], "parents": [[0, 0]]}')
    target = manifest.step_folder(folder / "checkpoints", 8)
    target.mkdir(parents=True)
    manifest.write(target, 8, {"files": seal.stamp(folder)}, {}, {})
    return folder, options


def _flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 16))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _insert(data, rng):
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.randbytes(rng.randrange(1, 40)), b"[" * 10**5, b"9" * 5000, b"null", b"\0", b"-1")) + data[at:]


def _swap(data, rng):
    """Two stretches of equal length change places: valid JSON, often, of another meaning."""
    n = rng.randrange(1, 12)
    i, j = sorted(rng.randrange(len(data) - n) for _ in range(2))
    return data if j < i + n else data[:i] + data[j : j + n] + data[i + n : j] + data[i : i + n] + data[j + n :]


DAMAGE = (_flip, _flip, _flip, _flip, _insert, _swap, _swap, lambda data, rng: data[: rng.randrange(len(data))])


def _ids(options, folder=None):
    return load_tokenizer(options, folder).encode_batch(CAPTIONS[:4]).tolist()


@pytest.mark.parametrize("seeds", [pytest.param(range(25), id="share"), pytest.param(range(25, 300), id="rest", marks=pytest.mark.long)])
def test_no_damage_changes_ids_unseen_or_hangs(seeds, base, tmp_path):
    run, options = base
    want = _ids(options, run / "tokenizer")
    files = [p.relative_to(run) for p in sorted(run.rglob("*")) if p.is_file() and "checkpoints" not in p.parts]
    for seed in seeds:
        rng = random.Random(seed)
        folder = shutil.copytree(run, tmp_path / str(seed))
        path = folder / rng.choice([*files, *[f for f in files if f.name == "tokenizer.json"] * 3])
        before = path.read_bytes()
        path.write_bytes(rng.choice(DAMAGE)(before, rng))
        begin = time.monotonic()
        try:
            seal.check(folder)
            assert path.read_bytes() == before, f"seed {seed}: {path.name} was changed and is not refused"
            assert _ids(options, folder / "tokenizer") == want
        except DamagedError as error:
            assert path.name in str(error), f"seed {seed}: {error}"
        # Where no checkpoint has sealed it yet, or it is someone else's: any ids, or one sentence that says where.
        for given in ((options, folder / "tokenizer"), (options._replace(name=str(folder / "tokenizer"), lexicon=""),)):
            try:
                _ids(*given)
            except TOLD as error:
                assert len(str(error).splitlines()) == 1, f"seed {seed}: {error}"
        assert time.monotonic() - begin < LIMIT, f"seed {seed}"
        shutil.rmtree(folder)
