import json
import re
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxvl.interop import load as loading, names
from jaxvl.interop.load import Mismatch, at_resolution, load, save
from jaxvl.interop.published import describe, parts, shapes
from jaxvl.interop.tensors import FileError
from jaxvl.mesh import MeshOptions, make_mesh, shardings
from jaxvl.models.attention import Rope, rope_tables, rotate
from jaxvl.models.rules import RULES

HF = Path(__file__).parent.parent / "fixtures" / "parity" / "hf"


def tensors_of(folder):
    return safetensors.numpy.load_file(HF / folder / "model.safetensors")


def written(folder, tensors, config=None, **changes):
    """A model folder of these tensors, with a fixture's config."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file({name: np.array(value, order="C") for name, value in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        text = json.loads((HF / config / "config.json").read_text()) if isinstance(config, str) else config
        (folder / "config.json").write_text(json.dumps({**text, **changes}))
    return folder


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def original_dinov2(tensors):
    """transformers' names as DINOv2's own, q, k and v joined."""
    renames = (
        (r"^embeddings\.position_embeddings", "pos_embed"), (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"), (r"^embeddings\.", ""),
        (r"^encoder\.layer\.", "blocks."), ("attention.output.dense", "attn.proj"), (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
        ("weights_in", "w12"), ("weights_out", "w3"), ("^layernorm", "norm"),
    )  # fmt: skip
    out = {}
    for name, value in tensors.items():
        if ".attention.attention." in name:
            if ".query." in name:
                joined = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
                out[name.replace("attention.attention.query", "attn.qkv").replace("encoder.layer", "blocks")] = np.concatenate(joined)
            continue
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


@pytest.mark.parametrize("folder", ["dinov2", "dinov2_registers", "dinov2_swiglu"])
def test_original_dinov2_files_give_the_same_parameters(tmp_path, folder):
    original = original_dinov2(tensors_of(folder))
    got, want = load(written(tmp_path / "original", original, folder)), load(HF / folder)
    equal(got.params, want.params)
    save(tmp_path / "back.safetensors", got.model, got.params, layout=got.layout, prefix=got.prefix)
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    assert back.keys() == original.keys()
    equal(back, original)


def open_clip_names(tensors):
    """transformers' CLIP as open_clip writes it: joined attention, projections as [in, out] parameters."""
    out = {
        "logit_scale": tensors["logit_scale"],
        "text_projection": tensors["text_projection.weight"].T,
        "visual.proj": tensors["visual_projection.weight"].T,
    }
    for name, value in tensors.items():
        side, prefix = ("vision_model", "visual.") if name.startswith("vision_model") else ("text_model", "")
        if not name.startswith(side) or "k_proj" in name or "v_proj" in name:
            continue
        name = name.removeprefix(side + ".")
        for a, b in (
            ("embeddings.class_embedding", "class_embedding"), ("embeddings.patch_embedding", "conv1"), ("embeddings.position_embedding.weight", "positional_embedding"),
            ("embeddings.token_embedding", "token_embedding"), ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"), ("final_layer_norm", "ln_final"),
            ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"), ("self_attn", "attn"), ("fc1", "c_fc"), ("fc2", "c_proj"),
        ):  # fmt: skip
            name = name.replace(a, b)
        if "q_proj" in name:
            value = np.concatenate([tensors[f"{side}.{name.replace('transformer.resblocks', 'encoder.layers').replace('attn', 'self_attn').replace('q_proj', x)}"]
                                    for x in ("q_proj", "k_proj", "v_proj")])  # fmt: skip
            name = name.replace("q_proj.", "in_proj_")
        out[prefix + name] = value
    return out


@pytest.mark.parametrize("prefix", ["", "text."])
def test_open_clip_files_give_the_same_parameters(tmp_path, prefix):
    tensors = open_clip_names(tensors_of("clip"))
    tensors = {
        (prefix if not name.startswith("visual.") and name != "logit_scale" else "") + name: value for name, value in tensors.items()
    }
    config = {"model_cfg": {"embed_dim": 24, "quick_gelu": True,
                            "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "mlp_ratio": 2.0, "patch_size": 8},
                            "text_cfg": {"context_length": 12, "vocab_size": 120, "width": 32, "heads": 4, "layers": 2, "mlp_ratio": 2.0}}}  # fmt: skip
    folder = written(tmp_path, {**tensors, f"{prefix}attn_mask": np.zeros((12, 12), np.float32)})
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    got, want = load(folder), load(HF / "clip")
    equal(got.params, want.params)
    assert got.dropped == (f"{prefix}attn_mask",)
    exact = lambda o: o._replace(init_std=0.0)
    assert exact(got.model.image) == exact(want.model.image)._replace(drop_remainder=False)


