"""Every key of a published config is read, known to change nothing or refused, and what is left out is the library's default."""

import json
from pathlib import Path

import pytest
import transformers

from jaxvl.interop import albef, convnets, load
from jaxvl.interop.keys import IDLE, KINDS, ONLY, ConfigError, section
from jaxvl.interop.published import describe

HF = Path(__file__).parent.parent / "fixtures" / "parity" / "hf"
CLASSES = {
    "vit": "ViTConfig", "deit": "DeiTConfig", "dinov2": "Dinov2Config", "dinov2_with_registers": "Dinov2WithRegistersConfig", "bert": "BertConfig",
    "clip_vision_model": "CLIPVisionConfig", "clip_text_model": "CLIPTextConfig", "clip": "CLIPConfig", "siglip_vision_model": "SiglipVisionConfig",
    "siglip_text_model": "SiglipTextConfig", "siglip": "SiglipConfig", "llama": "LlamaConfig",
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_are_the_librarys_and_none_of_its_keys_is_unknown(kind):
    theirs = getattr(transformers, CLASSES[kind])().to_dict()
    keys = KINDS[kind]
    for key, default in keys.read.items():
        if key in theirs and default not in (None, {}):
            assert theirs[key] == default, key
    assert not set(theirs) - set(keys.read) - set(keys.only) - set(keys.idle) - IDLE - set(ONLY)
    for key, legal in {**ONLY, **keys.only}.items():
        assert theirs.get(key, legal[0]) in legal, key
    section(kind, json.loads(json.dumps(theirs)))  # and so a config that is written out whole is read


def open_clip(embed_dim=64, vision=(), text=(), **more):
    return {"model_cfg": {"embed_dim": embed_dim, "vision_cfg": dict(vision), "text_cfg": dict(text), **more}}


# What the hub's configs of these families hold besides, of several years of transformers.
PUBLISHED = {
    "dinov2_with_registers": {"interpolate_antialias": True, "interpolate_offset": 0.0, "apply_layernorm": True, "stage_names": ["stem"], "torch_dtype": "float32"},
    "llama": {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "transformers.js_config": {"dtype": "q4"}, "rope_scaling": None,
              "max_sequence_length": 2048, "eos_token_id": [1, 2], "pad_token_id": -1},
    "bert": {"directionality": "bidi", "pooler_type": "first_token_transform", "pooler_fc_size": 768, "gradient_checkpointing": False,
             "position_embedding_type": "absolute", "classifier_dropout": None},
    "clip_text_model": {"dropout": 0.0, "bad_words_ids": None, "top_k": 50, "typical_p": 1.0, "torchscript": False, "pruned_heads": {}, "is_decoder": False,
                        "add_cross_attention": False, "tie_encoder_decoder": False, "tie_word_embeddings": True, "tf_legacy_loss": False, "prefix": None},
    "vit": {"pad_token_id": None, "encoder_stride": 16, "label2id": {"a": 0}, "problem_type": None, "return_dict": True},
    "siglip_text_model": {"bos_token_id": 49406, "projection_size": 768}, "siglip_vision_model": {"vision_use_head": True, "_attn_implementation_autoset": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_what_published_configs_hold_besides_is_taken(kind):
    section(kind, {"model_type": kind, "transformers_version": "4.31.0", **PUBLISHED[kind]})


@pytest.mark.parametrize("kind", [k for k in CLASSES if k not in ("clip", "siglip")])
@pytest.mark.parametrize("key, value", [("attention_window", 7), ("quantization_config", {"bits": 4}), ("auto_map", {"AutoModel": "evil.Evil"}), ("is_decoder", True),
                                        ("per_layer_config", {"0": {"num_attention_heads": 1}}), ("pruned_heads", {"1": [0]})])  # fmt: skip
def test_a_key_that_may_change_the_numbers_is_refused_by_name(kind, key, value):
    with pytest.raises(ConfigError, match=rf"^{key}="):
        describe({"model_type": kind, key: value}, [])
    for family, name in (("clip", "text_config"), ("siglip", "vision_config")):
        with pytest.raises(ConfigError, match=rf"^{name}\.{key}="):
            describe({"model_type": family, name: {key: value}}, [])
        with pytest.raises(ConfigError, match=rf"^{key}="):
            describe({"model_type": family, key: value}, [])


@pytest.mark.parametrize("change, words", [
    ({"hidden_size": "768"}, "hidden_size='768' must be a whole number of 1 or more"), ({"hidden_size": 768.0}, "hidden_size=768.0 must be a whole"),
    ({"num_attention_heads": 0}, "num_attention_heads=0 must be"), ({"image_size": 0}, "image_size=0 must be"), ({"patch_size": 0}, "patch_size=0 must be"),
    ({"patch_size": [16, 8]}, r"patch_size=\[16, 8\]: only squares"), ({"layer_norm_eps": "x"}, "layer_norm_eps='x' must be a finite number of 0 or more"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan must be"), ({"qkv_bias": 1}, "qkv_bias=1 must be true or false"),
    ({"hidden_act": ["gelu"]}, r"hidden_act=\['gelu'\] must be a text"), ({"id2label": [1]}, r"id2label=\[1\] must be an object"),
    ({"layer_norm_eps": 10**400}, "layer_norm_eps=1000.*must be a finite number"), ({"hidden_size": None}, "hidden_size=None must be"),
])  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_by_name(change, words):
    with pytest.raises(ConfigError, match=words):
        describe({"model_type": "vit", **change}, [])


@pytest.mark.parametrize("config, words", [
    ({"model_type": ["vit"]}, r"model_type=\['vit'\] is none of"), ({"model_type": "clip", "vision_config": [1]}, r"vision_config=\[1\] must be an object"),
    ({"model_type": "llama", "rope_scaling": 5}, "rope_scaling=5 must be an object"), ({"model_cfg": 5}, "model_cfg=5 must be an object"),
    ({"model_cfg": {}}, "model_cfg has no embed_dim, vision_cfg, text_cfg"), ({"model_type": "clip", "text_config": {"eos_token_id": None}}, "text_config.eos_token_id=None"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling has no low_freq_factor, high_freq_factor"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "default", "attention_factor": 0.5}}, "rope_scaling.attention_factor=0.5 is no key"),
])  # fmt: skip
def test_an_odd_config_is_one_sentence(config, words):
    with pytest.raises(ConfigError, match=words) as error:
        describe(config, [])
    assert len(str(error.value).splitlines()) == 1


def test_clips_sections_called_dict_win_as_in_transformers():
    """With what they leave out at its default, whatever the newer section says of it."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"text_config": {**small, "vocab_size": 60, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-3, "eos_token_id": 59}, "projection_dim": 8,
              "text_config_dict": {**small, "vocab_size": 60, "hidden_act": "gelu", "eos_token_id": 58},
              "vision_config": {**small, "image_size": 32}, "vision_config_dict": {**small, "hidden_act": "gelu", "patch_size": 8}}  # fmt: skip
    theirs = transformers.CLIPConfig(**json.loads(json.dumps(config)))
    ours = describe({"model_type": "clip", **config}, [])
    text, image = theirs.text_config, theirs.vision_config
    assert (text.hidden_act, text.layer_norm_eps, text.eos_token_id, image.image_size) == ("gelu", 1e-5, 58, 224)
    assert (ours.text.act, ours.text.eps, ours.text.eos_id, ours.text.positions) == ("gelu", 1e-5, 58, text.max_position_embeddings)
    assert (ours.image.act, ours.image.patch, ours.image_size, ours.image.width) == (
        "gelu",
        image.patch_size,
        image.image_size,
        image.hidden_size,
    )


def test_rope_scaling_replaces_rope_parameters_as_in_transformers():
    config = {"rope_scaling": {"rope_type": "default", "rope_theta": 3e4}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    theirs = transformers.LlamaConfig(**json.loads(json.dumps(config))).rope_parameters["rope_theta"]
    assert describe({"model_type": "llama", **config}, []).text.rope_theta == theirs == 3e4


def test_what_open_clip_leaves_out_is_its_default():
    model = describe(open_clip(), [])
    image, text = model.image, model.text
    assert (image.width, image.depth, image.heads, image.mlp_dim, image.patch, model.image_size, image.act) == (
        768,
        12,
        12,
        3072,
        16,
        224,
        "gelu",
    )
    assert (text.width, text.depth, text.heads, text.mlp_dim, text.vocab_size, text.positions) == (512, 12, 8, 2048, 49408, 77)
    scaled = describe(open_clip(vision={"ls_init_value": 1e-4, "patch_dropout": 0.5, "act_kwargs": None}, text={"ls_init_value": None}), [])
    assert (scaled.image.layer_scale, scaled.image.patch_dropout, scaled.text.layer_scale) == (1e-4, 0.5, 0.0)
    harmless = {"nonscalar_logit_scale": True, "custom_text": True, "init_logit_scale": 2.6, "init_logit_bias": None}
    assert describe(open_clip(text={"hf_tokenizer_name": "x", "pad_id": 0}, **harmless), []) == model


VISION = {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "pos_embed_type": "sin_cos_2d", "attentional_pool": True, "output_tokens": True,
          "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}, "qk_norm": True, "a_new_key": 1}  # fmt: skip
TEXT = {"pool_type": "last", "final_ln_after_pool": True, "no_causal_mask": True, "embed_cls": True, "pad_id": 1, "proj_bias": True, "proj_type": "none",
        "output_tokens": True, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}, "a_new_key": 1}  # fmt: skip


@pytest.mark.parametrize("name, key, value", [
    *(("vision", k, v) for k, v in VISION.items()), *(("text", k, v) for k, v in TEXT.items()),
    ("more", "init_logit_bias", -10), ("more", "multimodal_cfg", {}), ("more", "audio_cfg", {}),
])  # fmt: skip
def test_what_changes_an_open_clip_model_is_refused_by_name(name, key, value):
    config = open_clip(**({key: value} if name == "more" else {name: {key: value}}))
    with pytest.raises(ConfigError, match=rf"model_cfg\.(?:{name}_cfg\.)?{key}="):
        describe(config, [])


@pytest.mark.parametrize("config, words", [
    (open_clip(vision={"timm_model_name": "vit_base"}), "timm_model_name='vit_base': only open_clip's own"),
    (open_clip(text={"hf_model_name": "bert"}), "hf_model_name='bert': only open_clip's own"),
    (open_clip(vision={"layers": [3, 4, 6, 3]}), r"vision_cfg.layers=\[3, 4, 6, 3\]: only transformers can be read, not open_clip's ResNets"),
])  # fmt: skip
def test_towers_of_others_in_open_clip_are_named(config, words):
    with pytest.raises(ConfigError, match=words):
        describe(config, [])


def test_a_config_beside_files_whose_tensors_tell_the_model_must_agree():
    model = load.Published("resnet")
    convnets.check({"architecture": "resnet50", "num_classes": 1000, "pretrained_cfg": {"mean": [0.5]}}, model)
    with pytest.raises(ConfigError, match="architecture='resnetblur50': only resnet50"):
        convnets.check({"architecture": "resnetblur50"}, model)
    bert = json.loads((HF / "bert_mlm" / "config.json").read_text())
    shaped, bert = describe(bert, []), {**bert, "fusion_layer": 2, "encoder_width": 48}
    albef.check({**bert, "hidden_act": "gelu"}, shaped)
    for key, value in (("hidden_act", "relu"), ("layer_norm_eps", 1e-5), ("num_attention_heads", 1), ("add_type_embeddings", False)):
        with pytest.raises(ConfigError, match=f"^{key}="):
            albef.check({**bert, key: value}, shaped)
