"""What a published config.json describes, in our options. Every key that changes the numbers is read or refused by name."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvl.interop.positions import Method
from jaxvl.models import kinds
from jaxvl.models.fusion import Fusion, LmHead, MlmHead
from jaxvl.models.parts import Act
from jaxvl.models.text import Text, TextOptions
from jaxvl.models.vit import VitOptions


class Fused(NamedTuple):
    """What files of the ALBEF family hold besides the towers of the student.

    width: of the joint space. teacher_fused: whether the teacher has fusion layers and word head too, as only hidden words need them.
    """

    fusion_depth: int
    width: int
    itm: bool = True
    teacher: bool = True
    teacher_fused: bool = True
    queue: int = 0  # entries; 0 where there are none
    ids: bool = False  # whether the queue's images have ids


class Published(NamedTuple):
    """A published model: which family, and our options for each part of it that the files hold."""

    family: str  # a key of names.layouts
    image: Any = None  # options of a vit, or of a convolutional tower
    text: TextOptions | None = None
    image_size: int = 0  # pixels a side, at which the positions are stored
    channels: int = 3
    positions: Method = "bicubic"  # how its own code resizes them
    head: str = "none"  # on the text tower: none | lm | lm_tied | mlm | mlm_tied
    scalars: tuple[str, ...] = ()  # of "t" (log scale), "b" (bias) and "temperature"
    fused: Fused | None = None


class ConfigError(ValueError):
    """A config.json that is none we know; the message names the key, its value and what would be right."""


ACTIVATIONS: dict[str, Act] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip

# Values of keys that a config.json may leave out, since transformers writes only what differs.
_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "initializer_range": 0.02}
_IMAGE = {"image_size": 224, "patch_size": 16, "num_channels": 3, "attention_dropout": 0.0}
_VIT = {**_SIZES, **_IMAGE, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "qkv_bias": True}
DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {**_VIT, "layer_norm_eps": 1e-12, "pooler_act": "tanh"},
    "dinov2": {**_VIT, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "layerscale_value": 1.0, "use_swiglu_ffn": False, "use_mask_token": True, "patch_size": 14},
    "bert": {**_SIZES, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
             "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0, "tie_word_embeddings": True},
    "clip_vision": {**_SIZES, **_IMAGE, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512},
    "clip_text": {**_SIZES, "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "max_position_embeddings": 77,
                  "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "eos_token_id": 49407, "pad_token_id": 1, "projection_dim": 512},
    "siglip_vision": {**_SIZES, **_IMAGE, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True},
    "siglip_text": {**_SIZES, "vocab_size": 32000, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
                    "attention_dropout": 0.0, "pad_token_id": 1},
    "llama": {**_SIZES, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
              "attention_dropout": 0.0, "tie_word_embeddings": False},
}  # fmt: skip


def describe(config: dict[str, Any], names: Collection[str]) -> Published:
    """The model of a config.json and of the tensor names of its files, which tell the heads that are present.

    Raises ConfigError for a model_type we do not have and for values our modules cannot compute.
    """
    kind = config.get("model_type")
    if "model_cfg" in config:
        return _open_clip(config["model_cfg"], names)
    if kind not in READERS:
        raise ConfigError(f"model_type={kind!r} is none of {', '.join(READERS)}")
    return READERS[kind](config, names)


def parts(model: Published) -> dict[str, Any]:
    """Our modules of a model: "image" (Vit, Resnet or Mobilenet), "text" (Text), "lm_head" (LmHead), "mlm" (MlmHead), those that it has."""
    out: dict[str, Any] = {}
    if model.image:
        out["image"] = kinds.of(model.image).module(model.image)
    if model.text:
        out["text"] = Text(model.text)
        if model.head == "lm":
            out["lm_head"] = LmHead(model.text)
        if model.head in ("mlm", "mlm_tied"):
            out["mlm"] = MlmHead(model.text, tied=model.head == "mlm_tied")
    return out


def shapes(model: Published) -> dict[str, Any]:
    """The tree of our parameters as float32 ShapeDtypeStructs; nothing is computed."""
    side = model.image_size
    text = model.text or TextOptions()
    states, table = jax.ShapeDtypeStruct((1, 1, text.width), jnp.float32), jax.ShapeDtypeStruct((text.vocab_size, text.width), jnp.float32)
    inputs = {
        "image": (jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32),),
        "text": (jax.ShapeDtypeStruct((1, text.positions or 1), jnp.int32),),
        "lm_head": (states,),
        "mlm": (states, table),
    }
    tree = {name: jax.eval_shape(module.init, jax.random.key(0), *inputs[name])["params"] for name, module in parts(model).items()}
    tree |= {name: jax.ShapeDtypeStruct((), jnp.float32) for name in model.scalars}
    return tree | _fused(model, tree) if model.fused else tree


def _fused(model: Published, tree: dict[str, Any]) -> dict[str, Any]:
    """What files of the ALBEF family hold besides the towers and heads in `tree`; the teacher copies all but the temperature."""
    image, text, fused = model.image, model.text, model.fused
    assert image and text and fused
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    linear = lambda inputs, outputs: {"kernel": array(inputs, outputs), "bias": array(outputs)}
    fusion = Fusion(text._replace(depth=fused.fusion_depth))
    inputs = array(1, 1, text.width), None, array(1, 1, image.width)
    out: dict[str, Any] = {
        "fusion": jax.eval_shape(fusion.init, jax.random.key(0), *inputs)["params"],
        "image_proj": linear(image.width, fused.width), "text_proj": linear(text.width, fused.width),
    }  # fmt: skip
    untaught = model.scalars if fused.teacher_fused else (*model.scalars, "fusion", "mlm")
    teacher = {k: v for k, v in {**tree, **out}.items() if k not in untaught}
    if fused.itm:
        out["itm"] = linear(text.width, 2)
    if fused.teacher:
        out["teacher"] = teacher
    if fused.queue:
        out |= {name: array(fused.queue, fused.width) for name in ("image_queue", "text_queue")} | {"pointer": array(dtype=jnp.int32)}
    if fused.ids:
        out["id_queue"] = array(fused.queue, dtype=jnp.int32)
    return out


def _has(names: Collection[str], end: str) -> bool:
    return any(name == end or name.endswith("." + end) for name in names)


def _act(c: dict[str, Any]) -> Act:
    if c["hidden_act"] not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={c['hidden_act']!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[c["hidden_act"]]


def _only(c: dict[str, Any], key: str, *legal: Any) -> None:
    if key in c and c[key] not in legal:
        raise ConfigError(f"{key}={c[key]!r}: only {', '.join(map(repr, legal))} can be computed")


def _square(c: dict[str, Any], key: str) -> int:
    value = c[key]
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise ConfigError(f"{key}={value!r}: only squares can be computed")
    return value


def _shared(c: dict[str, Any]) -> dict[str, Any]:
    """Options that every tower has."""
    return {
        "variant": "", "width": c["hidden_size"], "depth": c["num_hidden_layers"], "heads": c["num_attention_heads"], "act": _act(c),
        "init_std": c["initializer_range"], "dropout": c.get("hidden_dropout_prob", 0.0),
        "attention_dropout": c.get("attention_probs_dropout_prob", c.get("attention_dropout", 0.0)),
    }  # fmt: skip


def _vit(config: dict[str, Any], names: Collection[str]) -> Published:
    c = {**DEFAULTS["vit"], **config}
    _only(c, "pooler_act", "tanh")
    image = VitOptions(
        **_shared(c), patch=_square(c, "patch_size"), mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], qkv_bias=c["qkv_bias"],
        class_tokens=2 if config["model_type"] == "deit" else 1, mask_token=_has(names, "mask_token"),
        pooler=(c.get("pooler_output_size") or c["hidden_size"]) if _has(names, "pooler.dense.weight") else 0,
        head=_labels(c) if _has(names, "classifier.weight") else 0, head_bias=True, drop_remainder=True,
    )  # fmt: skip
    return Published("vit", image=image, image_size=_square(c, "image_size"), channels=c["num_channels"])


def _labels(c: dict[str, Any]) -> int:
    return len(c["id2label"]) if c.get("id2label") else c.get("num_labels", 2)


def _dinov2(config: dict[str, Any], names: Collection[str]) -> Published:
    registers = config["model_type"] == "dinov2_with_registers"
    c = {**DEFAULTS["dinov2"], "num_register_tokens": 4 if registers else 0, **({"patch_size": 16} if registers else {}), **config}
    hidden = int(c["hidden_size"] * c["mlp_ratio"])
    if c["use_swiglu_ffn"]:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        c["hidden_act"] = "silu"  # the SwiGLU layer does not read the config's
    image = VitOptions(
        **_shared(c), patch=_square(c, "patch_size"), mlp_dim=hidden, eps=c["layer_norm_eps"], qkv_bias=c["qkv_bias"], gated=c["use_swiglu_ffn"],
        layer_scale=c["layerscale_value"] or 1.0, registers=c["num_register_tokens"], mask_token=_has(names, "mask_token"),
        drop_path=c.get("drop_path_rate", 0.0), drop_remainder=True,
    )  # fmt: skip
    resize: Method = "bicubic_antialias" if registers else "bicubic"
    return Published("dinov2", image=image, image_size=_square(c, "image_size"), channels=c["num_channels"], positions=resize)


def _bert(config: dict[str, Any], names: Collection[str]) -> Published:
    c = {**DEFAULTS["bert"], **config}
    _only(c, "position_embedding_type", "absolute")
    _only(c, "is_decoder", False)
    _only(c, "add_cross_attention", False)
    text = TextOptions(
        **_shared(c), mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], vocab_size=c["vocab_size"], positions=c["max_position_embeddings"],
        token_types=c["type_vocab_size"], pad_id=c["pad_token_id"] or 0, causal=False, post_norm=True, embed_norm=True, final_norm=False, pool="first",
        pooler=c["hidden_size"] if _has(names, "pooler.dense.weight") else 0,
    )  # fmt: skip
    head = "none"
    if "cls.predictions.transform.dense.weight" in names:
        head = "mlm_tied" if c["tie_word_embeddings"] else "mlm"
    return Published("bert", text=text, head=head)


def _clip_image(c: dict[str, Any], names: Collection[str]) -> Published:
    c = {**DEFAULTS["clip_vision"], **c}
    image = VitOptions(
        **_shared(c), patch=_square(c, "patch_size"), mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], pre_norm=True, patch_bias=False,
        head=c["projection_dim"] if _has(names, "visual_projection.weight") else 0, drop_remainder=True,
    )  # fmt: skip
    return Published("clip", image=image, image_size=_square(c, "image_size"), channels=c["num_channels"])


def _clip_text(c: dict[str, Any], names: Collection[str]) -> Published:
    c = {**DEFAULTS["clip_text"], **c}
    # Files from before the end-of-text id was right say 2, and mean the largest id of a caption.
    pool = {"pool": "argmax"} if c["eos_token_id"] == 2 else {"pool": "eos", "eos_id": c["eos_token_id"]}
    text = TextOptions(
        **_shared(c), **pool, mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], vocab_size=c["vocab_size"], positions=c["max_position_embeddings"],
        pad_id=c["pad_token_id"] or 0, head=c["projection_dim"] if _has(names, "text_projection.weight") else 0,
    )  # fmt: skip
    return Published("clip", text=text)


def _clip(config: dict[str, Any], names: Collection[str]) -> Published:
    shared = {"projection_dim": config.get("projection_dim", 512)}
    image = _clip_image({**(config.get("vision_config") or {}), **shared}, names)
    text = _clip_text({**(config.get("text_config") or {}), **shared}, names)
    return image._replace(text=text.text, scalars=("t",))


def _siglip_image(c: dict[str, Any], names: Collection[str]) -> Published:
    c = {**DEFAULTS["siglip_vision"], **c}
    image = VitOptions(
        **_shared(c), patch=_square(c, "patch_size"), mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], class_tokens=0, drop_remainder=True,
        pool="map" if _has(names, "vision_model.head.probe") else "mean",
    )  # fmt: skip
    return Published("siglip", image=image, image_size=_square(c, "image_size"), channels=c["num_channels"])


def _siglip_text(c: dict[str, Any], names: Collection[str]) -> Published:
    del names
    c = {**DEFAULTS["siglip_text"], **c}
    text = TextOptions(
        **_shared(c), mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], vocab_size=c["vocab_size"], positions=c["max_position_embeddings"],
        pad_id=c["pad_token_id"] or 0, causal=False, mask_padding=False, pool="end", head=c.get("projection_size") or c["hidden_size"], head_bias=True,
    )  # fmt: skip
    return Published("siglip", text=text)


def _siglip(config: dict[str, Any], names: Collection[str]) -> Published:
    image, text = _siglip_image(config.get("vision_config") or {}, names), _siglip_text(config.get("text_config") or {}, names)
    return image._replace(text=text.text, scalars=("t", "b"))


def _llama(config: dict[str, Any], names: Collection[str]) -> Published:
    c = {**DEFAULTS["llama"], **config}
    rope = {"rope_theta": c.get("rope_theta"), **(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope_type={kind!r}: only 'default' and 'llama3' can be computed")
    _only({**c, **rope}, "partial_rotary_factor", 1, 1.0, None)
    scaling: tuple[float, ...] = ()
    if kind == "llama3":
        length = rope.get("original_max_position_embeddings") or c.get("original_max_position_embeddings") or c["max_position_embeddings"]
        scaling = (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], length)
    text = TextOptions(
        **_shared(c), mlp_dim=c["intermediate_size"], eps=c["rms_norm_eps"], vocab_size=c["vocab_size"], kv_heads=c.get("num_key_value_heads") or 0,
        head_dim=c.get("head_dim") or 0, pad_id=c.get("pad_token_id") or 0, norm="rms", gated=True, position="rope", rope_theta=rope["rope_theta"] or 10_000.0,
        rope_scaling=scaling, pool="last", qkv_bias=c["attention_bias"], out_bias=c["attention_bias"], mlp_bias=c["mlp_bias"],
    )  # fmt: skip
    head = "lm_tied" if c["tie_word_embeddings"] else "lm"
    return Published(
        "llama",
        text=text,
        head=head if c["tie_word_embeddings"] or _has(names, "lm_head.weight") or _has(names, "output.weight") else "none",
    )


def _open_clip(c: dict[str, Any], names: Collection[str]) -> Published:
    """open_clip_config.json of its own transformer towers."""
    v, t = c["vision_cfg"], c["text_cfg"]
    for key, section in (("timm_model_name", v), ("hf_model_name", t)):
        if section.get(key):
            raise ConfigError(f"{key}={section[key]!r}: only open_clip's own transformers can be read, not {key.partition('_')[0]} towers")
    act: Act = "quick_gelu" if c.get("quick_gelu") else "gelu"
    image = VitOptions(
        variant="", width=v["width"], depth=v["layers"], heads=v["width"] // v.get("head_width", 64), patch=v["patch_size"], act=act, eps=1e-5,
        mlp_dim=int(v["width"] * v.get("mlp_ratio", 4.0)), pre_norm=True, patch_bias=False, head=c["embed_dim"], layer_scale=v.get("ls_init_value") or 0.0,
    )  # fmt: skip
    text = TextOptions(
        variant="", width=t["width"], depth=t["layers"], heads=t["heads"], mlp_dim=int(t["width"] * t.get("mlp_ratio", 4.0)), act=act, eps=1e-5,
        vocab_size=t["vocab_size"], positions=t["context_length"], pool="argmax", head=c["embed_dim"], layer_scale=t.get("ls_init_value") or 0.0,
    )  # fmt: skip
    del names
    return Published("clip", image=image, text=text, image_size=v["image_size"], scalars=("t",))


READERS = {
    "vit": _vit, "deit": _vit, "dinov2": _dinov2, "dinov2_with_registers": _dinov2, "bert": _bert, "llama": _llama,
    "clip": _clip, "clip_vision_model": _clip_image, "clip_text_model": _clip_text,
    "siglip": _siglip, "siglip_vision_model": _siglip_image, "siglip_text_model": _siglip_text,
}  # fmt: skip
