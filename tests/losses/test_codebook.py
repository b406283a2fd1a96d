"""The codebook's terms against plain numpy, in value and gradient; scopes, diagnostics, edges, and every split."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxvl.losses import codebook
from jaxvl.losses.codebook import Solver, assign, codebook_terms, cosines, log_predictions, usage
from jaxvl.losses.transport import ipot

N, K, D = 8, 12, 5
close = np.testing.assert_allclose


def features(samples=N, codes=K, seed=0):
    """Unit student and teacher features [view, sample, width] and a codebook that is not normalised."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((2, 2, samples, D))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return *np.float32(z), np.float32(2 * rng.standard_normal((codes, D)))


@partial(jax.jit, static_argnames=("solver", "normalise_rows"))
def terms(z, teacher, codes, solver=Solver(), tau=0.1, normalise_rows=True):
    cosine = cosines(jax.lax.stop_gradient(teacher), codes)
    return codebook_terms(cosine, log_predictions(z, codes, tau), assign(cosine, solver), normalise_rows=normalise_rows)


assign_jit = jax.jit(assign, static_argnums=1)
cosines_jit, log_predictions_jit, usage_jit = (jax.jit(f) for f in (cosines, log_predictions, usage))


def slow(z, teacher, codes, plan, tau=0.1):
    """Float64, sample by sample and code by code: ot_image, ot_text, t2p, i2p."""
    z, teacher, codes, plan = (np.float64(x) for x in (z, teacher, codes, plan))
    c = np.array([code / np.sqrt((code**2).sum()) for code in codes])
    out = np.zeros(4)
    for view in (0, 1):
        for i in range(z.shape[1]):
            size = np.sqrt((teacher[view, i] ** 2).sum())
            out[view] += sum(plan[view, i, k] * (1 - teacher[view, i] @ c[k] / size) for k in range(len(c)))
            logits = np.array([z[view, i] @ code / tau for code in c])
            log_p = logits - np.log(np.exp(logits).sum())
            target = plan[1 - view, i] / plan[1 - view, i].sum()
            out[3 - view] -= (target * log_p).sum() / z.shape[1]
    return out


def test_matches_plain_numpy_in_value_and_gradient():
    z, teacher, codes = features()
    plan = np.asarray(assign(cosines(teacher, codes), Solver()))
    weights = np.array([1.0, 0.7, 1.3, 0.4])  # apart, so that no term hides another
    value, grads = jax.jit(jax.value_and_grad(lambda *args: jnp.dot(jnp.stack(terms(*args)), weights), (0, 1, 2)))(z, teacher, codes)
    close(value, slow(z, teacher, codes, plan) @ weights, rtol=1e-5)
    f = lambda z, codes: slow(z, teacher, codes, plan) @ weights
    for got, at in ((grads[0], 0), (grads[2], 1)):
        args = [np.float64(z), np.float64(codes)]
        for index in list(np.ndindex(args[at].shape))[::3]:
            ends = []
            for step in (1e-5, -1e-5):
                moved = [a.copy() for a in args]
                moved[at][index] += step
                ends.append(f(*moved))
            close(got[index], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-5)
    assert not np.any(grads[1])


@pytest.mark.parametrize(("term", "students"), [("ot_image", ()), ("ot_text", ()), ("t2p", (1,)), ("i2p", (0,))])
def test_each_term_moves_what_it_should(term, students):
    dz, dteacher, dcodes = jax.grad(lambda *args: getattr(terms(*args), term), (0, 1, 2))(*features())
    assert [bool(np.any(d)) for d in dz] == [view in students for view in (0, 1)]
    assert not np.any(dteacher)
    assert np.abs(dcodes).max() > 1e-4


def test_a_student_is_told_the_plan_of_the_other_view():
    z, teacher, codes = features()
    other = np.array([teacher[0], -teacher[1]])
    a, b = terms(z, teacher, codes), terms(z, other, codes)
    assert (a.t2p, a.ot_image) == (b.t2p, b.ot_image)
    assert a.i2p != b.i2p


def test_targets_by_rows_or_by_plan():
    """The same but for the solver's error, which Sinkhorn does not leave in the rows."""
    args = features()
    rows, plan = (terms(*args, Solver("sinkhorn", iterations=3), normalise_rows=n) for n in (True, False))
    close(rows, plan, rtol=1e-5)
    rows, plan = (terms(*args, Solver(iterations=2), normalise_rows=n) for n in (True, False))
    assert abs(rows.t2p - plan.t2p) > 1e-4


def test_local_scope_is_each_group_alone():
    _, teacher, codes = features()
    cosine = cosines(teacher, codes)
    local = assign_jit(cosine, Solver(scope="local", group=4))
    alone = [assign_jit(cosine[:, at : at + 4], Solver()) for at in (0, 4)]
    close(local, np.concatenate(alone, 1) / 2, atol=1e-7)
    assert np.abs(local - assign_jit(cosine, Solver())).max() > 1e-3
    with pytest.raises(ValueError, match="groups of 3, which does not divide its 8 rows"):
        assign(cosine, Solver(scope="local", group=3))


def test_the_queue_takes_its_share_of_the_codes():
    _, teacher, codes = features()
    cosine, queue = (cosines(x, codes) for x in (teacher, features(16, seed=1)[1]))
    solver = Solver(scope="batch_plus_queue", iterations=500)
    plan = assign_jit(cosine, solver, queue)
    whole = ipot(1 - jnp.concatenate([cosine, queue], 1), iterations=500)
    close(plan, 3 * whole[:, :N], atol=1e-6)
    close(plan.sum((1, 2)), 1, atol=1e-3)
    valid = np.arange(16) < 4
    close(assign_jit(cosine, solver, queue, valid), assign_jit(cosine, solver, queue[:, :4]), atol=1e-6)
    none = assign_jit(cosine, solver, queue, np.zeros(16, bool))
    close(none, assign_jit(cosine, Solver(iterations=500)), atol=1e-6)
    with pytest.raises(ValueError, match="needs the cosines of the queues"):
        assign(cosine, solver)


