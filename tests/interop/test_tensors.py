import argparse
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxvl.interop import load
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
    if how in ENTRIES:
        header["a.weight"].update(ENTRIES[how])
    if how == "overlap":
        header["d"]["data_offsets"] = header["a.weight"]["data_offsets"]
    text = TEXTS.get(how) or json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


ENTRIES = {
    "unknown dtype": {"dtype": "F8_X"}, "dtype of a list": {"dtype": ["F32"]}, "no dtype": {"dtype": None}, "no shape": {"shape": None},
    "other shape": {"shape": [3, 6]}, "negative shape": {"shape": [-3, -5]}, "fractions": {"shape": [3.0, 5]}, "huge": {"shape": [10**20]},
    "a product that overflows": {"shape": [2**32, 2**32]}, "offsets of text": {"data_offsets": ["0", "60"]}, "three offsets": {"data_offsets": [0, 60, 60]},
    "huge offsets": {"data_offsets": [10**30, 10**30 + 60]},
}  # fmt: skip
ONE = b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
TEXTS = {
    "nested": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "digits": b'{"a":{"shape":[' + b"9" * 5_000 + b"]}}", "null": b"null", "list": b"[]",
    "nan": b'{"a":NaN}', "not UTF-8": b"\xff\xfe{}", "a name twice": b"{" + ONE + b"," + ONE + b"}",
}  # fmt: skip


@pytest.mark.parametrize("how", ["empty", "cut header", "cut values", "longer", "garbage", "no json", "overlap", *ENTRIES, *TEXTS])
def test_a_damaged_file_is_refused_by_name(tmp_path, how):
    path = tmp_path / "model.safetensors"
    write(path, planned(TENSORS), TENSORS.items())
    path.write_bytes(broken(path, how))
    with pytest.raises(FileError, match=str(path)) as error:
        find(tmp_path)
    assert len(str(error.value).splitlines()) == 1


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"
PAGE = b"\n<!DOCTYPE html><html><body>Not found</body></html>"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json"])
@pytest.mark.parametrize("data, words", [(POINTER, "a Git LFS pointer.*git lfs pull"), (PAGE, "a web page"), (b"", "is empty")])
def test_a_file_that_is_another_is_told_as_what_it_is(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileError, match=f"{name} is {words}|{name} {words}"):
        load.read_config(tmp_path) if name == "config.json" else find(tmp_path / name)


def test_eight_bit_floats_are_named(tmp_path):
    text = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(FileError, match=r"tensors of types that are not read, such as a \(F8_E4M3\).*import the model's files of F64"):
        find(tmp_path)


def test_names_come_without_what_training_loops_wrap_modules_in(tmp_path):
    wrapped = {"module._orig_mod.a.weight": "a.weight", "b._orig_mod.0._fsdp_wrapped_module.b": "b.0.b", "c.submodule.x": "c.submodule.x"}
    values = {name: np.full(3, i, np.float32) for i, name in enumerate(wrapped)}
    write(tmp_path / "model.safetensors", planned(values), values.items())
    same(find(tmp_path), {wrapped[name]: value for name, value in values.items()})
    values = {"a": np.zeros(3), "module.a": np.zeros(3)}
    write(tmp_path / "model.safetensors", planned(values), values.items())
    with pytest.raises(FileError, match="holds both a and module.a"):
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
    for text, words in (
        ("[]", "holds a list; it must be an object"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "is no index of safetensors files"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(FileError, match=words):
            find(tmp_path)


def test_a_damaged_header_of_640_bytes_is_no_pickle(tmp_path):
    """Its length begins as one does."""
    for length in (640, 896):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{" * length)
        with pytest.raises(FileError, match="has a damaged header"):
            find(tmp_path)


def test_parts_without_an_index_are_told(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileError, match=r"parts of a model, such as model-00001-of-00002.safetensors, and no model.safetensors.index.json"):
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


def pickle_of(state, path):
    """A checkpoint as a training loop leaves it."""
    torch = pytest.importorskip("torch")
    tensors = {f"module.{name}": torch.tensor(value) for name, value in state.items()}
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": tensors, "optimizer": {"step": torch.zeros(1)}}, path)


@pytest.mark.parametrize(
    "names", [["epoch 3.pt"], ["last.ckpt", "optimizer.pt"], ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]]
)
def test_pickles_are_named_and_the_lines_that_convert_them_do(names, tmp_path):
    values = {f"{name}.weight": np.full((2, 2), i, np.float32) for i, name in enumerate(names) if name != "optimizer.pt"}
    for name in names:
        pickle_of({k: v for k, v in values.items() if k.startswith(name)}, tmp_path / name)
    with pytest.raises(FileError, match="PyTorch pickle.*could run any code and is not opened") as error:
        find(tmp_path)
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 2
    exec("\n".join(line.strip() for line in lines), {})  # the test wrote these pickles
    same(find(tmp_path), values)


def test_no_suffix_hides_a_pickle(tmp_path):
    path = tmp_path / "model.safetensors"
    for data in (b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00." + bytes(60)):
        path.write_bytes(data)
        with pytest.raises(FileError, match=r"is a PyTorch pickle(?s:.*)'.*model.converted.safetensors'"):
            find(tmp_path)
