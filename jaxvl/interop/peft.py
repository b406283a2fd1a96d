"""Adapters in the folders of PEFT: adapter_config.json and adapter_model.safetensors, per layer and module of the published model.

Theirs are A [rank, in] and B [out, rank] of each layer, each module with a rank and alpha of its own if need be; ours are stacked
over layers with one rank and one scale. So ranks are filled up with zeros and differences of scale go into B.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvl.data.lists import read_json
from jaxvl.interop import load, tensors
from jaxvl.interop.names import LINEAR
from jaxvl.interop.published import Published, shapes
from jaxvl.mesh import path_str
from jaxvl.models import lora
from jaxvl.models.lora import LoraOptions

CONFIG, WEIGHTS, START = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Keys of adapter_config.json under which the files are no plain low-rank change, and the values that leave them one.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None), "modules_to_save": (None, []), "lora_bias": (False, None),
    "trainable_token_indices": (None, []), "layer_replication": (None, []), "use_qalora": (False, None), "megatron_config": (None,),
}  # fmt: skip


class AdapterError(ValueError):
    """An adapter folder that is not of the model, or that changes more than low-rank; the message lists everything at fault."""


def read(folder: str | Path, model: Published, options: LoraOptions) -> dict[str, np.ndarray]:
    """{"text/blocks/attn/q/kernel/a": float32 [layer, in, rank], ".../b": [layer, rank, out]} as `options` scale them.

    Layers and modules that the folder leaves out have zeros, or are no part of the result where no layer has one.
    """
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder} is no adapter folder: {CONFIG} cannot be read ({error})") from None
    faults = [
        f"{key}={config[key]!r}: only {legal[0]!r} can be read"
        for key, legal in PLAIN.items()
        if key in config and config[key] not in legal
    ]
    if re.match("pissa|olora|corda|loftq", str(config.get("init_lora_weights", ""))):
        faults.append(f"init_lora_weights={config['init_lora_weights']!r}: such adapters belong to a base that was changed as well")
    if faults:
        raise AdapterError(f"{folder / CONFIG}:\n  " + "\n  ".join(faults))
    stored = {
        re.sub(r"\.default(?=\.weight$)", "", name).removeprefix(START): tensor for name, tensor in tensors.find(folder / WEIGHTS).items()
    }
    modules = max(
        (_modules(model, *choice) for choice in _choices(model)), key=lambda known: sum(f"{m}.lora_A.weight" in stored for m in known)
    )
    expected = {f"{module}.lora_{side}.weight" for module in modules for side in "AB"}
    faults = [f"unknown: {name} {stored[name].shape}" for name in sorted(stored.keys() - expected)]

    flat = {path_str(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(model))}
    ours = lora.scale(options)
    out: dict[str, np.ndarray] = {}
    for module, (path, layer) in modules.items():
        if not (pair := {side: stored[f"{module}.lora_{side}.weight"] for side in "AB" if f"{module}.lora_{side}.weight" in stored}):
            continue
        *lead, wide_in, wide_out = flat[path]
        rank = _of(config.get("rank_pattern"), module, config["r"])
        for side, want in (("A", (rank, wide_in)), ("B", (wide_out, rank))):
            if side not in pair or pair[side].shape != want:
                faults.append(f"{module}.lora_{side}.weight is {pair[side].shape if side in pair else 'missing'}, not {want}")
        if rank > options.rank:
            faults.append(f"{module} has rank {rank}; set config.lora.rank to that or more, not {options.rank}")
        if faults:
            continue
        alpha = _of(config.get("alpha_pattern"), module, config["lora_alpha"])
        theirs = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        a = out.setdefault(f"{path}/a", np.zeros((*lead, wide_in, options.rank), np.float32))
        b = out.setdefault(f"{path}/b", np.zeros((*lead, options.rank, wide_out), np.float32))
        at = (layer,) if lead else ()
        a[(*at, slice(None), slice(rank))] = tensors.read(pair["A"]).astype(np.float32).T
        b[(*at, slice(rank))] = tensors.read(pair["B"]).astype(np.float32).T * np.float32(theirs / ours)
    if faults:
        raise AdapterError(f"{folder} does not fit this {model.family} model:\n  " + "\n  ".join(faults))
    if not out:
        raise AdapterError(f"{folder / WEIGHTS} holds no adapters")
    return out


def write(folder: Path, adapters: dict[str, np.ndarray], options: LoraOptions, model: Published, base: str) -> None:
    """The folder that `read` reads. adapters: as `read` gives them; base: NAME or NAME@REVISION of the published model they belong to.

    Raises AdapterError for an adapter of a map that the published model does not have as one of its own.
    """
    choice = next(choice for choice in _choices(model) if not choice[0].files_only)  # PEFT looks modules up by their names in memory
    modules = {module: where for module, where in _modules(model, *choice).items() if f"{where[0]}/a" in adapters}
    lost = {name.removesuffix("/a") for name in adapters if name.endswith("/a")} - {path for path, _ in modules.values()}
    if lost:
        raise AdapterError(f"no module of a published {model.family} model is {', '.join(sorted(lost))}")
    values: dict[str, np.ndarray] = {}
    for module, (path, layer) in modules.items():
        for side, name in (("a", "A"), ("b", "B")):
            whole = np.asarray(adapters[f"{path}/{side}"], np.float32)
            values[f"{START}{module}.lora_{name}.weight"] = (whole if layer is None else whole[layer]).T
    tensors.write(folder / WEIGHTS, {name: (value.shape, value.dtype) for name, value in values.items()}, values.items())
    name, _, revision = base.partition("@") if re.fullmatch(r"[\w.-]+/[\w.-]+@[\w.-]+", base) else (base, "", "")
    config: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": name, "revision": revision or None, "r": options.rank, "lora_alpha": options.alpha, "lora_dropout": options.dropout,
        "use_rslora": options.rslora, "use_dora": False, "bias": "none", "fan_in_fan_out": False, "target_modules": sorted(modules), "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "task_type": None, "inference_mode": True,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _choices(model: Published) -> list[tuple[Any, str]]:
    """Every layout and prefix, those of a model with a head last first: adapters are trained under one."""
    return [
        (layout, prefix) for layout in load.layouts_of(model) for prefix in sorted(layout.prefixes, key=len, reverse=model.head != "none")
    ]


def _modules(model: Published, layout: Any, prefix: str) -> dict[str, tuple[str, int | None]]:
    """Published module -> (our kernel's path, layer or None) of every linear map that is one module there and one kernel here."""
    flat = {path_str(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(model))}
    out: dict[str, tuple[str, int | None]] = {}
    for one in layout.names:
        if one.ours in flat and one.transform is LINEAR and one.parts == 1:
            module = one.theirs.removesuffix(".weight").replace("{p}", prefix)
            layers = range(flat[one.ours][0]) if "/blocks/" in one.ours else [None]
            out |= {module.replace("{i}", str(layer)): (one.ours, layer) for layer in layers}
    return out


def _of(patterns: dict[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value whose pattern ends the module's name, as PEFT looks it up."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), otherwise)
