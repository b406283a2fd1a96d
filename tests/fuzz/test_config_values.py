"""Random keys of every recipe given hostile values: a recipe that was tried out on shapes, or one sentence that names the key."""

import random
import time
from pathlib import Path

import pytest

from jaxvl import config as configs

LIMIT = 20.0  # seconds
FILES = sorted(str(p) for p in (Path(__file__).parents[2] / "configs").glob("*.py"))
NUMBERS = ("nan", "inf", "-inf", "1e400", "-1", "0", "1", "7", "2147483648", "-2147483649", "99999999999999999999", "1e-30")
TEXTS = (
    "",
    "x" * 10_000,
    "\x1b[2J",
    "../../..",
    "None",
    "{",
    "('a',)",
    "[[[[",
    "(" * 500,
    "1_0",
    "0x10",
    "true",
    "\u202e",
    "nan,nan",
    "(1,2,3,4,5,6,7,8,9)",
)


def _attack(seed):
    rng = random.Random(seed)
    file = rng.choice(FILES)
    config = configs.load(file)
    key, value = rng.choice(list(configs.flat(config.to_dict()).items()))
    hostile = rng.choice(NUMBERS if isinstance(value, (int, float)) and rng.random() < 0.8 else (*NUMBERS, *TEXTS))
    begin = time.monotonic()
    try:
        configs.read(configs.override(config, [f"{key}={hostile}"]))
    except configs.ConfigError as error:
        assert str(error), (file, key, hostile)
    else:
        whole = isinstance(value, int) and not isinstance(value, bool)
        infinite = isinstance(value, float) and hostile in ("nan", "inf", "-inf", "1e400")
        assert not infinite and not (whole and len(hostile.strip("-")) > 9), (file, key, hostile)
    assert time.monotonic() - begin < LIMIT, (file, key, hostile)


@pytest.mark.parametrize("seeds", [pytest.param(range(20), id="share"), pytest.param(range(20, 250), id="rest", marks=pytest.mark.long)])
def test_values_are_taken_or_refused_by_name(seeds):
    for seed in seeds:
        _attack(seed)


@pytest.mark.parametrize("key", ["lora.targets", "optim.decay", "init.skip"])
@pytest.mark.parametrize("pattern", ["(", "(" * 5000, "a{99999999999999999999}"])
def test_a_pattern_that_cannot_be_compiled_names_its_key(key, pattern):
    config = configs.load(str(Path(__file__).parents[2] / "configs" / "clip_small.py"))
    with pytest.raises(configs.ConfigError, match=key.partition(".")[0] + ".*not a regular expression"):
        configs.read(configs.override(config, [f"{key}={pattern}"]))


@pytest.mark.parametrize("section", ["image", "text"])
def test_no_size_count_or_id_of_a_tower_is_negative(section):
    seen = set()
    for file in FILES:
        kind = configs.load(file)[section].get("kind", "")
        for key, value in configs.load(file)[section].items():
            if isinstance(value, int) and not isinstance(value, bool) and (kind, key) not in seen:
                seen.add((kind, key))
                with pytest.raises(configs.ConfigError, match=rf"{section}.{key} is -1"):
                    configs.read(configs.load(file, [f"{section}.{key}=-1"]))
    assert len(seen) >= 10
