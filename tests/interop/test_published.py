import pytest

from jaxvl.interop.keys import ConfigError
from jaxvl.interop.published import describe

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 50,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("keys, theta, scaling", [
    ({}, 1e4, ()),
    ({"rope_theta": 5e5}, 5e5, ()),
    ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, ()),
    ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}}, 5e5, (8.0, 1.0, 4.0, 512)),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}}, 5e5, (8.0, 1.0, 4.0, 512)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, ()),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}}, 5e5, (8.0, 1.0, 4.0, 512)),
    ({"max_position_embeddings": 99, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **{k: v for k, v in SCALING.items() if "orig" not in k}}},
     5e5, (8.0, 1.0, 4.0, 99)),
])  # fmt: skip
def test_every_spelling_of_rotary_embedding(keys, theta, scaling):
    text = describe({**LLAMA, **keys}, ["model.embed_tokens.weight", "lm_head.weight"]).text
    assert (text.rope_theta, text.rope_scaling) == (theta, scaling)


def test_llama_defaults_and_switches():
    plain = describe(LLAMA, ["lm_head.weight"])
    assert (
        plain.head == "lm" and plain.text.kv_heads == 0 and plain.text.head_dim == 0 and not plain.text.qkv_bias and plain.text.eps == 1e-6
    )
    other = describe(
        {**LLAMA, "num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, []
    )
    assert (
        other.head == "lm_tied" and other.text.kv_heads == 2 and other.text.head_dim == 24 and other.text.out_bias and other.text.mlp_bias
    )
    assert describe(LLAMA, ["embed_tokens.weight"]).head == "none"


def test_a_config_that_says_nothing_means_the_published_defaults():
    siglip = describe(
        {"model_type": "siglip", "text_config": {"model_type": "siglip_text_model"}, "vision_config": {}}, ["vision_model.head.probe"]
    )
    assert (siglip.image.width, siglip.image.patch, siglip.image.pool, siglip.image_size) == (768, 16, "map", 224)
    assert (siglip.text.vocab_size, siglip.text.positions, siglip.text.head, siglip.scalars) == (32000, 64, 768, ("t", "b"))
    clip = describe({"model_type": "clip"}, ["visual_projection.weight", "text_projection.weight"])
    assert (clip.image.patch, clip.image.act, clip.text.width, clip.text.pool, clip.text.eos_id, clip.text.head) == (
        32,
        "quick_gelu",
        512,
        "eos",
        49407,
        512,
    )
    assert describe({"model_type": "clip", "text_config": {"eos_token_id": 2}}, []).text.pool == "argmax"
    bert = describe({"model_type": "bert"}, ["bert.pooler.dense.weight", "cls.predictions.transform.dense.weight"])
    assert (bert.text.dropout, bert.text.attention_dropout, bert.text.pooler, bert.head) == (0.1, 0.1, 768, "mlm_tied")
    giant = describe(
        {"model_type": "dinov2", "hidden_size": 1536, "use_swiglu_ffn": True, "num_attention_heads": 24, "num_hidden_layers": 40}, []
    )
    assert (giant.image.mlp_dim, giant.image.gated, giant.image.act, giant.positions) == (4096, True, "silu", "bicubic")
    registers = describe({"model_type": "dinov2_with_registers"}, [])
    assert (registers.image.registers, registers.positions) == (4, "bicubic_antialias")


def test_open_clip_config():
    config = {"model_cfg": {"embed_dim": 512, "quick_gelu": True, "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
                            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}}}  # fmt: skip
    model = describe(config, [])
    assert (model.image.heads, model.image.act, model.image.head, model.text.mlp_dim, model.text.pool) == (
        12,
        "quick_gelu",
        512,
        2048,
        "argmax",
    )
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "roberta-base"
    with pytest.raises(ConfigError, match="hf_model_name='roberta-base'"):
        describe(config, [])


@pytest.mark.parametrize("config, words", [
    ({"model_type": "swin"}, "model_type='swin' is none of vit, deit"),
    ({**LLAMA, "hidden_act": "gelu_python"}, "hidden_act='gelu_python' is none of gelu"),
    ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type='yarn': only 'default' and 'llama3'"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: only 1"),
    ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type='relative_key': only 'absolute'"),
    ({"model_type": "vit", "patch_size": [16, 8]}, r"patch_size=\[16, 8\]: only squares"),
    ({"model_type": "vit", "pooler_act": "relu"}, "pooler_act='relu': only 'tanh'"),
])  # fmt: skip
def test_what_cannot_be_computed_is_refused_by_key_and_value(config, words):
    with pytest.raises(ConfigError, match=words):
        describe(config, [])
