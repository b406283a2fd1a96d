"""Proxy losses against pair-by-pair sums, in blocks and sampled, on meshes that do not divide; clustering; the optimiser's tables."""

import doctest
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from jaxvl.losses import cluster, hierarchy, proxy
from jaxvl.losses.classes import PER_DEVICE
from jaxvl.losses.hierarchy import Hierarchy
from jaxvl.mesh import BATCH, MeshOptions, make_mesh
from jaxvl.optim import OptimOptions, make_optimizer

B, C, D = 8, 11, 6
NAMES = pytest.mark.parametrize("name", proxy.LOSSES)


def drawn(seed=0, batch=B, classes=C):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(batch, D)).astype(np.float32),
        rng.normal(size=(classes, D)).astype(np.float32),
        rng.integers(0, classes, batch).astype(np.int32),
    )


def slow(name, x, p, labels, alpha=32.0, margin=0.1, scale=9.0, temperature=0.05):
    """Float64, pair by pair."""
    x, p = (v / np.sqrt((v * v).sum(1, keepdims=True) + 1e-12) for v in (x.astype(np.float64), p.astype(np.float64)))
    n, c = len(x), len(p)
    s = [[float(a @ b) for b in p] for a in x]
    if name == "proxy_anchor":
        pull = [
            np.log1p(sum(np.exp(-alpha * (s[i][j] - margin)) for i in range(n) if labels[i] == j)) for j in sorted(set(labels.tolist()))
        ]
        push = [np.log1p(sum(np.exp(alpha * (s[i][j] + margin)) for i in range(n) if labels[i] != j)) for j in range(c)]
        return np.mean(pull) + np.mean(push)
    total = 0.0
    for i, y in enumerate(labels):
        logit = [s[i][j] / temperature if name == "norm_softmax" else -scale * ((x[i] - p[j]) ** 2).sum() for j in range(c)]
        norm = np.log(sum(np.exp(v) for j, v in enumerate(logit) if name != "proxy_nca" or j != y))
        smooth = 0.1 if name == "proxy_nca_smoothed" else 0.0
        target = [1 - smooth if j == y else smooth / (c - 1) for j in range(c)]
        total += norm - sum(t * v for t, v in zip(target, logit, strict=True))
    return total / n


