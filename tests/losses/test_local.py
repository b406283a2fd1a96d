"""Local mutual information against its definition part by part."""

import jax
import numpy as np
import pytest

from jaxvl.losses.local import local_information, pool_grid

B, P, D = 4, 3, 5


def slow(g, l, tau, valid, groups):
    size, means = B // groups, []
    for group in range(groups):
        rows, losses = range(group * size, (group + 1) * size), []
        for i in rows:
            each = []
            for p in np.flatnonzero(valid[i]):
                positive = np.exp(g[i] @ l[i, p] / tau)
                negatives = sum(np.exp(g[i] @ l[j, q] / tau) for j in rows if j != i for q in np.flatnonzero(valid[j]))
                each.append(-np.log(positive / (positive + negatives)))
            if each:
                losses.append(np.mean(each))
        means.append(np.mean(losses) if losses else 0.0)
    return np.mean(means)


@pytest.mark.parametrize("groups", [1, 2])
def test_is_its_definition_also_without_some_parts(groups):
    rng = np.random.default_rng(0)
    g, l = rng.standard_normal((B, D)), rng.standard_normal((B, P, D))
    run = jax.jit(jax.value_and_grad(lambda g, l, tau, valid: local_information(g, l, tau, valid=valid, groups=groups), (0, 1, 2)))
    for valid in (
        np.ones((B, P), bool),
        np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]], bool),
        np.array([[1, 0, 0]] + [[0] * P] * 3, bool),
        np.zeros((B, P), bool),
    ):
        value, (dg, dl, dtau) = run(np.float32(g), np.float32(l), 0.5, valid)
        np.testing.assert_allclose(value, slow(g, l, 0.5, valid, groups), rtol=1e-5, atol=1e-6)
        assert np.isfinite(dg).all() and not dl.any() and np.isfinite(dtau)
        for index in ((0, 0), (2, 3)):
            step = np.zeros_like(g)
            step[index] = 1e-5
            want = (slow(g + step, l, 0.5, valid, groups) - slow(g - step, l, 0.5, valid, groups)) / 2e-5
            np.testing.assert_allclose(dg[index], want, rtol=1e-4, atol=1e-5)
        want = (slow(g, l, 0.5 + 1e-6, valid, groups) - slow(g, l, 0.5 - 1e-6, valid, groups)) / 2e-6
        np.testing.assert_allclose(dtau, want, rtol=1e-4, atol=1e-5)


def test_one_sample_has_nothing_to_be_told_from():
    one = np.ones((1, D), np.float32)
    for tau in (0.001, 0.5):
        value, grad = jax.value_and_grad(lambda g: local_information(g, np.ones((1, P, D), np.float32), tau))(one)  # noqa: B023
        assert value == 0 and not grad.any()


def test_memory_is_that_of_one_logit_a_pair_and_part():
    rows, parts = 128, 24
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((rows, 16), (rows, parts, 16), ())]
    asked = jax.jit(jax.value_and_grad(local_information, (0, 2))).lower(*shapes).compile().memory_analysis()
    assert asked.temp_size_in_bytes < 6 * 4 * rows**2 * parts, "B² P² would be 24 times as much"


def test_patches_are_pooled_row_by_row():
    tokens = np.arange(2 * 24 * 1.0).reshape(2, 24, 1)
    got = pool_grid(tokens, (4, 6), 2)
    want = [
        [np.mean([24 * b + 6 * r + c for r in (2 * i, 2 * i + 1) for c in range(3 * j, 3 * j + 3)]) for i in (0, 1) for j in (0, 1)]
        for b in (0, 1)
    ]
    np.testing.assert_allclose(got[:, :, 0], want)
    with pytest.raises(ValueError, match=r"4 x 6 patches do not pool to 4 x 4: config.method.pool_grid"):
        pool_grid(tokens, (4, 6), 4)
