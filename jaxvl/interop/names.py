"""Which of our parameters is which published tensor, and how its layout differs: tables read in both directions.

Ours are paths in {"image": Vit, "text": Text, "lm_head", "mlm", "t", "b"}, and what ALBEF has besides; `{i}` in a published name
is the layer, which for us is the leading axis of everything below `blocks`. `{p}` is a prefix that a file has or has not (`bert.`).
A table may name more than a model has; what a model's options leave out is not asked for.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """Values between layouts, for one layer; each undoes the other without changing a bit."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.T, lambda x: x.T)  # [out, in] <-> [in, out]
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
LEAD = Transform(lambda x: x[0], lambda x: x[None])  # theirs has one more axis of size 1 in front
BARE = Transform(lambda x: x[None], lambda x: x[0])  # ours has


class Name(NamedTuple):
    """One of our leaves and its tensor, or its share of a tensor that holds several, stacked along their first axis.

    first: what our layer 0 is called in theirs.
    """

    ours: str
    theirs: str
    transform: Transform = SAME
    part: int = 0
    parts: int = 1
    first: int = 0


class Layout(NamedTuple):
    """One way of naming one family's tensors."""

    names: tuple[Name, ...]
    prefixes: tuple[str, ...] = ("",)  # what {p} may be: of the bare model, then of the model under a head
    renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement): older spellings of the same names
    copies: tuple[tuple[str, str], ...] = ()  # (theirs, theirs): may be present, and then equals the other where ours is tied
    unread: tuple[str, ...] = ()  # patterns of tensors that are no weights of ours: buffers, heads of other tasks
    files_only: bool = False  # transformers 5 reads files with these names into modules of other names
    counts: tuple[tuple[str, str], ...] = ()  # (theirs, theirs): buffers [1, n] of 0, 1, ... that files hold, for n rows of the other
    repeats: bool = False  # whether files hold the copies


def linear(ours: str, theirs: str) -> list[Name]:
    return [Name(f"{ours}/kernel", f"{theirs}.weight", LINEAR), Name(f"{ours}/bias", f"{theirs}.bias")]


def norm(ours: str, theirs: str) -> list[Name]:
    return [Name(f"{ours}/scale", f"{theirs}.weight"), Name(f"{ours}/bias", f"{theirs}.bias")]


def fused(ours: tuple[str, ...], weight: str, bias: str) -> list[Name]:
    """Several linear maps of one input stored as one matrix, their outputs one after the other."""
    n = len(ours)
    return [Name(f"{o}/{leaf}", theirs, change, part, n) for part, o in enumerate(ours)
            for leaf, theirs, change in (("kernel", weight, LINEAR), ("bias", bias, SAME))]  # fmt: skip


def attention(ours: str, q: str, k: str, v: str, out: str) -> list[Name]:
    return [name for one, theirs in (("q", q), ("k", k), ("v", v), ("out", out)) for name in linear(f"{ours}/{one}", theirs)]


def qkv(ours: str, weight: str, bias: str, out: str) -> list[Name]:
    return fused((f"{ours}/q", f"{ours}/k", f"{ours}/v"), weight, bias) + linear(f"{ours}/out", out)


def _vit(layer: str, q: str, k: str, v: str, out: str, norms: tuple[str, str], mlp: list[Name], mask_token: Transform) -> tuple[Name, ...]:
    """The ViT family of transformers: ViT, DeiT, DINOv2."""
    e, b = "{p}embeddings.", "image/blocks"
    return (
        Name("image/cls", e + "cls_token", LEAD),
        Name("image/distill", e + "distillation_token", LEAD),
        Name("image/mask_token", e + "mask_token", mask_token),
        Name("image/registers", e + "register_tokens", LEAD),
        Name("image/pos", e + "position_embeddings", LEAD),
        Name("image/patch/kernel", e + "patch_embeddings.projection.weight", CONV),
        Name("image/patch/bias", e + "patch_embeddings.projection.bias"),
        *attention(f"{b}/attn", *(f"{layer}.attention.{x}" for x in (q, k, v, out))),
        *norm(f"{b}/attn_norm", f"{layer}.{norms[0]}"),
        *norm(f"{b}/mlp_norm", f"{layer}.{norms[1]}"),
        Name(f"{b}/attn_scale", f"{layer}.layer_scale1.lambda1"),
        Name(f"{b}/mlp_scale", f"{layer}.layer_scale2.lambda1"),
        *mlp,
        *norm("image/norm", "{p}layernorm"),
        *linear("image/pooler", "{p}pooler.dense"),
        *linear("image/head", "classifier"),
    )


