"""Runs of every shape that transformers has a class for, exported and read back by our importer and, where there is torch, by
transformers itself; what has no class is refused, and what fails leaves nothing behind."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvl import config as configs
from jaxvl.checkpoint import Restored
from jaxvl.data.text import TokenizerOptions, train_tokenizer
from jaxvl.interop import export, hugging_face, tensors
from jaxvl.methods.method import Run
from jaxvl.models import lora
from jaxvl.parts import assemble
from jaxvl.tiny import shrink

SIZES = dict(variant="", width=16, depth=2, heads=2, mlp_dim=32, dtype="float32")
CLIP = dict(image=dict(patch=8, pre_norm=True, act="quick_gelu"), text=dict(act="quick_gelu"))
SIGLIP = dict(
    method=dict(name="siglip"), image=dict(patch=8, pool="map", class_tokens=0), text=dict(causal=False, mask_padding=False, pool="end")
)
BERT = dict(causal=False, pool="first", embed_norm=True, final_norm=False, post_norm=True, pooler=16, token_types=2, eps=1e-12)
VIT_BERT = dict(image=dict(patch=8, pooler=16, eps=1e-12), text=BERT)
DINO_BERT = dict(image=dict(patch=8, registers=2, layer_scale=0.1), text=BERT)
SWIGLU_CLIP = dict(image=dict(patch=8, gated=True, act="silu", mlp_dim=48), text={})
RUNS = {"clip": ("CLIPModel", CLIP), "siglip": ("SiglipModel", SIGLIP), "vit_bert": ("VisionTextDualEncoderModel", VIT_BERT),
        "dino_bert": ("VisionTextDualEncoderModel", DINO_BERT), "swiglu_clip": ("VisionTextDualEncoderModel", SWIGLU_CLIP)}  # fmt: skip
TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a green circle over a red square", "two letters"], TokenizerOptions(vocab_size=512, context_length=8))


def made(tokenizer, image, text, method=None, **sections):
    """The parts and parameters of a run, every parameter random, none as it starts."""
    plain = dict(method=method or dict(name="clip", width=8), image={**SIZES, **image}, text={**SIZES, **text}, train=dict(batch_size=8, steps=2),
                 data=dict(source="glyphs://train?size=8", image_size=32), tokenizer=dict(context_length=8), **sections)  # fmt: skip
    parts = assemble(configs.read(configs.complete(ConfigDict(plain))), tokenizer)
    return parts, Restored(7, random_params(parts), {})


def random_params(parts):
    shapes, _ = jax.eval_shape(lambda key: parts.method.init(key, parts.spec), jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: np.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), shapes)


@pytest.mark.parametrize("name", RUNS)
def test_round_trip(name, tokenizer, tmp_path, capfd):
    architecture, sections = RUNS[name]
    parts, found = made(tokenizer, **sections)
    assert export.run(parts, found, "hf", tmp_path / "out") == 0
    said = capfd.readouterr().err
    assert "read by our importer" in said and ("read by transformers" in said) == TORCH
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} == {
        p.name for p in (tmp_path / "out").iterdir()
    }


@pytest.mark.skipif(not TORCH, reason="torch is not installed; the other tests read the same folders with our own importer")
@pytest.mark.parametrize("name", RUNS)
def test_transformers_computes_the_same(name, tokenizer, tmp_path):
    """From captions as strings: the exported tokenizer, model and what AutoModel makes of the folder."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    architecture, sections = RUNS[name]
    parts, found = made(tokenizer, **sections)
    export.run(parts, found, "hf", tmp_path / "out")
    assert type(AutoModel.from_pretrained(tmp_path / "out")).__name__ == architecture
    captions = ["a red circle", "letters two a", "square"]
    pad = "max_length" if name == "siglip" else True
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")(captions, padding=pad, truncation=True, max_length=8, return_tensors="np")
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 3)).astype(np.float32)
    mask = None if name == "siglip" else theirs["attention_mask"]
    got = hugging_face.embeddings_in_torch(tmp_path / "out", images, theirs["input_ids"], mask)
    np.testing.assert_allclose(got[0], parts.method.embed_image(found.state, images), atol=1e-4)
    np.testing.assert_allclose(got[1], parts.method.embed_text(found.state, tokenizer.encode_batch(captions)), atol=1e-4)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size == {"height": 32, "width": 32}


