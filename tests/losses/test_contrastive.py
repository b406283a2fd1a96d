"""InfoNCE and the sigmoid loss against a slow reference, between implementations, and on every split of the batch."""

import doctest
from functools import cache, partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxvl.losses import infonce as infonce_module, sigmoid as sigmoid_module
from jaxvl.losses.infonce import infonce
from jaxvl.losses.sigmoid import sigmoid

HEADS = {infonce: (12.0,), sigmoid: (12.0, -5.0)}  # the scalars each loss takes: scale, and bias
LOSSES = pytest.mark.parametrize("loss", HEADS, ids=lambda f: f.__name__)
IMPLS = pytest.mark.parametrize("impl", ["global", "ring"])
MESHES = [(2, 1, 1), (3, 1, 1), (1, 4, 1), (8, 1, 1), (2, 2, 2), (4, 2, 1), (1, 1, 8)]


def mesh_of(shape):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[: np.prod(shape)])


def embeddings(batch, width=5, seed=0):
    x, y = np.random.default_rng(seed).standard_normal((2, batch, width))
    return tuple((v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32) for v in (x, 0.5 * x + y))


@cache
def grad_of(loss, impl):
    return jax.jit(jax.value_and_grad(partial(loss, impl=impl), tuple(range(2 + len(HEADS[loss])))))


def slow(loss, x, y, s, b=0.0):
    """Float64, pair by pair."""
    B, total = len(x), 0.0
    logits = [[s * float(np.dot(x[i], y[j])) + b for j in range(B)] for i in range(B)]
    for i in range(B):
        if loss is infonce:
            row = sum(np.exp(logits[i][j] - logits[i][i]) for j in range(B))
            column = sum(np.exp(logits[j][i] - logits[i][i]) for j in range(B))
            total += (np.log(row) + np.log(column)) / 2
        else:
            total += sum(np.log1p(np.exp(-logits[i][j] if i == j else logits[i][j])) for j in range(B))
    return total / B


def numeric_gradient(f, args, step=1e-5):
    grads = []
    for k, a in enumerate(args):
        g = np.zeros(np.shape(a))
        for index in np.ndindex(np.shape(a)):
            ends = []
            for sign in (1, -1):
                moved = np.array(a, np.float64)
                moved[index] += sign * step
                ends.append(f(*args[:k], moved, *args[k + 1 :]))
            g[index] = (ends[0] - ends[1]) / (2 * step)
        grads.append(g)
    return grads


@LOSSES
@IMPLS
def test_matches_the_slow_reference(loss, impl):
    args = (*(v.astype(np.float64) for v in embeddings(6, 3)), *HEADS[loss])
    value, grads = grad_of(loss, impl)(*(jnp.float32(a) for a in args))
    np.testing.assert_allclose(value, slow(loss, *args), rtol=1e-6)
    for got, want in zip(grads, numeric_gradient(partial(slow, loss), args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@LOSSES
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_equal_on_every_mesh(loss, shape):
    x, y = embeddings(24)  # three rows a device on eight: halves of one and two
    want = grad_of(loss, "global")(x, y, *HEADS[loss])
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        x, y = jax.device_put((x, y), NamedSharding(mesh, P(("data", "fsdp"))))
        for impl in ("global", "ring"):
            got = grad_of(loss, impl)(x, y, *HEADS[loss])
            jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6), got, want)
            assert got[1][0].sharding.is_equivalent_to(x.sharding, 2), "the gradient is split like the batch"


@LOSSES
def test_one_row_a_device_and_the_value_alone(loss):
    x, y = embeddings(8)
    want = grad_of(loss, "global")(x, y, *HEADS[loss])
    with jax.set_mesh(mesh_of((8, 1, 1))):
        got = grad_of(loss, "ring")(x, y, *HEADS[loss])
        value = jax.jit(partial(loss, impl="ring"))(x, y, *HEADS[loss])
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6), got, want)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)


@LOSSES
@IMPLS
def test_half_precision_embeddings_lose_nothing_in_the_loss(loss, impl):
    half = [jnp.asarray(v, jnp.bfloat16) for v in embeddings(16, 8)]
    value, grads = grad_of(loss, impl)(*half, *HEADS[loss])
    want, want_grads = grad_of(loss, impl)(*(v.astype(jnp.float32) for v in half), *HEADS[loss])
    assert value.dtype == jnp.float32
    assert [g.dtype for g in grads[:3]] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(value, want, rtol=1e-6)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(np.float32(g), w, rtol=1e-2, atol=1e-5), grads, want_grads)