def test_metas_llama_files_give_the_same_model(tmp_path):
    tensors, out = tensors_of("llama_gqa"), {}
    heads = {"q_proj": 4, "k_proj": 2}
    table = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output",
    }  # fmt: skip
    for name, value in tensors.items():
        for part, count in heads.items():
            if part in name:  # row (head, half, k) of the split layout is row (head, k, half) of the interleaved one
                value = np.stack([value.reshape(count, 2, 4, 32)[:, half] for half in range(2)], axis=2).reshape(value.shape)
        name = name.removeprefix("model.")
        for a, b in table.items():
            name = name.replace(a, b)
        out[name] = value
    got, want = load(written(tmp_path, {**out, "rope.freqs": np.zeros(4, np.float32)}, "llama_gqa")), load(HF / "llama_gqa")
    equal(got.params, want.params)
    save(tmp_path / "back.safetensors", got.model, got.params, layout=got.layout)
    equal(safetensors.numpy.load_file(tmp_path / "back.safetensors"), out)


def test_interleaved_rows_rotate_as_metas_complex_pairs():
    weight = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)  # two heads of eight channels
    x = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    angles = np.arange(3)[:, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    theirs = (x @ weight.T).reshape(3, 2, 4, 2)
    theirs = (theirs[..., 0] + 1j * theirs[..., 1]) * np.exp(1j * angles)[:, None]
    ours = rotate((x @ names.interleaved(2).ours(weight)).reshape(1, 3, 2, 8), *rope_tables(Rope(100.0), jnp.arange(3)[None], 8))[0]
    scores = lambda z: np.einsum("qhc,khc->hqk", z, z.conj()).real
    np.testing.assert_allclose(np.einsum("qhc,khc->hqk", ours, ours), scores(theirs), rtol=1e-4, atol=1e-4)


def test_older_bert_files_load_and_what_is_no_weight_is_told(tmp_path):
    tensors = tensors_of("bert_mlm")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(64)[None]
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    old["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)
    got = load(written(tmp_path, old, "bert_mlm"))
    equal(got.params, load(HF / "bert_mlm").params)
    assert set(got.dropped) == {"bert.embeddings.position_ids", "cls.predictions.decoder.weight", "cls.seq_relationship.weight"}
    old["cls.predictions.decoder.weight"] = old["cls.predictions.decoder.weight"] + 1
    with pytest.raises(Mismatch, match="untied: cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings.weight"):
        load(written(tmp_path, old, "bert_mlm"))


def test_an_untied_word_head_keeps_both_its_biases(tmp_path):
    tensors = tensors_of("bert_mlm")
    tensors["cls.predictions.decoder.weight"] = np.random.default_rng(0).standard_normal((101, 32)).astype(np.float32)
    tensors["cls.predictions.decoder.bias"] = np.random.default_rng(1).standard_normal(101).astype(np.float32)
    got = load(written(tmp_path, tensors, "bert_mlm", tie_word_embeddings=False))
    states, embedding = np.ones((1, 32), np.float32), got.params["text"]["embed"]
    run = lambda params: parts(got.model._replace(text=got.model.text._replace(dtype="float32")))["mlm"].apply(
        {"params": params}, states, embedding
    )
    np.testing.assert_allclose(run({**got.params["mlm"], "bias": got.params["mlm"]["bias"] + 1}), run(got.params["mlm"]) + 1, rtol=1e-4)
    np.testing.assert_array_equal(run({**got.params["mlm"], "spare_bias": 0 * got.params["mlm"]["spare_bias"]}), run(got.params["mlm"]))
    save(tmp_path / "back.safetensors", got.model, got.params)
    equal(safetensors.numpy.load_file(tmp_path / "back.safetensors"), tensors)


def test_llama_tied_or_bare_and_a_classifying_vit(tmp_path):
    tensors = tensors_of("llama_mha")
    head = tensors.pop("lm_head.weight")
    tied = load(written(tmp_path / "tied", tensors, "llama_mha", tie_word_embeddings=True))
    assert tied.model.head == "lm_tied" and set(tied.params) == {"text"} and tied.prefix == "model."
    with pytest.raises(Mismatch, match="untied: lm_head.weight differs"):
        load(written(tmp_path / "differs", {**tensors, "lm_head.weight": head}, "llama_mha", tie_word_embeddings=True))
    same = load(
        written(
            tmp_path / "same", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, "llama_mha", tie_word_embeddings=True
        )
    )
    assert same.dropped == ("lm_head.weight",)
    bare = load(written(tmp_path / "bare", {name.removeprefix("model."): value for name, value in tensors.items()}, "llama_mha"))
    assert bare.model.head == "none" and bare.prefix == ""
    equal(bare.params, tied.params)

    vit = {f"vit.{name}": value for name, value in tensors_of("vit").items() if not name.startswith("pooler")}
    vit |= {"classifier.weight": np.ones((7, 32), np.float32), "classifier.bias": np.ones(7, np.float32)}
    got = load(written(tmp_path / "vit", vit, "vit", id2label={str(i): str(i) for i in range(7)}))
    assert got.params["image"]["head"]["kernel"].shape == (32, 7) and got.model.image.pooler == 0
    save(tmp_path / "back.safetensors", got.model, got.params)
    equal(safetensors.numpy.load_file(tmp_path / "back.safetensors"), vit)


def test_one_error_lists_all_that_does_not_fit_and_nothing_is_read(tmp_path, monkeypatch):
    tensors = tensors_of("dinov2")
    tensors["encoder.layer.1.mlp.fc1.weight"] = np.zeros((128, 31), np.float32)
    tensors["encoder.layer.3.norm1.weight"] = np.zeros(32, np.float32)
    del tensors["encoder.layer.2.norm2.bias"], tensors["layernorm.weight"]
    monkeypatch.setattr(loading.tensors, "read", lambda tensor: pytest.fail("read before everything fits"))
    with pytest.raises(Mismatch) as error:
        load(written(tmp_path, tensors, "dinov2"))
    for words in (
        "wrong shape: encoder.layer.1.mlp.fc1.weight has (128, 31), the model needs (128, 32)", "unknown: encoder.layer.3.norm1.weight (32,)",
        "missing: encoder.layer.2.norm2.bias (32,), for image/blocks/mlp_norm/bias", "missing: layernorm.weight (32,), for image/norm/scale",
    ):  # fmt: skip
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 5


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_single_number_may_be_stored_with_an_axis_or_without(family, tmp_path):
    tensors = tensors_of(family)
    other = {name: value.reshape(() if value.shape else 1) if name.startswith("logit_") else value for name, value in tensors.items()}
    assert any(other[name].shape != tensors[name].shape for name in tensors)
    equal(load(written(tmp_path, other, family)).params, load(HF / family).params)


@pytest.mark.parametrize("family", ["bert"])
def test_wrapped_names_are_the_same_model(family, tmp_path):
    tensors = {f"module._orig_mod.{name}": value for name, value in tensors_of(family).items()}
    equal(load(written(tmp_path, tensors, family)).params, load(HF / family).params)


def test_quantized_weights_are_refused(tmp_path):
    tensors = {name: value.astype(np.int8) if "mlp" in name else value for name, value in tensors_of("vit").items()}
    tensors["encoder.layer.0.intermediate.dense.weight"] = tensors["encoder.layer.0.intermediate.dense.weight"].astype(np.int8)
    with pytest.raises(Mismatch, match="wrong type: encoder.layer.0.intermediate.dense.weight holds int8.*quantized"):
        load(written(tmp_path, tensors, "vit"))


@pytest.mark.parametrize("change, words", [
    ({"num_hidden_layers": 200_000_000}, "200,000,000 for the image tower's depth, and the files hold 56 tensors in all"),
    ({"hidden_size": 10**9}, "1,000,000,000 for the image tower's width"),
    ({"image_size": 10**9}, "for the image tower's patches"),
])  # fmt: skip
def test_a_config_of_more_than_the_files_hold_is_refused_before_it_is_built(change, words, tmp_path):
    with pytest.raises(Mismatch, match=words):
        load(written(tmp_path, tensors_of("vit"), "vit", **change))


def test_an_error_lists_no_more_than_can_be_read(tmp_path):
    with pytest.raises(Mismatch) as error:
        load(written(tmp_path, {f"x.{name}": value for name, value in tensors_of("vit").items()}, "vit"))
    assert len(str(error.value).splitlines()) == 32 and "and 82 more" in str(error.value)


def test_a_file_without_a_readable_config_needs_the_model_told(tmp_path):
    folder = written(tmp_path, tensors_of("bert"))
    with pytest.raises(FileError, match="holds no config.json: say which model"):
        load(folder)
    model = describe(json.loads((HF / "bert" / "config.json").read_text()), tensors_of("bert"))
    equal(load(folder, model).params, load(HF / "bert").params)
    (folder / "config.json").write_text("{")
    with pytest.raises(FileError, match="config.json:1 is no JSON"):
        load(folder)


def test_tensors_go_straight_into_their_sharding_in_the_wanted_dtype():
    mesh = make_mesh(MeshOptions(2, 2, 2))
    place = lambda tree: shardings(tree, RULES, mesh)
    split, whole = load(HF / "llama_gqa", dtype="bfloat16", place=place), load(HF / "llama_gqa")
    up = split.params["text"]["blocks"]["mlp"]["up"]["kernel"]
    assert (
        up.dtype == jnp.bfloat16
        and up.sharding.spec == jax.P(None, "fsdp", "tensor")
        and up.addressable_shards[0].data.shape == (3, 16, 24)
    )
    equal(
        jax.tree.map(lambda x: np.asarray(x, np.float32), split.params),
        jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32), whole.params),
    )


