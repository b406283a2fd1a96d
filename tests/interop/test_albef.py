"""ALBEF and TCL checkpoints: in and out again with the same bytes, whichever names they have, and what is wrong told at once."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxvl.interop import albef, load, tensors
from jaxvl.interop.load import Mismatch
from jaxvl.interop.tensors import FileError
from jaxvl.parts import assemble

FIXTURES = Path(__file__).parent.parent / "fixtures" / "parity" / "tcl"


def state(name: str) -> dict[str, np.ndarray]:
    """The state dict of a recorded tiny model: "e2e_pretrain" or, in retrieval's names and with ids, "e2e_retrieval"."""
    arrays = np.load(FIXTURES / f"{name}.npz")
    return {k[3:]: arrays[k] for k in arrays.files if k.startswith("sd/")}


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    tensors.write(path, {k: (v.shape, v.dtype) for k, v in arrays.items()}, arrays.items())
    return path


def read(path: Path, heads: int = 4) -> load.Imported:
    stored = tensors.find(path)
    assert albef.holds(stored)
    return load.fill(albef.describe(stored, heads), stored)


@pytest.mark.parametrize("name", ["e2e_pretrain", "e2e_retrieval"])
@pytest.mark.parametrize("without", ["", "teacher", "queues"])
def test_in_and_out_again_bit_for_bit(tmp_path, name, without):
    """Both generations of names, with teacher and queues or without; wrapped in "module." they are the same model."""
    parts = {"": (), "teacher": ("_m.",), "queues": ("_queue", "queue_ptr")}[without]
    arrays = {k: v for k, v in state(name).items() if not any(part in k for part in parts)}
    found = read(write(tmp_path / "in.safetensors", arrays))
    load.save(tmp_path / "out.safetensors", found.model, found.params, layout=found.layout, prefix=found.prefix)
    again = tensors.find(tmp_path / "out.safetensors")
    assert again.keys() == arrays.keys()
    for key, value in arrays.items():
        got = tensors.read(again[key])
        assert (got.dtype, got.shape, got.tobytes()) == (value.dtype, value.shape, value.tobytes()), key
    wrapped = read(write(tmp_path / "wrapped.safetensors", {f"module.{k}": v for k, v in arrays.items()}))
    jax.tree.map(np.testing.assert_array_equal, wrapped.params, found.params)
    params, memory = albef.split(found.params)
    assert (
        set(memory) <= set(albef.MEMORY)
        and ("teacher" in memory) == (without != "teacher")
        and ("image_queue" in memory) == (without != "queues")
    )
    assert found.prefix == ("bert." if name == "e2e_pretrain" else "")
    model, tree = albef.of_run(params, memory, found.model.image, found.model.text, found.model.image_size)
    assert model == found.model and jax.tree.structure(tree) == jax.tree.structure(found.params)
    if memory.get("image_queue") is not None:
        np.testing.assert_array_equal(memory["image_queue"], arrays["image_queue"].T)


def test_the_layers_are_parted_between_text_and_fusion(tmp_path):
    arrays = state("e2e_pretrain")
    params = read(write(tmp_path / "in.safetensors", arrays)).params
    assert params["text"]["blocks"]["attn"]["q"]["kernel"].shape[0] == params["fusion"]["blocks"]["cross"]["k"]["kernel"].shape[0] == 2
    for side, end in ((params, ""), (params["teacher"], "_m")):
        name = f"text_encoder{end}.bert.encoder.layer.3."
        np.testing.assert_array_equal(
            side["fusion"]["blocks"]["cross"]["k"]["kernel"][1], arrays[f"{name}crossattention.self.key.weight"].T
        )
        np.testing.assert_array_equal(side["fusion"]["blocks"]["mlp"]["up"]["bias"][1], arrays[f"{name}intermediate.dense.bias"])


