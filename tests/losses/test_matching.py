"""Hard negatives: drawn in proportion to their weights, never a row's own, whatever the similarities are."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvl.losses.matching import hard_negatives, matching, weights

draw_many = jax.jit(jax.vmap(hard_negatives, (0, None, None)))
KEYS = jax.random.split(jax.random.key(0), 4000)


def test_negatives_come_in_proportion_to_their_weights():
    s = np.float32(2 * np.random.default_rng(0).standard_normal((2, 4, 4)))
    ids = np.int32([[0, 1, 2, 1], [3, 3, 3, 4]])
    for known in (ids, np.arange(8, dtype=np.int32).reshape(2, 4)):
        drawn = np.asarray(draw_many(KEYS, s, known))  # [draw, group, row]
        share = np.stack([np.mean(drawn == j, 0) for j in range(4)], -1)
        w = np.asarray(weights(jnp.asarray(s), jnp.asarray(known)))
        np.testing.assert_allclose(share, w / w.sum(-1, keepdims=True), atol=0.035)
        assert (share[w == 0] == 0).all()
        own = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        np.testing.assert_allclose(w, np.where(known[:, :, None] == known[:, None, :], 0, own), rtol=1e-5)


def test_what_cannot_be_drawn_is_any_other_row():
    broken = np.zeros((1, 3, 3), np.float32)
    broken[0, 0] = [0, np.nan, 0]
    broken[0, 1] = [np.inf, 0, 0]
    drawn = np.asarray(draw_many(KEYS, broken, np.int32([[5, 6, 7]])))[:, 0]
    same = np.asarray(draw_many(KEYS, np.zeros((1, 3, 3), np.float32), np.int32([[5, 5, 5]])))[:, 0]
    for row in range(3):
        others = [j for j in range(3) if j != row]
        for found in (drawn, same):
            np.testing.assert_allclose([np.mean(found[:, row] == j) for j in others], 0.5, atol=0.035)
    # At the lowest temperature all other weights are zero as floats, and the draw still follows them.
    steep = np.float32([[[1000, -900, -950], [-900, 1000, -950], [-950, -900, 1000]]])
    assert not np.asarray(weights(steep))[0][~np.eye(3, dtype=bool)].any()
    np.testing.assert_array_equal(np.asarray(draw_many(KEYS[:50], steep, np.int32([[0, 1, 2]])))[:, 0], [[1, 0, 1]] * 50)
    assert (np.asarray(draw_many(KEYS[:5], np.zeros((2, 1, 1), np.float32), np.int32([[1], [2]]))) == 0).all()


def test_loss_counts_a_match_and_its_negatives_alike():
    logits = np.random.default_rng(1).standard_normal((5, 3, 2))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = -np.mean(np.concatenate([np.log(p[:, :1, 1]), np.log(p[:, 1:, 0])], 1))
    np.testing.assert_allclose(matching(np.float32(logits)), want, rtol=1e-6)
    np.testing.assert_allclose(matching(np.float32(logits), 5), -np.mean(np.log(p[:, 0, 1])), rtol=1e-6)