def test_bfloat16_files_round_trip_byte_for_byte(tmp_path):
    half = {name: value.astype(jnp.bfloat16) for name, value in tensors_of("siglip").items()}
    got = load(written(tmp_path, half, "siglip"))
    save(tmp_path / "back.safetensors", got.model, got.params, dtype="bfloat16")
    assert (tmp_path / "back.safetensors").read_bytes()[-1000:] == (tmp_path / "model.safetensors").read_bytes()[-1000:]
    equal(safetensors.numpy.load_file(tmp_path / "back.safetensors"), half)


def test_host_memory_stays_within_a_few_tensors(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 256,
    }
    model = describe(config, ["model.norm.weight", "lm_head.weight"])
    flat = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes(model))
    save(tmp_path / "model.safetensors", model, flat)
    total, largest = sum(leaf.nbytes for leaf in jax.tree.leaves(flat)), 128 * 512 * 4
    del flat
    (tmp_path / "config.json").write_text(json.dumps(config))
    load(tmp_path)
    for run in (lambda: load(tmp_path), lambda got=load(tmp_path): save(tmp_path / "out.safetensors", got.model, got.params)):
        tracemalloc.start()
        kept = run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * largest + 2**20 < total / 3, f"{peak:,} bytes of host memory for {total:,} bytes of weights"
        del kept


def test_resolution_changes_only_the_positions():
    got = load(HF / "vit")
    other = at_resolution(got.model, got.params, 48, 40)
    assert other["image"]["pos"].shape == (1 + 6 * 5, 32)
    np.testing.assert_array_equal(other["image"]["pos"][0], got.params["image"]["pos"][0])
    assert {k: v for k, v in other["image"].items() if k != "pos"} == {k: v for k, v in got.params["image"].items() if k != "pos"}
    equal(at_resolution(got.model, got.params, 32, 32), got.params)


def test_every_fixture_has_one_place_for_every_parameter():
    """No leaf of ours is filled by two names of one layout, and every layout of a family knows every leaf."""
    for folder in sorted(p for p in HF.iterdir() if p.is_dir()):
        model = describe(json.loads((folder / "config.json").read_text()), loading.tensors.find(folder))
        for layout in loading.layouts_of(model):
            ours = [name.ours for name in layout.names]
            assert len(ours) == len(set(ours)), folder
