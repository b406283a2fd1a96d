"""What a published config.json describes, in our options. Every key that changes the numbers is read or refused by name."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvl.interop.keys import ConfigError, section
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


ACTIVATIONS: dict[str, Act] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip


def describe(config: dict[str, Any], names: Collection[str]) -> Published:
    """The model of a config.json and of the tensor names of its files, which tell the heads that are present.

    Raises ConfigError for a model_type we do not have, for keys that are not known and for values our modules cannot compute.
    """
    kind = config.get("model_type")
    if "model_cfg" in config:
        return _open_clip(section("open_clip_config.json", config)["model_cfg"])
    if not isinstance(kind, str) or kind not in READERS:
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


def _shared(c: dict[str, Any]) -> dict[str, Any]:
    """Options that every tower has."""
    return {
        "variant": "", "width": c["hidden_size"], "depth": c["num_hidden_layers"], "heads": c["num_attention_heads"], "act": _act(c),
        "init_std": c["initializer_range"], "dropout": c.get("hidden_dropout_prob", 0.0),
        "attention_dropout": c.get("attention_probs_dropout_prob", c.get("attention_dropout", 0.0)),
    }  # fmt: skip


def _vit(config: dict[str, Any], names: Collection[str]) -> Published:
    c = section(config["model_type"], config)
    image = VitOptions(
        **_shared(c), patch=c["patch_size"], mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], qkv_bias=c["qkv_bias"],
        class_tokens=2 if config["model_type"] == "deit" else 1, mask_token=_has(names, "mask_token"),
        pooler=(c["pooler_output_size"] or c["hidden_size"]) if _has(names, "pooler.dense.weight") else 0,
        head=_labels(c) if _has(names, "classifier.weight") else 0, head_bias=True, drop_remainder=True,
    )  # fmt: skip
    return Published("vit", image=image, image_size=c["image_size"], channels=c["num_channels"])


def _labels(c: dict[str, Any]) -> int:
    return len(c["id2label"]) or c["num_labels"]


def _dinov2(config: dict[str, Any], names: Collection[str]) -> Published:
    registers = config["model_type"] == "dinov2_with_registers"
    c = section(config["model_type"], config)
    hidden = int(c["hidden_size"] * c["mlp_ratio"])
    if c["use_swiglu_ffn"]:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        c["hidden_act"] = "silu"  # the SwiGLU layer does not read the config's
    image = VitOptions(
        **_shared(c), patch=c["patch_size"], mlp_dim=hidden, eps=c["layer_norm_eps"], qkv_bias=c["qkv_bias"], gated=c["use_swiglu_ffn"],
        layer_scale=c["layerscale_value"] or 1.0, registers=c.get("num_register_tokens", 0), mask_token=_has(names, "mask_token"),
        drop_path=c["drop_path_rate"], drop_remainder=True,
    )  # fmt: skip
    resize: Method = "bicubic_antialias" if registers else "bicubic"
    return Published("dinov2", image=image, image_size=c["image_size"], channels=c["num_channels"], positions=resize)


def _bert(config: dict[str, Any], names: Collection[str]) -> Published:
    c = section("bert", config)
    text = TextOptions(
        **_shared(c), mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], vocab_size=c["vocab_size"], positions=c["max_position_embeddings"],
        token_types=c["type_vocab_size"], pad_id=c["pad_token_id"] or 0, causal=False, post_norm=True, embed_norm=True, final_norm=False, pool="first",
        pooler=c["hidden_size"] if _has(names, "pooler.dense.weight") else 0,
    )  # fmt: skip
    head = "none"
    if "cls.predictions.transform.dense.weight" in names:
        head = "mlm_tied" if c["tie_word_embeddings"] else "mlm"
    return Published("bert", text=text, head=head)


def _clip_image(config: dict[str, Any], names: Collection[str], where: str = "") -> Published:
    c = section("clip_vision_model", config, where)
    image = VitOptions(
        **_shared(c), patch=c["patch_size"], mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], pre_norm=True, patch_bias=False,
        head=c["projection_dim"] if _has(names, "visual_projection.weight") else 0, drop_remainder=True,
    )  # fmt: skip
    return Published("clip", image=image, image_size=c["image_size"], channels=c["num_channels"])


def _clip_text(config: dict[str, Any], names: Collection[str], where: str = "") -> Published:
    c = section("clip_text_model", config, where)
    if c["eos_token_id"] is None:
        raise ConfigError(f"{where + '.' * bool(where)}eos_token_id=None: the id is needed at which a text is pooled")
    # Files from before the end-of-text id was right say 2, and mean the largest id of a caption.
    pool = {"pool": "argmax"} if c["eos_token_id"] == 2 else {"pool": "eos", "eos_id": c["eos_token_id"]}
    text = TextOptions(
        **_shared(c), **pool, mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], vocab_size=c["vocab_size"], positions=c["max_position_embeddings"],
        pad_id=c["pad_token_id"] or 0, head=c["projection_dim"] if _has(names, "text_projection.weight") else 0,
    )  # fmt: skip
    return Published("clip", text=text)


def _clip(config: dict[str, Any], names: Collection[str]) -> Published:
    c = section("clip", config)
    image, text = (read(_both(kind, c, name) | {"projection_dim": c["projection_dim"]}, names, name) for read, kind, name in (
        (_clip_image, "clip_vision_model", "vision_config"), (_clip_text, "clip_text_model", "text_config")))  # fmt: skip
    return image._replace(text=text.text, scalars=("t",))


def _both(kind: str, c: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a CLIP config; where an old file has it twice, transformers takes the one called _dict, its defaults included."""
    old = c[f"{name}_dict"]
    return {**section(kind, c[name], name), **section(kind, old, f"{name}_dict")} if old else c[name]


