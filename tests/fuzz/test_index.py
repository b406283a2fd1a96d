"""Damage to what is kept about shards: the same samples and classes, or a refusal that says what to do."""

import random
import time
import warnings

import numpy as np
import pytest

from jaxvl.data.stream import open_data, read_samples
from jaxvl.data.tarsource import _open
from tests.data.shards import options, write_shards

LIMIT = 20.0  # seconds


def _flip(data, rng, _):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 16))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


ATTACKS = (
    _flip,
    _flip,
    _flip,
    lambda data, rng, _: data[: rng.randrange(len(data))],
    lambda data, rng, _: data + rng.randbytes(rng.randrange(1, 60)),
    lambda data, rng, _: bytes(len(data)),
    lambda data, rng, other: other,
    lambda data, rng, other: data[: len(data) // 2] + other[len(other) // 2 :],
)


def _found(dataset):
    records = read_samples(dataset, np.arange(len(dataset)))
    return dataset.classes, [(r.key, r.image, r.captions, r.meta) for r in records], sorted(dataset.bad)


@pytest.mark.parametrize("seeds", [pytest.param(range(40), id="share"), pytest.param(range(40, 300), id="rest", marks=pytest.mark.long)])
def test_no_kept_file_changes_samples_or_classes(seeds, tmp_path):
    write_shards(tmp_path / "s", [4, 3, 5])
    changes = ({"label": "class"}, {"label": "class", "classes": "all"}, {"label": "class", "classes": "first"})
    opened = lambda n: open_data(options(str(tmp_path / "s"), tmp_path, **changes[n]))
    true = [_found(opened(n)) for n in range(3)]
    folder = tmp_path / "cache" / "index"
    good = {path: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".idx", ".json", ".npz")}
    assert len(good) >= 5
    for seed in seeds:
        rng = random.Random(seed)
        number, path = rng.randrange(3), rng.choice(list(good))
        dataset = opened(number) if rng.random() < 0.5 else None  # in the midst of a run, or before it
        path.write_bytes(rng.choice(ATTACKS)(good[path], rng, rng.choice([data for other, data in good.items() if other != path])))
        _open.cache_clear()
        begin = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*damaged")
                assert _found(dataset or opened(number)) == true[number], f"seed {seed}"
        except OSError as error:
            assert "open them again" in str(error), f"seed {seed}"
        assert time.monotonic() - begin < LIMIT, f"seed {seed}"
        for path, data in good.items():
            path.write_bytes(data)
