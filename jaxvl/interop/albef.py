"""Checkpoints of ALBEF and TCL: what their tensors say of the model, since no config.json lies beside them."""
import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from jaxvl.interop.names import Name, albef as layout_of
from jaxvl.interop.published import Fused, Published
from jaxvl.interop.tensors import FileError
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions

HEAD_WIDTH = 64  # of every published model of the family; no tensor tells it
MEMORY = ("teacher", "image_queue", "text_queue", "id_queue", "pointer")  # what is no parameter of the student

NAMES = tuple(name for name in layout_of(0).names if not name.ours.startswith("teacher/"))  # of the student, and of the queues


def theirs(name: Name, *, text_layers: int, teacher: bool = False, bert: str = "bert.", layer: int = 0) -> str:
    """The tensor of one of NAMES, of one layer where it has layers. bert: "" in files of retrieval."""
    told = re.sub(r"^(visual_encoder|text_encoder|vision_proj|text_proj)", r"\1_m", name.theirs) if teacher else name.theirs
    return told.replace("{p}", bert).replace("{i}", str(layer + (text_layers if name.ours.startswith("fusion/") else 0)))


def prefix(state: Mapping[str, Any]) -> str:
    """What stands before BERT's own names in a state dict."""
    return "bert." if any(name.startswith("text_encoder.bert.") for name in state) else ""


def tree(state: Mapping[str, np.ndarray], shapes: Any, *, text_layers: int, teacher: bool = False) -> dict[str, Any]:
    """A state dict, or the gradients of one, that lies in memory, as a tree of ours with these shapes; `teacher` for the teacher's leaves.

    Raises ValueError naming all that is missing or of a wrong shape.
    """
    table, bert, out, faults = {name.ours: name for name in NAMES}, prefix(state), {}, []
    for ours, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items():
        if ours not in table:
            faults.append(f"no tensor of theirs is known for {ours}")
            continue
        name, stacked = table[ours], "/blocks/" in ours
        asked = [theirs(name, text_layers=text_layers, teacher=teacher, bert=bert, layer=i) for i in range(leaf.shape[0] if stacked else 1)]
        if lost := [one for one in asked if one not in state]:
            faults.append(f"missing: {', '.join(lost)}, for {ours}")
            continue
        share = lambda x, name=name: np.asarray(name.transform.ours(np.array_split(np.asarray(x), name.parts)[name.part] if name.parts > 1 else np.asarray(x)))
        layers = [share(state[one]) for one in asked]
        value = np.stack(layers) if stacked else layers[0]
        if value.shape != tuple(leaf.shape):
            faults.append(f"wrong shape: {asked[0]} gives {value.shape}, {ours} is {tuple(leaf.shape)}")
        out[ours] = value.astype(np.int32) if value.dtype == np.int64 else value
    if faults:
        raise ValueError("the state dict does not hold this model:\n  " + "\n  ".join(faults))
    return flax.traverse_util.unflatten_dict(out, sep="/")


def unknown(state: Mapping[str, Any], shapes: Any, teacher: Any, *, text_layers: int) -> list[str]:
    """Tensors of a state dict that are no leaves of `shapes` or of `teacher`, nor buffers, nor copies of others."""
    bert, asked = prefix(state), set()
    for of_teacher, leaves in ((False, shapes), (True, teacher)):
        flat = flax.traverse_util.flatten_dict(leaves, sep="/")
        for name in (name for name in NAMES if name.ours in flat):
            layers = flat[name.ours].shape[0] if "/blocks/" in name.ours else 1
            asked |= {theirs(name, text_layers=text_layers, teacher=of_teacher, bert=bert, layer=i) for i in range(layers)}
    return sorted(name for name in state if name not in asked and not re.search(r"position_ids$|predictions\.decoder\.(weight|bias)$", name))


def holds(names: Collection[str]) -> bool:
    """Whether tensors of these names are a checkpoint of the family."""
    plain = {name.removeprefix("module.") for name in names}
    return any(name.startswith("visual_encoder.") for name in plain) and any(name.startswith("text_encoder.") for name in plain)


def describe(stored: Mapping[str, Any], heads: int = 0) -> Published:
    """The model of tensors (anything with a shape) by name.

    heads: of both towers, where they are not as many as HEAD_WIDTH channels each give. Raises FileError where a tensor is missing
    that tells a size, and where the heads cannot be told.
    """
    shapes = {name.removeprefix("module."): tuple(tensor.shape) for name, tensor in stored.items()}
    bert = "text_encoder.bert." if any(name.startswith("text_encoder.bert.") for name in shapes) else "text_encoder."

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != axes:
            raise FileError(f"a checkpoint of ALBEF or TCL has a tensor {name} of {axes} axes; here it is {shapes.get(name, 'missing')}")
        return shapes[name]

    def layers(pattern: str) -> list[int]:
        return sorted({int(found[1]) for name in shapes if (found := re.match(pattern, name))})

    (width, channels, patch, _), (_, positions, _) = shape("visual_encoder.patch_embed.proj.weight", 4), shape("visual_encoder.pos_embed", 3)
    (vocabulary, text_width), (text_positions, _) = (shape(f"{bert}embeddings.{name}_embeddings.weight", 2) for name in ("word", "position"))
    depth, all_layers = len(layers(r"visual_encoder\.blocks\.(\d+)\.")), len(layers(rf"{re.escape(bert)}encoder\.layer\.(\d+)\."))
    crossed = layers(rf"{re.escape(bert)}encoder\.layer\.(\d+)\.crossattention\.")
    if not crossed or crossed != list(range(crossed[0], all_layers)):
        raise FileError(f"the upper layers of {bert} must be those with cross-attention; of {all_layers} layers these have it: {crossed or 'none'}")
    side = round((positions - 1) ** 0.5)
    if side * side != positions - 1:
        raise FileError(f"visual_encoder.pos_embed has {positions} rows; it must have one for the class token and a square of patches")
    if not heads and (width % HEAD_WIDTH or text_width % HEAD_WIDTH):
        raise FileError(f"towers of {width} and {text_width} channels have no whole number of heads of {HEAD_WIDTH}: say how many heads they have (--heads)")
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


def split(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, memory) of what `load` makes of a checkpoint."""
    return {k: v for k, v in tree.items() if k not in MEMORY}, {k: v for k, v in tree.items() if k in MEMORY}


def of_run(params: dict[str, Any], memory: dict[str, Any], image: VitOptions, text: TextOptions, image_size: int) -> tuple[Published, dict[str, Any]]:
    """The model and its tree, as `load.save` takes them, of a run with a method of the family.

    Raises ValueError naming what of the run has no place in such a checkpoint, such as the codebook of CODIS.
    """
    tree = {**params, **{k: memory[k] for k in MEMORY if k in memory}}
    alien = sorted((tree.keys() - {"image", "text", "fusion", "image_proj", "text_proj", "itm", "mlm", "temperature", *MEMORY}) | ({"fusion", "image_proj"} - tree.keys()))
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
