"""Which class of transformers a run is, and its parameters in that class's layout.

A tower is compared with every kind of published tower; what it lacks and the kind has is filled in where that changes no number
(a bias of zero, a layer scale of one), and anything else is a reason why it is not of that kind.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvl.interop import load, names, tensors
from jaxvl.interop.names import LINEAR, SAME, Layout, Name
from jaxvl.interop.published import Published, describe
from jaxvl.methods.method import unit
from jaxvl.models import text as texts, vit as vits
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions

ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}
_PLAIN_IMAGE = {"registers": (0,), "gated": (False,), "qkv_bias": (True,), "layer_scale": (0.0,), "mask_token": (False,)}
_PLAIN_TEXT = {"position": ("learned",), "norm": ("layer",), "head_dim": (0,), "gated": (False,), "qkv_bias": (True,), "out_bias": (True,),
               "mlp_bias": (True,), "layer_scale": (0.0,)}  # fmt: skip
# What the options of each kind of tower must be; WIDTH stands for the tower's own width.
WIDTH = "its width"
IMAGE: dict[str, dict[str, tuple[Any, ...]]] = {
    "clip": {**_PLAIN_IMAGE, "pool": ("cls",), "class_tokens": (1,), "pre_norm": (True,), "pooler": (0,)},
    "siglip": {**_PLAIN_IMAGE, "pool": ("map",), "class_tokens": (0,), "pre_norm": (False,), "pooler": (0,)},
    "vit": {**_PLAIN_IMAGE, "pool": ("cls",), "class_tokens": (1,), "pre_norm": (False,), "pooler": (WIDTH,)},
    "dinov2": {"pool": ("cls",), "class_tokens": (1,), "pre_norm": (False,), "pooler": (0,), "qkv_bias": (True,)},
}
_DUAL_TEXT = {**_PLAIN_TEXT, "token_types": (0,), "embed_norm": (False,), "final_norm": (True,), "post_norm": (False,), "pooler": (0,)}
TEXT: dict[str, dict[str, tuple[Any, ...]]] = {
    "clip": {**_DUAL_TEXT, "causal": (True,), "pool": ("eos", "argmax")},
    "siglip": {**_DUAL_TEXT, "causal": (False,), "mask_padding": (False,), "pool": ("end",)},
    "bert": {**_PLAIN_TEXT, "causal": (False,), "mask_padding": (True,), "embed_norm": (True,), "final_norm": (False,), "post_norm": (True,),
             "pool": ("first",), "pooler": (WIDTH,)},
}  # fmt: skip
PREFIX = {"vit": "vision_model.", "dinov2": "vision_model.", "bert": "text_model.", "clip": "", "siglip": ""}  # in a dual encoder


class Target(NamedTuple):
    """A run as a class of transformers. ids: int64 [vocab], the id there of each of ours; None where they are the same."""

    architecture: str
    config: dict[str, Any]
    params: dict[str, Any]
    layout: Layout
    ids: np.ndarray | None


class Faces(NamedTuple):
    """Float32 embeddings of unit norm of an exported folder: images [b, S, S, 3]; tokens int [b, L] in the folder's ids."""

    embed_image: Any
    embed_text: Any


def target(method: Any, image: VitOptions, text: TextOptions, params: dict[str, Any], image_size: int) -> Target:
    """The class of transformers that computes what a run does. Raises ValueError saying of every class why it does not."""
    head = lambda tower: params[tower]["head"]["kernel"].shape[1] if "head" in params[tower] else 0  # the method's doing, not the options'
    image, text = vits.resolve(image)._replace(head=head("image")), texts.resolve(text)._replace(head=head("text"))
    if method.name not in ("clip", "siglip"):
        raise ValueError(f"config.method.name is {method.name!r}; only clip and siglip are models that transformers has")
    images = {kind: _reasons("image", image, want) for kind, want in IMAGE.items()}
    captions = {kind: _reasons("text", text, want) for kind, want in TEXT.items()}
    if image.gated and image.act != "silu":
        images["dinov2"].append(f"config.image.act is {image.act!r}, not 'silu'")
    if _mlp_ratio(image) is None:
        images["dinov2"].append(
            f"config.image.mlp_dim is {image.mlp_dim}, which is no whole multiple of {image.width}{', in eights' if image.gated else ''}"
        )
    kinds = {
        name: next((kind for kind, reasons in found.items() if not reasons), None)
        for name, found in (("image", images), ("text", captions))
    }
    if method.name == "siglip":
        reasons = [*images["siglip"], *captions["siglip"]] + (["config.method.width is not 0"] if "head" in params["image"] else [])
        if reasons:
            raise ValueError("this run is no SiglipModel, the only class of transformers with its loss: " + "; ".join(reasons))
        return _dual_of_one_family("siglip", image, text, params, image_size)
    if kinds["image"] is None or kinds["text"] not in ("clip", "bert"):
        tell = lambda name, found: [f"a {kind} {name} tower: {'; '.join(reasons)}" for kind, reasons in found.items() if reasons]
        lines = (tell("image", images) if kinds["image"] is None else []) + (
            tell("text", captions) if kinds["text"] not in ("clip", "bert") else []
        )
        raise ValueError("transformers has no class for this run; safetensors and stablehlo take any. It is not\n  " + "\n  ".join(lines))
    t = np.minimum(np.float32(params["t"]), np.float32(math.log(method.max_scale)))  # the bound is in our forward pass, not in theirs
    params = {**params, "t": t}
    if kinds["image"] == kinds["text"] == "clip":
        return _dual_of_one_family("clip", image, text, params, image_size)
    return _dual_of_two(kinds["image"], kinds["text"], image, text, params, image_size)


