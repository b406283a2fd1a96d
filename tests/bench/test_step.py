"""The step and loss benches measure the programs they claim to, and their numbers hang together."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxvl import config as configs
from jaxvl.bench import loss as loss_bench, sizes, step as step_bench, terms as terms_bench
from jaxvl.mesh import make_mesh
from jaxvl.tiny import shrink

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *(
        f"{tower}.{key}={value}"
        for tower in ("image", "text")
        for key, value in (("width", 16), ("depth", 1), ("heads", 2), ("mlp_dim", 32))
    ),
    *("data.image_size=32", "tokenizer.vocab_size=512", "tokenizer.context_length=8", "method.width=8", "train.batch_size=32"),
]


@pytest.fixture(autouse=True)
def _compile_in_haste():
    """What is tested is the accounting, which does not need fast programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tiny(*overrides):
    return configs.read(configs.load(str(step_bench.SMALL), [*TINY, *overrides]))


def test_step_reports_time_memory_and_the_price_of_accumulation():
    got = json.loads(json.dumps(step_bench.measure(tiny(), rounds=1)))
    assert got["devices"] == jax.device_count()
    plain, cut = got["steps"]
    assert (plain["accumulate"], cut["accumulate"]) == (1, 4)
    assert plain["wall_ratio"] == {"median": 1, "min": 1, "max": 1}
    assert math.isclose(cut["wall_ratio"]["median"], cut["step_s"]["median"] / plain["step_s"]["median"], rel_tol=0.5)
    assert got["step_s"]["min"] <= got["step_s"]["median"] <= got["step_s"]["max"]
    assert math.isclose(got["samples_per_s"] * got["step_s"]["median"], 32, rel_tol=1e-6)
    assert math.isclose(got["mfu"], got["samples_per_s"] * got["flops_per_sample"] / got["peak_flops"], rel_tol=1e-6)
    assert 0 < got["mfu"] < 1, "nothing is faster than the matrix products it is made of"
    assert got["flops_per_sample"] > 3 * 2 * 5 * 12 * 16**2, "at least the towers' square matrices, forward and backward"
    assert got["peak_memory_bytes"] > plain["temporary_bytes"] > 0
    assert got["compile_s"] == plain["compile_s"] > 0
    assert plain["argument_bytes"] * got["devices"] > 3 * 4 * got["parameters"], "parameters and two moments are the step's arguments"


def test_an_accumulated_config_is_compared_with_the_uncut_step():
    assert [step_bench.microbatches(b, 8) for b in (64, 16, 24, 8)] == [4, 2, 3, 1]
    recipe = tiny("train.accumulate=2")
    with pytest.raises(ValueError, match="--rounds is -1"):
        step_bench.measure(recipe, rounds=-1)
    parts = step_bench.assemble(recipe, step_bench.tokenizer(recipe))
    batch = step_bench.random_batch(parts)
    assert batch["image"].shape == (32, 32, 32, 3)
    assert batch["image"].dtype == "uint8"
    assert 0 < batch["tokens"].min() <= batch["tokens"].max() < 512