def _mlp(up: str, down: str) -> list[Name]:
    return linear("image/blocks/mlp/up", up) + linear("image/blocks/mlp/down", down)


_HUB = "{p}encoder.layer.{i}"
_OLD = ("attention.query", "attention.key", "attention.value", "output.dense")
_NEW = ("q_proj", "k_proj", "v_proj", "o_proj")
_SWIGLU = ("image/blocks/mlp/gate", "image/blocks/mlp/up")

_VIT_NORMS, _VIT_PREFIXES = ("layernorm_before", "layernorm_after"), ("", "vit.", "deit.")
_DINO_NORMS, _DINO_PREFIXES = ("norm1", "norm2"), ("", "dinov2.", "dinov2_with_registers.")
VIT = (
    Layout(_vit(_HUB, *_OLD, _VIT_NORMS, _mlp(f"{_HUB}.intermediate.dense", f"{_HUB}.output.dense"), LEAD), _VIT_PREFIXES, files_only=True),
    Layout(_vit("{p}layers.{i}", *_NEW, _VIT_NORMS, _mlp("{p}layers.{i}.mlp.fc1", "{p}layers.{i}.mlp.fc2"), LEAD), _VIT_PREFIXES),
)


def dinov2(gated: bool) -> tuple[Layout, ...]:
    """transformers on disk, transformers in memory, and the original files."""
    mlp = f"{_HUB}.mlp"
    hub = memory = _mlp(f"{mlp}.fc1", f"{mlp}.fc2")
    if gated:
        hub = [
            *fused(_SWIGLU, f"{mlp}.weights_in.weight", f"{mlp}.weights_in.bias"),
            *linear("image/blocks/mlp/down", f"{mlp}.weights_out"),
        ]
        memory = [name for x in ("gate", "up", "down") for name in linear(f"image/blocks/mlp/{x}", f"{mlp}.{x}_proj")]
    return (
        Layout(_vit(_HUB, *_OLD, _DINO_NORMS, hub, SAME), _DINO_PREFIXES, files_only=True),
        Layout(_vit(_HUB, *_NEW, _DINO_NORMS, memory, SAME), _DINO_PREFIXES),
        original(gated),
    )


def original(gated: bool) -> Layout:
    """Names of DINOv2's own files, which DeiT and timm share."""
    layer = "blocks.{i}"
    mlp = _mlp(f"{layer}.mlp.fc1", f"{layer}.mlp.fc2")
    if gated:
        mlp = [*fused(_SWIGLU, f"{layer}.mlp.w12.weight", f"{layer}.mlp.w12.bias"), *linear("image/blocks/mlp/down", f"{layer}.mlp.w3")]
    return Layout((
        Name("image/cls", "cls_token", LEAD),
        Name("image/distill", "dist_token", LEAD),
        Name("image/mask_token", "mask_token"),
        Name("image/registers", "register_tokens", LEAD),
        Name("image/pos", "pos_embed", LEAD),
        Name("image/patch/kernel", "patch_embed.proj.weight", CONV),
        Name("image/patch/bias", "patch_embed.proj.bias"),
        *qkv("image/blocks/attn", f"{layer}.attn.qkv.weight", f"{layer}.attn.qkv.bias", f"{layer}.attn.proj"),
        *norm("image/blocks/attn_norm", f"{layer}.norm1"),
        *norm("image/blocks/mlp_norm", f"{layer}.norm2"),
        Name("image/blocks/attn_scale", f"{layer}.ls1.gamma"),
        Name("image/blocks/mlp_scale", f"{layer}.ls2.gamma"),
        *mlp,
        *norm("image/norm", "norm"),
        *linear("image/head", "head"),
    ))  # fmt: skip


