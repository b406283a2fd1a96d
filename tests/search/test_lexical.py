"""Search among sparse vectors against a dense matrix product and a full sort."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings, strategies as st

from jaxvl.search import backends, lexical
from jaxvl.search.lexical import Pruning


def csr(x):
    return sp.csr_array(np.asarray(x, np.float32))


def reference(scores, k):
    """The k best of scores [query, n], equals by id."""
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(scores, ids, 1)


@st.composite
def vectors(draw):
    """Weights are eighths up to 2, whose products and sums float32 holds exactly: equal scores are equal whatever the order. Many are 0."""
    width = draw(st.integers(1, 12))
    row = st.lists(st.sampled_from([0, 0, 0, 1 / 8, 1 / 4, 1, 2]), min_size=width, max_size=width)
    rows = draw(st.lists(st.one_of(row, st.just([0] * width)), min_size=1, max_size=20))
    queries = draw(st.lists(st.one_of(row, st.just([0] * width)), min_size=1, max_size=4))
    return np.array(rows, np.float32), np.array(queries, np.float32), draw(st.integers(1, 25))


@settings(max_examples=60, deadline=None)
@given(vectors())
def test_exact_search_is_the_dense_product_sorted(case):
    rows, queries, k = case
    hits = lexical.exact(lexical.invert(csr(rows)), csr(queries), k)
    ids, scores = reference(queries @ rows.T, k)
    np.testing.assert_array_equal(hits.ids, ids)
    np.testing.assert_array_equal(hits.scores, scores)


@settings(max_examples=40, deadline=None)
@given(vectors(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 8))
def test_two_stages_find_the_best_of_what_pruned_vectors_find(case, items, query, candidates):
    rows, queries, k = case
    keep = lambda x, n: np.stack([np.where(np.isin(np.arange(len(r)), np.argsort(-r, kind="stable")[:n]), r, 0) for r in x])
    pruned = lexical.prune(csr(rows), items)
    np.testing.assert_array_equal(pruned.toarray(), keep(rows, items))
    hits = lexical.two_stage(lexical.invert(pruned), csr(rows), csr(queries), k, Pruning(items, query, candidates))
    first, _ = reference(keep(queries, query) @ keep(rows, items).T, max(k, candidates))
    whole = queries @ rows.T
    chosen = np.full(whole.shape, -np.inf, np.float32)
    np.put_along_axis(chosen, first, np.take_along_axis(whole, first, 1), 1)
    ids, scores = reference(chosen, k)
    np.testing.assert_array_equal(hits.ids, ids)
    np.testing.assert_array_equal(hits.scores, scores)


@settings(max_examples=40, deadline=None)
@given(vectors())
def test_contributions_add_up_to_the_score(case):
    rows, queries, k = case
    hits = lexical.exact(lexical.invert(csr(rows)), csr(queries), k)
    for q, query in enumerate(queries):
        for item, score in zip(hits.ids[q], hits.scores[q], strict=True):
            words, parts = lexical.contributions(csr(query[None]), csr(rows[[item]]))
            assert parts.sum() == score and (np.diff(parts) <= 0).all()
            assert set(words) == set(np.flatnonzero(query * rows[item])) and len(words) == len(parts)


def test_real_weights_score_as_a_float64_product():
    rng = np.random.default_rng(0)
    draw = lambda n: np.where(rng.random((n, 300)) < 0.1, rng.exponential(size=(n, 300)), 0).astype(np.float32)
    rows, queries = draw(500), draw(7)
    hits = lexical.exact(lexical.invert(csr(rows)), csr(queries), 9)
    exact = queries.astype(np.float64) @ rows.T.astype(np.float64)
    np.testing.assert_allclose(hits.scores, -np.sort(-exact, 1)[:, :9], rtol=1e-5)
    again = np.stack([lexical.rescored(csr(rows), csr(q[None]), ids) for q, ids in zip(queries, hits.ids, strict=True)])
    np.testing.assert_array_equal(again, hits.scores)  # one order of addition, so a two-stage score is the exact one to the bit


def test_what_cannot_be_asked_is_refused():
    postings = lexical.invert(csr(np.eye(3)))
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        lexical.exact(postings, csr(np.eye(3)), 0)
    with pytest.raises(ValueError, match="keeps 0 candidates"):
        lexical.check(Pruning(1, 1, 0))


def test_recall_leaves_the_asking_item_out_and_counts_equals():
    rows = csr(np.eye(6)[[0, 0, 0, 1, 1, 2]])
    truth = lambda queries, k: lexical.exact(lexical.invert(rows), queries, k)
    assert backends.recall(truth, truth, rows, k=1) == 1
    back = lambda queries, k: lexical.Hits(*(x[:, ::-1][:, :k] for x in lexical.exact(lexical.invert(rows), queries, 6)))  # the worst first
    # Items 0 to 4 have an equal, which the worst-first order does not give; to item 5 all others are equal, at 0.
    assert backends.recall(back, truth, rows, k=1) == pytest.approx(1 / 6)
