"""Odd values under the keys of published configs, beside files that are sound: read as something that fits them, or refused in a sentence."""

import json
import random
import time
from pathlib import Path

import pytest

from jaxvl.interop import load, tensors
from jaxvl.interop.keys import KINDS
from jaxvl.interop.published import READERS

HF = Path(__file__).parent.parent / "fixtures" / "parity" / "hf"
FOLDERS = sorted(p for p in HF.iterdir() if p.is_dir())
LIMIT = 20.0  # seconds
VALUES = (
    0,
    1,
    3,
    -1,
    10**9,
    10**18,
    10**400,
    0.5,
    1e200,
    float("nan"),
    float("inf"),
    None,
    "x",
    "gelu",
    [],
    [2, 2],
    [2, 3],
    {},
    {"a": 1},
    True,
    False,
)


@pytest.mark.parametrize("seeds", [pytest.param(range(15), id="share"), pytest.param(range(15, 600), id="rest", marks=pytest.mark.long)])
def test_an_odd_value_is_read_or_refused_in_a_sentence(seeds):
    for seed in seeds:
        rng = random.Random(seed)
        folder = rng.choice(FOLDERS)
        config = json.loads((folder / "config.json").read_text())
        section = (
            config[rng.choice([name for name in config if name.endswith("_config")])]
            if config["model_type"] in ("clip", "siglip")
            else config
        )
        kind = KINDS[section.get("model_type", config["model_type"])]
        key, value = rng.choice([*section, *kind.read, *kind.only, "a_new_key"]), rng.choice(VALUES)
        if key == "model_type":
            value = rng.choice([*READERS, "mamba", ["vit"]])
        section[key] = value
        stored, begin = tensors.find(folder / "model.safetensors"), time.monotonic()
        try:
            load.match(load.describe(config, stored), stored)
        except load.Mismatch:
            pass  # which lists tensors, one a line
        except ValueError as error:
            assert len(str(error).splitlines()) == 1, f"seed {seed}: {key}={value!r}: {error}"
        assert time.monotonic() - begin < LIMIT, f"seed {seed}: {key}={value!r}"