def test_usage_against_plain_numpy():
    z, teacher, codes = features()
    z[1] = z[1, :1]  # the texts are all alike
    cosine, log_p = cosines_jit(teacher, codes), log_predictions_jit(z, codes, 0.05)
    plan = assign_jit(cosine, Solver(iterations=3))
    got = {name.removeprefix("codes/"): float(value) for name, value in usage_jit(cosine, log_p, plan).items()}
    entropy = lambda p: -sum(x * np.log(x) for x in p if x > 0) / np.log(K)
    for i, view in enumerate(("image", "text")):
        used = np.exp(np.float64(log_p[i])).mean(0)
        close(got.pop(f"usage_entropy_{view}"), entropy(used), rtol=1e-5)
        assert got.pop(f"dead_{view}") == (used < 0.1 / K).sum()
        rows = np.float64(plan[i]) / np.sum(plan[i], 1, keepdims=True)
        close(got.pop(f"target_entropy_{view}"), np.mean([entropy(row) for row in rows]), rtol=1e-5)
        close(got.pop(f"row_error_{view}"), np.abs(np.sum(plan[i], 1) * N - 1).max(), rtol=1e-4)
        close(got.pop(f"nearest_{view}"), np.mean([cosine[i, n].max() for n in range(N)]), rtol=1e-5)
    assert got.pop("agreement") == np.mean([plan[0, n].argmax() == plan[1, n].argmax() for n in range(N)])
    assert got == {}


def test_usage_of_known_cases():
    uniform, one = np.full((2, N, K), -np.log(K)), np.log(np.eye(K)[np.zeros((2, N), int)] + 1e-30)
    plan = np.full((2, N, K), 1 / (N * K))
    spread, collapsed = (usage_jit(np.zeros((2, N, K)), log_p, plan) for log_p in (uniform, one))
    close([spread["codes/usage_entropy_image"], spread["codes/dead_image"]], [1, 0], atol=1e-6)
    close([collapsed["codes/usage_entropy_text"], collapsed["codes/dead_text"]], [0, K - 1], atol=1e-6)
    assert spread["codes/agreement"] == 1


@pytest.mark.parametrize("solver", [Solver(beta=1e-3), Solver("sinkhorn", epsilon=1e-3, iterations=3)], ids=lambda s: s.name)
def test_edges_give_finite_numbers(solver):
    z, teacher, codes = features()
    zeros = np.zeros_like(teacher)
    alike = np.repeat(codes[:1], K, 0)

    def loss(z, teacher, codes):
        cosine, log_p = cosines(teacher, codes), log_predictions(z, codes, 0.1)
        plan = assign(cosine, solver)
        return sum(codebook_terms(cosine, log_p, plan)), usage(cosine, log_p, plan)

    f = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))
    for args in (
        (z, zeros, codes),
        (zeros, zeros, codes),
        (z, teacher, alike),
        (z, teacher, np.zeros_like(codes)),
        (z[:, :1], teacher[:, :1], codes),
        (z, teacher, codes[:1]),
    ):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(f(*args)))
    close(cosines(zeros, codes), 0)


def test_half_precision_features_lose_nothing_in_the_plan():
    z, teacher, codes = (jnp.asarray(x, jnp.bfloat16) for x in features())
    cosine = cosines(teacher, codes)
    assert cosine.dtype == assign(cosine, Solver()).dtype == jnp.float32
    want = terms(*(x.astype(jnp.float32) for x in (z, teacher, codes)))
    close(jnp.stack(terms(z, teacher, codes)), jnp.stack(want), rtol=1e-6)


SCOPES = {"global": Solver(), "local": Solver(scope="local", group=4), "queue": Solver(scope="batch_plus_queue")}


@pytest.mark.parametrize(("scope", "shape"), [("global", (2, 2, 2)), ("local", (2, 1, 1)), ("queue", (2, 2, 1))], ids=str)
def test_equal_on_every_mesh_without_gathering_a_plan(scope, shape):
    z, teacher, codes = features(16, 24)
    queue = features(40, 24, seed=1)[1]

    def loss(z, teacher, codes, queue):
        cosine = cosines(teacher, codes)
        past = cosines(queue, jax.lax.stop_gradient(codes)) if scope == "queue" else None
        plan, log_p = assign(cosine, SCOPES[scope], past), log_predictions(z, codes, 0.1)
        return sum(codebook_terms(cosine, log_p, plan)), usage(cosine, log_p, plan)

    f = partial(jax.value_and_grad, argnums=(0, 2), has_aux=True)(loss)
    want = jax.jit(f)(z, teacher, codes, queue)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[: np.prod(shape)])
    rows, centres = NamedSharding(mesh, P(None, ("data", "fsdp"))), NamedSharding(mesh, P(("fsdp", "tensor")))
    with jax.set_mesh(mesh):
        args = [jax.device_put(x, s) for x, s in zip((z, teacher, codes, queue), (rows, rows, centres, rows), strict=True)]
        compiled = jax.jit(f).lower(*args).compile()
        got = compiled(*args)
    jax.tree.map(partial(close, rtol=2e-4, atol=2e-6), got, want)
    text = compiled.as_text()
    assert not any(f"[2,{n},24]" in text for n in (16, 40, 56)), "no device holds a whole plan"


def test_row_normalised_leaves_empty_rows_empty():
    close(codebook.row_normalised(jnp.array([[[0.1, 0.3], [0.0, 0.0]]])), [[[0.25, 0.75], [0, 0]]])
