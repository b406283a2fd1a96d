"""A TPU that nobody has: what libtpu makes of a step. Skipped where libtpu is not installed (pip install '.[tpu-plan]')."""

import importlib.util
import os
from pathlib import Path

import pytest

from jaxvl import config as configs
from jaxvl.plan import chips, fit, outside

QUICK = str(Path(__file__).resolve().parents[2] / "configs" / "clip_quickstart.py")
pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")), reason="libtpu is not installed: " + outside.ABSENT
)


def test_a_step_is_compiled_for_an_absent_tpu():
    plan = fit.make(configs.load(QUICK), QUICK, chips.topology("v5e:2x4"), compiles=1, limit=1200)
    assert "libtpu" in plan.source and plan.seconds["compile"] > 0 and plan.fits
    assert plan.total >= sum(plan.held.values())  # tiles of 8 x 128 make arguments larger than their shapes
    reduced = sum(c.bytes for c in plan.collectives if c.kind == "all-reduce")
    assert reduced == pytest.approx(plan.held["params"], rel=0.1)  # of float32 towers, every gradient once


def test_what_is_more_than_the_memory_is_a_plan_that_does_not_fit():
    plan = fit.make(configs.load(QUICK, ["train.batch_size=4194304"]), QUICK, chips.topology("v5e:2x4"), compiles=1, limit=1200)
    assert plan.fits is False and plan.total > plan.hbm and plan.temporary > 0
    assert any("gave up" in note for note in plan.notes)
