"""Runs that start from PEFT adapter folders and leave them: through the config, the first state, and `jaxvl export --format peft`."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvl import config as configs
from jaxvl.checkpoint import Restored
from jaxvl.data.text import TokenizerOptions, train_tokenizer
from jaxvl.interop import export, importing, initial, peft
from jaxvl.models import lora
from jaxvl.models.lora import LoraOptions
from jaxvl.parts import assemble
from jaxvl.state import create

HF = Path(__file__).parent.parent / "fixtures" / "parity" / "hf"
HALF = LoraOptions(rank=2, alpha=8.0, targets="attn/q/kernel$")  # the folder's; the run's has ranks to spare and more targets
Q = "blocks/attn/q/kernel"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The fixtures' ViT and BERT, and random adapters of rank 2 on BERT's queries, none on those of layer 0."""
    root = tmp_path_factory.mktemp("imported")
    for name in ("vit", "bert"):
        importing.run(str(HF / name / "model.safetensors"), root / name)
    model, rng = importing.read(root / "bert").model, np.random.default_rng(0)
    a, b = (0.1 * rng.standard_normal((model.text.depth, *s)).astype(np.float32) for s in ((model.text.width, 2), (2, model.text.width)))
    a[0], b[0] = 0, 0
    (root / "adapter").mkdir()
    peft.write(root / "adapter", {f"text/{Q}/a": a, f"text/{Q}/b": b}, HALF, model, "some/bert")
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a green circle over a red square"], TokenizerOptions(vocab_size=512, context_length=8))


def assembled(imported, tokenizer, **sections):
    """CLIP on both towers with adapters of rank 4, and the shapes of its parameters."""
    tower = lambda name, kind, **kw: {**importing.tower(imported / name, kind), "dtype": "float32", **kw}
    base = dict(
        method=dict(name="clip", width=8), image=tower("vit", "image"), text=tower("bert", "text", vocab_size=0), train=dict(batch_size=8, steps=2),
        init=dict(image=str(imported / "vit"), text=str(imported / "bert"), skip="text/embed$", text_adapter=str(imported / "adapter")),
        tokenizer=dict(context_length=8, vocab_size=512), data=dict(source="glyphs://train?size=32", image_size=32),
        lora=dict(rank=4, alpha=2.0, targets="attn/[qv]/kernel$", base_dtype="float32"), optim=dict(ema_decay=0.9),
    )  # fmt: skip
    plain = {**base, **{k: {**base.get(k, {}), **v} for k, v in sections.items()}}
    parts = assemble(configs.read(configs.complete(ConfigDict(plain))), tokenizer)
    return parts, jax.eval_shape(lambda key: parts.method.init(key, parts.spec), jax.random.key(0))[0]


def randomised(shapes):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: np.asarray(0.1 * rng.standard_normal(p.shape), p.dtype), shapes)


def test_a_run_starts_from_the_adapters_of_a_folder(imported, tokenizer, capsys):
    parts, shapes = assembled(imported, tokenizer)
    leaves = initial.plan(parts.recipe, shapes, tokenizer.offset)
    told = {line.split()[1]: line.rsplit("  ", 1)[1] for line in capsys.readouterr().err.splitlines() if line.startswith("init")}
    assert told[f"lora/text/{Q}/a"] == told[f"lora/text/{Q}/b"] == "loaded"
    assert told[f"lora/text/{Q.replace('/q/', '/v/')}/a"] == told[f"lora/image/{Q}/b"] == "new"
    start = jax.tree.map(jax.numpy.asarray, randomised(shapes))
    start["lora"] = lora.start(jax.random.key(1), {k: start[k] for k in ("image", "text")}, parts.recipe.lora)
    state = initial.fill(leaves, create(start, (), (), jax.random.key(0), ema=True))
    got, fresh = state.params["lora"]["text"]["blocks"]["attn"]["q"]["kernel"], start["lora"]["text"]["blocks"]["attn"]["q"]["kernel"]
    model = importing.read(imported / "bert").model
    want = peft.read(imported / "adapter", model, HALF)
    change = lambda a, b, options: lora.scale(options) * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(
        change(got["a"], got["b"], parts.recipe.lora), change(want[f"text/{Q}/a"], want[f"text/{Q}/b"], HALF), atol=1e-6
    )
    # What the folder lacks, two ranks of every layer and the whole first one, can still learn.
    np.testing.assert_array_equal(got["a"][..., 2:], fresh["a"][..., 2:])
    np.testing.assert_array_equal(got["a"][0], fresh["a"][0])
    assert not np.any(got["b"][:, 2:])
    jax.tree.map(np.testing.assert_array_equal, state.ema["lora"], state.params["lora"])


