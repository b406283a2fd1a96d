"""Damage at random places of a checkpoint folder: the true bits of a step, or a refusal by name, within seconds."""

import random
import shutil
import time

import odd_checkpoints as odd
import pytest

from jaxvl import manifest
from jaxvl.manifest import DamagedError
from jaxvl.restore import restore

LIMIT = 20.0  # seconds


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "checkpoints"
    odd.save(folder)
    return folder


def _flip(path, rng):
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(rng.choice((1, 1, 1, 16))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _cut(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) + 1)])


def _insert(path, rng):
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    path.write_bytes(data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:])


def _swap(path, rng):
    other = rng.choice([p for p in path.parent.parent.rglob("*") if p.is_file() and p != path])
    path.write_bytes(other.read_bytes())


def _resealed(path, rng):
    """A random field of a manifest replaced by a random value, hashed anew."""
    if path.name != manifest.FILE:
        return _flip(path, rng)
    value = rng.choice((None, True, -1, 0, 2**40, 1e300, "x", "../x", [], {}, [[]], {"x": 1}))

    def change(body):
        node, key = body, rng.choice(list(body))
        while isinstance(node[key], dict) and node[key] and rng.random() < 0.6:
            node, key = node[key], rng.choice(list(node[key]))
        node[key] = value

    return odd.forge(path.parent, change)


ATTACKS = (_flip, _flip, _cut, _insert, _swap, _resealed, lambda path, rng: path.unlink(), lambda path, rng: path.rename(f"{path}x"))


@pytest.mark.parametrize("seeds", [pytest.param(range(40), id="share"), pytest.param(range(40, 600), id="rest", marks=pytest.mark.long)])
def test_no_attack_loads_other_bits_or_hangs(seeds, base, tmp_path):
    for seed in seeds:
        rng = random.Random(seed)
        folder = shutil.copytree(base, tmp_path / str(seed), symlinks=True)
        step = folder / f"{rng.choice((48, 48, 44)):08d}"
        files = sorted(p for p in step.rglob("*") if p.is_file())
        if rng.random() < 0.15:
            name = rng.choice(list(odd.ODD))
            odd.ODD[name](folder / "00000048")
        else:
            rng.choice(ATTACKS)(rng.choice([*files, *([step / manifest.FILE] * 3)]), rng)
        begin = time.monotonic()
        try:
            found = restore(folder, odd.abstract())
            assert odd.same(found.state, found.step), f"seed {seed}: step {found.step} has other bits"
        except DamagedError:
            pass
        assert time.monotonic() - begin < LIMIT, f"seed {seed}"
        shutil.rmtree(folder)
