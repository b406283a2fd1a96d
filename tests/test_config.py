"""Configs are read strictly: what is wrong is said by key, value and remedy, before anything is compiled."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxvl import config as configs
from jaxvl.config import ConfigError

QUICK = str(Path(__file__).parent.parent / "configs" / "clip_quickstart.py")


@pytest.mark.parametrize("override, words", [
    ("optim.learning_rate=nan", "config.optim.learning_rate is nan; it must be a finite number"),
    ("data.cache_gb=inf", "config.data.cache_gb is inf; it must be a finite number"),
    ("augment.mean=(0.5,nan,0.5)", "augment.mean"),
    ("train.steps=3000000000", "config.train.steps is 3000000000; it must be from"),
    ("train.batch_size=99999999999999", "config.train.batch_size"),
    ("seed=99999999999999999999999", "config.seed"),
    ("seed=-1", "config.seed is -1; it must be at least 0"),
    ("mesh.data=0", "config.mesh"),
    ("mesh.fsdp=-2", "config.mesh"),
    ("evals.val.every=-1", "config.evals.val.every is -1"),
    ("tokenizer.name=", "config.tokenizer.name is ''"),
    ("tokenizer.context_length=2", "config.tokenizer.context_length is 2; it must be at least 3"),
    ("image.variant=L/14", "config.image.variant is 'L/14', and every size is given as another one"),
    ("image.heads=7", "image.heads=7 does not divide image.width=96"),
    ("text.depth=0", "depth=0"),
    ("method.temperature=-1", "config.method"),
    ("optim.warmup_steps=-5", "config.optim.warmup_steps is -5"),
    ("optim.groups=(('^nothing',0.0),)", "config.optim.groups: '^nothing' matches no parameter"),
    ("optim.unlock=(('^image/',9),)", "config.optim.unlock of '^image/' is 9"),
    ("lora.rank=-1", "config.lora.rank is -1"),
    ("evals.val.kind=composed", "needs a method with compose; clip has none"),
    ("method.name=codis", "fusion models read the class token"),
])  # fmt: skip
def test_values_that_cannot_be_are_refused_when_the_config_is_read(override, words):
    """Before data are opened, tokenizers trained or a workdir made: method, towers, optimiser and adapters are tried out on shapes."""
    with pytest.raises(ConfigError) as error:
        configs.read(configs.load(QUICK, [override]))
    assert words in str(error.value)


def test_reading_a_config_starts_no_backend():
    """A run of several processes must not have started one before they have met, nor may the parent of a sweep take the GPUs."""
    code = """
import sys
from jax._src import xla_bridge
from jaxvl import config
for file in sys.argv[1:]:
    config.read(config.load(file))
assert not xla_bridge.backends_are_initialized()
"""
    files = [
        str(Path(QUICK).with_name(f"{name}.py")) for name in ("clip_vitb16_cc12m", "lexvla_cc12m", "tcl_small", "hpl_small", "jvsm_small")
    ]
    subprocess.run([sys.executable, "-c", code, *files], check=True)


def test_another_kind_is_chosen_by_override():
    """What was at its default takes the new kind's; what the config sets and the new kind does not read is an error that names it."""
    recipe = configs.read(configs.load(QUICK, ["method.name=siglip", "method.bias=-9.5"]))
    assert type(recipe.method).__name__ == "SiglipOptions" and recipe.method.bias == -9.5 and recipe.method.width == 96
    with pytest.raises(ConfigError, match=r"sets config.image.act to 'quick_gelu', .* which resnet does not read"):
        configs.load(QUICK, ["image.kind=resnet"])
    recipe = configs.read(configs.load(QUICK, ["evals.val.kind=metric_learning", "evals.val.label=class"]))
    assert recipe.evals["val"].label == "class"


@pytest.mark.parametrize("override, field, value", [
    ("data.source=('a.tar','b.tar')", "source", ("a.tar", "b.tar")),
    ("data.source=x{a,b}.tar", "source", "x{a,b}.tar"),
    ("data.source=7", "source", "7"),
    ("data.triplets=", "triplets", ""),
])  # fmt: skip
def test_what_may_be_one_or_many_is_either_on_the_command_line(override, field, value):
    assert getattr(configs.read(configs.load(QUICK, [override])).data, field) == value


def test_tuples_of_a_saved_config_can_be_overridden(tmp_path):
    """JSON makes lists of them, and the command line replaces tuples."""
    file = tmp_path / "config.json"
    file.write_text(configs.to_json(configs.load(QUICK)))
    config = configs.load(str(file), ["evals.val.ks=(1,2)", "augment.std=(1,1,1)", "optim.groups=(('^image/',0.1),)"])
    assert configs.read(config).evals["val"].ks == (1, 2) and config.optim.groups == (("^image/", 0.1),)
    assert (
        configs.read(configs.load(str(file), ["method.name=siglip"])).method
        == configs.read(configs.load(QUICK, ["method.name=siglip"])).method
    )


