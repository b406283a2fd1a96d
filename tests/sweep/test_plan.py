"""What a sweep() may say, and the trials it means."""

import math
from pathlib import Path

import pytest

from jaxvl.sweep import Choice, Integer, Uniform, options, plan
from jaxvl.sweep.options import SweepError

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "configs" / "clip_quickstart.py"
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.py"))


def write(folder: Path, body: str) -> str:
    """A sweep's file with this dict."""
    file = folder / "sweep.py"
    file.write_text(f"from jaxvl.sweep import Choice, Integer, Uniform\ndef sweep():\n    return dict(config={str(RECIPE)!r}, **{body})\n")
    return str(file)


@pytest.mark.parametrize("plain, says", [
    ([], "must return a dict"),
    ({"seeds": (0,)}, "metric is missing"),
    ({"metric": "val/x", "seed": (0,)}, "did you mean 'seeds'"),
    ({"metric": "val/x"}, "nothing to vary"),
    ({"metric": "val/x", "seeds": (0, 0)}, "seeds is (0, 0)"),
    ({"metric": "val/x", "seeds": 3}, "seeds is 3"),
    ({"metric": "val/x", "seeds": (0,), "mode": "most"}, "mode is 'most'"),
    ({"metric": "val/x", "seeds": (0,), "pick": "first"}, "pick is 'first'"),
    ({"metric": "val/x", "seeds": (0,), "keep": 0.0}, "keep is 0.0"),
    ({"metric": "val/x", "seeds": (0,), "keep_least": 1}, "keep_least is 1"),
    ({"metric": "val/x", "seeds": (0,), "trials": 3}, "trials is 3"),
    ({"metric": "val/x", "space": {"a": Uniform(0, 1)}}, "trials is 0"),
    ({"metric": "val/x", "space": {"a": Uniform(1, 1)}, "trials": 1}, "low must be below high"),
    ({"metric": "val/x", "space": {"a": Uniform(0, 1, log=True)}, "trials": 1}, "low must be above 0"),
    ({"metric": "val/x", "space": {"a": Integer(0.5, 1)}, "trials": 1}, "whole numbers"),
    ({"metric": "val/x", "space": {"a": Choice(())}, "trials": 1}, "something in it"),
    ({"metric": "val/x", "space": {"a": (0, 1)}, "trials": 1}, "a Uniform, an Integer or a Choice"),
    ({"metric": "val/x", "grid": {"a": 3}}, "a tuple of values"),
    ({"metric": "val/x", "rows": {"a": 3}}, "dict of overrides"),
    ({"metric": "val/x", "rows": {"a": {"seed": 1}}, "seeds": (1,)}, "seed is set in more than one"),
    ({"metric": "val/x", "rows": {"a": {"b": 1}}, "grid": {"b": (1,)}}, "b is set in more than one"),
    ({"metric": 5, "seeds": (1,)}, "metric has the name 5"),
    ({"metric": "val/x", "also": (None,), "seeds": (1,)}, "also has the name None"),
    ({"metric": "val/x", "config": 5, "seeds": (1,)}, "config is 5"),
    ({"metric": "val/x", "rows": {5: {}}}, "rows has the name 5"),
    ({"metric": "val/x", "rows": {"a": {5: 1}}}, "dict of overrides"),
    ({"metric": "val/x", "grid": {("a", "b"): (1,)}}, "grid has the name ('a', 'b')"),
    ({"metric": "val/x", "seeds": (0,), "keep": "half"}, "keep is 'half'"),
    ({"metric": "val/x", "space": {"a": Uniform("0", 1)}, "trials": 1}, "both must be numbers"),
    ({"metric": "val/x", "seeds": (1,), "sampler": "tpe"}, "without a space"),
    ({"metric": "val/x", "seeds": (1,), "sampler": "tpe", "space": {"a": Uniform(0, 1)}, "trials": 1}, "TPE draws from the space alone"),
])  # fmt: skip
def test_what_cannot_be_meant_is_named(plain, says):
    with pytest.raises(SweepError, match=".*") as error:
        options.read(plain)
    assert says in str(error.value)


