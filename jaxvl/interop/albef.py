"""Checkpoints of ALBEF and TCL: what their tensors say of the model, since no config.json lies beside them."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxvl.interop.keys import ConfigError, section
from jaxvl.interop.published import Fused, Published
from jaxvl.interop.tensors import FileError
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions

HEAD_WIDTH = 64  # of every published model of the family; no tensor tells it
MEMORY = ("teacher", "image_queue", "text_queue", "id_queue", "pointer")  # what is no parameter of the student


def holds(names: Collection[str]) -> bool:
    """Whether tensors of these names are a checkpoint of the family."""
    return any(name.startswith("visual_encoder.") for name in names) and any(name.startswith("text_encoder.") for name in names)


def describe(stored: Mapping[str, Any], heads: int = 0) -> Published:
    """The model of tensors (anything with a shape) by name.

    heads: of both towers, where they are not as many as HEAD_WIDTH channels each give. Raises FileError where a tensor is missing
    that tells a size, and where the heads cannot be told.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    bert = "text_encoder.bert." if any(name.startswith("text_encoder.bert.") for name in shapes) else "text_encoder."

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != axes:
            raise FileError(f"a checkpoint of ALBEF or TCL has a tensor {name} of {axes} axes; here it is {shapes.get(name, 'missing')}")
        return shapes[name]

    def layers(pattern: str) -> list[int]:
        return sorted({int(found[1]) for name in shapes if (found := re.match(pattern, name))})

    (width, channels, patch, _), (_, positions, _) = (
        shape("visual_encoder.patch_embed.proj.weight", 4),
        shape("visual_encoder.pos_embed", 3),
    )
    (vocabulary, text_width), (text_positions, _) = (
        shape(f"{bert}embeddings.{name}_embeddings.weight", 2) for name in ("word", "position")
    )
    depth, all_layers = len(layers(r"visual_encoder\.blocks\.(\d+)\.")), len(layers(rf"{re.escape(bert)}encoder\.layer\.(\d+)\."))
    crossed = layers(rf"{re.escape(bert)}encoder\.layer\.(\d+)\.crossattention\.")
    if not crossed or crossed != list(range(crossed[0], all_layers)):
        raise FileError(
            f"the upper layers of {bert} must be those with cross-attention; of {all_layers} layers these have it: {crossed or 'none'}"
        )
    side = round((positions - 1) ** 0.5)
    if side * side != positions - 1:
        raise FileError(f"visual_encoder.pos_embed has {positions} rows; it must have one for the class token and a square of patches")
    if not heads and (width % HEAD_WIDTH or text_width % HEAD_WIDTH):
        raise FileError(
            f"towers of {width} and {text_width} channels have no whole number of heads of {HEAD_WIDTH}: say how many heads they have (--heads)"
        )
    queue = shapes.get("image_queue", (0, 0))[-1]
    return Published(
        "albef",
        VitOptions(
            variant="", patch=patch, width=width, depth=depth, heads=heads or width // HEAD_WIDTH, eps=1e-6, pool="cls",
            mlp_dim=shape("visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        ),
        TextOptions(
            variant="", vocab_size=vocabulary, width=text_width, depth=crossed[0], heads=heads or text_width // HEAD_WIDTH, eps=1e-12,
            mlp_dim=shape(f"{bert}encoder.layer.0.intermediate.dense.weight", 2)[0], causal=False, pool="first", positions=text_positions,
            token_types=shape(f"{bert}embeddings.token_type_embeddings.weight", 2)[0], embed_norm=True, final_norm=False, post_norm=True,
        ),
        image_size=side * patch, channels=channels, scalars=("temperature",) if "temp" in shapes else (),
        head="mlm_tied" if "text_encoder.cls.predictions.bias" in shapes else "none",
        fused=Fused(
            len(crossed), shape("vision_proj.weight", 2)[0], itm="itm_head.weight" in shapes, teacher=any(n.startswith("visual_encoder_m.") for n in shapes),
            queue=queue, ids="idx_queue" in shapes, teacher_fused=any(re.match(r"text_encoder_m\..*\.crossattention\.", n) for n in shapes),
        ),
    )  # fmt: skip


def check(config: dict[str, Any], model: Published) -> None:
    """Raises ConfigError where a config.json beside the files tells of another model than their tensors do."""
    told, text = section("albef", config)["num_attention_heads"], model.text
    if text and told not in (None, text.heads):
        raise ConfigError(
            f"num_attention_heads={told}, and a text tower of {text.width} channels has {text.heads}: say how many heads (--heads)"
        )


def split(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, memory) of what `load` makes of a checkpoint."""
    return {k: v for k, v in tree.items() if k not in MEMORY}, {k: v for k, v in tree.items() if k in MEMORY}


def of_run(
    params: dict[str, Any], memory: dict[str, Any], image: VitOptions, text: TextOptions, image_size: int
) -> tuple[Published, dict[str, Any]]:
    """The model and its tree, as `load.save` takes them, of a run with a method of the family.

    Raises ValueError naming what of the run has no place in such a checkpoint, such as the codebook of CODIS.
    """
    tree = {**params, **{k: memory[k] for k in MEMORY if k in memory}}
    alien = sorted(
        (tree.keys() - {"image", "text", "fusion", "image_proj", "text_proj", "itm", "mlm", "temperature", *MEMORY})
        | ({"fusion", "image_proj"} - tree.keys())
    )
    if alien:
        raise ValueError(f"this run is no ALBEF or TCL: their checkpoints and it differ in {', '.join(alien)}")
    depth, width = params["fusion"]["blocks"]["attn_norm"]["scale"].shape[0], params["image_proj"]["bias"].shape[0]
    teacher = tree.get("teacher", {})
    fused = Fused(
        depth, width, itm="itm" in params, teacher=bool(teacher), teacher_fused="fusion" in teacher,
        queue=tree["image_queue"].shape[0] if "image_queue" in tree else 0, ids="id_queue" in tree,
    )  # fmt: skip
    head = "mlm_tied" if "mlm" in params else "none"
    return Published("albef", image, text, image_size, head=head, scalars=("temperature",), fused=fused), tree
