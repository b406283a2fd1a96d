"""Hostile images under an address space of 1 GiB: pixels, those that Pillow makes too, or a reason; within seconds and a budget of bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxvl.data import pixels
from jaxvl.data.reasons import REASONS

LIMIT = 20  # seconds of an image
SLACK = 96 << 20  # bytes above the budget of a decoding: the file, rows on their way, what the allocator keeps
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(60), id="share"),
        pytest.param(range(60, 700), id="rest", marks=pytest.mark.long),
        pytest.param(range(-10, 0), id="largest", marks=pytest.mark.long),
    ],
)
def test_every_image_gives_its_pixels_or_a_reason(seeds):
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "data")))
    script = [sys.executable, str(Path(__file__).with_name("hostile_images.py")), str(seeds[0]), str(seeds[-1] + 1)]
    run = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"})
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"{lines[-1:]}: status {run.returncode}\n{run.stderr[-2000:]}"
    found = [line for line in lines if "came" in line]
    assert [line["seed"] for line in found] == list(seeds)
    for line in found:
        assert line["came"] == "pixels" or line["came"] in REASONS, line
        assert line["came"] == "pixels" or not line["sound"], line
        assert line["seconds"] < LIMIT and line["bytes"] < pixels.MEMORY + SLACK, line
        assert "not enough memory" not in line.get("detail", ""), line  # the budget refuses it before
        assert line.get("off", 0) < 2, line
    if seeds[0] >= 0:
        assert {"pixels", "bomb", "truncated", "corrupt"} <= {line["came"] for line in found}