def open_folder(folder: Path) -> Faces:
    """The model that the files of an exported folder describe, read by our own importer."""
    config, stored = load.read_config(folder), tensors.find(folder)
    if config["model_type"] != "vision-text-dual-encoder":
        found = load.load(folder)
        return Faces(
            _face(vits.Vit(_exact(found.model.image)), found.params["image"]),
            _face(texts.Text(_exact(found.model.text)), found.params["text"]),
        )
    faces = []
    for section, start, projection in (
        ("vision_config", "vision_model.", "visual_projection.weight"),
        ("text_config", "text_model.", "text_projection.weight"),
    ):
        sub = config[section]
        cut = start if PREFIX.get(sub["model_type"].split("_")[0], "") else ""
        mine = {name.removeprefix(cut): tensor for name, tensor in stored.items() if name.startswith(start)}
        found = load.fill(describe(sub, mine), mine)
        name, module = ("image", vits.Vit) if section == "vision_config" else ("text", texts.Text)
        faces.append(_face(module(_exact(getattr(found.model, name))), found.params[name], tensors.read(stored[projection]).T))
    return Faces(*faces)


def _exact(options: Any) -> Any:
    return options._replace(dtype="float32")


def _face(module: Any, params: dict[str, Any], projection: np.ndarray | None = None) -> Any:
    project = (lambda x: x) if projection is None else (lambda x: x @ projection)
    return jax.jit(lambda inputs: unit(project(module.apply({"params": params}, inputs).pooled)))


def _reasons(section: str, options: Any, want: dict[str, tuple]) -> list[str]:
    out = []
    for key, legal in want.items():
        legal = tuple(options.width if value == WIDTH else value for value in legal)
        if getattr(options, key) not in legal:
            out.append(f"config.{section}.{key} is {getattr(options, key)!r}, not {' or '.join(map(repr, legal))}")
    if section == "text" and options.kv_heads not in (0, options.heads):
        out.append(f"config.text.kv_heads is {options.kv_heads}, not {options.heads}")
    if options.head and options.head_bias and section == "image":
        out.append("config.image.head_bias is True, not False")
    return out


