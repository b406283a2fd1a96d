"""Accumulation gives the gradient of the whole batch, not the mean of the gradients of its parts."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxvl.accumulate import value_and_grad
from jaxvl.losses.infonce import infonce
from jaxvl.methods.method import Method, in_sequence, split_key, unit

B, KEY = 32, jax.random.key(7)


def toy(dropout=0.0, impl="global", dtype=jnp.float32, depth=2):
    """Two stacks of layers and a temperature; small enough to compile in no time."""

    def tower(layers, x, key):
        x = x.astype(dtype)
        if key is not None and dropout:
            x = jnp.where(jax.random.bernoulli(key, 1 - dropout, x.shape), x, 0)
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w.astype(dtype)), None), x, layers)
        return unit(x)

    def encode(params, batch, key):
        keys = split_key(key)
        return {k: tower(params[k], batch[k], key) for k, key in zip(("image", "text"), keys, strict=True)}

    def objective(params, memory, z, *_):
        scale = jnp.exp(params["t"])
        return infonce(z["image"], z["text"], scale, impl=impl), {"logit_scale": scale, "seen": memory + len(z["text"])}

    def init(_, batch_spec):
        width = batch_spec["image"].shape[1]
        image, text = np.random.default_rng(1).standard_normal((2, depth, width, width)).astype(np.float32) / width**0.5
        return {"image": image, "text": text, "t": np.float32(0.5)}, np.float32(1)

    nothing = lambda *_: None
    return Method(init, encode, objective, in_sequence(encode, objective), nothing, nothing, nothing, nothing, ())


def batch_of(rows=B, width=6):
    image, noise = np.random.default_rng(0).standard_normal((2, rows, width)).astype(np.float32)
    return {"image": image, "text": image + noise}


def run(method, accumulate, batch=None, shape=None):
    batch = batch or batch_of()
    params, memory = method.init(KEY, batch)
    f = jax.jit(value_and_grad(method, accumulate))
    if shape is None:
        return f(params, memory, batch, KEY)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        return f(params, memory, jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp")))), KEY)


@cache
def whole():
    return run(toy(), 1)


def assert_same(got, want, tolerance=1e-6):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance), got, want)


@pytest.mark.parametrize(("accumulate", "shape"), [(2, None), (32, None), (2, (8, 1, 1)), (4, (2, 2, 2))], ids=str)
def test_equals_the_whole_batch(accumulate, shape):
    assert_same(run(toy(), accumulate, shape=shape), whole())


def test_with_the_ring():
    assert_same(run(toy(impl="ring"), 4, shape=(4, 2, 1)), whole())


def test_the_mean_over_parts_would_be_another_gradient():
    parts = [run(toy(), 1, {k: v[i::2] for k, v in batch_of().items()}) for i in range(2)]
    mean = jax.tree.map(lambda *g: sum(g) / 2, *(grads for _, grads in parts))
    (_, _), grads = whole()
    assert abs(grads["image"] - mean["image"]).max() > 1e-3


def test_both_passes_draw_the_same_dropout():
    method, batch = toy(dropout=0.5), batch_of()
    params, memory = method.init(KEY, batch)

    def loss(params):
        key_encode, key_objective = split_key(KEY)
        z = [method.encode(params, {k: v[i::2] for k, v in batch.items()}, key) for i, key in enumerate(jax.random.split(key_encode, 2))]
        z = jax.tree.map(lambda *parts: jnp.stack(parts, 1).reshape(B, -1), *z)
        return method.objective(params, memory, z, batch, key_objective)

    want = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_same(run(method, 2), want)
    assert abs(want[0][0] - whole()[0][0]) > 1e-3, "dropout is on"


def test_half_precision_towers_accumulate_in_float32():
    (_, _), grads = run(toy(dtype=jnp.bfloat16), 4)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    assert_same(grads, whole()[1], 3e-2)


def compiled(accumulate, rows, width, depth):
    method = toy(depth=depth)
    spec = {k: jax.ShapeDtypeStruct((rows, width), jnp.float32) for k in ("image", "text")}
    params, memory = method.init(KEY, spec)
    return jax.jit(value_and_grad(method, accumulate)).lower(params, memory, spec, KEY).compile()


def test_activations_of_one_microbatch_are_held():
    whole, cut = (compiled(k, 512, 16, 256).memory_analysis().temp_size_in_bytes for k in (1, 8))
    assert cut * 3 < whole, f"temporary bytes: {whole} uncut, {cut} in 8 parts"


def test_cutting_moves_no_row_between_devices():
    mesh = jax.make_mesh((4, 2, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    split = NamedSharding(mesh, P(("data", "fsdp")))
    spec = {k: jax.ShapeDtypeStruct((64, 4), jnp.float32, sharding=split) for k in ("image", "text")}
    method = toy()
    params, memory = method.init(KEY, spec)
    with jax.set_mesh(mesh):
        programs = [jax.jit(value_and_grad(method, k)).lower(params, memory, spec, KEY).compile().as_text() for k in (1, 4)]
    for collective in ("all-to-all(", "collective-permute("):
        assert collective not in programs[1]
    assert programs[1].count("all-gather(") <= programs[0].count("all-gather("), "only the loss gathers rows"


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"32 rows does not cut into 3 microbatches over 1 devices: make it a multiple of 3"):
        run(toy(), 3)
    with pytest.raises(ValueError, match=r"32 rows does not cut into 8 microbatches over 8 devices: make it a multiple of 64"):
        run(toy(), 8, shape=(8, 1, 1))
    with pytest.raises(ValueError, match=r"train.accumulate is 2.* use 1"):
        value_and_grad(toy()._replace(encode=None), 2)
