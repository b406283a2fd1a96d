"""Matching losses of composed retrieval against a loop over rows, and on the inputs that break hinge and mining."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvl.losses.compose import Ids, draw_triplets, in_batch_softmax, jvsm, match, soft_triplet

MINING = ("semi_hard", "semi_hard_val", "hard")


def slow(a, b, margin, mining, same, valid):
    """The definition, row by row in float64."""
    unit = lambda x: x / np.sqrt(np.maximum((x * x).sum(1, keepdims=True), 1e-10))
    a, b = unit(a.astype(np.float64)), unit(b.astype(np.float64))
    total = 0.0
    for x, y in ((a, b), (b, a)):
        d = ((x[:, None] - y[None]) ** 2).sum(-1)
        for i in np.flatnonzero(valid):
            floor = {"semi_hard": lambda j, i=i, d=d: d[i, i], "semi_hard_val": lambda j, d=d: d[j, j], "hard": lambda j: -1.0}[mining]
            rivals = [j for j in np.flatnonzero(valid) if j != i and not any(ids[i] == ids[j] >= 0 for ids in same) and d[i, j] >= floor(j)]
            if rivals:
                total += max(d[i, i] - min(d[i, j] for j in rivals) + margin, 0) / valid.sum()
    return total


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 10_000), mining=st.sampled_from(MINING), share=st.floats(0, 1))
def test_masks_and_repeats_against_the_loop(seed, mining, share):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(8, 5)).astype(np.float32) for _ in range(2))
    same = rng.integers(-1, 4, (2, 8))
    valid = rng.uniform(size=8) < share
    got = MATCH[mining](a, b, same, valid)
    np.testing.assert_allclose(got[0], slow(a, b, 0.2, mining, same, valid), rtol=1e-5, atol=1e-6)
    for d in got[1]:
        assert not np.asarray(d)[~valid].any(), "a row that is not valid has no gradient"


MATCH = {
    m: jax.jit(jax.value_and_grad(lambda a, b, same, valid, m=m: match(a, b, mining=m, same=tuple(same), valid=valid), (0, 1)))
    for m in MINING
}
HARD = {
    "zeros": np.zeros((8, 5)), "all the same": np.ones((8, 5)), "tiny": np.full((8, 5), 1e-20), "huge": np.full((8, 5), 1e15),
    "one direction and its opposite": np.repeat([[1.0], [-1.0]], 4, 0) * np.ones(5),
}  # fmt: skip


@pytest.mark.parametrize("mining", MINING)
def test_hard_inputs_give_finite_numbers(mining):
    none, every = np.full((2, 8), -1), np.ones(8, bool)
    for name, x in HARD.items():
        for valid in (every, ~every, np.arange(8) == 3):
            for y in (x, np.random.default_rng(0).normal(size=x.shape)):
                value, grads = MATCH[mining](x.astype(np.float32), y.astype(np.float32), none, valid)
                assert all(np.isfinite(v).all() for v in jax.tree.leaves((value, grads))), name
                if valid.sum() <= 1:
                    assert value == 0 and not any(np.asarray(g).any() for g in grads), f"{name}: a single row has no negative"


def test_one_row_and_bfloat16():
    one = jnp.ones((1, 4))
    assert match(one, -one) == 0
    x, y = (jnp.asarray(np.random.default_rng(i).normal(size=(8, 16)), jnp.bfloat16) for i in (0, 1))
    assert match(x, y).dtype == jnp.float32
    np.testing.assert_allclose(match(x, y), match(x.astype(jnp.float32), y.astype(jnp.float32)), rtol=1e-6)
    with pytest.raises(ValueError, match="mining='easy' is none of semi_hard"):
        match(x, y, mining="easy")
    with pytest.raises(ValueError, match=r"not \(8, 16\) and \(8, 8\)"):
        match(x, y[:, :8])


def test_pairs_among_triplets():
    """Rows without a query count in the visual-semantic term alone, and a term without rows is 0."""
    rng = np.random.default_rng(0)
    q, vt, vr, st_, sr = (jnp.asarray(rng.normal(size=(6, 8)), jnp.float32) for _ in range(5))
    n, none = np.arange(6), np.full(6, -1)
    query = np.where(n < 4, n, -1)
    mixed = jvsm(q, vt, vr, st_, sr, Ids(n, query, query, n, query))
    first = slice(0, 4)
    np.testing.assert_allclose(mixed.im, match(q[first], vt[first]), rtol=1e-6)
    np.testing.assert_allclose(mixed.cs, match(q[first], st_[first]), rtol=1e-6)
    np.testing.assert_allclose(mixed.vs, (match(vt, st_) + match(vr[first], sr[first])) / 2, rtol=1e-6)
    pairs = jvsm(q, vt, vr, st_, sr, Ids(n, none, none, n, none))
    assert pairs.im == pairs.cs == 0
    np.testing.assert_allclose(pairs.total, match(vt, st_) / 2, rtol=1e-6)
    repeated = jvsm(q, vt, vr, st_, sr, Ids(n * 0, n, n, n, n))
    assert repeated.im == 0, "one target for all leaves no negatives"


def test_tirg_draws_and_masks():
    drawn = np.asarray(draw_triplets(jax.random.key(0), 5))
    assert drawn.shape == (30, 3)
    anchor, positive, negative = drawn.T
    assert (positive == (anchor + 5) % 10).all() and not ((negative == anchor) | (negative == positive)).any()
    assert len({tuple(t) for t in drawn}) == 30
    assert draw_triplets(jax.random.key(0), 2).shape == (8, 3), "two pairs have two negatives for each anchor"
    rng = np.random.default_rng(0)
    q, t = (jnp.asarray(rng.normal(size=(5, 4)), jnp.float32) for _ in range(2))
    np.testing.assert_allclose(in_batch_softmax(q, t, 4.0, np.arange(5) < 3), in_batch_softmax(q[:3], t[:3], 4.0), rtol=1e-6)
    assert in_batch_softmax(q, t, 4.0, np.zeros(5, bool)) == 0
    assert np.isfinite(soft_triplet(1e3 * jnp.concatenate([q, t]), drawn))
    assert soft_triplet(jnp.concatenate([q, t]), drawn, np.zeros(30, bool)) == 0
