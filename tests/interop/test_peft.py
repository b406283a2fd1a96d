"""Adapter folders as PEFT writes them, against W + s B A of each layer; what is more than low-rank is refused."""

import json

import numpy as np
import pytest

from jaxvl.interop import peft, tensors
from jaxvl.interop.published import Published
from jaxvl.models import lora
from jaxvl.models.lora import LoraOptions
from jaxvl.models.text import TextOptions

TEXT = TextOptions(variant="", width=8, depth=2, heads=2, kv_heads=1, mlp_dim=12, vocab_size=10, norm="rms", gated=True, position="rope",
                   pool="last", qkv_bias=False, out_bias=False, mlp_bias=False)  # fmt: skip
MODEL = Published("llama", text=TEXT, head="lm")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_dora": False, "bias": "none"}


def folder(path, config=CONFIG, ranks=(2, 2), infix="", extra=()):
    """q_proj of both layers with `ranks`, down_proj of layer 1 alone; returns s B A of each."""
    rng, values, change = np.random.default_rng(0), {}, {}
    for module, out, wide, rank in (
        ("layers.0.self_attn.q_proj", 8, 8, ranks[0]),
        ("layers.1.self_attn.q_proj", 8, 8, ranks[1]),
        ("layers.1.mlp.down_proj", 8, 12, 2),
    ):
        a, b = rng.standard_normal((rank, wide)).astype(np.float32), rng.standard_normal((out, rank)).astype(np.float32)
        values |= {f"base_model.model.model.{module}.lora_A{infix}.weight": a, f"base_model.model.model.{module}.lora_B{infix}.weight": b}
        change[module] = b.astype(np.float64) @ a
    values |= dict.fromkeys(extra, np.zeros(3, np.float32))
    path.mkdir()
    tensors.write(path / "adapter_model.safetensors", {k: (v.shape, v.dtype) for k, v in values.items()}, values.items())
    (path / "adapter_config.json").write_text(json.dumps(config))
    return change


def change_of(adapters, path, layer, options):
    return lora.scale(options) * (adapters[f"{path}/a"][layer].astype(np.float64) @ adapters[f"{path}/b"][layer]).T


@pytest.mark.parametrize("more, ranks, scales, infix", [
    ({}, (2, 2), (3.0, 3.0, 3.0), ""),
    ({"use_rslora": True}, (2, 2), (6 / 2**0.5,) * 3, ".default"),
    ({"rank_pattern": {"layers.0.self_attn.q_proj": 4}, "alpha_pattern": {"down_proj": 10}}, (4, 2), (1.5, 3.0, 5.0), ""),
])  # fmt: skip
def test_each_layer_changes_by_its_own_scaled_product(more, ranks, scales, infix, tmp_path):
    options = LoraOptions(rank=4, alpha=3.0)
    change = folder(tmp_path / "in", {**CONFIG, **more}, ranks, infix)
    got = peft.read(tmp_path / "in", MODEL, options)
    assert sorted(got) == [f"text/blocks/{m}/kernel/{s}" for m in ("attn/q", "mlp/down") for s in "ab"]
    for (module, want), scale in zip(change.items(), scales, strict=True):
        path = "text/blocks/attn/q/kernel" if "q_proj" in module else "text/blocks/mlp/down/kernel"
        np.testing.assert_allclose(change_of(got, path, int(module[7]), options), scale * want, atol=1e-5)
    assert not np.any(got["text/blocks/mlp/down/kernel/b"][0])


def test_out_and_in_again_is_the_same(tmp_path):
    options = LoraOptions(rank=2, alpha=6.0)
    folder(tmp_path / "in")
    first = peft.read(tmp_path / "in", MODEL, options)
    (tmp_path / "out").mkdir()
    peft.write(tmp_path / "out", first, options, MODEL, "some/base@v1")
    again = peft.read(tmp_path / "out", MODEL, options)
    assert first.keys() == again.keys() and all(np.array_equal(first[k], again[k]) for k in first)
    names = tensors.find(tmp_path / "out" / "adapter_model.safetensors")
    assert names["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (2, 12)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (
        config["r"] == 2
        and (config["base_model_name_or_path"], config["revision"]) == ("some/base", "v1")
        and "model.layers.0.self_attn.q_proj" in config["target_modules"]
    )


@pytest.mark.parametrize("config, extra, rank, words", [
    ({"use_dora": True}, (), 2, ["use_dora=True: only False"]), ({"bias": "all", "modules_to_save": ["lm_head"]}, (), 2, ["bias='all'", "modules_to_save="]),
    ({"peft_type": "IA3"}, (), 2, ["peft_type='IA3'"]), ({"init_lora_weights": "pissa_niter_4"}, (), 2, ["a base that was changed"]),
    ({}, ("base_model.model.score.weight", "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"), 2, ["unknown: score.weight", "unknown: model.layers.7"]),
    ({"r": 3}, (), 4, ["q_proj.lora_A.weight is (2, 8), not (3, 8)", "q_proj.lora_B.weight is (8, 2), not (8, 3)"]),
    ({}, (), 1, ["has rank 2; set config.lora.rank to that or more, not 1"]),
])  # fmt: skip
def test_what_is_refused(config, extra, rank, words, tmp_path):
    folder(tmp_path / "in", {**CONFIG, **config}, extra=extra)
    with pytest.raises(peft.AdapterError) as error:
        peft.read(tmp_path / "in", MODEL, LoraOptions(rank=rank))
    for part in words:
        assert part in str(error.value)
