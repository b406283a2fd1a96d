import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl.models import parts
from jaxvl.models.attention import Rope, attend, rope_tables
from tests.models import reference
from tests.models.reference import draw, jit, run

BASE = parts.BlockOptions(width=12, heads=4, mlp_dim=20, depth=2, dtype="float32")
CASES = {
    "vit": BASE,
    "dinov2": BASE._replace(layer_scale=0.5, gated=True, act="silu"),
    "clip": BASE._replace(act="quick_gelu", causal=True),
    "siglip": BASE._replace(act="gelu_tanh"),
    "bert": BASE._replace(post_norm=True, cross=True),
    "llama": BASE._replace(
        norm="rms", act="silu", gated=True, kv_heads=2, head_dim=6, qkv_bias=False, out_bias=False, mlp_bias=False, causal=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_stack_equals_the_block_written_out_layer_by_layer(name):
    o = CASES[name]
    x = jax.random.normal(jax.random.key(1), (2, 5, o.width))
    image = jax.random.normal(jax.random.key(2), (2, 3, 7)) if o.cross else None
    counted = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    angles = np.arange(5)[:, None] * 100.0 ** (-np.arange(0, o.head_width, 2) / o.head_width) if o.norm == "rms" else None
    rope = None if angles is None else rope_tables(Rope(100.0), jnp.broadcast_to(jnp.arange(5), (2, 5)), o.head_width)
    context = parts.Context(mask=jnp.asarray(counted)[:, None, None], rope=rope, tokens=image)

    module = parts.stack(o, "blocks", hidden=True)
    params = draw(module, x, context, None, None)
    y, layers = run(module, params, x, context, None, None)

    for row in range(2):
        want = np.asarray(x[row], np.float64)
        for layer in range(o.depth):
            p = jax.tree.map(lambda leaf: np.asarray(leaf[layer], np.float64), params)  # noqa: B023
            allowed = lambda i, j: counted[row, j] and (j <= i or not o.causal)  # noqa: B023
            want = reference.block(o, p, want, None if image is None else np.asarray(image[row], np.float64), allowed, angles)
            seen = counted[row]
            np.testing.assert_allclose(layers.hidden[layer, row][seen], want[seen], rtol=2e-4, atol=2e-4)
        np.testing.assert_array_equal(y[row], layers.hidden[-1, row])


def loss_and_gradient(o, params, x):
    """Mean square of the output of a training pass, and its gradient, with a fixed dropout key."""
    module = parts.stack(o, "blocks")
    loss = lambda p: (
        module.apply({"params": p}, x, parts.Context(), None, None, rngs={"dropout": jax.random.key(7, impl="rbg")})[0] ** 2
    ).mean()
    return jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain():
    o = BASE._replace(dropout=0.2, attention_dropout=0.2)
    x = jax.random.normal(jax.random.key(1), (2, 5, o.width))
    params = draw(parts.stack(o, "blocks"), x, parts.Context(), None, None)
    return o, params, x, loss_and_gradient(o, params, x)


@pytest.mark.parametrize("change", [{"scan": False}, {"remat": "full"}, {"remat": "branches", "scan": False}, {"remat": "dots"}])
def test_unrolling_and_remat_change_neither_value_nor_gradient(plain, change):
    o, params, x, (value, gradient) = plain
    other_value, other_gradient = loss_and_gradient(o._replace(**change), params, x)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other_gradient, gradient)


def test_full_remat_saves_memory_scanned_and_unrolled():
    o = BASE._replace(depth=6)
    x = jnp.zeros((64, 32, o.width))
    params = jax.eval_shape(parts.stack(o, "blocks").init, jax.random.key(0), x, parts.Context(), None, None)["params"]

    def kept(o):
        """Bytes carried from the forward to the backward pass."""
        module = parts.stack(o, "blocks")
        _, residuals = jax.eval_shape(
            lambda p: jax.vjp(lambda p: module.apply({"params": p}, x, parts.Context(), None, None)[0], p), params
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    for scan in (True, False):
        sizes = {remat: kept(o._replace(scan=scan, remat=remat)) for remat in parts.REMAT}
        assert sizes["full"] < sizes["branches"] < sizes["dots"] < sizes["none"], sizes


def test_dropout_acts_only_with_a_key_and_differs_by_layer_and_key(plain):
    o, params, x, _ = plain
    module = parts.stack(o, "blocks", hidden=True)
    apply = jit(
        lambda p, x, key: module.apply({"params": p}, x, parts.Context(), None, None, rngs={} if key is None else {"dropout": key})[1]
    )
    still, one, other = (apply(params, x, key).hidden for key in (None, *(jax.random.key(n, impl="rbg") for n in (1, 2))))
    np.testing.assert_array_equal(apply(params, x, None).hidden, still)
    assert abs(one - other).max() > 0.1 and abs(one - still).max() > 0.1

    # With branches that add a constant, what a layer adds is its own dropout mask.
    constant = jax.tree.map(jnp.zeros_like, params)
    constant["mlp"]["down"]["bias"] = jnp.ones_like(params["mlp"]["down"]["bias"])
    masks = jnp.diff(jnp.concatenate([x[None], apply(constant, x, jax.random.key(1, impl="rbg")).hidden]), axis=0)
    assert set(np.unique(masks.round(3)).tolist()) == {0.0, 1.25}
    assert (masks[0] != masks[1]).any() and (masks[:, 0] != masks[:, 1]).any()


def test_attention_dropout_keeps_the_expected_output():
    q = jax.random.normal(jax.random.key(0), (1, 3, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 6, 2, 8))
    mask = jnp.array([1, 1, 0, 1, 1, 1], bool)[None, None, None]
    many = [jnp.repeat(y, 4000, axis=0) for y in (q, k, v)]
    dropped = jit(lambda key: attend(*many, mask=mask, causal=True, dropout=0.3, key=key))(jax.random.key(2, impl="rbg"))
    np.testing.assert_allclose(dropped.mean(0), attend(q, k, v, mask=mask, causal=True)[0], atol=0.08)


def test_llama3_frequencies_keep_short_and_stretch_long_wavelengths():
    rope = Rope(theta=10_000.0, factor=8.0, low=1.0, high=4.0, length=64)
    width = 16
    for i, base in enumerate(10_000.0 ** (-np.arange(0, width, 2) / width)):
        wavelength = 2 * np.pi / base
        if wavelength < 64 / 4:
            want = base
        elif wavelength > 64 / 1:
            want = base / 8
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * base / 8 + smooth * base
        cos, sin = rope_tables(rope, jnp.array([3]), width)
        np.testing.assert_allclose([cos[0, i], sin[0, i + width // 2]], [np.cos(3 * want), np.sin(3 * want)], atol=1e-6)


def test_norms_and_softmax_are_float32_in_a_bfloat16_block():
    o = BASE._replace(dtype="bfloat16", width=64, mlp_dim=128)
    x = 100 + jax.random.normal(jax.random.key(0), (2, 6, o.width))
    module = parts.norm(o, "norm")
    y = module.apply({"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32).std(-1), 1, rtol=0.01)  # a bfloat16 mean of 100 would be off by 0.25

    stack = parts.stack(o, "blocks")
    shapes = jax.eval_shape(stack.init, jax.random.key(1), x, parts.Context(), None, None)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params = jax.tree.map(lambda leaf: leaf / 3, draw(stack, x, parts.Context(), None, None))
    low = run(stack, params, (x - 100).astype(jnp.bfloat16), parts.Context(), None, None)[0]
    high = run(parts.stack(o._replace(dtype="float32"), "blocks"), params, x - 100, parts.Context(), None, None)[0]
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), high, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("change, words", [
    ({"heads": 5}, "image.heads=5 does not divide image.width=12"),
    ({"kv_heads": 3}, "image.kv_heads=3 does not divide image.heads=4"),
    ({"act": "gelo"}, "image.act='gelo' is none of gelu, gelu_tanh"),
    ({"remat": "all"}, "image.remat='all' is none of none, full"),
    ({"dropout": 1.0}, "image.dropout=1.0 is not in"),
    ({"depth": 0}, "depth=0: all must be at least 1"),
])  # fmt: skip
def test_wrong_options_name_the_key_and_the_value(change, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        parts.check_block(BASE._replace(**change), "image")
