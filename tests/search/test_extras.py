"""Structures of other libraries: what they find is scored exactly, their recall is measured, and where they are missing that is said."""

import importlib.util
import sys

import numpy as np
import pytest
import scipy.sparse as sp

from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.search import build, store
from jaxvl.search.backends import open_backend, vectors
from jaxvl.search.extras import LIBRARIES, again, library
from jaxvl.search.lexical import Pruning

needs = lambda name: pytest.mark.skipif(
    importlib.util.find_spec(LIBRARIES[name][1]) is None, reason=f"{LIBRARIES[name][0]} is not installed (pip install '.[search]')"
)


def draw(kind, count, seed):
    rng = np.random.default_rng(seed)
    if kind == "dense":
        x = rng.standard_normal((count, 16)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    x = np.where(rng.random((count, 60)) < 0.2, rng.exponential(size=(count, 60)), 0).astype(np.float32)
    x[3] = 0  # an item, and a query, without words
    return sp.csr_array(x)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in LIBRARIES])
def test_hits_have_exact_scores_and_recall_is_in_the_index(name, tmp_path):
    kind = "lexical" if name == "seismic" else "dense"
    rows, queries, mesh = draw(kind, 300, 0), draw(kind, 5, 1), make_mesh(MeshOptions())
    with store.drafting(tmp_path / "index") as draft:
        batches = [(rows, [""] * 300)]
        index = build.write(
            draft,
            tmp_path / "index",
            batches,
            {"pieces": tuple(map(str, range(60 if kind == "lexical" else 0)))},
            0,
            pruning=Pruning(),
            also=(name,),
            mesh=mesh,
        )
    assert index.measured[f"{name}/recall@10"] > 0.8
    hits, plain = open_backend(index, name, mesh)(queries, 10), lambda x: x.toarray() if sp.issparse(x) else x
    scores = plain(queries) @ plain(rows).T
    for q in range(5):
        real = hits.ids[q] >= 0
        assert real.all() or (kind == "lexical" and q == 3)
        np.testing.assert_allclose(hits.scores[q, real], scores[q, hits.ids[q, real]], rtol=1e-5)
        assert (np.diff(hits.scores[q, real]) <= 0).all() and len(set(hits.ids[q, real])) == real.sum()
    np.testing.assert_array_equal(plain(vectors(index)), plain(rows))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, LIBRARIES[name][1], None)
    with pytest.raises(ValueError, match=rf"{LIBRARIES[name][0]} is not installed.*pip install {LIBRARIES[name][0]}"):
        library(name)


def test_found_ids_are_scored_again_and_sorted():
    hits = again(np.array([[4, -1, 2, 9]]), lambda q, ids: np.float32(ids % 4))
    np.testing.assert_array_equal(hits.ids, [[2, 9, 4, -1]])
    np.testing.assert_array_equal(hits.scores, [[2, 1, 0, -np.inf]])