def test_rows_grid_and_seeds_multiply(tmp_path):
    path = write(
        tmp_path,
        "{'metric': 'val/x', 'rows': {'a b': {}, 'wide': {'method.width': 48}}, 'grid': {'optim.learning_rate': (1e-3, 3e-3)}, 'seeds': (4, 5)}",
    )
    trials = plan.trials(plan.load(path, ["train.steps=90"]))
    assert [t.name for t in trials] == [
        f"{row},learning_rate={rate}-seed{seed}" for row in ("a_b", "wide") for rate in ("0.001", "0.003") for seed in (4, 5)
    ]
    assert [t.group for t in trials][::2] == [
        "a b,learning_rate=0.001",
        "a b,learning_rate=0.003",
        "wide,learning_rate=0.001",
        "wide,learning_rate=0.003",
    ]
    seen = [(t.config.method.width, t.config.optim.learning_rate, t.config.seed, t.config.train.steps) for t in trials]
    assert seen == [(width, rate, seed, 90) for width in (96, 48) for rate in (1e-3, 3e-3) for seed in (4, 5)]


def test_a_row_may_have_its_own_recipe(tmp_path):
    path = write(
        tmp_path,
        f"{{'metric': 'val/x', 'rows': {{'clip': {{}}, 'siglip': {{'config': {str(RECIPE.with_name('siglip_quickstart.py'))!r}}}}}}}",
    )
    assert [t.config.method.name for t in plan.trials(plan.load(path))] == ["clip", "siglip"]


@pytest.mark.parametrize("body, overrides, says", [
    ("{'metric': 'val/x', 'rows': {'bad': {'method.widht': 1}}}", [], "trial 'bad': config.method.widht is a key that nothing reads; did you mean 'width'"),
    ("{'metric': 'val/x', 'rows': {'bad': {'method.width': 'wide'}}}", [], "trial 'bad': config.method.width is 'wide'"),
    ("{'metric': 'val/x', 'rows': {'bad': {'seed.x': 1}}}", [], "config.seed is 0, not a section"),
    ("{'metric': 'val/x', 'rows': {'a': {'method.width': 8}}}", ["method.width=9"], "the sweep itself sets method.width"),
    ("{'metric': 'test/x', 'seeds': (0,)}", [], "has no evaluation 'test' to give the metric 'test/x'; its evaluations: val"),
    ("{'metric': 'val/x', 'rows': {'a b': {}, 'a/b': {}}}", [], "share the folder 'a_b'"),
])  # fmt: skip
def test_a_trial_that_cannot_run_is_named(tmp_path, body, overrides, says):
    with pytest.raises(SweepError) as error:
        plan.trials(plan.load(write(tmp_path, body), overrides))
    assert says in str(error.value)


def test_a_file_without_sweep_is_told():
    with pytest.raises(SweepError, match=r"defines no sweep\(\)"):
        plan.load(str(RECIPE))


def test_random_points_do_not_depend_on_each_other():
    space = {
        "a": Uniform(1e-4, 1e-1, log=True),
        "b": Integer(2, 5),
        "c": Choice(("x", "y")),
        "d": Integer(1, 1000, log=True),
        "e": Uniform(-1, 1),
    }
    o = options.SweepOptions("val/x", space=space, trials=400)
    points = [plan.draw(o, i) for i in range(o.trials)]
    assert points == [plan.draw(o._replace(space=dict(reversed(space.items()))), i) for i in range(o.trials)]
    assert points != [plan.draw(o._replace(sampler_seed=1), i) for i in range(o.trials)]
    assert all(1e-4 <= p["a"] <= 1e-1 and -1 <= p["e"] <= 1 and 1 <= p["d"] <= 1000 for p in points)
    assert {p["b"] for p in points} == {2, 3, 4, 5} and {p["c"] for p in points} == {"x", "y"}
    for key, middle in (("a", math.sqrt(1e-4 * 1e-1)), ("d", math.sqrt(1000)), ("e", 0.0)):  # half on either side, to four sigmas
        assert abs(sum(p[key] < middle for p in points) - 200) < 40


def test_short_keys_tell_apart():
    assert plan.short_keys(["optim.learning_rate", "image.width", "text.width", "seed"]) == {
        "optim.learning_rate": "learning_rate", "image.width": "image.width", "text.width": "text.width", "seed": "seed"}  # fmt: skip


@pytest.mark.parametrize("file", SWEEPS, ids=lambda f: f.stem)
def test_shipped_sweeps(file):
    trials = plan.trials(plan.load(str(file)))
    assert len(trials) > 1 and len({t.name for t in trials}) == len(trials)