def test_end_of_text_id_2_moves_to_where_transformers_pools_at_it(tokenizer, tmp_path):
    """transformers takes eos_token_id 2 for an old file's and pools at the largest id."""
    parts, found = made(tokenizer, **CLIP)
    assert parts.recipe.text.eos_id == 2
    export.run(parts, found, "hf", tmp_path / "out")
    last = tokenizer.vocab_size - 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["eos_token_id"] == last
    from tokenizers import Tokenizer

    moved = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a red circle").ids
    ids = np.arange(tokenizer.vocab_size)
    ids[[2, last]] = last, 2
    assert moved == ids[[i for i in tokenizer.encode_batch(["a red circle"])[0] if i]].tolist()


def test_adapters_are_merged(tokenizer, tmp_path):
    options = dict(rank=2, targets="blocks/.*kernel$", base_dtype="float32")
    parts, found = made(tokenizer, **CLIP, lora=options)
    export.run(parts, found, "safetensors", tmp_path / "out")
    stored = tensors.find(tmp_path / "out")
    assert not any("lora" in name for name in stored)
    want = lora.merge(found.state, parts.recipe.lora)["text"]["blocks"]["attn"]["out"]["kernel"]
    np.testing.assert_array_equal(tensors.read(stored["text/blocks/attn/out/kernel"]), np.asarray(want))


@pytest.mark.parametrize("kind, name", [("hf", "README.md"), ("safetensors", "config.json")])
def test_secrets_of_a_source_are_not_exported(kind, name, tokenizer, tmp_path):
    parts, found = made(tokenizer, **CLIP)
    source = "https://me:word@store.example/a.tar?sig=abc"
    recipe = parts.recipe._replace(data=parts.recipe.data._replace(source=source))
    export.run(parts._replace(recipe=recipe), found, kind, tmp_path / "out")
    said = (tmp_path / "out" / name).read_text()
    assert "https://store.example/a.tar" in said and "word@" not in said and "abc" not in said


