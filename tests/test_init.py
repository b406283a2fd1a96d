"""Runs that start from published towers: what is loaded, resized and new, and a run that trains, resumes and exports."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from running import leaves, metrics

from jaxvl import assembly, config as configs, manifest, train
from jaxvl.data import lexicon
from jaxvl.data.text import TokenizerOptions, train_tokenizer
from jaxvl.interop import export, importing, initial, load
from jaxvl.interop.positions import resize_table
from jaxvl.parts import assemble
from jaxvl.state import create

HF = Path(__file__).parent / "fixtures" / "parity" / "hf"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The fixtures' ViT and BERT as `jaxvl import` leaves them."""
    root = tmp_path_factory.mktemp("imported")
    for name in ("vit", "bert"):
        importing.run(str(HF / name / "model.safetensors"), root / name)
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a green circle over a red square"], TokenizerOptions(vocab_size=512, context_length=8))


def config(imported, **sections):
    """CLIP on both towers, as in the configs that `jaxvl import` prints, at another resolution than the ViT's own."""
    tower = lambda name, kind, **kw: {**importing.tower(imported / name, kind), "dtype": "float32", **kw}
    base = dict(
        method=dict(name="clip", width=8), image=tower("vit", "image"), text=tower("bert", "text", vocab_size=0),
        init=dict(image=str(imported / "vit"), text=str(imported / "bert"), skip="text/embed$"), tokenizer=dict(context_length=8, vocab_size=512),
        data=dict(source="glyphs://train?size=32", image_size=48, chunk=8, group_shards=2), train=dict(batch_size=8, steps=2),
        optim=dict(learning_rate=1e-3, ema_decay=0.9), checkpoint=dict(every=1), log=dict(every=1, tensorboard=False, html=False),
    )  # fmt: skip
    return configs.complete(ConfigDict({**base, **{k: {**base.get(k, {}), **v} for k, v in sections.items()}}))


def planned(imported, tokenizer, **sections):
    parts = assemble(configs.read(config(imported, **sections)), tokenizer)
    shapes, _ = jax.eval_shape(lambda key: parts.method.init(key, parts.spec), jax.random.key(0))
    return shapes, initial.plan(parts.recipe, shapes, tokenizer.offset)


def test_what_is_loaded_resized_and_new(imported, tokenizer, capsys):
    shapes, leaves = planned(imported, tokenizer)
    table = capsys.readouterr().err
    assert "resized from 4 x 4 to 6 x 6, bicubic" in table and table.count("loaded") > 30
    new = [line.split()[1] for line in table.splitlines() if line.endswith("  new")]
    assert sorted(new) == ["image/head/kernel", "t", "text/embed", "text/head/kernel"]
    params = jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), shapes)
    memory = {"teacher": {"image": jax.tree.map(jax.numpy.copy, params["image"])}, "queue": jax.numpy.zeros((3, 4))}
    state = initial.fill(leaves, create(params, memory, (), jax.random.key(0), ema=True))
    vit, bert = (load.load(HF / name / "model.safetensors").params for name in ("vit", "bert"))
    np.testing.assert_array_equal(state.params["image"]["blocks"]["attn"]["q"]["kernel"], vit["image"]["blocks"]["attn"]["q"]["kernel"])
    np.testing.assert_array_equal(state.params["text"]["types"], bert["text"]["types"])
    np.testing.assert_array_equal(state.params["image"]["pos"], resize_table(np.asarray(vit["image"]["pos"]), 1, (6, 6), "bicubic"))
    assert not np.any(state.params["text"]["embed"]) and not np.any(state.memory["queue"])
    for copy in (state.ema["image"], state.memory["teacher"]["image"]):
        jax.tree.map(np.testing.assert_array_equal, copy, state.params["image"])


def test_a_row_is_put_in_front_for_the_padding_that_a_tokenizer_adds(imported, tokenizer):
    model = importing.read(imported / "bert").model
    rows = model.text.vocab_size
    small = SimpleNamespace(vocab_size=rows + 1, context_length=8, eos=2, ends=True, mask=3, lexicon=None, prompt=None)
    parts = assemble(configs.read(config(imported, init=dict(skip=""))), small)
    shapes, _ = jax.eval_shape(lambda key: parts.method.init(key, parts.spec), jax.random.key(0))
    leaf = initial.plan(parts.recipe, shapes, 1)["text/embed"]
    table = np.random.default_rng(0).standard_normal((rows, 3))
    np.testing.assert_array_equal(leaf.change(table), np.concatenate([table[model.text.pad_id][None], table]))


