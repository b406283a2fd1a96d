"""Plans against what really happens: the memory of a real step, a compiler that dies or hangs, configs that cannot run where they are sent."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxvl import cli, config as configs
from jaxvl.assembly import program
from jaxvl.bench.step import compile_step, random_batch
from jaxvl.mesh import make_mesh, place
from jaxvl.plan import chips, fit, outside, shapes, tell
from jaxvl.plan.fit import Asked

QUICK = str(Path(__file__).resolve().parents[2] / "configs" / "clip_quickstart.py")
# Two layers, 17 tokens and no augmentation; enough rows that activations outweigh what a process takes for itself.
SMALL = ["train.batch_size=512", "image.depth=1", "tokenizer.vocab_size=512", "method.width=32"]


@pytest.fixture(scope="module")
def plan():
    """Of SMALL on eight forced devices, compiled in a process of its own."""
    return fit.make(configs.load(QUICK, SMALL), QUICK, chips.topology("cpu:8"), compiles=1, limit=600)


@pytest.fixture(scope="module")
def modelled():
    """Of SMALL on eight GPUs."""
    return fit.make(configs.load(QUICK, SMALL), QUICK, chips.topology("h100:8"), compiles=1, limit=1)


def high_water() -> int:
    """The most memory this process has had since it was last reset, in bytes."""
    return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the high-water mark of a process and takes it back"
)
def test_the_plan_is_within_15_percent_of_what_a_real_step_takes(plan):
    recipe = configs.read(configs.load(QUICK, SMALL))
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        parts = shapes.planned(recipe).parts
        run = program(parts, mesh, recipe.train.steps)
        step = compile_step(parts, mesh, 1)
        state = jax.jit(run.init, out_shardings=run.out_shardings[0])(jax.random.key(0))
        batch = place(random_batch(parts), mesh)
        jax.block_until_ready((state, batch))
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
        state, _ = jax.block_until_ready(step(state, batch))
        peak = high_water() - before
    live = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, batch)))
    assert live == sum(plan.held.values())
    assert live + peak / 8 == pytest.approx(plan.total, rel=0.15)
    assert plan.temporary > 3 * live  # or else the test could not fail


def test_the_model_from_shapes_is_near_the_compiler(plan, modelled):
    assert modelled.source.startswith("a model from shapes") and modelled.held == plan.held
    assert modelled.temporary == pytest.approx(plan.temporary, rel=0.5)
    # Of gradients the compiler moves what the shapes say; the losses gather embeddings besides.
    planned, compiled = (sum(c.bytes for c in p.collectives if c.kind == "all-reduce") for p in (modelled, plan))
    assert planned == pytest.approx(compiled, rel=0.1)
    assert {c.kind for c in plan.collectives} >= {"all-reduce", "all-gather"}


@pytest.mark.parametrize(("compiles", "fixed", "curve"), [(8, 100, 1.0), (12, 0, 1.4), (12, 300, 0.8)])
def test_the_search_ends_at_the_largest_batch(compiles, fixed, curve):
    need = lambda batch: round(fixed + batch**curve)
    asked = []

    def ask(batch):
        asked.append(batch)
        return Asked(need(batch), 0, (), "", {})

    for start in (64, 8 * 4000):
        found = fit.search(ask, start, need(start), fixed, 10_000, 8, compiles)
        best = max(b for b in range(8, 100_000, 8) if need(b) <= 10_000)
        assert best / fit.CLOSE - 8 <= found.largest <= best
        assert len(found.tried) <= compiles and all(b % 8 == 0 for b in asked)


def test_one_compile_searches_nothing():
    found = fit.search(lambda batch: pytest.fail("compiled"), 64, 164, 100, 1000, 8, 1)
    assert found == (64, {64: 164}, False)


def test_a_compiler_that_dies_or_hangs_is_told(monkeypatch):
    cpu, config = chips.topology("cpu:2"), configs.load(QUICK).to_dict()
    run = subprocess.run
    instead = lambda script: monkeypatch.setattr(
        outside.subprocess, "run", lambda command, **how: run([sys.executable, "-c", script], **how)
    )
    instead("import os; print('libtpu says no', flush=True); os.abort()")
    with pytest.raises(ValueError, match=r"(?s)killed by signal 6; its last words:\nlibtpu says no"):
        outside.compile_for(config, cpu, limit=60)
    instead("import time; time.sleep(60)")
    with pytest.raises(ValueError, match=r"took more than 0 s and was stopped.*--limit"):
        outside.compile_for(config, cpu, limit=0.2)
    monkeypatch.setattr(outside.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=r"pip install libtpu"):
        outside.compile_for(config, chips.topology("v5e:2x2"), limit=60)


def test_what_the_compiler_says_of_memory_is_read():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert outside.exceeded(said, 1) == 20.5 * 2**30
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (200M) exceeds available HBM (15.75G)."
    )
    assert outside.exceeded(early, 1) == 200 * 2**20 + 1
    assert outside.exceeded("RESOURCE_EXHAUSTED: something else", 1) == 0


@pytest.mark.parametrize(
    ("topology", "override", "words"),
    [
        ("v5:4x4", "", r"no chip is called 'v5'; did you mean 'v5[pe]'"),
        ("v5e:256", "", r"after v5e: come 2 sizes joined by x, as in v5e:4x4"),
        ("v5p:4x4", "", r"after v5p: come 3 sizes"),
        ("h100:", "", r"one number of devices, as in h100:8"),
        ("h100:8", "mesh.fsdp=3", r"config.mesh is .*does not fill 8 devices: 3 must divide"),
        ("h100:8", "train.batch_size=100", r"config.train.batch_size is 100; to be split over data\*fsdp = 8 it must be a multiple of 8"),
        (
            "h100:64",
            "image.width=99 --config.mesh.fsdp=64",
            r"(?s)cannot shard:\n .*params/image/.* of size 99 does not divide over fsdp = 64",
        ),
    ],
)
def test_what_cannot_be_planned_is_an_error_that_names_it(capsys, topology, override, words):
    overrides = [f"--config.{o}" for o in override.split(" --config.") if o]
    assert cli.main(["plan", f"--config={QUICK}", f"--topology={topology}", *overrides]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_plan_is_told_to_people_and_to_programs(capsys, plan, modelled):
    said = "\n".join(tell.lines(modelled))
    assert "FITS" in said and "a model from shapes alone" in said and "all-reduce" in said
    assert "compiled for forced CPU devices" in "\n".join(tell.lines(plan))
    full = modelled._replace(temporary=modelled.hbm, total=modelled.total - modelled.temporary + modelled.hbm)
    assert re.search(r"DOES NOT FIT: .* of 74.51 GiB; by estimate train.accumulate=2 would", "\n".join(tell.lines(full)))
    assert cli.main(["plan", f"--config={QUICK}", "--topology=h100:8", "--config.train.batch_size=64", "--compiles=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and found["batch"]["largest"] > 64 and found["total"] == sum(found["held"].values()) + found["temporary"]
