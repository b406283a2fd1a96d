"""What a run says and keeps beyond its numbers."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from running import metrics

from jaxvl import config as configs, train
from jaxvl.tiny import shrink

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