_B = "{p}encoder.layer.{i}"
BERT_TIES = (
    ("cls.predictions.decoder.weight", "{p}embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
)
BERT = Layout(
    (
        Name("text/embed", "{p}embeddings.word_embeddings.weight"),
        Name("text/pos", "{p}embeddings.position_embeddings.weight"),
        Name("text/types", "{p}embeddings.token_type_embeddings.weight"),
        *norm("text/embed_norm", "{p}embeddings.LayerNorm"),
        *attention(
            "text/blocks/attn",
            f"{_B}.attention.self.query",
            f"{_B}.attention.self.key",
            f"{_B}.attention.self.value",
            f"{_B}.attention.output.dense",
        ),
        *norm("text/blocks/attn_norm", f"{_B}.attention.output.LayerNorm"),
        *linear("text/blocks/mlp/up", f"{_B}.intermediate.dense"),
        *linear("text/blocks/mlp/down", f"{_B}.output.dense"),
        *norm("text/blocks/mlp_norm", f"{_B}.output.LayerNorm"),
        *linear("text/pooler", "{p}pooler.dense"),
        *linear("mlm/transform", "cls.predictions.transform.dense"),
        *norm("mlm/norm", "cls.predictions.transform.LayerNorm"),
        Name("mlm/bias", "cls.predictions.bias"),
    ),
    prefixes=("", "bert."),
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    copies=BERT_TIES,
    unread=(r"embeddings\.position_ids$", r"^cls\.seq_relationship\."),
)
# With a decoder of its own the head adds the decoder's bias, and the file's other bias is read by nothing.
BERT_UNTIED = BERT._replace(
    names=(
        *(name for name in BERT.names if name.ours != "mlm/bias"),
        Name("mlm/decoder/kernel", "cls.predictions.decoder.weight", LINEAR),
        Name("mlm/bias", "cls.predictions.decoder.bias"),
        Name("mlm/spare_bias", "cls.predictions.bias"),
    ),
    copies=(),
)


def _clip_layers(ours: str, layer: str) -> list[Name]:
    return [
        *attention(f"{ours}/attn", *(f"{layer}.self_attn.{x}_proj" for x in ("q", "k", "v", "out"))),
        *norm(f"{ours}/attn_norm", f"{layer}.layer_norm1"),
        *norm(f"{ours}/mlp_norm", f"{layer}.layer_norm2"),
        *linear(f"{ours}/mlp/up", f"{layer}.mlp.fc1"),
        *linear(f"{ours}/mlp/down", f"{layer}.mlp.fc2"),
    ]


_TOWERS = (
    Name("image/patch/kernel", "vision_model.embeddings.patch_embedding.weight", CONV),
    Name("image/patch/bias", "vision_model.embeddings.patch_embedding.bias"),
    Name("image/pos", "vision_model.embeddings.position_embedding.weight"),
    *_clip_layers("image/blocks", "vision_model.encoder.layers.{i}"),
    *norm("image/norm", "vision_model.post_layernorm"),
    Name("text/embed", "text_model.embeddings.token_embedding.weight"),
    Name("text/pos", "text_model.embeddings.position_embedding.weight"),
    *_clip_layers("text/blocks", "text_model.encoder.layers.{i}"),
    *norm("text/norm", "text_model.final_layer_norm"),
)
CLIP = Layout(
    (
        *_TOWERS,
        Name("image/cls", "vision_model.embeddings.class_embedding", BARE),
        *norm("image/pre_norm", "vision_model.pre_layrnorm"),
        *linear("image/head", "visual_projection"),
        *linear("text/head", "text_projection"),
        Name("t", "logit_scale"),
    ),
    unread=(r"embeddings\.position_ids$",),
)
_HEAD = "vision_model.head"
SIGLIP = Layout(
    (
        *_TOWERS,
        Name("image/map/probe", f"{_HEAD}.probe", LEAD),
        *qkv("image/map/attn", f"{_HEAD}.attention.in_proj_weight", f"{_HEAD}.attention.in_proj_bias", f"{_HEAD}.attention.out_proj"),
        *norm("image/map/norm", f"{_HEAD}.layernorm"),
        *linear("image/map/mlp/up", f"{_HEAD}.mlp.fc1"),
        *linear("image/map/mlp/down", f"{_HEAD}.mlp.fc2"),
        *linear("text/head", "text_model.head"),
        Name("t", "logit_scale", LEAD),
        Name("b", "logit_bias", LEAD),
    ),
    unread=(r"embeddings\.position_ids$",),
)


def _open_clip_layers(ours: str, layer: str) -> list[Name]:
    return [
        *qkv(f"{ours}/attn", f"{layer}.attn.in_proj_weight", f"{layer}.attn.in_proj_bias", f"{layer}.attn.out_proj"),
        *norm(f"{ours}/attn_norm", f"{layer}.ln_1"),
        *norm(f"{ours}/mlp_norm", f"{layer}.ln_2"),
        *linear(f"{ours}/mlp/up", f"{layer}.mlp.c_fc"),
        *linear(f"{ours}/mlp/down", f"{layer}.mlp.c_proj"),
        Name(f"{ours}/attn_scale", f"{layer}.ls_1.gamma"),
        Name(f"{ours}/mlp_scale", f"{layer}.ls_2.gamma"),
    ]


# open_clip's and OpenAI's own files; the projections are parameters [in, out] there, not linear maps.
OPEN_CLIP = Layout(
    (
        Name("image/cls", "visual.class_embedding", BARE),
        Name("image/pos", "visual.positional_embedding"),
        Name("image/patch/kernel", "visual.conv1.weight", CONV),
        *norm("image/pre_norm", "visual.ln_pre"),
        *_open_clip_layers("image/blocks", "visual.transformer.resblocks.{i}"),
        *norm("image/norm", "visual.ln_post"),
        Name("image/head/kernel", "visual.proj"),
        Name("text/embed", "{p}token_embedding.weight"),
        Name("text/pos", "{p}positional_embedding"),
        *_open_clip_layers("text/blocks", "{p}transformer.resblocks.{i}"),
        *norm("text/norm", "{p}ln_final"),
        Name("text/head/kernel", "{p}text_projection"),
        Name("t", "logit_scale"),
    ),
    prefixes=("", "text."),
    unread=(r"(?:^|\.)attn_mask$", r"^(?:input_resolution|context_length|vocab_size)$"),
)

_L = "{p}layers.{i}"
LLAMA = Layout(
    (
        Name("text/embed", "{p}embed_tokens.weight"),
        *norm("text/blocks/attn_norm", f"{_L}.input_layernorm"),
        *norm("text/blocks/mlp_norm", f"{_L}.post_attention_layernorm"),
        *attention("text/blocks/attn", *(f"{_L}.self_attn.{x}_proj" for x in ("q", "k", "v", "o"))),
        *(name for x in ("gate", "up", "down") for name in linear(f"text/blocks/mlp/{x}", f"{_L}.mlp.{x}_proj")),
        *norm("text/norm", "{p}norm"),
        Name("lm_head/kernel", "lm_head.weight", LINEAR),
    ),
    prefixes=("", "model."),
    copies=(("lm_head.weight", "{p}embed_tokens.weight"),),
    unread=(r"rotary_emb\.inv_freq$",),
)


def interleaved(heads: int) -> Transform:
    """A [heads · width, in] map whose rotary pairs are (2k, 2k + 1) in theirs and (k, k + width / 2) in ours."""

    def ours(x: np.ndarray) -> np.ndarray:
        return x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape).T

    def theirs(x: np.ndarray) -> np.ndarray:
        return x.T.reshape(heads, 2, -1, x.shape[0]).swapaxes(1, 2).reshape(x.shape[::-1])

    return Transform(ours, theirs)