def test_everything_wrong_is_told_at_once(tmp_path):
    arrays = state("e2e_pretrain")
    del arrays["itm_head.bias"], arrays["visual_encoder_m.blocks.1.mlp.fc2.weight"]
    arrays |= {"text_proj.weight": np.zeros((3, 5), np.float32), "cls_head.weight": np.zeros((2, 2), np.float32)}
    arrays["text_encoder.cls.predictions.decoder.bias"] = arrays["text_encoder.cls.predictions.bias"] + 1
    with pytest.raises(Mismatch) as error:
        read(write(tmp_path / "in.safetensors", arrays))
    wanted = ("missing: itm_head.bias", "missing: visual_encoder_m.blocks.1.mlp.fc2.weight", "wrong shape: text_proj.weight has (3, 5)",
              "unknown: cls_head.weight (2, 2)", "untied: text_encoder.cls.predictions.decoder.bias")  # fmt: skip
    assert all(fault in str(error.value) for fault in wanted) and str(error.value).count("\n") == len(wanted)


def test_sizes_that_no_tensor_tells(tmp_path):
    arrays = state("e2e_pretrain")
    with pytest.raises(FileError, match="48 and 32 channels have no whole number of heads of 64.*--heads"):
        read(write(tmp_path / "in.safetensors", arrays), heads=0)
    cut = {k: v for k, v in arrays.items() if "layer.2.crossattention" not in k and "layer.3.crossattention" not in k}
    with pytest.raises(FileError, match="of 4 layers these have it: none"):
        albef.describe(cut, 4)
    del arrays["vision_proj.weight"]
    with pytest.raises(FileError, match=r"tensor vision_proj\.weight of 2 axes; here it is missing"):
        albef.describe(arrays, 4)


def test_a_pickle_is_not_opened_and_its_way_in_is_told(tmp_path):
    (tmp_path / "ALBEF.pth").write_bytes(b"\x80\x02c")
    with pytest.raises(FileError, match=r"weights_only=True(?s:.)*save_file.*ALBEF\.safetensors"):
        tensors.find(tmp_path / "ALBEF.pth")


@pytest.mark.parametrize("retrieval", [False, True])
def test_a_run_is_exported_under_the_published_names(tmp_path, retrieval):
    """What is imported and saved as a run's state comes out of `export` with the bytes it had; a retrieval run has no word head."""
    from types import SimpleNamespace

    from jaxvl import config as configs
    from jaxvl.data.text import TokenizerOptions, train_tokenizer
    from jaxvl.interop import export

    arrays = state("e2e_retrieval" if retrieval else "e2e_pretrain")
    if retrieval:  # of the teacher, what the loss has a use for
        arrays = {
            k: v
            for k, v in arrays.items()
            if not k.startswith("text_encoder_m.encoder.layer.2") and not k.startswith("text_encoder_m.encoder.layer.3")
        }
    found = read(write(tmp_path / "in.safetensors", arrays))
    params, memory = albef.split(jax.tree.map(np.asarray, found.params))
    tower = lambda options: {**options._asdict(), "dtype": "float32"}
    config = dict(
        method=dict(name="tcl", width=16, fusion_depth=2, queue=24, scope="global", ids=retrieval, mlm=not retrieval), image=tower(found.model.image),
        text=tower(found.model.text), tokenizer=dict(context_length=9), data=dict(source="x", image_size=32, id="sample"), train=dict(batch_size=4, steps=1),
    )  # fmt: skip
    tokenizer = train_tokenizer(["a"], TokenizerOptions(vocab_size=512, context_length=9))
    few = SimpleNamespace(vocab_size=97, context_length=9, eos=2, ends=True, mask=3, save=tokenizer.save)
    parts = assemble(configs.read(configs.complete(configs.ConfigDict(config))), few)
    shapes, kept = jax.eval_shape(lambda: parts.method.init(jax.random.key(0), parts.spec))
    assert jax.tree.structure(shapes) == jax.tree.structure(params) and set(kept) == {*memory, "step"}
    export.run(parts, SimpleNamespace(state=params, step=3), "albef", tmp_path / "out", {**memory, "step": np.int32(7)})
    again = tensors.find(tmp_path / "out")
    assert again.keys() == arrays.keys()
    assert [k for k, v in arrays.items() if tensors.read(again[k]).tobytes() != v.tobytes()] == []
    with pytest.raises(ValueError, match="no ALBEF or TCL: .* differ in codebook"):
        albef.of_run({**params, "codebook": 0}, memory, found.model.image, found.model.text, 32)
