"""Backbones imported from transformers files: outputs and every hidden state, scanned on one device and unrolled on eight.

Each folder's files are also exported again: the bytes must be those that were read, whichever names they had.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvl.interop import load, positions, published
from jaxvl.interop.published import Published
from jaxvl.mesh import BATCH, MeshOptions, ShardingError, make_mesh, shardings
from jaxvl.models.fusion import LmHead
from jaxvl.models.rules import RULES
from jaxvl.models.text import pool
from tests.models.reference import jit
from tests.parity.case import Case, Check

STATES = partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-4)
POOLED = partial(np.testing.assert_allclose, atol=5e-5, rtol=1e-4)
SCALARS = ((r"(?:^|/)[tb]$", jax.P()),)
MESHES = (MeshOptions(2, 2, 2), MeshOptions(1, 8, 1), MeshOptions(8, 1, 1))  # the first that the sizes divide over


def model_folder(case: Case) -> None:
    files = sources(case)
    model = load.describe(case.config, load.tensors.find(files[0]))
    first, *others = [round_trip(file, model) for file in files]
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first.params, other.params)
    for scan in (True, False):
        exact = {"dtype": "float32", "scan": scan}
        model = first.model._replace(**{k: getattr(first.model, k)._replace(**exact) for k in ("image", "text") if getattr(first.model, k)})
        with jax.default_matmul_precision("highest"):
            FAMILIES[model.family](case, Runner(model, first.params if scan else None, files[0]))


def sources(case: Case) -> list[Path]:
    """Every complete set of weights in the folder: single files, and indexes with their shards."""
    indexes = sorted(case.folder.glob("*.safetensors.index.json"))
    shards = {name for index in indexes for name in json.loads(case.file(index.name).read_text())["weight_map"].values()}
    files = [case.file(p.name) for p in sorted(case.folder.glob("*.safetensors"))]
    return indexes + [p for p in files if p.name not in shards]


def round_trip(file: Path, model: Published) -> load.Imported:
    """Imports a file and checks that the export of it holds the same bytes."""
    loaded = load.load(file)
    assert loaded.model == model
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.safetensors"
        load.save(out, loaded.model, loaded.params, layout=loaded.layout, prefix=loaded.prefix)
        want, got = load.tensors.find(file), load.tensors.find(out)
        assert want.keys() - set(loaded.dropped) == got.keys()
        for name in got:
            a, b = load.tensors.read(want[name]), load.tensors.read(got[name])
            assert a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes(), name
    return loaded


class Runner:
    """Runs a part of the model under jit: on one device, or imported straight into shards and run on all eight."""

    def __init__(self, model: Published, params: Any, file: Path):
        self.model, self.params, self.mesh = model, params, None
        self.parts = published.parts(model)
        if params is None:
            self.mesh, place = sharding_of(model)
            self.params = load.load(file, model, place=place).params

    def __call__(self, name: str, *inputs: np.ndarray | None, resize: bool = False, **options: Any) -> Any:
        module, params, rows = self.parts[name], self.params, len(inputs[0])
        if resize:
            params = load.at_resolution(self.model, params, *inputs[0].shape[1:3])
        if self.mesh is None:
            return jax.tree.map(np.asarray, jit(lambda p, *x: module.apply({"params": p}, *x, **options))(params[name], *inputs))
        whole = [None if x is None else np.resize(x, (8, *x.shape[1:])) for x in inputs]  # repeats rows until they divide
        with jax.set_mesh(self.mesh):
            place = shardings(params, (*RULES, *SCALARS), self.mesh)[name]
            spread = [None if x is None else jax.device_put(x, jax.NamedSharding(self.mesh, BATCH)) for x in whole]
            out = jit(lambda p, *x: module.apply({"params": p}, *x, **options))(jax.device_put(params[name], place), *spread)
        out = jax.tree.map(np.asarray, out)
        return out._replace(pooled=out.pooled[:rows], tokens=out.tokens[:rows], hidden=out.hidden[:, :rows])


def sharding_of(model: Published) -> tuple[jax.sharding.Mesh, Any]:
    for options in MESHES:
        mesh = make_mesh(options)
        place = lambda tree, mesh=mesh: shardings(tree, (*RULES, *SCALARS), mesh)
        try:
            place(published.shapes(model))
        except ShardingError:
            continue
        return mesh, place
    raise AssertionError("no mesh divides the model")


def hidden_states(case: Case, prefix: str, states: Any, mask: np.ndarray | None = None) -> None:
    """Every published state of one case, if it has them; states [layer, batch, token, width], compared where the mask is 1."""
    names = sorted(name for name in case if name.startswith(f"{prefix}hidden_state_"))
    assert len(names) in (0, len(states)), names
    states = states[: len(names)]
    for name, got in zip(names, states, strict=True):
        kept = slice(None) if mask is None else mask == 1
        STATES(got[kept], case[name][kept], err_msg=name)


def tags(case: Case, start: str) -> list[str]:
    found = sorted(name.removeprefix(start) for name in case if name.startswith(start))
    assert found, f"no {start}*"
    return found


def image(case: Case, run: Runner) -> None:
    for tag in tags(case, "in_pixel_values_"):
        pixels = case[f"in_pixel_values_{tag}"].transpose(0, 2, 3, 1)
        masked = case.get(f"in_bool_masked_pos_{tag}")
        out = run("image", pixels, masked, resize=True, hidden=True)
        hidden_states(case, f"out_{tag}_", out.hidden)
        compare(STATES, out.tokens, case, f"out_{tag}_last_hidden_state")
        compare(POOLED, out.pooled, case, f"out_{tag}_pooler_output")


def compare(how: Any, got: Any, case: Case, name: str, kept: Any = slice(None)) -> None:
    """With an array that a file need not have; that it has none which nobody compares is seen to elsewhere."""
    if name in case:
        how(np.asarray(got)[kept], case[name][kept], err_msg=name)


def mask_of(case: Case, tag: str) -> np.ndarray:
    """int [b, L]; without one every token counts."""
    ids = case[f"in_input_ids{tag}"]
    return case[f"in_attention_mask{tag}"] if f"in_attention_mask{tag}" in case else np.ones_like(ids)


def bert(case: Case, run: Runner) -> None:
    for tag in tags(case, "in_input_ids_"):
        mask = mask_of(case, f"_{tag}")
        out = run("text", case[f"in_input_ids_{tag}"], mask, case.get(f"in_token_type_ids_{tag}"), hidden=True)
        hidden_states(case, f"out_{tag}_", out.hidden, mask)
        compare(STATES, out.tokens, case, f"out_{tag}_last_hidden_state", mask == 1)
        compare(POOLED, out.pooled, case, f"out_{tag}_pooler_output")
        if f"out_{tag}_logits" in case:
            logits = run.parts["mlm"].apply({"params": run.params["mlm"]}, out.tokens, run.params["text"]["embed"])
            compare(STATES, logits, case, f"out_{tag}_logits", mask == 1)


def llama(case: Case, run: Runner) -> None:
    for tag in tags(case, "in_input_ids_"):
        mask = mask_of(case, f"_{tag}")
        compare(np.testing.assert_array_equal, np.maximum(mask.cumsum(1) - 1, 0), case, f"in_position_ids_{tag}")
        out = run("text", case[f"in_input_ids_{tag}"], mask, hidden=True)
        hidden_states(case, f"out_{tag}_", [*out.hidden[:-1], out.tokens], mask)
        if run.model.head == "lm_tied":
            logits = LmHead(run.model.text).apply({}, out.tokens, run.params["text"]["embed"])
        else:
            logits = run.parts["lm_head"].apply({"params": run.params["lm_head"]}, out.tokens)
        compare(STATES, logits, case, f"out_{tag}_logits", mask == 1)
        compare(np.testing.assert_array_equal, mask.shape[1] - 1 - mask[:, ::-1].argmax(1), case, f"out_{tag}_last_index")
        compare(STATES, out.pooled, case, f"out_{tag}_last_token_hidden")


def dual(case: Case, run: Runner) -> None:
    """CLIP and SigLIP: both towers and their logits."""
    clip, pixels, ids = run.model.family == "clip", case["in_pixel_values"].transpose(0, 2, 3, 1), case["in_input_ids"]
    mask = mask_of(case, "") if clip else np.ones_like(ids)
    image, text = run("image", pixels, resize=True, hidden=True), run("text", ids, hidden=True)
    hidden_states(case, "out_vision_", image.hidden)
    hidden_states(case, "out_text_", text.hidden, mask)
    compare(STATES, image.hidden[-1] if clip else image.tokens, case, "out_vision_last_hidden_state")
    compare(STATES, text.tokens, case, "out_text_last_hidden_state", mask == 1)
    if clip:  # published before the projections, which ours have in `pooled`
        compare(POOLED, image.tokens[:, 0], case, "out_vision_pooler_output")
        compare(POOLED, pool(run.model.text, text.tokens, jnp.asarray(ids), mask == 1), case, "out_text_pooler_output")
        compare(POOLED, image.pooled, case, "out_image_proj")
        compare(POOLED, text.pooled, case, "out_text_proj")
    else:
        compare(POOLED, image.pooled, case, "out_vision_pooler_output")
        compare(POOLED, text.pooled, case, "out_text_pooler_output")
    unit = lambda x: np.asarray(x / jnp.linalg.norm(x, axis=1, keepdims=True))
    compare(POOLED, unit(image.pooled), case, "out_image_embeds")
    compare(POOLED, unit(text.pooled), case, "out_text_embeds")
    logits = np.exp(run.params["t"]) * unit(image.pooled) @ unit(text.pooled).T + (0 if clip else run.params["b"])
    compare(POOLED, logits, case, "out_logits_per_image")
    compare(POOLED, logits.T, case, "out_logits_per_text")


FAMILIES = {"vit": image, "dinov2": image, "bert": bert, "llama": llama, "clip": dual, "siglip": dual}


def position_grids(case: Case) -> None:
    ours = {"bicubic_scale_offset0.1": "bicubic_offset"}
    for name in case:
        if name.endswith("_grid"):
            case[name]
            continue
        source, _, rest = name.partition("_to")
        size, _, method = rest.partition("_")
        target = tuple(map(int, size.split("x")))
        got = positions.resize_grid(case[f"{source}_grid"], target, ours.get(method, method))
        np.testing.assert_allclose(got, case[name], atol=1e-5, err_msg=name)


CHECKS = {
    "model": Check(lambda case: "model_type" in case.config, model_folder),
    "pos_interp": Check(lambda case: any(name.endswith("_grid") for name in case) and any("_to" in name for name in case), position_grids),
}