def llama_original(heads: int, kv_heads: int) -> Layout:
    """Meta's own names."""
    layer, ours = "layers.{i}", "text/blocks"
    return Layout(
        (
            Name("text/embed", "tok_embeddings.weight"),
            Name(f"{ours}/attn_norm/scale", f"{layer}.attention_norm.weight"),
            Name(f"{ours}/mlp_norm/scale", f"{layer}.ffn_norm.weight"),
            Name(f"{ours}/attn/q/kernel", f"{layer}.attention.wq.weight", interleaved(heads)),
            Name(f"{ours}/attn/k/kernel", f"{layer}.attention.wk.weight", interleaved(kv_heads)),
            *(Name(f"{ours}/{a}/kernel", f"{layer}.{b}.weight", LINEAR) for a, b in (
                ("attn/v", "attention.wv"), ("attn/out", "attention.wo"),
                ("mlp/gate", "feed_forward.w1"), ("mlp/down", "feed_forward.w2"), ("mlp/up", "feed_forward.w3"))),
            Name("text/norm/scale", "norm.weight"),
            Name("lm_head/kernel", "output.weight", LINEAR),
        ),
        copies=(("output.weight", "tok_embeddings.weight"),),
        unread=(r"^rope\.freqs$",),
    )  # fmt: skip


