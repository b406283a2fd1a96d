"""What a user calls, from files and strings to embeddings, gives what jaxvl gives; what a client cannot be made to do is in the card."""

import importlib.machinery
import importlib.util
import json
import re
import sys

import numpy as np
import pytest

from jaxvl.bench import clients
from jaxvl.bench.client_inputs import STRINGS, write_files
from jaxvl.data.text import Cleaning
from jaxvl.interop import export, onnx
from jaxvl.interop.cleaning import cleaned


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"), clients.SIZE)


def card_code(folder, **names):
    """The names that the Python of a folder's README.md defines."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    scope = {"folder": str(folder), **names}
    exec(compile(code, str(folder / "README.md"), "exec"), scope)
    return scope


def beyond(found):
    """(kind, client) that differ by more than they may, in images and in strings."""
    return {
        (kind, client)
        for what, most in (("image", 1e-3), ("text", 1e-6))
        for (kind, client), difference in found[what].items()
        if not difference <= (1e-5 if kind == "JPEG, as large as the model's" else most)
    }


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed; test_cleaning.py compares the ids without it"
)
@pytest.mark.parametrize("family", [
    name if name == "siglip" else pytest.param(name, marks=pytest.mark.long) for name in clients.FAMILIES
])  # fmt: skip
def test_every_client_agrees_or_is_named(family, files, tmp_path):
    run = clients.exported(family, tmp_path / "out")
    found = clients.measure(run, files, STRINGS)
    unnamed = {key for key in beyond(found) if not clients.named(*key, family)}
    assert not unnamed
    # The card's own code: upright pictures and raw strings, all at once.
    scope = card_code(tmp_path / "out", paths=list(files.values()), captions=list(STRINGS.values()))
    for what, given, ours in (("image", files, run.image), ("text", STRINGS, run.text)):
        theirs = clients.unit(scope["out"][f"{what}_embeds"].detach())
        for got, (kind, one) in zip(theirs, given.items(), strict=True):
            assert np.sum((got - ours(one)) ** 2) / 2 < (1e-3 if what == "image" else 1e-6) or clients.named(kind, "card", family), kind


@pytest.mark.parametrize("kind", ["stablehlo", "onnx"])
def test_programs_come_with_their_preparation(kind, files, tmp_path, monkeypatch):
    """The README's code from files and strings to similarities; tokenizers whose ids are moved by one included."""
    parts, found = clients.made("clip", data=dict(cleaning="albef", fit="squash"), tokenizer=dict(context_length=12))
    if kind == "onnx":  # whose packages need an environment of their own: the files and the code around its two calls

        def write(path, face, params, inputs):
            path.write_bytes(b"")
            return lambda x: face(found.state, x)

        monkeypatch.setattr(onnx, "check_installed", lambda: None)
        monkeypatch.setattr(onnx, "write", write)
        monkeypatch.setitem(sys.modules, "onnxruntime", Runtime(parts.method, found.state))
    export.run(parts, found, kind, tmp_path / "out")
    image, text = clients.own_faces(parts, found.state)
    some = dict(list(files.items())[:5])
    strings = [one for name, one in STRINGS.items() if name != "a special token's text"]
    scope = card_code(tmp_path / "out", paths=list(some.values()), captions=strings)
    np.testing.assert_array_equal(scope["tokens"], parts.tokenizer.encode_batch(cleaned(strings, Cleaning("albef"))))
    want = np.stack([text(one) for one in strings]) @ np.stack([image(path) for path in some.values()]).T
    np.testing.assert_allclose(scope["similarity"][:, 0], want[:, 0], atol=1e-5)  # a photograph that is not resized
    np.testing.assert_allclose(scope["similarity"], want, atol=0.03)
    said = (tmp_path / "out" / "README.md").read_text()
    for words in ("64 x 64 pixels", "bicubic", "0.48145466", "0.26862954", "lower case", "first 30 words", "12 at most"):
        assert words in said
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["do_center_crop"] is False


class Runtime:
    """What the card calls of onnxruntime, computed by the run."""

    __spec__ = importlib.machinery.ModuleSpec("onnxruntime", None)  # for which transformers asks

    def __init__(self, method, params):
        self.method, self.params = method, params

    def InferenceSession(self, path):
        face = getattr(self.method, "embed_" + path.rsplit("/", 1)[1].removesuffix(".onnx"))
        return type("Session", (), {"run": lambda _, names, feed: [np.asarray(face(self.params, feed["input"]))]})()
