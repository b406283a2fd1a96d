"""What a run says and keeps beyond its numbers."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from running import metrics

from jaxvl import compiled, config as configs, train
from jaxvl.checkpoint import CheckpointOptions
from jaxvl.tiny import shrink
from jaxvl.workdir import open_workdir

QUICK = str(Path(__file__).parent.parent / "configs" / "clip_quickstart.py")


def test_resizing_on_the_device_gives_the_run_of_the_host(tmp_path):
    """Same crops, same bicubic weights; the host rounds to whole levels, which is all that may differ."""
    losses = {}
    for where in ("host", "device"):
        config = shrink(configs.load(QUICK, [f"data.resize={where}", "data.crop_scale=(0.3,1.0)"]), steps=1)
        assert train.train(config, tmp_path / where) == 0
        losses[where] = [row["loss"] for row in metrics(tmp_path / where) if "loss" in row]
    np.testing.assert_allclose(losses["host"], losses["device"], rtol=5e-3)


@pytest.mark.parametrize("overrides, words", [
    (["evals.val.source=nowhere-*.tar"], "evals.val: "),
    (["evals.val.ks=(0,)"], "evals.val: ks is (0,)"),
    (["optim.warmup_steps=99"], "optim.warmup_steps is 99"),
    (["image.heads=5"], "image.heads=5"),
    (["data.source=nowhere-*.tar"], "nowhere-*.tar"),
    (["method.width=0"], "method.width is 0"),
])  # fmt: skip
def test_what_cannot_be_fails_before_anything_is_compiled(overrides, words, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    config = shrink(configs.load(QUICK))
    for key, value in (o.split("=", 1) for o in overrides):
        *path, last = key.split(".")
        section = config
        for part in path:
            section = section[part]
        section[last] = ast.literal_eval(value) if value[0] in "(0123456789" else value
    with pytest.raises(ValueError) as error:
        train.train(config, tmp_path / "run")
    assert words in str(error.value)


@pytest.mark.parametrize("change, words", [
    (dict(checkpoint=dict(every=0)), "config.checkpoint.every is 0"),
    (dict(log=dict(every=0)), "config.log.every is 0"),
    (dict(augment=dict(flip=2.0)), "config.augment.flip is 2.0"),
    (dict(data=dict(source="")), "config.data.source is ''"),
    (dict(tokenizer=dict(vocab_size=3)), "config.tokenizer.vocab_size is 3"),
])  # fmt: skip
def test_values_are_checked_when_the_config_is_read(change, words):
    plain = configs.load(QUICK).to_dict()
    for name, section in change.items():
        plain[name] |= section
    with pytest.raises(configs.ConfigError) as error:
        configs.read(ConfigDict(plain))
    assert words in str(error.value)


def _tree(folder):
    """Every file of a folder with its bytes, but for the lock, which names its holder, and the cache of programs."""
    return {
        p.relative_to(folder): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "LOCK" and ".compiled" not in p.parts
    }


REFUSED = (
    ["evals.val.source=nowhere-*.tar"],  # known once the data are opened
    ["text.vocab_size=300"],  # once the tokenizer is there
    ["image.heads=5"],  # at once
    ["init.image=nowhere"],
    ["data.max_bad_rate=-1.0"],
    ["train.batch_size=17"],
)


@pytest.mark.parametrize("overrides", REFUSED, ids=str)
def test_a_first_start_that_is_refused_leaves_nothing(overrides, tmp_path):
    config = shrink(configs.load(QUICK))
    with pytest.raises((ValueError, OSError)):
        train.train(configs.override(config, overrides), tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises((ValueError, OSError)):
        train.train(configs.override(config, overrides), tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_refused_start_changes_nothing_of_a_run(tmp_path):
    """Also one that only the checkpoint refuses; the run then goes on as if nothing had been tried."""
    config, run = shrink(configs.load(QUICK)), tmp_path / "run"
    assert train.train(config, run) == 0
    with open(run / "report" / "bad-0.jsonl", "a") as file:
        file.write('{"shard": "torn')
    before = _tree(run)
    for overrides in (
        *REFUSED[:3],
        ["text.depth=1", "train.steps=4"],
        ["data.label=class", "data.classes=all", "evals.val.source=nowhere.tar"],
    ):
        with pytest.raises((ValueError, OSError)):
            train.train(configs.override(shrink(configs.load(QUICK)), overrides), run)
        assert _tree(run) == before, overrides
    assert train.train(configs.override(config, ["train.steps=3"]), run) == 0
    assert metrics(run)[-1]["step"] == 3


def test_a_set_smaller_than_the_batch_is_told(tmp_path, capsys):
    config = configs.override(shrink(configs.load(QUICK)), ["data.source=glyphs://train?size=12", "evals.val.source=nowhere.tar"])
    with pytest.raises(ValueError, match="nowhere"):
        train.train(config, tmp_path / "run")
    assert "batch_size is 16 and the data have 12 samples" in capsys.readouterr().err


def test_programs_are_kept_with_the_run(tmp_path):
    """Where JAX was told of no other place."""
    told = jax.config.jax_compilation_cache_dir
    try:
        for place, kept in ((None, str(tmp_path / ".compiled")), ("elsewhere", "elsewhere")):
            jax.config.update("jax_compilation_cache_dir", place)
            compiled.keep(tmp_path)
            assert jax.config.jax_compilation_cache_dir == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", told)


@pytest.mark.parametrize("damage", ["", "{", "[1]", "5"])
def test_a_damaged_config_of_a_run_that_goes_on_is_set_aside(tmp_path, damage, capfd):
    """The command's own config is what the run goes on with; the file as it was is kept and named."""
    (tmp_path / "config.json").write_text(damage)
    config = configs.load("configs/clip_quickstart.py")
    train._keep_config(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == configs.to_json(config, indent=2)
    assert (tmp_path / "config.json.damaged").read_text() == damage
    said = capfd.readouterr().err
    assert "config.json is damaged" in said and "was None" not in said


def test_a_refused_start_leaves_the_lock_as_it_was(tmp_path):
    """Every byte of a run's folder, so that whoever compares two copies finds none changed."""
    lock = tmp_path / "run" / "checkpoints" / "LOCK"
    with open_workdir(tmp_path / "run", CheckpointOptions()) as run:
        run.accept()
    lock.write_text("process 1 on another host\n")
    with pytest.raises(ValueError, match="refused"), open_workdir(tmp_path / "run", CheckpointOptions()):
        raise ValueError("refused")
    assert lock.read_text() == "process 1 on another host\n"