def _albef(ours: str, m: str, depth: int) -> list[Name]:
    """Student (m "") or teacher (m "_m"): a BERT whose layers from `depth` on are our fusion layers, and a ViT."""
    text = f"text_encoder{m}."
    layers = [name for name in BERT.names if name.ours.startswith("text/blocks/")]
    cross = [
        *attention("fusion/blocks/cross", *(f"{_B}.crossattention.{x}" for x in ("self.query", "self.key", "self.value", "output.dense"))),
        *norm("fusion/blocks/cross_norm", f"{_B}.crossattention.output.LayerNorm"),
    ]
    upper = [name._replace(ours=name.ours.replace("text/", "fusion/")) for name in layers] + cross
    names = [
        *(name._replace(theirs=f"visual_encoder{m}.{name.theirs}") for name in original(False).names),
        *(name._replace(theirs=text + name.theirs) for name in BERT.names),
        *(name._replace(theirs=text + name.theirs, first=depth) for name in upper),
        *linear("image_proj", f"vision_proj{m}"),
        *linear("text_proj", f"text_proj{m}"),
    ]
    return [name._replace(ours=ours + name.ours) for name in names]


def albef(depth: int) -> Layout:
    """ALBEF's and TCL's own names, of pre-training (text_encoder.bert.) and of retrieval, for `depth` text layers below the fusion layers.

    Their queues are [width, entry], ours [entry, width].
    """
    sides = ("text_encoder.", "text_encoder_m.")
    return Layout(
        (
            *_albef("", "", depth),
            *_albef("teacher/", "_m", depth),
            *linear("itm", "itm_head"),
            Name("temperature", "temp"),
            Name("image_queue", "image_queue", LINEAR),
            Name("text_queue", "text_queue", LINEAR),
            Name("id_queue", "idx_queue", LEAD),
            Name("pointer", "queue_ptr", LEAD),
        ),
        prefixes=("", "bert."),
        copies=tuple((s + a, s + b) for s in sides for a, b in BERT_TIES),
        unread=(r"embeddings\.position_ids$",),
        counts=tuple((s + "{p}embeddings.position_ids", s + "{p}embeddings.position_embeddings.weight") for s in sides),
        repeats=True,
    )


def layouts(family: str, *, gated: bool, tied: bool, heads: int, kv_heads: int, depth: int = 0) -> tuple[Layout, ...]:
    """Every layout a family is published in; the first is the one to export. depth: of the text tower."""
    return {
        "albef": (albef(depth),),
        "vit": (*VIT, original(gated)),
        "dinov2": dinov2(gated),
        "bert": (BERT if tied else BERT_UNTIED,),
        "clip": (CLIP, OPEN_CLIP),
        "siglip": (SIGLIP,),
        "llama": (LLAMA, llama_original(heads, kv_heads)),
    }[family]
