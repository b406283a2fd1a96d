"""Penalties and contrastive loss of lexical vectors: what they come to in cases worked out by hand, and against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl.losses import lexical
from jaxvl.models import sparse

N, V = 6, 24
close = np.testing.assert_allclose
both = jax.jit(lambda s: [jax.value_and_grad(f)(s) for f in (lexical.flops, lexical.overuse)])


def unit_rows(seed=0):
    s = np.random.default_rng(seed).random((N, V)) ** 3
    return np.float32(s / np.linalg.norm(s, axis=1, keepdims=True))


def slow_overuse(s):
    mean = [sum(row[j] for row in s) / len(s) for j in range(s.shape[1])]
    return s.shape[1] * sum(m / sum(mean) * m**2 for m in mean)


@pytest.mark.parametrize(("s", "flops", "overuse"), [
    (np.full((N, V), V**-0.5), 1, 1),
    (np.eye(V)[[3] * N], 1, V),
    (np.eye(V)[:N], 1 / N, V / N**2),
    (np.eye(V)[[5]], 1, V),
    (np.zeros((N, V)), 0, 0),
], ids=["even", "one word", "a word each", "one row", "nothing"])  # fmt: skip
def test_batches_worked_out_by_hand(s, flops, overuse):
    (got_flops, _), (got_overuse, grad) = both(np.float32(s))
    close([got_flops, got_overuse], [flops, overuse], rtol=1e-5)
    assert np.isfinite(grad).all()
    assert s.any() or not np.any(grad)


def test_overuse_matches_loops_and_pushes_rare_words_up():
    s = unit_rows()
    _, (value, grad) = both(s)
    close(value, slow_overuse(np.float64(s)), rtol=1e-5)
    m = np.float64(s).mean(0)
    closed = V / N * (3 * m**2 / m.sum() - (m**3).sum() / m.sum() ** 2)
    close(grad, np.broadcast_to(closed, s.shape), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(grad)[0] < 0, m**2 < (m**3).sum() / (3 * m.sum()))
    held = jax.grad(lambda s: lexical.overuse(s, stop_weight_grad=True))(s)
    close(held, np.broadcast_to(V / N * 2 * m**2 / m.sum(), s.shape), rtol=1e-4, atol=1e-6)


def test_columns_that_are_no_words_change_nothing():
    s = unit_rows()
    wide = np.pad(s, ((0, 0), (0, 8)))
    close(lexical.overuse(wide, V), lexical.overuse(s), rtol=1e-6)


def test_parts_are_penalised_more_than_the_whole():
    s = unit_rows()
    parts = [float(lexical.by_parts(lexical.overuse, s, n)) for n in (1, 2, 3)]
    close(parts[0], lexical.overuse(s), rtol=1e-6)
    assert parts[0] < parts[1] < parts[2]
    with pytest.raises(ValueError, match="6 rows does not divide into 4 parts"):
        lexical.by_parts(lexical.overuse, s, 4)


def test_contrastive_is_the_sum_of_its_directions():
    x, y = unit_rows(), unit_rows(1)
    i2t, t2i = lexical.cross_entropies(x, y, 20.0)
    logits = 20 * np.float64(x) @ np.float64(y).T
    close(i2t, np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits)]), rtol=1e-5)
    close(t2i, np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits.T)]), rtol=1e-5)
    close(lexical.contrastive(x, y, 20.0), i2t + t2i, rtol=1e-6)
    close(lexical.contrastive(x, y, 20.0, reduce="mean"), (i2t + t2i) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="reduce='max'"):
        lexical.contrastive(x, y, 20.0, reduce="max")


def test_weights_grow_quadratically_from_zero():
    close([float(lexical.growing(jnp.int32(t), 0.5, 10)) for t in (0, 5, 10, 99)], [0, 0.125, 0.5, 0.5])
    assert lexical.growing(jnp.int32(0), 0.5, 0) == 0.5


def test_sparse_vectors():
    s = jnp.asarray([[0.5, 0.1, 0.5, 0.5, 0.0], [0.0] * 5])
    close(sparse.above(s, 0.1), [[0.5, 0, 0.5, 0.5, 0], [0] * 5])  # strictly above
    close(sparse.above(s, 0.1, renormalize=True)[0], np.array([1, 0, 1, 1, 0]) / 3**0.5, rtol=1e-6)
    assert not np.isnan(sparse.above(s, 0.1, renormalize=True)).any()
    np.testing.assert_array_equal(sparse.top_indices(s, 2)[0], [0, 2])
    close(sparse.top(s, 2)[0], [0.5, 0, 0.5, 0, 0])
    np.testing.assert_array_equal(sparse.active(s), [4, 0])
    with pytest.raises(ValueError, match="k is 6; it must be from 1 to the 5"):
        sparse.top(s, 6)
