"""Each operation against a slow reference on single images, and what a batch must not depend on."""

import colorsys
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from PIL import Image, ImageOps
from scipy import ndimage

from jaxvl.data import augment, randaugment
from jaxvl.data.augment import AugmentOptions, preprocess
from jaxvl.data.randaugment import OPERATIONS

ALL = AugmentOptions(jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2, blur=0.5, blur_sigma=(0.1, 1.0), flip=0.5, randaugment=1)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (16, 12, 10, 3), dtype=np.uint8)
# With the emitters that conftest.py turns off for quick compiles, hues would depend on the sharding; users have them on.
EMITTERS = {"xla_cpu_use_fusion_emitters": True} if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"] else {}
run = jax.jit(preprocess, static_argnums=2, compiler_options=EMITTERS)


def test_evaluation_only_normalises():
    want = (IMAGES / 255 - np.array(ALL.mean)) / np.array(ALL.std)
    np.testing.assert_allclose(preprocess(jnp.asarray(IMAGES), None, ALL), want, atol=2e-6)
    np.testing.assert_allclose(run(IMAGES, jax.random.key(0), AugmentOptions()), want, atol=2e-6)


def test_brightness_contrast_and_saturation_are_blends():
    def reference(x, brightness, contrast, saturation):
        gray = lambda x: x @ np.array([0.299, 0.587, 0.114])
        x = np.clip(x * brightness, 0, 255)
        x = np.clip(x * contrast + (1 - contrast) * gray(x).mean(), 0, 255)
        return np.clip(x * saturation + (1 - saturation) * gray(x)[..., None], 0, 255)

    keys = jax.random.split(jax.random.key(1), 16)
    strength = (0.4, 0.6, 1.5, 0.0)
    got = augment.color_jitter(keys, jnp.asarray(IMAGES, jnp.float32), strength)
    for i, key in enumerate(keys):
        u = np.asarray(jax.random.uniform(key, (4, 1, 1, 1), minval=-1.0)).ravel()
        factors = np.maximum(1 + u[:3] * strength[:3], 0)
        np.testing.assert_allclose(got[i], reference(IMAGES[i].astype(float), *factors), atol=1e-3)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 0.5])
