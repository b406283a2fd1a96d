"""What waits for a step that a run does not reach is refused."""

import jax.numpy as jnp
import pytest

from jaxvl import config as configs, phases, rehearsal
from jaxvl.methods.method import Run
from jaxvl.parts import assemble


def checked(config):
    """`phases.check` of a config on stand-ins for its data."""
    recipe = configs.read(config)
    tokenizer = None if recipe.data.captions == "none" else rehearsal.sizes(recipe, rehearsal.vocabulary(recipe) or rehearsal.VOCABULARY)
    steps = recipe.train.steps
    parts = assemble(recipe, tokenizer, Run(steps, 10, recipe.optim.warmup_steps, *rehearsal._classes(recipe)))
    phases.check(parts.method, parts.recipe.optim, steps)
    return parts.method


@pytest.mark.parametrize(
    ("recipe", "step", "overrides"),
    [
        ("tcl_small", "method.alpha_steps is step 800", ["method.alpha_steps=800"]),
        ("codis_small", "method.alpha_steps is step 900", ["method.alpha_steps=900"]),
        ("codis_small", "method.freeze_steps is step 1,000", ["method.freeze_steps=1000"]),
        ("jvsm_small", "method.first_stage is step 750", ["method.schedule=two_stage", "method.first_stage=750"]),
        ("lexvla_mini", "method.penalty_warmup is step 300", ["method.penalty_warmup=300"]),
        ("hpl_small", "method.hierarchy_start is step 450", ["method.hierarchy_start=450"]),
        ("hpl_small", "method.hierarchy_start is step 500", ["method.hierarchy_start=500", "method.coarse_mode=tied"]),
        ("hpl_small", "optim.hold of '.image' is step 460", ['optim.hold=(("^image", 460),)']),
        ("clip_quickstart", "optim.step_every is step 900", ["optim.schedule=step", "optim.step_every=900"]),
    ],
)
def test_what_would_never_happen_is_refused(recipe, step, overrides):
    with pytest.raises(ValueError, match=rf"config\.{step}, and the run has [0-9]+ steps: .*; it must be at most [0-9]+, or"):
        checked(configs.load(f"configs/{recipe}.py", overrides))


@pytest.mark.parametrize("overrides", [["method.hierarchy=none"], ["method.hierarchy=given"]])
def test_what_is_not_asked_for_is_not_waited_for(overrides):
    checked(configs.load("configs/hpl_small.py", ["method.hierarchy_start=500", *overrides]))


def test_a_run_that_missed_the_start_of_its_hierarchy_or_is_past_its_end_does_not_go_on():
    method = checked(configs.load("configs/hpl_small.py", ["method.hierarchy_start=100"]))
    memory = lambda refreshed: {"refreshed": jnp.int32(refreshed)}
    for step, refreshed in ((0, -1), (100, -1), (101, 100), (400, 350)):
        phases.check_resumed(method, memory(refreshed), step, 450)
    with pytest.raises(
        ValueError, match=r"hierarchy_start comes to step 100 .* is at step 101 without a hierarchy: set it to 101 or a later"
    ):
        phases.check_resumed(method, memory(-1), 101, 450)
    with pytest.raises(ValueError, match="config.train comes to 300 steps, and the run is at step 400 already"):
        phases.check_resumed(method, memory(350), 400, 300)
