"""What the notes of a parity folder allow though none of its files shows it: files derived from the fixtures are taken as well."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxvl.interop import positions, tensors
from tests.parity import codis, lexvla, tcl, tcl_terms
from tests.parity.case import Case
from tests.parity.test_parity import kind_of

PARITY = Path(__file__).parent.parent / "fixtures" / "parity"


def derived(source: Path, target: Path, change: dict | None = None, without: tuple[str, ...] = ()) -> Path:
    """A copy of a file with arrays changed, and without those whose names begin so."""
    np.savez(target, **{name: value for name, value in {**np.load(source), **(change or {})}.items() if not name.startswith(without)})
    return target


def check(path: Path) -> None:
    case = Case(path)
    kind_of(case)[1].run(case)
    assert not case.unread()


def table_of(table: np.ndarray, front: int, side: int) -> np.ndarray:
    """A position table of side x side patches which, resized to as many patches as `table` has, is `table`."""
    old = math.isqrt(len(table) - front)
    weights = positions._weights(side, old, "bicubic")
    grid = table[front:].reshape(old, old, -1).astype(np.float64)
    back = np.linalg.pinv(weights)
    return np.concatenate([table[:front], np.einsum("ab,cd,bdw->acw", back, back, grid).reshape(side * side, -1)]).astype(np.float32)


def test_scores_need_not_be_cosines_of_the_embeddings_and_numbers_may_be_left_out(tmp_path):
    source = PARITY / "metrics" / "image_text_five_captions.npz"
    other = np.random.default_rng(0).standard_normal((40, 16))
    check(derived(source, tmp_path / "x.npz", {"image_embeddings": other}, ("rsum", "fold_mean", "i2t_median", "t2i_recall_optimistic")))
    with pytest.raises(AssertionError):  # what is there is compared all the same
        check(derived(source, tmp_path / "y.npz", {"t2i_rank_stable": np.load(source)["t2i_rank_stable"] + 1}))
    check(derived(PARITY / "metrics" / "dml_self.npz", tmp_path / "z.npz", {}, ("embeddings", "mean_", "lib_", "precision")))


def test_a_labelling_may_come_with_one_mean_alone(tmp_path):
    source = PARITY / "metrics" / "nmi_base.npz"
    names = [name for name in np.load(source) if name.startswith(("nmi_", "ami_"))]
    check(derived(source, tmp_path / "x.npz", {}, tuple(name for name in names if name != "nmi_geometric")))


@pytest.mark.long
def test_positions_of_another_resolution_than_the_images_and_states_left_out(tmp_path):
    folder = shutil.copytree(PARITY / "hf" / "siglip", tmp_path / "siglip")
    config = json.loads((folder / "config.json").read_text())
    patch = config["vision_config"]["patch_size"]
    name, stored = "vision_model.embeddings.position_embedding.weight", tensors.find(folder)
    values = {key: tensors.read(tensor) for key, tensor in stored.items()}
    values[name] = table_of(values[name], 0, 6)
    tensors.write(folder / "model.safetensors", {k: (v.shape, v.dtype) for k, v in values.items()}, values.items())
    config["vision_config"]["image_size"] = 6 * patch
    (folder / "config.json").write_text(json.dumps(config))
    derived(PARITY / "hf" / "siglip" / "io.npz", folder / "io.npz", {}, ("out_text_hidden", "out_text_pooler", "out_logits_per_text"))
    check(folder)


@pytest.mark.long
def test_a_step_whose_backbone_has_positions_of_another_resolution(tmp_path):
    for name in ("text_tower", "train_step"):
        shutil.copy(PARITY / "lexvla" / f"{name}.npz", tmp_path)
    table = np.load(tmp_path / "train_step.npz")["dino:embeddings.position_embeddings"]
    change = {"dino:embeddings.position_embeddings": table_of(table[0], 1, 5)[None]}
    check(derived(PARITY / "lexvla" / "train_step.npz", tmp_path / "train_step.npz", change, ("flops_img", "logits_per_image")))


@pytest.mark.parametrize("near", [
    lambda got, want: lexvla.near(got, want, "x", 1e-5), lambda got, want: codis.near(got, want, 1e-5, 1e-9, "x"), tcl_terms.close,
])  # fmt: skip
def test_nothing_is_compared_absolutely(near):
    near(5e-10, 0.0)
    near(np.float32(7.0), None)  # the file does not have it
    with pytest.raises(AssertionError):
        near(1e-3, 0.0)
    with pytest.raises(AssertionError):
        near(1.001, 1.0)


def test_the_gradient_of_a_bias_of_keys_is_rounding():
    """Beside gradients of keys of length 10 noise of 3e-5 is nothing; of values it would be a fault."""
    want = {"text": {"attn": {x: {"kernel": np.full((4, 4), 2.5), "bias": np.zeros(4)} for x in "kv"}}}
    noisy = lambda name: {
        "text": {"attn": {x: {**leaf, "bias": leaf["bias"] + (1.5e-5 if x == name else 0)} for x, leaf in want["text"]["attn"].items()}}
    }
    tcl.compare_gradients(None, noisy("k"), want)
    with pytest.raises(AssertionError, match="attn/v/bias"):
        tcl.compare_gradients(None, noisy("v"), want)
