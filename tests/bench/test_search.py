"""The bench of search on few vectors: they are what it says they are, and every backend is measured against exact search."""

import numpy as np

from jaxvl.bench import search


def test_word_vectors_are_distinct_words_of_unit_norm(monkeypatch):
    monkeypatch.setattr(search, "BATCH", 64)
    batches = list(search.word_vectors(150, 700, 20, seed=3))
    assert [x.shape for x in batches] == [(64, 700), (64, 700), (22, 700)]
    for x in batches:
        assert (np.diff(x.indptr) == 20).all() and (np.diff(x.indices.reshape(-1, 20)) > 0).all() and x.indices.max() < 700
        np.testing.assert_allclose((x * x).sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(batches[0].indices, next(search.word_vectors(150, 700, 20, seed=3)).indices)
    use = sum(np.bincount(x.indices, minlength=700) for x in batches)
    assert use[:20].sum() > 5 * use[-20:].sum()  # by Zipf's law the first words are used the most


def test_every_backend_is_measured(monkeypatch):
    monkeypatch.setattr(search, "BATCH", 128)
    out = search.run(300, 400, 20, 8, 3, rounds=1)
    lexical, dense = out["lexical"]["backends"], out["dense"]["backends"]
    assert {"exact", "two-stage", "device", "scipy, transpose prepared", "scipy, query @ index.T"} <= set(lexical)
    assert {"exact", "plain product"} <= set(dense)
    for row in (*lexical.values(), *dense.values()):
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert lexical["device"]["recall@10"] == dense["exact"]["recall@10"] == 1
    assert 0.5 < lexical["two-stage"]["recall@10"] <= 1 and lexical["two-stage"]["bytes"] > lexical["exact"]["bytes"]
    assert set(out["lexical"]["exact_over_scipy"]) == {"scipy, transpose prepared", "scipy, query @ index.T"}