def _siglip_image(config: dict[str, Any], names: Collection[str], where: str = "") -> Published:
    del names
    c = section("siglip_vision_model", config, where)
    image = VitOptions(
        **_shared(c), patch=c["patch_size"], mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], class_tokens=0, drop_remainder=True,
        pool="map" if c["vision_use_head"] else "mean",
    )  # fmt: skip
    return Published("siglip", image=image, image_size=c["image_size"], channels=c["num_channels"])


def _siglip_text(config: dict[str, Any], names: Collection[str], where: str = "") -> Published:
    del names
    c = section("siglip_text_model", config, where)
    text = TextOptions(
        **_shared(c), mlp_dim=c["intermediate_size"], eps=c["layer_norm_eps"], vocab_size=c["vocab_size"], positions=c["max_position_embeddings"],
        pad_id=c["pad_token_id"] or 0, causal=False, mask_padding=False, pool="end", head=c["projection_size"] or c["hidden_size"], head_bias=True,
    )  # fmt: skip
    return Published("siglip", text=text)


def _siglip(config: dict[str, Any], names: Collection[str]) -> Published:
    c = section("siglip", config)
    image, text = (_siglip_image(c["vision_config"], names, "vision_config"), _siglip_text(c["text_config"], names, "text_config"))
    return image._replace(text=text.text, scalars=("t", "b"))


def _llama(config: dict[str, Any], names: Collection[str]) -> Published:
    c = section("llama", config)
    name = "rope_scaling" if c["rope_scaling"] else "rope_parameters"
    kind = c[name].get("rope_type", c[name].get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope_type={kind!r}: only 'default' and 'llama3' can be computed")
    rope = section("rope", {"rope_theta": c["rope_theta"], **c[name]}, name)
    scaling: tuple[float, ...] = ()
    if kind == "llama3":
        needed = ("factor", "low_freq_factor", "high_freq_factor")
        if missing := [key for key in needed if key not in c[name]]:
            raise ConfigError(f"{name} has no {', '.join(missing)}, which rope_type='llama3' takes")
        length = rope["original_max_position_embeddings"] or c["original_max_position_embeddings"] or c["max_position_embeddings"]
        scaling = (*(rope[key] for key in needed), length)
    text = TextOptions(
        **_shared(c), mlp_dim=c["intermediate_size"], eps=c["rms_norm_eps"], vocab_size=c["vocab_size"], kv_heads=c["num_key_value_heads"] or 0,
        head_dim=c["head_dim"] or 0, pad_id=max(c["pad_token_id"] or 0, 0), norm="rms", gated=True, position="rope", rope_theta=rope["rope_theta"],
        rope_scaling=scaling, pool="last", qkv_bias=c["attention_bias"], out_bias=c["attention_bias"], mlp_bias=c["mlp_bias"],
    )  # fmt: skip
    head = "lm_tied" if c["tie_word_embeddings"] else "lm"
    return Published(
        "llama",
        text=text,
        head=head if c["tie_word_embeddings"] or _has(names, "lm_head.weight") or _has(names, "output.weight") else "none",
    )


def _open_clip(config: dict[str, Any]) -> Published:
    """The model_cfg of open_clip_config.json, of its own transformer towers."""
    c = section("open_clip", config, "model_cfg")
    for key, told in (("timm_model_name", c["vision_cfg"]), ("hf_model_name", c["text_cfg"])):
        if told.get(key):
            raise ConfigError(f"{key}={told[key]!r}: only open_clip's own transformers can be read, not {key.partition('_')[0]} towers")
    if isinstance(c["vision_cfg"].get("layers"), list):
        raise ConfigError(
            f"model_cfg.vision_cfg.layers={c['vision_cfg']['layers']}: only transformers can be read, not open_clip's ResNets"
        )
    if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]:
        raise ConfigError(f"model_cfg has no {', '.join(missing)}, for which open_clip has no default")
    v, t = (
        section("open_clip_vision", c["vision_cfg"], "model_cfg.vision_cfg"),
        section("open_clip_text", c["text_cfg"], "model_cfg.text_cfg"),
    )
    act: Act = "quick_gelu" if c["quick_gelu"] else "gelu"
    image = VitOptions(
        variant="", width=v["width"], depth=v["layers"], heads=v["width"] // v["head_width"], patch=v["patch_size"], act=act, eps=1e-5,
        mlp_dim=int(v["width"] * v["mlp_ratio"]), pre_norm=True, patch_bias=False, head=c["embed_dim"], layer_scale=v["ls_init_value"],
        patch_dropout=v["patch_dropout"],
    )  # fmt: skip
    text = TextOptions(
        variant="", width=t["width"], depth=t["layers"], heads=t["heads"], mlp_dim=int(t["width"] * t["mlp_ratio"]), act=act, eps=1e-5,
        vocab_size=t["vocab_size"], positions=t["context_length"], pool="argmax", head=c["embed_dim"], layer_scale=t["ls_init_value"],
    )  # fmt: skip
    return Published("clip", image=image, text=text, image_size=v["image_size"], scalars=("t",))


READERS = {
    "vit": _vit, "deit": _vit, "dinov2": _dinov2, "dinov2_with_registers": _dinov2, "bert": _bert, "llama": _llama,
    "clip": _clip, "clip_vision_model": _clip_image, "clip_text_model": _clip_text,
    "siglip": _siglip, "siglip_vision_model": _siglip_image, "siglip_text_model": _siglip_text,
}  # fmt: skip
