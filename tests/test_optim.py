"""Schedules by their formulas, AdamW against ten lines of numpy, groups, decay masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvl.optim import OptimOptions, factors, forget, frozen, learning_rate, make_optimizer

PARAMS = {"blocks": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.full((2, 3), 0.5)}, "temperature": jnp.array(2.0)}


def test_schedules():
    at = lambda steps=100, **kw: [float(learning_rate(OptimOptions(learning_rate=2.0, **kw), steps)(s)) for s in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(at(schedule="cosine", warmup_steps=10, end_factor=0.1), [0, 1, 2, 2 * (0.1 + 0.9 * 0.5), 0.2], atol=1e-6)
    np.testing.assert_allclose(at(schedule="linear", warmup_steps=10), [0, 1, 2, 1, 0], atol=1e-6)
    np.testing.assert_allclose(at(schedule="constant", warmup_steps=10), [0, 1, 2, 2, 2], atol=1e-6)
    rsqrt = at(schedule="rsqrt", warmup_steps=10, timescale=45, cooldown_steps=20)
    np.testing.assert_allclose(rsqrt, [0, 1, 2, 2 * np.sqrt(0.5), 0], atol=1e-6)


def test_adamw_trajectory_against_numpy():
    o = OptimOptions(
        learning_rate=0.1, schedule="constant", weight_decay=0.3, clip_norm=0.7, b1=0.8, b2=0.9, eps=1e-3, groups=(("temperature", 0.5),)
    )
    tx = make_optimizer(o, PARAMS, 10)
    params, state = PARAMS, tx.init(PARAMS)
    want = {"k": np.ones((2, 3, 3)), "b": np.full((2, 3), 0.5), "t": np.array(2.0)}
    m, v = ({k: np.zeros_like(x) for k, x in want.items()} for _ in range(2))
    rng = np.random.default_rng(0)
    for step in range(1, 5):
        g = {k: rng.normal(size=x.shape) for k, x in want.items()}
        grads = {
            "blocks": {"kernel": jnp.array(g["k"], jnp.float32), "bias": jnp.array(g["b"], jnp.float32)},
            "temperature": jnp.array(g["t"], jnp.float32),
        }
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for k in want:
            x = g[k] * min(1, 0.7 / norm)
            m[k] = 0.8 * m[k] + 0.2 * x
            v[k] = 0.9 * v[k] + 0.1 * x * x
            direction = m[k] / (1 - 0.8**step) / (np.sqrt(v[k] / (1 - 0.9**step)) + 1e-3)
            want[k] = want[k] - 0.1 * (0.5 if k == "t" else 1) * (direction + (0.3 * want[k] if k == "k" else 0))
    np.testing.assert_allclose(params["blocks"]["kernel"], want["k"], rtol=2e-5)
    np.testing.assert_allclose(params["blocks"]["bias"], want["b"], rtol=2e-5)
    np.testing.assert_allclose(params["temperature"], want["t"], rtol=2e-5)


@pytest.mark.parametrize("kw", [{}, {"name": "lion"}, {"hold": (("^a$", 3),)}, {"lazy": ("^coarse/",)}, {"groups": (("^still$", 0.0),)}])
def test_a_renewed_leaf_begins_anew(kw):
    """After a refresh it takes the steps that it took first, at the rate of now; the other leaves go on as if nothing had been."""
    o = OptimOptions(learning_rate=0.1, schedule="constant", clip_norm=0.0, weight_decay=0.0, b2=0.999, **kw)
    params = {"a": jnp.ones(3), "coarse": {"1": jnp.ones((2, 3)), "2": jnp.ones((1, 3))}, "still": jnp.ones(2)}
    tx, plain = make_optimizer(o, params, 400, "^coarse/"), make_optimizer(o, params, 400)
    grads = [jax.tree.map(lambda x, n=n: x * (1.0 + n % 3), params) for n in range(6)]
    update = jax.jit(tx.update)

    def steps(state):
        moves = []
        for g in grads:
            moved, state = update(g, state, params)
            moves.append(moved)
        return moves, state

    first, state = steps(tx.init(params))
    want, at = [], plain.init(params)
    for g in 50 * grads + grads:
        moved, at = jax.jit(plain.update)(g, at, params)
        want.append(moved)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), first, want[:6])
    for _ in range(49):
        _, state = steps(state)
    kept, emptied = forget(state, jnp.bool_(False)), forget(state, jnp.bool_(True))
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    again, _ = steps(emptied)
    for new, old, late in zip(again, first, want[300:], strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), new["coarse"], old["coarse"])
        np.testing.assert_allclose(new["a"], late["a"], rtol=1e-6)


def test_a_frozen_group_does_not_move_and_keeps_no_moments():
    o = OptimOptions(groups=((r"blocks/", 0.0),))
    tx = make_optimizer(o, PARAMS, 10)
    state = tx.init(PARAMS)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    assert float(jnp.abs(updates["blocks"]["kernel"]).max()) == 0 and float(jnp.abs(updates["temperature"])) > 0
    assert not any("blocks" in jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state))
    assert frozen(o, PARAMS) == {"blocks": {"kernel": True, "bias": True}, "temperature": False}


@pytest.mark.parametrize("kw, words", [
    ({"warmup_steps": 10}, "optim.warmup_steps is 10"), ({"learning_rate": -1.0}, "optim.learning_rate is -1"),
    ({"ema_decay": 1.5}, "optim.ema_decay is 1.5"), ({"decay": "("}, "not a regular expression"),
    ({"groups": (("kernal", 1.0),)}, "'kernal' matches no parameter"), ({"unlock": (("kernel", 3),)}, "is 3; the tower has 2 layers"),
    ({"layer_decay": (("blocks", 0.0),)}, "'blocks' is 0.0"), ({"layer_decay": (("block/", 0.5),)}, "'block/' matches no parameter"),
])  # fmt: skip
def test_values_that_cannot_be(kw, words):
    with pytest.raises(ValueError, match="config.optim") as error:
        make_optimizer(OptimOptions(**kw), PARAMS, 10)
    assert words in str(error.value)


def test_group_factors_take_the_first_match():
    assert factors(OptimOptions(groups=(("kernel", 0.1), ("blocks", 0.2))), PARAMS) == {
        "blocks": {"kernel": 0.1, "bias": 0.2},
        "temperature": 1.0,
    }


TOWERS = {
    "image": {"patch": {"kernel": jnp.ones((2, 4))}, "blocks": {"kernel": jnp.ones((3, 2, 4))}, "norm": {"scale": jnp.ones(4)}},
    "text": {"embed": jnp.ones((5, 4)), "blocks": {"bias": jnp.ones((2, 4))}, "norm": {"scale": jnp.ones(4)}},
    "t": jnp.array(1.0),
}


def test_layer_decay_falls_from_the_top_of_each_tower():
    got = factors(OptimOptions(layer_decay=(("^image/", 0.5),), groups=(("image/norm", 3.0), ("text/blocks", 0.1))), TOWERS)
    assert got["image"]["patch"]["kernel"] == 0.5**4 and got["image"]["norm"]["scale"] == 3.0 and got["t"] == 1.0
    np.testing.assert_allclose(got["image"]["blocks"]["kernel"], np.array([0.125, 0.25, 0.5]).reshape(3, 1, 1))
    assert got["text"] == {"embed": 1.0, "blocks": {"bias": 0.1}, "norm": {"scale": 1.0}}


def test_only_the_unlocked_layers_move_and_have_moments():
    o = OptimOptions(unlock=(("^image/", 1),), groups=(("^text/", 0.0),), learning_rate=0.1, schedule="constant", clip_norm=0.0)
    hold = frozen(o, TOWERS)
    assert hold["image"]["patch"]["kernel"] is True and hold["image"]["norm"]["scale"] is False and hold["t"] is False
    assert hold["image"]["blocks"]["kernel"].tolist() == [[[True]], [[True]], [[False]]]
    tx = make_optimizer(o, TOWERS, 10)
    state = tx.init(TOWERS)
    moments = {jax.tree_util.keystr(p): m.shape for p, m in jax.tree_util.tree_leaves_with_path(state) if ".mu" in jax.tree_util.keystr(p)}
    assert sorted(moments.values()) == [(), (1, 2, 4), (4,)] and not any("text" in name for name in moments)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, TOWERS), state, TOWERS)
    alone = make_optimizer(OptimOptions(learning_rate=0.1, schedule="constant", clip_norm=0.0), TOWERS, 10)
    want, _ = alone.update(jax.tree.map(jnp.ones_like, TOWERS), alone.init(TOWERS), TOWERS)
    np.testing.assert_array_equal(updates["image"]["blocks"]["kernel"][:2], 0)
    np.testing.assert_array_equal(updates["image"]["blocks"]["kernel"][2], want["image"]["blocks"]["kernel"][2])
    np.testing.assert_array_equal(updates["text"]["embed"], 0)
    np.testing.assert_array_equal(updates["t"], want["t"])