HARD = {
    "one row": (np.ones((1, 4), np.float32) / 2, np.ones((1, 4), np.float32) / 2),
    "one row, zero": (np.zeros((1, 4), np.float32),) * 2,
    "all zero": (np.zeros((8, 4), np.float32),) * 2,
    "all alike": (np.ones((8, 4), np.float32) / 2,) * 2,
    "all opposed": (np.ones((8, 4), np.float32) / 2, -np.ones((8, 4), np.float32) / 2),
    "duplicates": tuple(np.repeat(v, 4, 0) for v in embeddings(2, 4)),
    "matched": (np.eye(8, dtype=np.float32),) * 2,
    "mismatched": (np.eye(8, dtype=np.float32), np.eye(8, dtype=np.float32)[::-1]),
    "not of unit norm": tuple(1e3 * v for v in embeddings(8, 4)),
}


@LOSSES
@IMPLS
def test_hard_inputs_give_finite_numbers(loss, impl):
    f = grad_of(loss, impl)
    for name, (x, y) in HARD.items():
        for scale in (0.0, 1.0, 100.0, 1e6):
            for bias in [()] if loss is infonce else [(-10.0,), (1e6,)]:
                value, grads = f(x, y, scale, *bias)
                finite = [np.isfinite(v).all() for v in jax.tree.leaves((value, grads))]
                assert all(finite), f"{name}, scale {scale}: {value}, {grads}"
                assert value >= 0, f"{name}, scale {scale}: {value}"


@IMPLS
def test_values_known_by_heart(impl):
    one, zero, eye = np.ones((1, 4), np.float32), np.zeros((8, 4), np.float32), np.eye(8, dtype=np.float32)
    value = lambda loss, *args: grad_of(loss, impl)(*args)[0]
    assert value(infonce, one, one, 100.0) == 0
    np.testing.assert_allclose(value(infonce, zero, zero, 100.0), np.log(8), rtol=1e-6)
    np.testing.assert_allclose(value(infonce, eye, eye[::-1], 100.0), 100, rtol=1e-6)
    np.testing.assert_allclose(value(sigmoid, zero, zero, 10.0, 0.0), 8 * np.log(2), rtol=1e-6)
    # with SigLIP's first bias an untrained pair costs about 10, and all negatives together next to nothing
    np.testing.assert_allclose(value(sigmoid, zero, zero, 10.0, -10.0), 10 + 8 * np.log1p(np.exp(-10)), rtol=1e-6)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(order=st.permutations(range(16)), seed=st.integers(0, 99), scale=st.floats(0, 30))
def test_permuting_the_batch_permutes_the_gradient(order, seed, scale):
    x, y = embeddings(16, seed=seed)
    order = np.array(order)
    for loss, head in ((infonce, (scale,)), (sigmoid, (scale, -10.0))):
        f = grad_of(loss, "ring")
        with jax.set_mesh(mesh_of((4, 2, 1))):
            value, (dx, dy, *dhead) = f(x, y, *head)
            permuted, (px, py, *phead) = f(x[order], y[order], *head)
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-5)
        close(permuted, value)
        close(px, dx[order])
        close(py, dy[order])
        close(phead, dhead)


@LOSSES
def test_the_ring_holds_a_sixth_of_the_memory_and_nothing_of_the_whole_batch(loss):
    B, mesh = 32768, mesh_of((4, 2, 1))
    rows = jax.ShapeDtypeStruct((B, 512), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        compiled = {i: grad_of(loss, i).lower(rows, rows, *HEADS[loss]).compile() for i in ("global", "ring")}
    temporary = {i: c.memory_analysis().temp_size_in_bytes for i, c in compiled.items()}
    assert temporary["ring"] * 6 <= temporary["global"], temporary
    assert f"[{B}" not in compiled["ring"].as_text()
    assert f",{B}" not in compiled["ring"].as_text()


@LOSSES
def test_wrong_input_is_refused_with_the_numbers(loss):
    x, y = embeddings(12)
    with jax.set_mesh(mesh_of((4, 2, 1))), pytest.raises(ValueError, match=r"8 devices \(mesh data=4 x fsdp=2\).* 12 rows"):
        loss(x, y, *HEADS[loss], impl="ring")
    with pytest.raises(ValueError, match=r"\(12, 5\) and \(11, 5\)"):
        loss(x, y[:11], *HEADS[loss])
    with pytest.raises(ValueError, match="impl='rong' is not one of: global, ring"):
        loss(x, y, *HEADS[loss], impl="rong")


@pytest.mark.parametrize("module", [infonce_module, sigmoid_module], ids=lambda m: m.__name__)
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted >= 3
    assert not result.failed