def _image(kind: str, o: VitOptions, p: dict[str, Any], size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of an image tower of a kind, and its parameters."""
    config = {"hidden_size": o.width, "num_hidden_layers": o.depth, "num_attention_heads": o.heads, "image_size": size, "patch_size": o.patch,
              "num_channels": 3, "hidden_act": ACTS[o.act], "layer_norm_eps": o.eps, "initializer_range": o.init_std or 0.02}  # fmt: skip
    if kind == "clip":
        if "bias" in p["patch"]:  # there is none; added to every patch's position it is the same sum
            pos = np.concatenate([p["pos"][:1], p["pos"][1:] + p["patch"]["bias"]])
            p = {**p, "pos": pos, "patch": {"kernel": p["patch"]["kernel"]}}
        return {"model_type": "clip_vision_model", "intermediate_size": o.mlp_dim, "projection_dim": o.head or o.width, **config}, p
    p = {**p, "patch": {"bias": np.zeros(o.width, np.float32), **p["patch"]}}
    if kind == "siglip":
        return {"model_type": "siglip_vision_model", "intermediate_size": o.mlp_dim, **config}, p
    if kind == "vit":
        return {
            "model_type": "vit",
            "intermediate_size": o.mlp_dim,
            "qkv_bias": True,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **config,
        }, p
    ones = np.ones((o.depth, o.width), np.float32)
    blocks = {"attn_scale": ones, "mlp_scale": ones, **p["blocks"]}
    p = {"mask_token": np.zeros((1, o.width), np.float32), **p, "blocks": blocks}
    kind, more = ("dinov2_with_registers", {"num_register_tokens": o.registers}) if o.registers else ("dinov2", {})
    return {"model_type": kind, "mlp_ratio": _mlp_ratio(o), "use_swiglu_ffn": o.gated, "layerscale_value": o.layer_scale or 1.0,
            "qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **config, **more}, p  # fmt: skip


def _mlp_ratio(o: VitOptions) -> int | None:
    """The whole number by which Dinov2Model is told the width of its MLPs, None where there is none."""
    hidden = lambda ratio: (int(o.width * ratio * 2 / 3) + 7) // 8 * 8 if o.gated else o.width * ratio
    return next((ratio for ratio in range(1, 33) if hidden(ratio) == o.mlp_dim), None)


def _text(kind: str, o: TextOptions, p: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], np.ndarray | None]:
    """config.json of a text tower of a kind, its parameters, and where its ids go."""
    positions, vocab, ids = len(p["pos"]), len(p["embed"]), None
    config = {"hidden_size": o.width, "num_hidden_layers": o.depth, "num_attention_heads": o.heads, "intermediate_size": o.mlp_dim, "vocab_size": vocab,
              "max_position_embeddings": positions, "hidden_act": ACTS[o.act], "layer_norm_eps": o.eps, "initializer_range": o.init_std or 0.02}  # fmt: skip
    if kind == "clip":
        eos = 2  # which tells transformers to pool at the largest id
        if o.pool == "eos":
            if o.eos_id == 2:  # and must not be said of any other pooling: the id goes to the end of the vocabulary
                ids = np.arange(vocab)
                ids[[2, vocab - 1]] = vocab - 1, 2
                p = {**p, "embed": np.asarray(p["embed"])[ids]}
            eos = int(o.eos_id if ids is None else ids[o.eos_id])
        # Ids of another default would lie outside a small vocabulary.
        return (
            {
                "model_type": "clip_text_model",
                "eos_token_id": eos,
                "bos_token_id": 1,
                "pad_token_id": 0,
                "projection_dim": o.head or o.width,
                **config,
            },
            p,
            ids,
        )
    if kind == "siglip":
        head = {"bias": np.zeros(o.head, np.float32), **p["head"]}
        special = {"pad_token_id": 0, "eos_token_id": o.eos_id or None, "bos_token_id": None}
        return {"model_type": "siglip_text_model", "projection_size": o.head, **special, **config}, {**p, "head": head}, None
    p = {"types": np.zeros((1, o.width), np.float32), **p}
    return (
        {
            "model_type": "bert",
            "type_vocab_size": len(p["types"]),
            "pad_token_id": 0,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **config,
        },
        p,
        None,
    )


def _dual_of_one_family(family: str, image: VitOptions, text: TextOptions, params: dict[str, Any], size: int) -> Target:
    vision, image_params = _image(family, image, params["image"], size)
    caption, text_params, ids = _text(family, text, params["text"])
    config: dict[str, Any] = {"model_type": family, "vision_config": vision, "text_config": caption}
    if family == "clip":
        config |= {"projection_dim": image.head or image.width, "logit_scale_init_value": float(params["t"])}
    layout = names.CLIP if family == "clip" else names.SIGLIP
    return Target(
        {"clip": "CLIPModel", "siglip": "SiglipModel"}[family], config, {**params, "image": image_params, "text": text_params}, layout, ids
    )


def _dual_of_two(image_kind: str, text_kind: str, image: VitOptions, text: TextOptions, params: dict[str, Any], size: int) -> Target:
    vision, image_params = _image(image_kind, image, params["image"], size)
    caption, text_params, ids = _text(text_kind, text, params["text"])
    config = {"model_type": "vision-text-dual-encoder", "projection_dim": image.head or image.width, "logit_scale_init_value": float(params["t"]),
              "vision_config": vision, "text_config": caption}  # fmt: skip
    parts = []
    for section, kind in (("image", image_kind), ("text", text_kind)):
        layout = names.layouts(kind, gated=image.gated, tied=True, heads=1, kv_heads=1)[0]
        parts += [
            one._replace(theirs=PREFIX[kind] + one.theirs.replace("{p}", ""))
            for one in layout.names
            if one.ours.startswith(section + "/") and "/head/" not in one.ours
        ]
    parts += [
        Name("image/head/kernel", "visual_projection.weight", LINEAR),
        Name("text/head/kernel", "text_projection.weight", LINEAR),
        Name("t", "logit_scale", SAME),
    ]
    return Target("VisionTextDualEncoderModel", config, {**params, "image": image_params, "text": text_params}, Layout(tuple(parts)), ids)


def write(folder: Path, what: Target, dtype: str) -> None:
    """model.safetensors of a target."""
    load.save(folder / tensors.SINGLE, Published("clip"), what.params, layout=what.layout, prefix="", dtype=dtype)


def embeddings_in_torch(folder: Path, images: np.ndarray, tokens: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Normalised embeddings of the folder as transformers loads it; needs torch."""
    import torch
    from transformers import AutoModel

    with torch.no_grad():
        given = {} if mask is None else {"attention_mask": torch.tensor(mask.astype(np.int64))}
        pixels = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        out = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()(
            input_ids=torch.tensor(tokens.astype(np.int64)), pixel_values=pixels, **given
        )
    return tuple(x.numpy() / np.linalg.norm(x.numpy(), axis=-1, keepdims=True) for x in (out.image_embeds, out.text_embeds))


def as_numpy(params: Any) -> Any:
    """Float32 numpy arrays of a tree."""
    return jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.float32)), params)
