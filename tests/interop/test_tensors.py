import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxvl.interop.tensors import FileError, find, read, write

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.standard_normal((3, 5)).astype(np.float32),
    "b": RNG.standard_normal(()).astype(np.float32),
    "c": RNG.standard_normal((2, 0)).astype(np.float16),
    "d": RNG.integers(0, 9, (4,)),
    "e": RNG.standard_normal((7, 3)).astype(ml_dtypes.bfloat16),
}


def planned(tensors):
    return {name: (value.shape, value.dtype) for name, value in tensors.items()}


def same(found, tensors):
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        got = read(found[name])
        assert got.dtype == value.dtype and got.shape == value.shape and got.tobytes() == value.tobytes(), name


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    write(tmp_path / "ours.safetensors", planned(TENSORS), reversed(TENSORS.items()))
    same(find(tmp_path / "ours.safetensors"), TENSORS)
    theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    for name, value in TENSORS.items():
        assert theirs[name].shape == value.shape and theirs[name].tobytes() == value.tobytes()
    safetensors.numpy.save_file(TENSORS, tmp_path / "theirs.safetensors")
    same(find(tmp_path / "theirs.safetensors"), TENSORS)


def sharded(folder):
    parts = {"model-00001-of-00002.safetensors": ["a.weight", "d"], "model-00002-of-00002.safetensors": ["b", "c", "e"]}
    for name, keys in parts.items():
        safetensors.numpy.save_file({key: TENSORS[key] for key in keys}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_sharded_folder_reads_as_one(tmp_path):
    sharded(tmp_path)
    same(find(tmp_path), TENSORS)
    same(find(tmp_path / "model.safetensors.index.json"), TENSORS)


def broken(path, how):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if how == "empty":
        return b""
    if how == "cut header":
        return data[: 8 + length // 2]
    if how == "cut values":
        return data[:-1]
    if how == "longer":
        return data + b"\0"
    if how == "garbage":
        return b"\xff" * 64
    if how == "no json":
        return data[:8] + b"{" * length + data[8 + length :]
    if how == "unknown dtype":
        header["a.weight"]["dtype"] = "F8_X"
    if how == "shape":
        header["a.weight"]["shape"] = [3, 6]
    if how == "overlap":
        header["d"]["data_offsets"] = header["a.weight"]["data_offsets"]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize("how", ["empty", "cut header", "cut values", "longer", "garbage", "no json", "unknown dtype", "shape", "overlap"])
def test_a_damaged_file_is_refused_by_name(tmp_path, how):
    path = tmp_path / "model.safetensors"
    write(path, planned(TENSORS), TENSORS.items())
    path.write_bytes(broken(path, how))
    with pytest.raises(FileError, match=str(path)):
        find(tmp_path)


def test_what_is_missing_or_contradicts_the_index_is_named(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        find(tmp_path / "nothing.safetensors")
    with pytest.raises(FileError, match="holds no model.safetensors"):
        find(tmp_path)
    index = sharded(tmp_path)
    index["weight_map"].update({"f": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match="not where it says: b, f; not in it: b"):
        find(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileError, match="model-00002-of-00002.safetensors does not exist"):
        find(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(FileError, match="is no index of safetensors files"):
        find(tmp_path)


def test_two_files_without_an_index_are_ambiguous(tmp_path):
    for name in ("one", "two"):
        safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileError, match=r"holds one.safetensors, two.safetensors: name one of them"):
        find(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path):
    def failing():
        yield "a.weight", TENSORS["a.weight"]
        raise RuntimeError("lost the device")

    path = tmp_path / "model.safetensors"
    with pytest.raises(RuntimeError):
        write(path, planned(TENSORS), failing())
    for stream, words in (
        ([("a.weight", TENSORS["d"])], "not as planned"),
        ([("a.weight", TENSORS["a.weight"])] * 2, "came twice"),
        ([], "never came: a.weight, b"),
    ):
        with pytest.raises(ValueError, match=words):
            write(path, planned(TENSORS), stream)
    assert not list(tmp_path.iterdir())