def test_hue_is_turned_in_hsv(turn):
    colors = np.concatenate([IMAGES[0].reshape(-1, 3), [[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 0], [0, 255, 255]]])
    want = [colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in (colorsys.rgb_to_hsv(*c) for c in colors / 255)]
    np.testing.assert_allclose(augment.shift_hue(jnp.asarray(colors, jnp.float32), turn), 255 * np.array(want), atol=2e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_a_gaussian(sigma):
    got = augment.blur(jnp.asarray(IMAGES[:2], jnp.float32), jnp.full(2, sigma), 6)
    want = [ndimage.gaussian_filter(x.astype(float), (sigma, sigma, 0), mode="nearest", radius=(6, 6, 0)) for x in IMAGES[:2]]
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_chances_are_kept_and_rows_differ():
    images = jnp.asarray(np.broadcast_to(IMAGES[0], (1000, 12, 10, 3)))
    plain = np.asarray(preprocess(images[:1], None, ALL))[0]
    flipped = run(images, jax.random.key(2), AugmentOptions(flip=0.3))
    kept = np.isclose(flipped, plain, atol=1e-5).all((1, 2, 3))
    assert np.isclose(np.asarray(flipped)[~kept], plain[:, ::-1], atol=1e-5).all() and 0.24 < (~kept).mean() < 0.36
    identity = AugmentOptions(mean=(0, 0, 0), std=(1, 1, 1))
    gray = np.asarray(run(images, jax.random.key(2), identity._replace(grayscale=0.2)))
    assert 0.15 < np.isclose(gray.min(-1), gray.max(-1), atol=1e-6).all((1, 2)).mean() < 0.25
    jittered = np.asarray(run(images[:200], jax.random.key(2), identity._replace(jitter=(0.4, 0, 0, 0), jitter_prob=1.0)))
    factors = np.median(jittered / np.maximum(np.asarray(images[:200]) / 255, 1e-6), (1, 2, 3))
    assert 0.6 <= factors.min() < 0.63 and factors.max() > 1.3 and len(np.unique(factors)) > 190


def test_a_row_depends_on_its_place_alone_and_not_on_the_sharding():
    key = jax.random.key(3)
    alone = np.asarray(run(IMAGES, key, ALL))
    assert np.isfinite(alone).all()
    others = IMAGES.copy()
    others[:5] = 255 - others[:5]
    np.testing.assert_array_equal(np.asarray(run(others, key, ALL))[5:], alone[5:])
    assert not np.isclose(np.asarray(run(IMAGES, jax.random.key(4), ALL)), alone).all((1, 2, 3)).any()

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    program = jax.jit(lambda x, k: preprocess(x, k, ALL), in_shardings=(rows, None), out_shardings=rows, compiler_options=EMITTERS)
    compiled = program.lower(jax.ShapeDtypeStruct(IMAGES.shape, jnp.uint8), key).compile()
    np.testing.assert_allclose(compiled(jax.device_put(IMAGES, rows), key), alone, atol=1e-5)
    text = compiled.as_text()
    assert not [c for c in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if c + "(" in text]


def apply(images, name, sign=1.0, level=4.0):
    count = len(images)
    program = jax.jit(randaugment.apply, static_argnums=3)
    return np.asarray(program(jnp.asarray(images, jnp.float32), jnp.full(count, OPERATIONS.index(name)), jnp.full(count, sign), level))


def test_table_operations_are_pillows():
    images = IMAGES[:6] // np.array([1, 2, 5, 40, 255, 1])[:, None, None, None]
    images[5] = 77
    for name, operation in (("Identity", lambda x: x), ("AutoContrast", ImageOps.autocontrast), ("Equalize", ImageOps.equalize)):
        want = [np.asarray(operation(Image.fromarray(x.astype(np.uint8)))) for x in images]
        np.testing.assert_array_equal(apply(images, name), want)
    for level in (4.0, 10.0):
        table = (np.arange(256) * (0.1 + 1.8 * level / 10)).clip(0, 255).astype(np.uint8)
        np.testing.assert_array_equal(apply(images, "Brightness", level=level), table[images])


def test_autocontrast_is_pillows_for_every_range():
    low, high = np.triu_indices(256)
    some = RNG.choice(len(low), 3000, replace=False)
    pairs = np.stack([low[some], high[some]], -1).reshape(1000, 3, 2)  # three channels of two pixels
    tables = np.asarray(jax.jit(randaugment.autocontrast)(jnp.asarray(pairs.swapaxes(1, 2)[:, None], jnp.float32)))
    for (lo, hi), table in zip(pairs.reshape(-1, 2), tables.reshape(-1, 256), strict=True):
        scale = 255 / (hi - lo) if hi > lo else 1
        want = (np.arange(lo, hi + 1) * scale - lo * scale).clip(0, 255).astype(int) if hi > lo else [lo]
        np.testing.assert_array_equal(table[lo : hi + 1], want)


def test_sharpness_moves_away_from_a_smoothing():
    x = IMAGES[0].astype(float)
    kernel = np.ones((3, 3, 1))
    kernel[1, 1] = 5
    smooth = np.round(ndimage.correlate(x, kernel / 13))[1:-1, 1:-1]  # level 4
    want = x.copy()
    want[1:-1, 1:-1] = np.floor(np.clip(smooth + 0.82 * (x[1:-1, 1:-1] - smooth), 0, 255))
    got = apply(IMAGES[:1], "Sharpness")[0]
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 0.02


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_warps_sample_bilinearly_with_gray_around(name, sign):
    x = IMAGES[0].astype(float)
    angle = np.radians(12)
    forward = {  # level 4: where (x, y, 1) goes
        "ShearX": [[1, 0.12 * sign, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [0.12 * sign, 1, 0]],
        "TranslateX": [[1, 0, -4 * sign], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, -4 * sign]],
        "Rotate": [[np.cos(angle), np.sin(angle) * sign, 0], [-np.sin(angle) * sign, np.cos(angle), 0]],
    }[name]
    matrix = np.array([*forward, [0, 0, 1]])
    if name == "Rotate":  # about the middle
        move = np.array([[1, 0, 5], [0, 1, 6], [0, 0, 1]])
        matrix = move @ matrix @ np.linalg.inv(move)
    inverse = np.linalg.inv(matrix)
    canvas = np.full((112, 110, 3), 128.0)
    canvas[50:62, 50:60] = x
    want = np.empty_like(x)
    for row in range(12):
        for column in range(10):
            u, v, _ = inverse @ (column, row, 1) + 50
            i, j, a, b = int(v), int(u), v % 1, u % 1
            upper, lower = ((1 - b) * canvas[k, j] + b * canvas[k, j + 1] for k in (i, i + 1))
            want[row, column] = np.round((1 - a) * upper + a * lower)
    got = apply(IMAGES[:1], name, sign)[0]
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 0.02


def test_randaugment_draws_operations_evenly():
    count = 2000
    image = np.sort(RNG.integers(20, 200, (1, 24, 24, 3)), axis=1)  # large enough for Equalize to have an effect
    images = jnp.asarray(np.broadcast_to(image, (count, 24, 24, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(5), count)
    got = np.asarray(jax.jit(randaugment.randaugment, static_argnums=(2, 3, 4))(images, keys, 1, 4.0, 0.5))
    found = {}
    for name in OPERATIONS:
        for sign in (1.0, -1.0):
            found.setdefault(apply(image, name, sign)[0].tobytes(), (name, sign))
    names = [found[x.tobytes()] for x in got]
    share = {name: names.count(name) / count for name in found.values()}
    assert abs(share.pop(("Identity", 1.0)) - 0.55) < 0.04  # half by chance, and one operation in ten
    assert len(share) == 4 + 2 * 5
    for (name, _), rate in share.items():
        assert abs(rate - (0.025 if name in OPERATIONS[5:] else 0.05)) < 0.015, name


@pytest.mark.parametrize(
    "change",
    [
        {"flip": 1.5},
        {"jitter": (0.1, 0.1, 0.1, 0.9)},
        {"blur_sigma": (2, 1)},
        {"randaugment": 2, "randaugment_level": 11},
        {"std": (1, 1, 0)},
    ],
)
def test_senseless_options_are_named(change):
    augment.check(ALL)
    with pytest.raises(ValueError, match=f"augment.{next(iter(change))}"):
        augment.check(ALL._replace(**change))