@pytest.mark.skipif(importlib.util.find_spec("flatbuffers") is None, reason="flatbuffers is not installed: pip install '.[stablehlo]'")
def test_stablehlo_runs_at_any_batch_size(tokenizer, tmp_path):
    parts, found = made(tokenizer, **CLIP)
    export.run(parts, found, "stablehlo", tmp_path / "out")
    program = jax.export.deserialize(bytearray((tmp_path / "out" / "image.stablehlo").read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    params = {k: tensors.read(v) for k, v in tensors.find(tmp_path / "out").items() if k.startswith("image/")}
    images = np.random.default_rng(3).standard_normal((3, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(program.call(params, images), parts.method.embed_image(found.state, jnp.asarray(images)), atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("flatbuffers") is None, reason="flatbuffers is not installed: pip install flatbuffers")
@pytest.mark.parametrize(
    "name", ["tcl_small", *(pytest.param(name, marks=pytest.mark.long) for name in ("codis_small", "lexvla_mini", "jvsm_small"))]
)
def test_programs_of_every_method_take_what_they_read(name, tmp_path, capfd):
    """Projections, adapters and codebooks lie outside the towers."""
    recipe = configs.read(shrink(configs.load(f"configs/{name}.py", []), devices=1))
    tokenizer = train_tokenizer(["a green circle", "two letters"], recipe.tokenizer)
    parts = assemble(recipe, tokenizer)
    export.run(parts, Restored(7, random_params(parts), {}), "stablehlo", tmp_path / "out")
    assert "stablehlo read by jax.export" in capfd.readouterr().err


def test_a_run_without_captions_is_refused(tmp_path):
    recipe = configs.read(shrink(configs.load("configs/hpl_small.py", []), devices=1))
    parts = assemble(recipe, None, Run(classes=6))
    with pytest.raises(ValueError, match="the method hpl reads no captions"):
        export.run(parts, Restored(7, {}, {}), "safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sections, words", [
    (dict(image=dict(patch=8, pool="mean", class_tokens=0), text={}), ["config.image.pool is 'mean', not 'cls'", "a siglip image tower: config.image.pool"]),
    (dict(image=dict(patch=8), text=dict(causal=False, pool="mean")), ["a bert text tower: ", "config.text.pool is 'mean', not 'first'"]),
    (dict(image=SIGLIP["image"], text=SIGLIP["text"], method=dict(name="siglip", width=8)), ["config.method.width is not 0"]),
    (dict(image=SIGLIP["image"], text={}, method=dict(name="siglip")), ["config.text.causal is True, not False", "config.text.pool is 'eos', not 'end'"]),
])  # fmt: skip
def test_what_transformers_cannot_express(sections, words, tokenizer, tmp_path):
    parts, found = made(tokenizer, **sections)
    with pytest.raises(ValueError, match="transformers") as error:
        export.run(parts, found, "hf", tmp_path / "out")
    for part in words:
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_differs_is_not_written(tokenizer, tmp_path, monkeypatch):
    parts, found = made(tokenizer, **CLIP)
    bent = hugging_face.write
    monkeypatch.setattr(
        hugging_face,
        "write",
        lambda folder, what, dtype: bent(
            folder, what._replace(params={**what.params, "image": jax.tree.map(lambda x: x * 1.01, what.params["image"])}), dtype
        ),
    )
    with pytest.raises(ValueError, match=r"differs from ours by more than 1e-04: .*nothing is written"):
        export.run(parts, found, "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


ONNX = all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnxruntime"))


@pytest.mark.skipif(not ONNX, reason="jax2onnx and onnxruntime are not installed: pip install '.[onnx]' in an environment of its own")
@pytest.mark.parametrize("name", RUNS)
def test_onnx_runs_at_any_batch_size(name, tokenizer, tmp_path, capfd):
    import onnxruntime

    parts, found = made(tokenizer, **RUNS[name][1])
    export.run(parts, found, "onnx", tmp_path / "out")
    assert "onnx read by onnxruntime: embeddings differ by at most" in capfd.readouterr().err
    rng = np.random.default_rng(3)
    images, tokens = rng.standard_normal((3, 32, 32, 3)).astype(np.float32), rng.integers(1, 512, (5, 8)).astype(np.int32)
    for face, inputs in (("image", images), ("text", tokens)):
        (got,) = onnxruntime.InferenceSession(tmp_path / "out" / f"{face}.onnx").run(["embedding"], {"input": inputs})
        np.testing.assert_allclose(got, getattr(parts.method, f"embed_{face}")(found.state, jnp.asarray(inputs)), atol=1e-5)


@pytest.mark.skipif(ONNX, reason="jax2onnx is installed")
def test_onnx_without_its_packages_says_how_to_get_them(tokenizer, tmp_path):
    parts, found = made(tokenizer, **CLIP)
    with pytest.raises(ValueError, match=r"jax2onnx and onnxruntime not installed.*pip install '\.\[onnx\]'"):
        export.run(parts, found, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_onnx_files_have_an_end(tokenizer, tmp_path, monkeypatch):
    from jaxvl.interop import onnx

    monkeypatch.setattr(onnx, "check_installed", lambda: None)
    monkeypatch.setattr(onnx, "LARGEST", 1000)
    monkeypatch.setitem(sys.modules, "jax2onnx", object())
    monkeypatch.setitem(sys.modules, "onnxruntime", object())
    parts, found = made(tokenizer, **CLIP)
    with pytest.raises(ValueError, match=r"image.onnx would hold .* GB of parameters.*--format stablehlo or hf"):
        export.run(parts, found, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
