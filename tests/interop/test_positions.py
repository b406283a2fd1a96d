import math

import jax
import numpy as np
import pytest

from jaxvl.interop.positions import resize_grid, resize_table

GRID = np.random.default_rng(0).standard_normal((4, 6, 3)).astype(np.float32)


def cubic(x, a):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_bicubic(grid, target, offset):
    """One output value at a time: the sixteen nearest inputs, edges repeated, never widened."""
    out = np.zeros((*target, grid.shape[2]))
    for i in range(target[0]):
        for j in range(target[1]):
            y, x = ((k + 0.5) * have / (want + offset) - 0.5 for k, have, want in zip((i, j), grid.shape, target, strict=False))
            for r in range(math.floor(y) - 1, math.floor(y) + 3):
                for c in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = grid[min(max(r, 0), grid.shape[0] - 1), min(max(c, 0), grid.shape[1] - 1)]
                    out[i, j] += cubic(y - r, -0.75) * cubic(x - c, -0.75) * value
    return out


@pytest.mark.parametrize("target", [(7, 6), (3, 5), (9, 13)])
def test_bicubic_equals_the_definition_and_antialiased_equals_jax(target):
    np.testing.assert_allclose(resize_grid(GRID, target, "bicubic"), slow_bicubic(GRID, target, 0), atol=1e-5)
    if target[1] != 6:
        np.testing.assert_allclose(resize_grid(GRID, target, "bicubic_offset"), slow_bicubic(GRID, target, 0.1), atol=1e-5)
    antialiased = jax.image.resize(GRID, (*target, 3), "cubic", antialias=True)
    np.testing.assert_allclose(resize_grid(GRID, target, "bicubic_antialias"), antialiased, atol=1e-5)
    linear = jax.image.resize(GRID, (*target, 3), "linear", antialias=False)
    np.testing.assert_allclose(resize_grid(GRID, target, "bilinear"), linear, atol=1e-5)


def test_an_unchanged_grid_is_untouched_and_constants_stay_constant():
    for method in ("bicubic", "bicubic_antialias", "bicubic_offset", "bilinear"):
        assert resize_grid(GRID, (4, 6), method) is GRID
        np.testing.assert_allclose(resize_grid(np.full((5, 5, 1), 3.0, np.float32), (8, 2), method), 3, atol=1e-6)


def test_a_table_keeps_its_class_rows_and_its_height_first():
    table = np.random.default_rng(1).standard_normal((2 + 16, 3)).astype(np.float32)
    out = resize_table(table, 2, (6, 5), "bicubic")
    np.testing.assert_array_equal(out[:2], table[:2])
    np.testing.assert_array_equal(out[2:].reshape(6, 5, 3), resize_grid(table[2:].reshape(4, 4, 3), (6, 5), "bicubic"))
    with pytest.raises(ValueError, match="18 positions less 1 of class tokens are 17 patches, which form no square"):
        resize_table(table, 1, (6, 5), "bicubic")
