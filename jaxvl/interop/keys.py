"""Which keys a published config may have: those we read, those of one value only, and those without effect. Any other is refused by name.

Values that a config leaves out are those of the library that publishes it.
"""

from typing import Any, NamedTuple


class ConfigError(ValueError):
    """A config.json that is none we know; the message names the key, its value and what would be right."""


class Keys(NamedTuple):
    """read: with the library's defaults, whose types the values must have (None: a whole number or null). only: values that can be computed.
    idle: what changes no number that we compute."""

    read: dict[str, Any]
    only: dict[str, tuple[Any, ...]]
    idle: tuple[str, ...] = ()


# Of every config of transformers: its bookkeeping, how it was run, and how texts were generated with it.
IDLE = set(
    """
    _name_or_path name_or_path _commit_hash transformers_version architectures model_type tokenizer_class finetuning_task problem_type
    task_specific_params id2label label2id num_labels torch_dtype dtype use_bfloat16 torchscript tf_legacy_loss return_dict use_return_dict
    output_attentions output_hidden_states output_scores return_dict_in_generate use_cache gradient_checkpointing chunk_size_feed_forward
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled
    experts_implementation _experts_implementation _experts_implementation_internal tie_last_hidden_states initializer_factor
    tie_word_embeddings bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id prefix auto_map
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p min_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens pad_token_id max_sequence_length transformers.js_config is_llama_config unsloth_fixed unsloth_version
    """.split()
)
ONLY: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False, None), "add_cross_attention": (False, None), "is_encoder_decoder": (False, None), "tie_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,), "pruned_heads": ({}, None), "per_layer_config": (None, {}), "quantization_config": (None,),
}  # fmt: skip

_SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "initializer_range": 0.02,
    "hidden_act": "gelu",
}
_IMAGE = {"image_size": 224, "patch_size": 16, "num_channels": 3}
_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_VIT = {
    **_SIZES,
    **_IMAGE,
    **_DROPOUT,
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "pooler_output_size": None,
    "id2label": {},
    "num_labels": 2,
}
_DINOV2 = {
    **{k: v for k, v in _SIZES.items() if k != "intermediate_size"}, **_IMAGE, **_DROPOUT, "patch_size": 14, "layer_norm_eps": 1e-6, "qkv_bias": True,
    "mlp_ratio": 4.0, "layerscale_value": 1.0, "drop_path_rate": 0.0, "use_swiglu_ffn": False,
}  # fmt: skip
_CLIP = {**_SIZES, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "projection_dim": 512}
_SIGLIP = {**_SIZES, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
_BACKBONE = ("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names")
_PLAIN: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), (False, None)
)
_OPEN_CLIP: dict[str, tuple[Any, ...]] = {
    **_PLAIN, "output_tokens": (False,), "final_ln_after_pool": (False,), "act_kwargs": (None, {}), "norm_kwargs": (None, {}), "block_type": (None, "default"),
}  # fmt: skip
_BERT = {**_SIZES, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
         "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0, "tie_word_embeddings": True}  # fmt: skip
_BERT_IDLE = ("classifier_dropout", "directionality", "output_past", *(f"pooler_{x}" for x in (
    "type", "fc_size", "num_attention_heads", "num_fc_layers", "size_per_head")))  # fmt: skip

KINDS: dict[str, Keys] = {
    "vit": Keys(_VIT, {"pooler_act": ("tanh",)}, ("encoder_stride",)),
    "deit": Keys(_VIT, {"pooler_act": ("tanh",)}, ("encoder_stride",)),
    "dinov2": Keys(_DINOV2, {}, ("use_mask_token", *_BACKBONE)),
    "dinov2_with_registers": Keys({**_DINOV2, "patch_size": 16, "num_register_tokens": 4}, {"interpolate_antialias": (True,), "interpolate_offset": (0,)}, ("use_mask_token", *_BACKBONE)),
    "bert": Keys(_BERT, {"position_embedding_type": ("absolute",)}, _BERT_IDLE),
    "clip_vision_model": Keys({**_CLIP, **_IMAGE, "patch_size": 32}, {}, ("dropout",)),
    "clip_text_model": Keys(
        {**_CLIP, "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "max_position_embeddings": 77,
         "eos_token_id": 49407, "pad_token_id": 1}, {}, ("dropout",)),
    "clip": Keys(
        {"text_config": {}, "vision_config": {}, "text_config_dict": {}, "vision_config_dict": {}, "projection_dim": 512}, {}, ("logit_scale_init_value",)
    ),
    "siglip_vision_model": Keys({**_SIGLIP, **_IMAGE, "vision_use_head": True}, {}),
    "siglip_text_model": Keys({**_SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64, "pad_token_id": 1, "projection_size": None}, {}),
    "siglip": Keys({"text_config": {}, "vision_config": {}}, {}),
    "llama": Keys(
        {**_SIZES, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False, "pad_token_id": None,
         "attention_dropout": 0.0, "tie_word_embeddings": False, "num_key_value_heads": None, "head_dim": None, "rope_theta": 10_000.0, "rope_scaling": {},
         "rope_parameters": {}, "original_max_position_embeddings": None}, {"partial_rotary_factor": (1, None), "rope_interleaved": (False,)}, ("pretraining_tp",)),
    "rope": Keys(
        {"rope_type": "default", "type": "default", "rope_theta": 10_000.0, "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": None}, {"partial_rotary_factor": (1, None)}),
    # Beside the files of these two, whose tensors tell the sizes.
    "albef": Keys(
        {"num_attention_heads": None}, {"hidden_act": ("gelu",), "layer_norm_eps": (1e-12,), "position_embedding_type": ("absolute",)},
        (*_BERT, *_BERT_IDLE, *"""fusion_layer encoder_width train_file train_root val_file test_file answer_list vqa_root vg_root image_root
         bert_config image_res vision_width embed_dim batch_size batch_size_train batch_size_test temp mlm_probability queue_size momentum alpha
         distill warm_up optimizer schedular k_test eos patch_size""".split())),
    "timm": Keys({"architecture": ""}, {"model_args": ({}, None)}, ("num_classes", "num_features", "global_pool", "pretrained_cfg", "label_names", "label_descriptions")),
    "open_clip_config.json": Keys({"model_cfg": {}}, {}, ("preprocess_cfg", "version")),
    "open_clip": Keys(
        {"embed_dim": 0, "vision_cfg": {}, "text_cfg": {}, "quick_gelu": False}, {"init_logit_bias": (None,), "multimodal_cfg": (None,)},
        ("custom_text", "nonscalar_logit_scale", "init_logit_scale", "cast_dtype", "output_dict")),
    "open_clip_vision": Keys(
        {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224, "ls_init_value": 0.0, "patch_dropout": 0.0},
        {**_OPEN_CLIP, "timm_model_name": (None, ""), "attentional_pool": (False,), "no_ln_pre": (False,), "pos_embed_type": ("learnable",), "pool_type": ("tok",)},
        ("attn_pooler_queries", "attn_pooler_heads", *(f"timm_{x}" for x in ("model_pretrained", "pool", "proj", "proj_bias", "drop", "drop_path")))),
    "open_clip_text": Keys(
        {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0, "ls_init_value": 0.0},
        {**_OPEN_CLIP, "hf_model_name": (None, ""), "embed_cls": (False,), "pad_id": (0,), "no_causal_mask": (False,), "pool_type": ("argmax",),
         "proj_bias": (False,), "proj_type": ("linear",)},
        ("hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "hf_tokenizer_name", "hf_tokenizer_mode", "tokenizer_kwargs", "tokenizer_mode", "eos_id")),
}  # fmt: skip
ZERO = ("num_register_tokens", "type_vocab_size", "num_labels")  # whole numbers that may be 0
SQUARES = ("image_size", "patch_size")


def section(kind: str, config: Any, where: str = "") -> dict[str, Any]:
    """The keys that we read of a kind of config, with the library's defaults. where: what the section is called in its file.

    Raises ConfigError naming key, value and what would be right.
    """
    keys, dot = KINDS[kind], f"{where}." if where else ""
    if not isinstance(config, dict):
        raise ConfigError(f"{where or 'the config'}={_shown(config)} must be an object of keys and values")
    out = dict(keys.read)
    for key, value in config.items():
        told = f"{dot}{key}={_shown(value)}"
        if key in keys.read:
            out[key] = _value(key, value, keys.read[key], told)
        elif key in keys.only or key in ONLY:
            legal = keys.only.get(key, ONLY.get(key, ()))
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in legal):
                raise ConfigError(f"{told}: only {', '.join(map(repr, legal))} can be computed")
        elif key == "auto_map" and isinstance(value, dict) and any(name.startswith(("AutoModel", "AutoConfig")) for name in value):
            raise ConfigError(f"{told}: this model is computed by code of its own, which is never run")
        elif value is not None and key not in keys.idle and key not in IDLE:
            raise ConfigError(f"{told} is no key of a {kind} that is known here, so it may change the numbers; delete it if it does not")
    return out


def _value(key: str, value: Any, default: Any, told: str) -> Any:
    """A value of the type of a key's default. Raises ConfigError."""
    if value is None and (default is None or isinstance(default, dict) or key.endswith("_token_id") or key == "ls_init_value"):
        return default if isinstance(default, (dict, float)) else None
    if key in SQUARES:
        if isinstance(value, list) and len(value) in (1, 2) and value[0] == value[-1]:
            value = value[0]
        elif isinstance(value, list):
            raise ConfigError(f"{told}: only squares can be computed")
    if isinstance(default, bool):
        right, what = isinstance(value, bool), "true or false"
    elif isinstance(default, (str, dict)):
        right, what = isinstance(value, type(default)), "a text" if isinstance(default, str) else "an object"
    elif isinstance(default, float):
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e30  # finite in float32
        what = "a finite number of 0 or more"
    else:
        least = -1 if key.endswith("_token_id") else 0 if key in ZERO else 1
        right, what = type(value) is int and least <= value < 2**31, f"a whole number of {least} or more that fits 32 bits"
    if not right:
        raise ConfigError(f"{told} must be {what}")
    return float(value) if isinstance(default, float) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