def test_a_loaded_config_is_complete_and_survives_json(tmp_path):
    config = configs.load(QUICK)
    assert config.optim.b2 == 0.98 and config.mesh.fsdp == 1 and config.evals.val.ks == (1, 5, 10)
    file = tmp_path / "config.json"
    file.write_text(config.to_json_best_effort())
    assert configs.read(configs.load(str(file))) == configs.read(config)


def test_overrides_reach_keys_the_file_does_not_name_and_keep_their_types():
    overrides = ["optim.b1=0.8", "optim.learning_rate=1", "data.crop_scale=(0.5,1.0)", "text.rope_theta=5e5", "seed=3", "train.steps=90"]
    recipe = configs.read(configs.load(QUICK, overrides))
    assert (recipe.optim.b1, recipe.optim.learning_rate, recipe.data.crop_scale) == (0.8, 1.0, (0.5, 1.0))
    assert (recipe.text.rope_theta, recipe.seed, recipe.train.steps) == (5e5, 3, 90)
    assert isinstance(recipe.optim.learning_rate, float)


@pytest.mark.parametrize("override, words", [
    ("optim.learning_rat=1", "has no key 'learning_rat'; did you mean 'learning_rate'?"),
    ("optm.learning_rate=1", "has no key 'optm'; did you mean 'optim'?"),
    ("optim.learning_rate.x=1", "config.optim.learning_rate has no key 'x'"),
    ("train.steps=many", "config.train.steps"),
])  # fmt: skip
def test_wrong_overrides(override, words):
    with pytest.raises(ConfigError) as error:
        configs.load(QUICK, [override])
    assert words in str(error.value)


@pytest.mark.parametrize("change, words", [
    (dict(optim=dict(lr=1.0)), "config.optim.lr is a key that nothing reads"),
    (dict(optimizer={}), "config.optimizer is a key that nothing reads; did you mean 'optim'?"),
    (dict(method=dict(name="clop")), "config.method.name is 'clop'; it must be one of clip, "),
    (dict(method={}), "config.method.name is missing"),
    (dict(method=dict(name="clip", bias=1.0)), "config.method.bias is a key that nothing reads"),
    (dict(optim=dict(schedule="cosin")), "config.optim.schedule is 'cosin'; it must be one of 'cosine'"),
    (dict(optim=dict(b1="high")), "config.optim.b1 is 'high', a str; it must be float"),
    (dict(train=dict(batch_size=2.5, steps=1)), "config.train.batch_size is 2.5, a float; it must be int"),
    (dict(train=dict(batch_size=10, accumulate=3, steps=1)), "config.train.accumulate is 3; it must divide train.batch_size 10"),
    (dict(train=dict(steps=10, epochs=1.0)), "set either steps or epochs"),
    (dict(train=dict()), "set either steps or epochs"),
    (dict(data=dict(crop_scale=(0.1, 0.5, 1.0))), "config.data.crop_scale"),
    (dict(evals=dict(val=dict(kind="retrieval", sourc="x"))), "config.evals.val.sourc is a key that nothing reads; did you mean 'source'?"),
    (dict(evals=dict(val=dict(source="x"))), "config.evals.val.kind is missing"),
    (dict(mesh=3), "config.mesh is 3; it must be a section"),
])  # fmt: skip
def test_wrong_configs(change, words):
    plain = {"method": {"name": "clip"}, "train": {"steps": 1}, "data": {"source": "x"}, **change}
    with pytest.raises(ConfigError) as error:
        configs.read(ConfigDict(plain))
    assert words in str(error.value)


def test_a_missing_file_and_a_file_without_a_config(tmp_path):
    with pytest.raises(ConfigError, match="no file"):
        configs.load("configs/none.py")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="defines no get_config"):
        configs.load(str(empty))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "jaxvl.cli", *arguments], capture_output=True, text=True, timeout=120, env={**os.environ})


def test_the_command_names_the_wrong_key_and_makes_nothing(tmp_path):
    done = run("train", f"--config={QUICK}", f"--workdir={tmp_path / 'run'}", "--config.optim.lerning_rate=1")
    assert done.returncode == 2 and "did you mean 'learning_rate'?" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_strange_arguments_are_refused(tmp_path):
    done = run("train", f"--config={QUICK}", f"--workdir={tmp_path / 'run'}", "--steps=3")
    assert done.returncode == 2 and "--config.KEY=VALUE" in done.stderr


def test_help_and_import_do_not_load_jax():
    """Both are asked to answer in half a second; the module list is what decides it, the clock only guards against the absurd."""
    code = "import sys, jaxvl, jaxvl.cli; jaxvl.cli.parser(); print(sorted({m.split('.')[0] for m in sys.modules}))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert time.perf_counter() - start < 10
    loaded = set(json.loads(done.stdout.replace("'", '"')))
    assert not loaded & {"jax", "jaxlib", "flax", "numpy", "optax", "orbax", "rich", "matplotlib", "ml_collections", "absl"}
    assert "train" in run("--help").stdout
