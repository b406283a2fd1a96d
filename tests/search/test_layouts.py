"""What `jaxvl search export` writes, read back: the same words, weights within the quantisation, the same order."""

import json
import shutil

import numpy as np
import pytest
import scipy.sparse as sp

from jaxvl import cli, manifest
from jaxvl.manifest import DamagedError
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.search import build, lexical, store
from jaxvl.search.backends import vectors
from jaxvl.search.lexical import Pruning
from jaxvl.search.store import open_index

PIECES = ("red", "▁dog", "##s", "ünder", "two words", "x")


def make_index(out, rows, pieces=()):
    """An index of rows without a model; the items are called 'item "0"', ..."""
    names = [f'item "{i}" ✓' for i in range(rows.shape[0])]
    batches = [(rows[:2], names[:2]), (rows[2:], names[2:])]
    with store.drafting(out) as draft:
        return build.write(
            draft,
            out,
            batches,
            {"run": "", "what": "texts", "pieces": pieces},
            3,
            pruning=Pruning(),
            also=(),
            mesh=make_mesh(MeshOptions()),
        )


@pytest.fixture(scope="module")
def rows():
    """Weights as sparse vectors have them, one below half a unit of the quantisation, and an item without words."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random((9, 6)) < 0.6, rng.random((9, 6)), 0).astype(np.float32)
    x[3], x[4, 0] = 0, 4e-5
    return x


@pytest.fixture(scope="module")
def index(rows, tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("layouts") / "index", sp.csr_array(rows), PIECES)


def export(index, out, kind, *more):
    assert cli.main(["search", "export", str(index.folder), "--format", kind, "--out", str(out), *more]) == 0
    return out


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_index_is_what_went_in(index, rows):
    np.testing.assert_array_equal(vectors(index).toarray(), rows)
    assert [index.name(i) for i in range(9)] == [f'item "{i}" ✓' for i in range(9)]
    assert index.meta["entries"] == np.count_nonzero(rows) and index.meta["dtype"] == "float32" and index.measured["sample"] == 9


@pytest.mark.parametrize("scale", [10_000, 100])
def test_anserini_round_trip(index, rows, tmp_path, scale):
    out = export(index, tmp_path / "out", "anserini", "--scale", str(scale))
    lines = read_lines(out / "documents" / "part-00000.jsonl")
    assert [line["id"] for line in lines] == [str(i) for i in range(9)] and lines[5]["contents"] == 'item "5" ✓'
    back = np.zeros(rows.shape, int)
    for line in lines:
        for word, weight in line["vector"].items():
            assert isinstance(weight, int) and weight > 0
            back[int(line["id"]), PIECES.index(word)] = weight
    assert lines[3]["vector"] == {} and back[4, 0] == 0
    assert np.abs(back / scale - rows).max() <= 0.5 / scale
    assert json.loads((out / "quantisation.json").read_text())["scale"] == scale
    # Impact search with the weights of a query quantised alike gives the order of the index, down to the items that score nothing.
    if scale == 10_000:
        query = rows[[6]]
        hits = lexical.exact(lexical.invert(sp.csr_array(rows)), sp.csr_array(query), 7)
        np.testing.assert_array_equal(np.argsort(-(np.rint(query * scale) @ back.T)[0], kind="stable")[:7], hits.ids[0])


def test_qdrant(index, rows, tmp_path):
    out = export(index, tmp_path / "out", "qdrant")
    assert json.loads((out / "collection.json").read_text()) == {"sparse_vectors": {"words": {}}}
    points = json.loads((out / "points-00000.json").read_text())["points"]
    back = np.zeros_like(rows)
    for point in points:
        vector = point["vector"]["words"]
        back[point["id"], vector["indices"]] = vector["values"]
    np.testing.assert_array_equal(back, rows)
    assert points[2]["payload"] == {"item": 'item "2" ✓'} and json.loads((out / "words.json").read_text())["1"] == "▁dog"


def test_opensearch(index, rows, tmp_path):
    out = export(index, tmp_path / "out", "opensearch")
    assert json.loads((out / "mapping.json").read_text())["mappings"]["properties"]["words"] == {"type": "rank_features"}
    lines = read_lines(out / "bulk.jsonl")
    assert [line["index"]["_id"] for line in lines[::2]] == [str(i) for i in range(9)]
    for i, line in enumerate(lines[1::2]):
        assert {PIECES.index(w): np.float32(x) for w, x in line["words"].items()} == {j: rows[i, j] for j in np.flatnonzero(rows[i])}


def test_dense_vectors(rows, tmp_path, capsys):
    index = make_index(tmp_path / "dense", rows)
    assert index.measured == {} and not index.lexical
    points = json.loads((export(index, tmp_path / "qdrant", "qdrant") / "points-00000.json").read_text())["points"]
    np.testing.assert_array_equal(np.array([p["vector"] for p in points], np.float32), rows)
    mapping = json.loads((export(index, tmp_path / "opensearch", "opensearch") / "mapping.json").read_text())
    assert mapping["mappings"]["properties"]["vector"]["dimension"] == 6
    assert cli.main(["search", "export", str(index.folder), "--format", "anserini", "--out", str(tmp_path / "no")]) == 2
    assert "the vectors of" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("key, value, told", [
    ("total", 99, "names.ends is of shape"), ("total", "9", "'total'"), ("also", None, "'also'"), ("width", "x", "'width'"),
    ("pieces", ["a"], "1 words for vectors of"), ("pieces", 5, "'pieces'"), ("kind", "dense", "vectors is missing"),
])  # fmt: skip
def test_an_index_of_another_form_is_refused(index, tmp_path, capsys, key, value, told):
    """Its bytes are those that were hashed; what they mean is not what an index has."""
    copy = tmp_path / "index"
    shutil.copytree(index.folder, copy)
    (copy / manifest.FILE).unlink()
    manifest.write(copy, index.step, {**index.meta, key: value}, index.measured, manifest.read_at(index.folder).leaves)
    assert cli.main(["search", "export", str(copy), "--format", "qdrant", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert told in said and "damaged" in said and str(copy) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["foo[3]", "float32[3000]"])
def test_an_array_that_its_file_cannot_hold_is_refused(index, tmp_path, text):
    copy = tmp_path / "index"
    shutil.copytree(index.folder, copy)
    (copy / manifest.FILE).unlink()
    manifest.write(copy, index.step, index.meta, index.measured, {**manifest.read_at(index.folder).leaves, "rows.data": text})
    with pytest.raises(DamagedError, match="rows.data cannot hold"):
        open_index(copy)


def test_weights_that_need_more_than_32_bits_are_refused(index, tmp_path, capsys):
    assert cli.main(["search", "export", str(index.folder), "--format", "anserini", "--out", str(tmp_path / "o"), "--scale", "9" * 20]) == 2
    assert "32 bits" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_what_a_model_may_not_give_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        make_index(tmp_path / "a", np.full((3, 2), np.nan, np.float32))
    with pytest.raises(ValueError, match="finite and not negative"):
        build.sparsified(np.array([[0.5, -0.1]], np.float32), build.Sparsity(0.1))
    with store.drafting(tmp_path / "b") as draft, pytest.raises(ValueError, match="nothing to index"):
        build.write(draft, tmp_path / "b", [], {}, 0, pruning=Pruning(), also=(), mesh=make_mesh(MeshOptions()))
    with store.drafting(tmp_path / "c") as draft, pytest.raises(ValueError, match="lower --threshold"):
        build.write(
            draft, tmp_path / "c", [(sp.csr_array((2, 3)), ["a", "b"])], {}, 0, pruning=Pruning(), also=(), mesh=make_mesh(MeshOptions())
        )
    assert list(tmp_path.iterdir()) == []


def test_sparsified_keeps_what_is_strictly_above_or_the_first_of_equals():
    x = np.array([[0.5, 0.25, 0.5, 0.5], [0.0, 0.0, 0.0, 0.25]], np.float32)
    np.testing.assert_array_equal(build.sparsified(x, build.Sparsity(0.25)).toarray(), [[0.5, 0, 0.5, 0.5], [0, 0, 0, 0]])
    kept = build.sparsified(x, build.Sparsity(0.25, active=2))
    np.testing.assert_array_equal(kept.toarray(), [[0.5, 0, 0.5, 0], [0, 0, 0, 0.25]])
    assert kept.nnz == 3
