"""The step on a method small enough to check by hand: what moves, what is kept, what a broken batch leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxvl.data.augment import AugmentOptions, preprocess
from jaxvl.mesh import MeshOptions, make_mesh, place, shardings
from jaxvl.methods.method import Method
from jaxvl.optim import OptimOptions, learning_rate, make_optimizer
from jaxvl.state import STATE_RULES, advance, create, samples_seen
from jaxvl.step import make_train_step

OPTIM = OptimOptions(learning_rate=0.1, schedule="constant", clip_norm=0.0, ema_decay=0.75)
SHAPE = (8, 4, 4, 3)


def linear(optim: OptimOptions = OPTIM):
    """loss = mean over the batch of (mean pixel * w - first token)^2; memory counts the updates it has seen."""
    encode = lambda params, batch, key: jnp.mean(batch["image"], (1, 2, 3)) * params["kernel"][0]

    def loss(params, memory, batch, key):
        z = encode(params, batch, key)
        return jnp.mean((z - batch["tokens"][:, 0]) ** 2), {"mean": z.mean(), "z": z}

    method = Method(
        init=lambda key, spec: ({"kernel": jnp.ones(8)}, {"updates": jnp.zeros((), jnp.int32)}),
        encode=None, objective=None, loss=loss,
        update=lambda memory, params, aux: {"updates": memory["updates"] + 1},
        embed_image=None, embed_text=None, flops=lambda spec: 1.0,
        rules=((r"kernel$", P("fsdp")), (r"updates$", P())),
    )  # fmt: skip
    params, memory = method.init(None, None)
    tx = make_optimizer(optim, params, 10)
    return method, tx, create(params, memory, tx.init(params), jax.random.key(7), ema=True)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {"image": rng.integers(0, 256, SHAPE, np.uint8), "tokens": rng.integers(1, 9, (8, 2), np.int32)}


def step_of(method, tx, optim=OPTIM, **kw):
    return make_train_step(method, tx, AugmentOptions(), optim, learning_rate(optim, 10), image_size=4, **kw)


def test_one_step_is_the_optimiser_applied_to_the_gradient():
    method, tx, state = linear()
    after, metrics = jax.jit(step_of(method, tx))(state, batch())
    pixels = {**batch(), "image": preprocess(jnp.array(batch()["image"]), None, AugmentOptions())}
    (loss, _), grads = jax.value_and_grad(method.loss, has_aux=True)(state.params, state.memory, pixels, None)
    updates, _ = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-6)
    np.testing.assert_allclose(after.params["kernel"], params["kernel"], rtol=1e-6)
    np.testing.assert_allclose(after.ema["kernel"], 0.75 * state.params["kernel"] + 0.25 * params["kernel"], rtol=1e-6)
    assert (int(after.step), int(after.memory["updates"]), samples_seen(after.position), int(after.skipped)) == (1, 1, 8, 0)
    assert set(metrics) == {"loss", "grad_norm", "learning_rate", "skipped", "mean"}  # arrays of aux are not logged


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(poison):
    method, tx, state = linear()
    broken = method._replace(loss=lambda *a: (method.loss(*a)[0] * poison, method.loss(*a)[1]))
    after, metrics = jax.jit(step_of(broken, tx))(state, batch())
    for name in ("params", "ema", "opt_state", "memory"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert (int(after.step), samples_seen(after.position), int(after.skipped), int(metrics["skipped"])) == (1, 8, 1, 1)
    again, _ = jax.jit(step_of(method, tx))(after, batch(1))
    assert int(again.skipped) == 1 and not np.array_equal(again.params["kernel"], state.params["kernel"])


def test_sharded_step_equals_the_dense_one_and_keeps_its_shardings():
    method, tx, state = linear()
    dense, dense_metrics = jax.jit(step_of(method, tx))(state, batch())
    mesh = make_mesh(MeshOptions(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        placed = shardings(state, (*STATE_RULES, *method.rules), mesh)
        step = jax.jit(
            step_of(method, tx, grad_shardings=placed.params), donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, P()))
        )
        after, metrics = step(jax.device_put(state, placed), place(batch(), mesh))
    np.testing.assert_allclose(metrics["loss"], dense_metrics["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after.params, dense.params)
    assert after.params["kernel"].sharding.spec == P("fsdp")
    assert after.ema["kernel"].sharding.spec == P("fsdp")


def test_frozen_leaves_have_no_gradient():
    optim = OPTIM._replace(groups=(("kernel", 0.0),))
    method, tx, state = linear(optim)
    after, metrics = jax.jit(step_of(method, tx, optim))(state, batch())
    np.testing.assert_array_equal(after.params["kernel"], state.params["kernel"])
    assert float(metrics["grad_norm"]) == 0


@pytest.mark.parametrize("seen", [0, 5, 2**32 - 1, 2**32 - 8, 2**40 + 2**32 - 3])
def test_the_position_counts_past_32_bits(seen):
    position = jnp.array([seen >> 32, seen & (2**32 - 1)], jnp.uint32)
    assert samples_seen(jax.jit(advance, static_argnums=1)(position, 8192)) == seen + 8192


def test_the_second_view_has_draws_of_its_own():
    """Both views of the same pixels, under an operation that is always drawn: two different results, the first as with one view."""
    method, tx, state = linear()
    seen = lambda batch: {f"{k}/{i}": v[i].mean() for k, v in batch.items() if k.startswith("image") for i in range(8)}
    spy = method._replace(loss=lambda params, memory, batch, key: (method.loss(params, memory, batch, key)[0], seen(batch)))
    augment = AugmentOptions(jitter=(0.4, 0.0, 0.0, 0.0), jitter_prob=1.0)
    step = jax.jit(make_train_step(spy, tx, augment, OPTIM, learning_rate(OPTIM, 10), image_size=4))
    once, twice = batch(), {**batch(), "image_aug": batch()["image"], "sided": np.zeros(8, bool)}
    one, two = step(state, once)[1], step(state, twice)[1]
    names = [k for k in two if k.startswith("image_aug/")]
    assert len(names) == 8 and all(two[k] != two[k.replace("_aug", "")] for k in names)
    assert all(one[k] == two[k] for k in one if k.startswith("image/"))
    draws = {float(v) for k, v in two.items() if k.startswith("image")}
    assert len(draws) == 16  # no row of one view shares its draw with another of the other