def test_a_step_is_compared_with_those_without_its_cheap_equivalents(monkeypatch):
    """Which programs are set against each other; what compiles them is replaced by bytes that tell which one it was asked for."""

    def compiled(parts, mesh, accumulate):
        o = parts.recipe.method
        size = 1000 * accumulate + 100 * (not o.fused) + 10 * (not o.shared_prefix) + (parts.method.features is None)
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=size, argument_size_in_bytes=1))

    monkeypatch.setattr(step_bench, "compile_step", compiled)
    config = shrink(configs.load(str(ROOT / "configs" / "lexvla_cc12m.py")))
    got = json.loads(json.dumps(step_bench.measure(configs.read(config), rounds=0)))
    rows = {row["name"]: (row["accumulate"], row["temporary_bytes_with"], row["temporary_bytes_without"]) for row in got["equivalents"]}
    assert rows == {
        "fused mapper": (1, 1000, 1100), "shared prompt prefix": (1, 1000, 1010), "features of frozen towers computed once": (2, 2000, 2001), "two-pass accumulation": (2, 2000, 1000),
    }  # fmt: skip
    assert got["equivalents"][0]["temporary_bytes_ratio"] == 1.1 and "step_s_with" not in got["equivalents"][0]
    assert not {"step_s", "samples_per_s", "peak_memory_bytes"} & got.keys()
    config.method.fused = False
    config.train.accumulate = 2
    rows = {
        row["name"]: (row["temporary_bytes_with"], row["temporary_bytes_without"])
        for row in step_bench.measure(configs.read(config), rounds=0)["equivalents"]
    }
    assert rows == {
        "shared prompt prefix": (2100, 2110),
        "features of frozen towers computed once": (2100, 2101),
        "two-pass accumulation": (2100, 1100),
    }


def test_times_are_compared_by_their_medians():
    row = lambda bytes_, seconds: {
        "accumulate": 1,
        "temporary_bytes": bytes_,
        "step_s": {"median": seconds},
        "cpu_s": {"median": 2 * seconds},
    }
    got = step_bench.compared("x", row(10, 2.0), row(30, 3.0))
    assert got["temporary_bytes_ratio"] == 3 and got["step_s_ratio"] == 1.5 and got["cpu_s_with"] == 4.0


def test_sizes_stand_for_a_prompt_and_its_words():
    recipe = configs.read(configs.load(str(ROOT / "configs" / "lexvla_cc12m.py")))
    made = sizes.tokenizer(recipe)
    assert len(made.lexicon.ids) == 17_182 and made.lexicon.ids.max() < made.vocab_size == 32_001
    assert (
        30 < made.prompt.head < 50
        and len(made.prompt.shared) == made.prompt.head - 1
        and made.prompt.head + made.prompt.tail < made.context_length
    )
    small = sizes.tokenizer(configs.read(configs.load(str(ROOT / "configs" / "lexvla_mini.py"))))
    assert (small.prompt.head, small.prompt.tail, small.vocab_size) == (4, 5, 8_192)


def test_loss_compares_both_implementations():
    got = json.loads(json.dumps(loss_bench.measure(batch=2048, timed_batch=64, width=16, rounds=1)))
    rows = {(row["loss"], row["impl"]): row for row in got["losses"]}
    assert set(rows) == {(loss, impl) for loss in ("infonce", "sigmoid") for impl in ("global", "ring")}
    for loss in ("infonce", "sigmoid"):
        assert rows[loss, "ring"]["memory_ratio"] >= 6
        assert math.isclose(rows[loss, "ring"]["value"], rows[loss, "global"]["value"], rel_tol=1e-5)
        assert rows[loss, "ring"]["wall_s"] > 0
    with pytest.raises(ValueError, match="takes neither --config"):
        loss_bench.main("configs/x.py", [], rounds=1)


def test_terms_are_weighed_and_what_can_run_apart_is_run():
    recipe = configs.read(shrink(configs.load(str(ROOT / "configs" / "tcl_small.py"))))
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        parts = step_bench.assemble(recipe, step_bench.tokenizer(recipe))
        assert {name: array.dtype.kind for name, array in step_bench.random_batch(parts).items()} == {
            "image": "u",
            "image_aug": "u",
            "tokens": "i",
        }
        found = terms_bench.measure(parts.method.terms(parts.spec), mesh, rounds=1, step_s=1e6)
    assert math.isclose(sum(row["flops_share"] for row in found.values()), 1)
    assert math.isclose(sum(row["flops_per_sample"] for row in found.values()), 3 * parts.method.flops(parts.spec))
    assert {name for name, row in found.items() if row["time_s"] is not None} == {"cma", "imc", "lmi"}
    assert all(row["temporary_bytes"] > 0 and 0 < row["time_share"] < 1 for row in found.values() if row["time_s"])
