"""`jaxvl import`: what it writes, and that a source which is not whole leaves one clear error and nothing else."""

import json
import shutil
from pathlib import Path

import hub
import jax
import ml_dtypes
import numpy as np
import pytest

from jaxvl import checkpoint
from jaxvl.interop import importing, load, tensors

HF = Path(__file__).parent.parent / "fixtures" / "parity" / "hf"


@pytest.fixture
def source(tmp_path):
    """A Llama in several bfloat16 files under an index."""
    folder, out = HF / "llama_gqa", tmp_path / "source"
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    stored = tensors.find(folder / "model.safetensors")
    names, files = sorted(stored), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        values = {name: tensors.read(stored[name]).astype(ml_dtypes.bfloat16) for name in names[i::3]}
        tensors.write(out / file, {k: (v.shape, v.dtype) for k, v in values.items()}, values.items())
        files |= dict.fromkeys(values, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return out


def test_a_verified_checkpoint_and_the_options_of_its_tower(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert importing.run(str(source), out) == 0
    want = load.load(source, dtype="bfloat16")
    assert importing.read(out).model == want.model
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), want.params)
    got = checkpoint.restore_params(out / "checkpoints", shapes).state
    jax.tree.map(np.testing.assert_array_equal, got, want.params)
    section = importing.tower(out, "text")
    assert section["kv_heads"] == 2 and section["gated"] is True and "dropout" not in section
    said = capsys.readouterr()
    assert f'config.init.text = "{out}"' in said.out and "kv_heads=2" in said.out
    assert "parameters in 30 tensors" in said.err and "GB of host memory" in said.err
    with pytest.raises(FileExistsError, match="choose another --out"):
        importing.run(str(source), out)
    with pytest.raises(ValueError, match="has no image tower"):
        importing.tower(out, "image")


def cut(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def wreck(folder):
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"\xff" * 100)


def lose(folder):
    (folder / "model-00003-of-00003.safetensors").unlink()


def widen(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 8, "num_hidden_layers": 4}))


def rename(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


@pytest.mark.parametrize("harm, words", [
    (cut, ["model-00002-of-00003.safetensors", "truncated or damaged"]), (wreck, ["model-00001-of-00003.safetensors"]), (lose, ["00003", "does not exist"]),
    (widen, ["missing: model.layers.3.self_attn.q_proj.weight", "wrong shape: model.layers.0.mlp.up_proj.weight", "wrong shape: model.layers.2.mlp.down_proj.weight"]),
    (rename, ["model_type='mamba' is none of"]),
])  # fmt: skip
def test_what_is_not_whole_is_one_error_and_writes_nothing(harm, words, source, tmp_path):
    harm(source)
    with pytest.raises(ValueError) as error:
        importing.run(str(source), tmp_path / "out")
    for part in words:
        assert part in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="is no folder of `jaxvl import`"):
        importing.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "[" * 100_000,
        '{"format": 1}',
        '{"format": 1, "model": [], "source": "x"}',
        '{"format": 1, "model": {"image": 3, "text": null}}',
    ],
)
def test_a_damaged_description_is_one_sentence(text, tmp_path):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match="model.json") as error:
        importing.read(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_pointer_is_not_kept_as_a_tokenizer(source, tmp_path):
    (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 5\n")
    with pytest.raises(ValueError, match="tokenizer.json is a Git LFS pointer"):
        importing.run(str(source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def repository(folder, files):
    """A small ViT under these names of files; what is no safetensors holds nothing of use."""
    folder.mkdir(parents=True)
    shutil.copy(HF / "vit" / "config.json", folder)
    for name in files:
        (folder / name).write_bytes((HF / "vit" / "model.safetensors").read_bytes() if name.endswith(".safetensors") else b"PK\x03\x04")


@pytest.mark.parametrize("files, used", [
    (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], "open_clip_model.safetensors"),
    (["model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"], "model.safetensors"),
    (["weights.safetensors"], "weights.safetensors"),
])  # fmt: skip
def test_a_repository_of_the_hub_is_fetched_whatever_its_weights_are_called(files, used, tmp_path, monkeypatch):
    repository(tmp_path / "hub" / "tiny", files)
    with hub.serving(tmp_path / "hub", monkeypatch, tmp_path / "cache") as fetched:
        assert importing.run("acme/tiny", tmp_path / "out") == 0
    assert used in fetched and set(fetched) <= {used, "config.json"}


def test_a_repository_of_pickles_is_named_as_that_and_fetches_none(tmp_path, monkeypatch):
    repository(tmp_path / "hub" / "tiny", ["pytorch_model.bin", "training_args.bin"])
    repository(tmp_path / "hub" / "other", ["tf_model.h5"])
    with hub.serving(tmp_path / "hub", monkeypatch, tmp_path / "cache") as fetched:
        with pytest.raises(ValueError, match=r"no safetensors but PyTorch pickles \(pytorch_model.bin\).*acme/tiny@refs/pr/1"):
            importing.run("acme/tiny", tmp_path / "out")
        with pytest.raises(ValueError, match="has no safetensors: it holds config.json, tf_model.h5"):
            importing.run("acme/other", tmp_path / "out")
    assert set(fetched) == {"config.json"} and not (tmp_path / "out").exists()