@pytest.mark.parametrize("sections, words", [
    (dict(lora=dict(rank=0)), ["config.init.text_adapter: ", "config.lora.rank is 0"]),
    (dict(lora=dict(rank=1)), ["config.init.text_adapter: ", "has rank 2; set config.lora.rank to that or more, not 1"]),
    (dict(lora=dict(targets="attn/v/kernel$")), [f"changes text/{Q}, which config.lora.targets 'attn/v/kernel$' leaves out"]),
    (dict(init=dict(text="")), ["config.init.text_adapter: ", "set config.init.text to the `jaxvl import` of that model, not ''"]),
    (dict(init=dict(image_adapter="/nowhere"), text=dict(eps=1e-3)), ["config.init.image_adapter: /nowhere is no adapter folder", "config.text.eps is 0.001"]),
])  # fmt: skip
def test_adapters_that_do_not_fit_are_told_with_everything_else(sections, words, imported, tokenizer):
    parts, shapes = assembled(imported, tokenizer, **sections)
    with pytest.raises(ValueError, match="do not fit this config") as error:
        initial.plan(parts.recipe, shapes, tokenizer.offset)
    for part in words:
        assert part in str(error.value)


def test_export_of_two_published_models_and_of_one(imported, tokenizer, tmp_path, capsys):
    parts, shapes = assembled(imported, tokenizer)
    found = Restored(3, randomised(shapes), {})
    assert export.run(parts, found, "peft", tmp_path / "both") == 0
    said = capsys.readouterr().err
    assert "peft read by our PEFT reader: embeddings differ by at most" in said and "trained as well" not in said
    for name, source in (("image", "vit"), ("text", "bert")):
        assert {p.name for p in (tmp_path / "both" / name).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        config = json.loads((tmp_path / "both" / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(HF / source / "model.safetensors") and config["r"] == 4
        read = peft.read(tmp_path / "both" / name, importing.read(imported / source).model, parts.recipe.lora)
        np.testing.assert_array_equal(read[f"{name}/{Q}/b"], found.state["lora"][name]["blocks"]["attn"]["q"]["kernel"]["b"])

    parts, shapes = assembled(imported, tokenizer, lora=dict(targets="text/.*attn/q/kernel$"), optim=dict(groups=(("^t$|head/", 1.0),)))
    export.run(parts, Restored(3, randomised(shapes), {}), "peft", tmp_path / "one")
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert "trained as well, and no part of an adapter folder: image/head/kernel, t, text/head/kernel" in capsys.readouterr().err


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "peft")), reason="torch and peft are not installed: pip install peft"
)
def test_peft_itself_makes_the_same_changes_to_the_same_modules(imported, tokenizer, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel

    parts, shapes = assembled(imported, tokenizer, lora=dict(targets="blocks/.*kernel$"))
    found = Restored(3, randomised(shapes), {})
    export.run(parts, found, "peft", tmp_path / "out")
    for name, source in (("image", "vit"), ("text", "bert")):
        adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(HF / source), tmp_path / "out" / name)
        theirs = {
            path: module.get_delta_weight("default").detach().numpy().T
            for path, module in adapted.base_model.model.named_modules()
            if hasattr(module, "lora_A")
        }
        ours = found.state["lora"][name]["blocks"]
        for ending, (part, linear) in {"up": ("mlp", "up"), "down": ("mlp", "down"), "q": ("attn", "q"), "out": ("attn", "out")}.items():
            modules = {"up": r"fc1|intermediate", "down": r"fc2|\.\d+\.output", "q": r"q_proj|query", "out": r"o_proj|attention\.output"}[
                ending
            ]
            a, b = ours[part][linear]["kernel"]["a"], ours[part][linear]["kernel"]["b"]
            want = lora.scale(parts.recipe.lora) * np.einsum("lir,lro->lio", a, b)
            got = [change for path, change in theirs.items() if re.search(modules, path)]
            np.testing.assert_allclose(np.stack(got), want, atol=1e-6)


@pytest.mark.parametrize("sections, words", [
    (dict(lora=dict(rank=0), init=dict(text_adapter="")), "config.lora.rank is 0: this run has no adapters"),
    (dict(init=dict(image="")), "config.init.image is '', no folder of `jaxvl import`"),
    (dict(lora=dict(targets="kernel$")), "no module of a published vit model is image/head/kernel"),
])  # fmt: skip
def test_runs_without_an_adapter_folder_to_write(sections, words, imported, tokenizer, tmp_path):
    parts, shapes = assembled(imported, tokenizer, **sections)
    with pytest.raises(ValueError, match="adapters|published") as error:
        export.run(parts, Restored(3, randomised(shapes), {}), "peft", tmp_path / "out")
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_come_back_otherwise_are_not_written(imported, tokenizer, tmp_path, monkeypatch):
    parts, shapes = assembled(imported, tokenizer)
    right = peft.read
    monkeypatch.setattr(peft, "read", lambda *args: {path: value * 1.5 for path, value in right(*args).items()})
    with pytest.raises(ValueError, match="differs from ours by more than"):
        export.run(parts, Restored(3, randomised(shapes), {}), "peft", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