@pytest.mark.parametrize("sections, words", [
    (dict(image=dict(act="relu", eps=1e-5)), ["config.image.act is 'relu'", "was trained with 'gelu'", "config.image.eps is 1e-05"]),
    (dict(text=dict(mlp_dim=96)), ["config.text.mlp_dim is 96", "text/blocks/mlp/up/kernel has"]),
    (dict(init=dict(skip="")), ["text/embed has", "set config.text.vocab_size="]),
    (dict(init=dict(image="/nowhere")), ["/nowhere is neither"]),
    (dict(init=dict(skip=".")), ["leaves nothing to load"]), (dict(init=dict(skip="(")), ["not a regular expression"]),
])  # fmt: skip
def test_towers_that_do_not_fit(sections, words, imported, tokenizer):
    with pytest.raises(ValueError, match="config") as error:
        planned(imported, tokenizer, **sections)
    for part in words:
        assert part in str(error.value)


def test_differ_allows_what_it_names(imported, tokenizer):
    _, leaves = planned(imported, tokenizer, image=dict(act="relu"), init=dict(differ=("act",)))
    assert "image/cls" in leaves


def test_a_run_from_both_towers_trains_resumes_and_exports(imported, tmp_path):
    """With adapters on a bfloat16 base: the base stays what was imported, and the exported folder is a dual encoder."""
    recipe = config(imported, lora=dict(rank=2, targets="blocks/.*kernel$"), optim=dict(groups=(("head/|^t$|^text/embed$", 1.0),)))
    run = tmp_path / "run"
    assert train.train(recipe, run) == 0
    logged, final = metrics(run), leaves(run, step=2)
    manifest.delete(run / "checkpoints", 2)
    assert train.train(recipe, run) == 0
    assert metrics(run) == logged and leaves(run, step=2) == final
    parts = assembly.build(assembly.read_recipe(run, []), run, None)
    found = assembly.read_params(parts, run, None)
    want = load.load(HF / "vit" / "model.safetensors", dtype="bfloat16").params["image"]["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(found.state["image"]["blocks"]["mlp"]["up"]["kernel"], want)
    assert np.any(found.state["lora"]["image"]["blocks"]["mlp"]["up"]["kernel"]["b"])
    export.run(parts, found, "hf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["VisionTextDualEncoderModel"]


def test_codebooks_start_as_rows_of_the_decoders_output(imported, tmp_path):
    """Of the words that the tokenizer keeps, one id lower in the file where the tokenizer puts a row for padding in front."""
    importing.run(str(HF / "llama_gqa" / "model.safetensors"), tmp_path / "llama")
    tower = importing.tower(tmp_path / "llama", "text")
    rows, words = tower["vocab_size"], np.array([7, 3, 11], np.int32)
    small = SimpleNamespace(
        vocab_size=rows + 1, context_length=8, eos=2, ends=True, mask=3, lexicon=lexicon.Lexicon(words, ("a", "b", "c"), {}), prompt=None
    )
    sections = dict(
        method=dict(name="lexvla", adapter_heads=2, width=8), text={**tower, "dtype": "float32", "vocab_size": rows + 1},
        init=dict(text=str(tmp_path / "llama"), skip=""), tokenizer=dict(lexicon="ascii_lower_len2"), optim=dict(groups=((r"^(image/|text_codebook)", 0.0),)),
    )  # fmt: skip
    whole = config(imported)
    whole.image.pooler = 0  # LexVLA reads the states of the tower
    plain = {
        **whole.to_dict(),
        **{k: {**whole.to_dict().get(k, {}), **v} for k, v in sections.items()},
        "method": {"name": "lexvla", "adapter_heads": 2},
        "text": sections["text"],
    }
    parts = assemble(configs.read(configs.complete(ConfigDict(plain))), small)
    shapes, _ = jax.eval_shape(lambda key: parts.method.init(key, parts.spec), jax.random.key(0))
    leaves = initial.plan(parts.recipe, shapes, 1)
    kernel = load.load(HF / "llama_gqa" / "model.safetensors").params["lm_head"]["kernel"]
    for path in ("text_codebook", "image_codebook"):
        got = leaves[path].change(np.asarray(kernel))
        assert got.shape == shapes[path].shape
        np.testing.assert_array_equal(got[:3], np.asarray(kernel).T[words - 1])
        assert not got[3:].any()
    far = parts.recipe._replace(method=parts.recipe.method._replace(words=(3, 7, rows + 5)))
    with pytest.raises(ValueError, match=f"lm_head/kernel has {rows} rows of"):
        initial.plan(far, shapes, 1)
