"""The banded resize against Pillow and against the matrix it stands for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from jaxvl.data import resize as resizing
from jaxvl.data.resize import band, cubic, resize


def test_cubic_is_keys_kernel():
    def keys(x, a=-0.5):
        x = abs(x)
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    x = np.linspace(-3, 3, 601)
    np.testing.assert_allclose(cubic(x), [keys(v) for v in x], atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 300), size=st.integers(1, 80), rows=st.sampled_from([1, 4, 5, 9]),
    low=st.floats(0, 0.45), high=st.floats(0.55, 1),
)  # fmt: skip
def test_a_band_is_the_resampling_matrix(length, size, rows, low, high):
    low, high = low * length, high * length
    found = band(length, low, high, size, rows)
    scale, stretch = (high - low) / size, max((high - low) / size, 1)
    weights = found.weights.reshape(-1, found.weights.shape[-1])
    _, group, n, taps = found.weights.shape
    for i in range(size):
        j = i // n
        first = found.start + j // group * found.far + j % group * found.near
        row = {first + k: w for k, w in enumerate(weights[i]) if abs(w) > 1e-7}
        centre = low + (i + 0.5) * scale
        taken = range(max(0, math.floor(centre - 2 * stretch)), min(length, math.ceil(centre + 2 * stretch)))
        want = {k: float(cubic(np.array((k + 0.5 - centre) / stretch))) for k in taken}
        total = sum(want.values())
        for k in want.keys() | row.keys():
            assert abs(row.get(k, 0) - want.get(k, 0) / total) < 1e-5
    assert taps < 5 * stretch + rows * scale + 5  # a band, not the whole matrix


@settings(deadline=None, max_examples=50)
@given(
    w=st.integers(2, 500), h=st.integers(2, 500), out=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    edges=st.tuples(*[st.floats(0, 1)] * 4), seed=st.integers(0, 9), whole=st.booleans(),
)  # fmt: skip
def test_resize_is_pillows(w, h, out, edges, seed, whole):
    pixels = np.random.default_rng(seed).integers(60, 196, (7, 5, 3), dtype=np.uint8)  # no overshoot to clip
    pixels = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BICUBIC))
    left, right = sorted((edges[0] * w, edges[1] * w))
    top, bottom = sorted((edges[2] * h, edges[3] * h))
    box = (left, top, max(right, min(left + 1, w)), max(bottom, min(top + 1, h)))
    if whole or box[2] - box[0] < 0.5 or box[3] - box[1] < 0.5:
        box = (0, 0, w, h)
    x, y = math.floor(box[0]), math.floor(box[1])
    image = Image.fromarray(pixels).crop((x, y, math.ceil(box[2]), math.ceil(box[3])))
    inner = (box[0] - x, box[1] - y, box[2] - x, box[3] - y)
    want = np.asarray(image.resize(out, Image.Resampling.BICUBIC, box=inner)).astype(int)
    difference = np.abs(resize(pixels, box, out[1], out[0]) - want)
    assert difference.max() <= 1 and difference.mean() <= 0.35


def test_no_product_is_large_enough_for_blas_to_start_threads(monkeypatch):
    sizes = []
    multiply = np.matmul

    def watch(a, b, out):
        sizes.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
        return multiply(a, b, out=out)

    monkeypatch.setattr(resizing.np, "matmul", watch)
    pixels = np.asarray(Image.linear_gradient("L").convert("RGB").resize((2300, 1700)))
    got = resize(pixels, (3, 5, 2290, 1690), 384, 384)
    assert max(sizes) <= resizing.SINGLE_THREADED
    want = np.asarray(Image.fromarray(pixels).crop((3, 5, 2290, 1690)).resize((384, 384), Image.Resampling.BICUBIC))
    assert np.abs(got.astype(int) - want).max() <= 1


def test_scratch_is_kept_by_thread_and_bounded():
    small = resizing.scratch("test", (10, 4), np.float32)
    small[:] = 7
    assert np.shares_memory(small, resizing.scratch("test", (5,), np.uint8))
    assert not np.shares_memory(small, resizing.scratch("other", (10, 4), np.float32))
    big = resizing.scratch("test", (resizing.KEPT + 1,), np.uint8)
    assert not np.shares_memory(big, resizing.scratch("test", (resizing.KEPT + 1,), np.uint8))


@pytest.mark.parametrize("value", [0, 255])
def test_flat_pictures_stay_flat(value):
    assert (resize(np.full((50, 70, 3), value, np.uint8), (1.3, 2.2, 66.6, 44.4), 37, 91) == value).all()
