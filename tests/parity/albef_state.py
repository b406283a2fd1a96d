"""State dicts of ALBEF and TCL that lie in memory, such as the parity files hold, and gradients by the same names, as trees of ours."""

import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from jaxvl.interop.names import Name, albef as layout_of

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
        share = lambda x, name=name: np.asarray(
            name.transform.ours(np.array_split(np.asarray(x), name.parts)[name.part] if name.parts > 1 else np.asarray(x))
        )
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
    return sorted(
        name for name in state if name not in asked and not re.search(r"position_ids$|predictions\.decoder\.(weight|bias)$", name)
    )