@NAMES
def test_matches_the_slow_reference_padded_and_in_blocks_on_eight_devices(name):
    x, p, labels = drawn()
    f = jax.jit(jax.value_and_grad(partial(proxy.LOSSES[name], classes=C, block=3), (0, 1)))
    padded = np.concatenate([p, np.full((5, D), np.nan, np.float32)])  # what is padding must not matter, whatever it holds
    padded[C:] = 7
    want = slow(name, x, p, labels)
    loss, (dx, dp) = f(x, padded, labels)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert not np.asarray(dp)[C:].any()
    mesh = make_mesh(MeshOptions(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, BATCH)), jax.device_put(padded, NamedSharding(mesh, PER_DEVICE))
        spread, (sx, sp) = f(*placed, labels)
        np.testing.assert_allclose(spread, want, rtol=1e-5)
        np.testing.assert_allclose(sx, dx, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(sp, dp, rtol=1e-4, atol=1e-6)
        assert sp.sharding.is_equivalent_to(placed[1].sharding, 2) and sx.sharding.is_equivalent_to(placed[0].sharding, 2)
    direction = np.random.default_rng(1).normal(size=p.shape).astype(np.float32)
    ends = [slow(name, x, p + sign * 1e-4 * direction, labels) for sign in (1, -1)]
    np.testing.assert_allclose((np.asarray(dp)[:C] * direction).sum(), (ends[0] - ends[1]) / 2e-4, rtol=1e-3)


@NAMES
def test_hard_inputs_give_finite_numbers(name):
    f = jax.jit(jax.value_and_grad(proxy.LOSSES[name], (0, 1)))
    x, p, _ = drawn(classes=2)
    for labels in ([0] * B, [1] * B, [0, 1] * (B // 2)):
        for a, b in ((x, p), (0 * x, p), (x, 0 * p), (np.repeat(p[:1], B, 0), p), (-np.repeat(p[:1], B, 0), p), (1e15 * x, 1e-15 * p)):
            value, grads = f(a, b, np.array(labels, np.int32))
            assert all(np.isfinite(v).all() for v in jax.tree.leaves((value, grads)))
    half = f(jnp.bfloat16(x), p, np.array([0, 1] * (B // 2), np.int32))
    assert half[0].dtype == jnp.float32 and half[1][0].dtype == jnp.bfloat16


def test_sampled_negatives_are_right_on_average_and_move_only_their_rows():
    x, p, labels = drawn(3, classes=24)
    keep = partial(proxy.proxy_anchor, alpha=4.0, block=5)
    dense = jax.jit(jax.value_and_grad(keep, (0, 1)))(x, p, labels)
    some = jax.jit(jax.vmap(lambda key: jax.value_and_grad(partial(keep, keep=0.25, key=key), (0, 1))(x, p, labels)))
    losses, (dx, dp) = some(jax.random.split(jax.random.key(0), 4000))
    spread = lambda v: 4 * np.std(v, 0) / np.sqrt(len(v)) + 1e-6
    for got, want in ((losses, dense[0]), (dx, dense[1][0]), (dp, dense[1][1])):
        assert (np.abs(np.mean(got, 0) - want) < 1.5 * spread(got)).all()
    moved = np.asarray(dp).any(-1)
    assert moved[:, sorted(set(labels.tolist()))].all() and moved.sum(1).max() <= len(set(labels.tolist())) + 6
    whole = jax.jit(jax.value_and_grad(partial(keep, keep=1.0, key=jax.random.key(0)), (0, 1)))(x, p, labels)
    jax.tree.map(np.testing.assert_array_equal, whole, dense)
    with jax.set_mesh(make_mesh(MeshOptions(4, 2, 1))):
        split = jax.jit(lambda key: proxy.proxy_anchor(x, p, labels, alpha=4.0, keep=0.5, key=key))
        values = [float(split(jax.random.key(k))) for k in range(100)]
    want = float(dense[0])
    assert abs(np.mean(values) - want) < 5 * np.std(values) / 10 and np.std(values) > 0
    for key in range(3):
        assert np.isfinite(proxy.norm_softmax(x, p, labels, keep=0.1, key=jax.random.key(key)))


def test_no_array_of_the_batch_by_the_classes_and_an_eighth_a_device():
    mesh, classes, batch = make_mesh(MeshOptions(4, 2, 1)), 1 << 17, 64
    with jax.set_mesh(mesh):
        x, p = (
            jax.ShapeDtypeStruct((batch, D), jnp.float32),
            jax.ShapeDtypeStruct((classes, D), jnp.float32, sharding=NamedSharding(mesh, PER_DEVICE)),
        )
        for name in ("proxy_anchor", "proxy_nca_pp"):
            f = jax.jit(jax.value_and_grad(partial(proxy.LOSSES[name], block=1024), (0, 1)))
            compiled = f.lower(x, p, jax.ShapeDtypeStruct((batch,), jnp.int32)).compile()
            assert f"{batch},{classes // 8}" not in compiled.as_text() and f"{batch},{classes}" not in compiled.as_text()
            assert "all-reduce" in compiled.as_text() and f"f32[{classes},{D}]" not in compiled.as_text()


def test_wrong_input_is_refused_with_the_numbers():
    x, p, labels = drawn()
    for words, call in (
        (r"\(8, 6\), \(11, 5\)", lambda: proxy.proxy_anchor(x, p[:, :5], labels)),
        ("1 classes of 1 proxies", lambda: proxy.proxy_nca(x, p[:1], labels * 0)),
        ("12 classes need as many proxies, not 11", lambda: proxy.norm_softmax(x, p, labels, classes=12)),
        ("keep=0.5 must be above 0 and at most 1, with a key", lambda: proxy.proxy_anchor(x, p, labels, keep=0.5)),
        ("keep=0.5 could leave proxy_nca", lambda: proxy.proxy_nca(x, p, labels, keep=0.5, key=jax.random.key(0))),
        ("12 clusters of 11 rows", lambda: cluster.plus_plus(jax.random.key(0), p, 12, cluster.How(C))),
        ("2 levels of proxies, 1 of labels", lambda: hierarchy.hierarchical(proxy.proxy_anchor, x, (p, p), (labels,), (1.0, 1.0), C)),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_kmeans_finds_blobs_on_any_mesh_and_three_levels_build_up():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(6), 7)
    p = (np.eye(6)[truth] + 0.02 * rng.normal(size=(42, 6))).astype(np.float32)
    padded = np.concatenate([p, np.zeros((6, 6), np.float32)])
    like = (jnp.zeros((6, 6)), jnp.zeros((2, 6)))
    make = jax.jit(lambda key, p: hierarchy.build(key, p, like, 42))
    want = make(jax.random.key(1), padded)
    assert sorted(want.counts[0].tolist()) == [7] * 6 and sum(want.counts[1].tolist()) == 6
    assert all(len(set(np.asarray(want.parents[0])[:42][truth == k].tolist())) == 1 for k in range(6))
    for mesh in (MeshOptions(8), MeshOptions(2, 2, 2)):
        with jax.set_mesh(make_mesh(mesh)):
            got = jax.jit(lambda key, p: hierarchy.build(key, p, like, 42))(jax.random.key(1), padded)
        jax.tree.map(np.testing.assert_array_equal, (got.parents, got.counts), (want.parents, want.counts))
    again = jax.jit(lambda p, h: hierarchy.refresh(p, h, 42))(padded, want)
    jax.tree.map(np.testing.assert_array_equal, again.parents, want.parents)


def test_an_empty_cluster_keeps_its_row_or_takes_the_farthest_row():
    p = np.array([[0.0], [1.0], [2.0], [9.0]], np.float32)
    start = np.array([[1.0], [100.0], [101.0]], np.float32)
    kept = cluster.online_step(p, start, cluster.How(4, "raw"))
    assert kept.assign.tolist() == [0] * 4 and kept.centroids.tolist() == [[3.0], [100.0], [101.0]]
    seeded = cluster.online_step(p, start, cluster.How(4, "raw", "reseed_farthest"))
    assert seeded.assign.tolist() == [2, 0, 0, 1] and seeded.counts.tolist() == [2, 1, 1]  # then rows 0 and 2 are level: the lowest
    same = jnp.ones((4, 1))
    assert cluster.kmeans(jax.random.key(0), same, 3, cluster.How(4)).counts.tolist() == [4, 0, 0]
    above = Hierarchy((jnp.array([0, 0, 2, 2]),), (jnp.array([[5.0], [6.0], [7.0]]),), ())
    grad = jax.grad(lambda p: hierarchy.tie(p, above, 3, "raw")[0].sum())(jnp.array([[1.0], [2.0], [3.0], [4.0]]))
    assert grad.ravel().tolist() == [0.5, 0.5, 1.0, 0.0]  # the last row is padding


def test_held_leaves_wait_and_lazy_rows_stay():
    params = {"a": jnp.ones(3), "table": jnp.ones((4, 2))}
    options = OptimOptions(
        learning_rate=0.1, schedule="step", step_every=2, step_factor=0.5, clip_norm=0.0, decay="", hold=(("^a$", 2),), lazy=("^table$",)
    )
    tx = make_optimizer(options, params, 10)
    state, free = tx.init(params), make_optimizer(options._replace(hold=(), lazy=()), params, 10)
    grads = {"a": jnp.array([1.0, -2.0, 3.0]), "table": jnp.zeros((4, 2)).at[1].set(1.0)}
    first, free_state = params, free.init(params)
    for t in range(3):
        updates, state = tx.update(grads, state, params)
        dense, free_state = free.update(grads, free_state, params)
        params = optax.apply_updates(params, updates)
        assert bool(jnp.any(params["a"] != 1)) == (t == 2)
        np.testing.assert_array_equal(params["table"][jnp.array([0, 2, 3])], first["table"][jnp.array([0, 2, 3])])
        assert dense["table"][0, 0] < 0  # AdamW would have decayed it
    alone, _ = free.update({**grads}, free.init(first), first)
    np.testing.assert_allclose(updates["a"], alone["a"] * 0.5, rtol=1e-5)  # its first step, at the rate of step 2
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "table" in jax.tree_util.keystr(path)]
    assert len(moments) == 2 and all(not np.asarray(m)[[0, 2, 3]].any() and np.asarray(m)[1].all() for m in moments)
    for key, value, words in (
        ("hold", (("q", 1),), "'q' matches no"),
        ("hold", (("a", -1),), "is -1"),
        ("lazy", ("q",), "'q' matches no"),
        ("step_every", 0, "step_every is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make_optimizer(options._replace(**{key: value}), params, 10)


def test_examples_run():
    assert doctest.testmod(proxy).failed == 0
