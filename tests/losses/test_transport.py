"""Both solvers against plain numpy, the linear program, their guarantees, and on every split of samples and codes."""

import doctest
from functools import cache, partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from scipy.optimize import linear_sum_assignment, linprog

from jaxvl.losses import transport
from jaxvl.losses.transport import ipot, sinkhorn

SOLVERS = pytest.mark.parametrize("solver", [ipot, sinkhorn], ids=lambda f: f.__name__)
close = np.testing.assert_allclose


def slow_ipot(cost, u, v, beta=0.5, iterations=50, inner=1):
    """As the algorithm is printed, without logarithms, in float64."""
    a = np.exp(-np.float64(cost) / beta)
    plan, sigma = np.ones_like(a), np.full(a.shape[1], 1 / a.shape[1])
    for _ in range(iterations):
        q = a * plan
        for _ in range(inner):
            delta = u / (q @ sigma)
            sigma = v / (q.T @ delta)
        plan = np.diag(delta) @ q @ np.diag(sigma)
    return plan


def slow_sinkhorn(cost, u, v, epsilon=0.05, iterations=3):
    kernel = np.exp(-np.float64(cost) / epsilon)
    a = np.ones(len(kernel))
    for _ in range(iterations):
        b = v / (kernel.T @ a)
        a = u / (kernel @ b)
    return a[:, None] * kernel * b


SLOW = {ipot: slow_ipot, sinkhorn: slow_sinkhorn}


@cache
def jitted(solver, **options):
    return jax.jit(partial(solver, **options))


def problem(samples, codes, seed=0, uniform=True):
    rng = np.random.default_rng(seed)
    masses = [np.full(n, 1 / n) if uniform else rng.dirichlet(np.full(n, 3.0)) for n in (samples, codes)]
    return rng.uniform(0, 2, (samples, codes)).astype(np.float32), *masses


@pytest.mark.parametrize(("solver", "options"), [
    (ipot, {}), (ipot, dict(beta=0.1, iterations=7, inner=3)), (sinkhorn, {}), (sinkhorn, dict(epsilon=0.2, iterations=40)),
])  # fmt: skip
@pytest.mark.parametrize("uniform", [True, False])
def test_matches_plain_numpy(solver, options, uniform):
    cost, u, v = problem(6, 9, uniform=uniform)
    want = SLOW[solver](cost, u, v, **options)
    f = partial(solver, **options)
    close(f(jnp.asarray(cost), jnp.asarray(u), jnp.asarray(v)), want, atol=1e-7)
    if uniform:
        close(f(jnp.asarray(cost)), want, atol=1e-7)
    with jax.enable_x64(True):
        got = f(jnp.asarray(cost, jnp.float64), jnp.asarray(u), jnp.asarray(v))
        assert got.dtype == np.float64
        close(got, want, atol=1e-15)


def test_ipot_reaches_the_linear_program():
    """The exact optimum: an assignment where both sides have as many of equal mass, a linear program elsewhere."""
    cost, *_ = problem(6, 6, seed=3)
    rows, columns = linear_sum_assignment(cost)
    best = np.zeros((6, 6))
    best[rows, columns] = 1 / 6
    far = jitted(ipot, beta=0.1, iterations=2000)
    close(far(cost), best, atol=1e-5)
    cost, u, v = problem(5, 8, seed=5, uniform=False)
    rows, columns = np.kron(np.eye(5), np.ones(8)), np.kron(np.ones(5), np.eye(8))
    exact = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([u, v]))
    assert exact.status == 0
    plan = np.asarray(far(cost, u, v))
    close((plan * cost).sum(), exact.fun, atol=1e-5)
    assert (plan > 1e-5).sum() <= 5 + 8 - 1, "an extreme point: a plan of no more entries than constraints"
    gaps = [float((jitted(ipot, iterations=n)(cost, u, v) * cost).sum() - exact.fun) for n in (5, 50, 500, 2000)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2], "no entropy blurs the limit: the gap goes on closing"


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 10_000), uniform=st.booleans(), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_one_side_is_exact_whatever_the_cost(seed, uniform, size):
    cost, u, v = problem(7, 5, seed, uniform)
    for beta in (0.5, 1e-4):
        plan = np.asarray(jitted(ipot, beta=beta, iterations=10)(cost * np.float32(size), u, v))
        close(plan.sum(0), v, rtol=1e-5)
        assert (plan >= 0).all()
        assert (plan.sum(1) > 0).all(), "every sample has codes"
    plan = np.asarray(jitted(sinkhorn, epsilon=1e-3)(cost * np.float32(size), u, v))
    close(plan.sum(1), u, rtol=1e-5)
    assert (plan >= 0).all()


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(samples=st.permutations(range(7)), codes=st.permutations(range(5)), seed=st.integers(0, 99))
def test_permuted_costs_give_permuted_plans(samples, codes, seed):
    cost, u, v = problem(7, 5, seed, uniform=False)
    for f in (jitted(ipot), jitted(sinkhorn)):
        close(f(cost[samples][:, codes], u[samples], v[codes]), np.asarray(f(cost, u, v))[samples][:, codes], atol=1e-6)


def test_rows_of_ipot_approach_their_sums():
    cost, u, v = problem(12, 30, uniform=False)
    errors = [np.abs(np.asarray(jitted(ipot, iterations=n)(cost, u, v)).sum(1) - u).max() for n in (5, 50, 500, 2000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 1e-3
    assert errors[3] < 1e-4


@SOLVERS
def test_edges(solver):
    f = jitted(solver)
    close(f(np.float32([[1.3]])), [[1]])
    close(f(np.ones((1, 3), np.float32)), np.full((1, 3), 1 / 3), rtol=1e-6)
    close(f(np.float32([[0.0], [2.0], [1.0]])), np.full((3, 1), 1 / 3), rtol=1e-6)
    close(f(np.ones((4, 6), np.float32)), np.full((4, 6), 1 / 24), rtol=1e-5)  # all samples zero vectors, for one
    cost, _, v = problem(4, 6)
    cost[:, 4] = cost[:, 1]
    plan = np.asarray(f(cost))
    np.testing.assert_array_equal(plan[:, 4], plan[:, 1], "duplicate codes share equally")
    u = np.float32([0.5, 0, 0.5, 0])
    v = np.float32([0, 0.2, 0.3, 0, 0.5, 0])
    plan = np.asarray(f(cost, u, v))
    assert np.isfinite(plan).all()
    assert not plan[:, v == 0].any()
    assert not plan[u == 0].any()
    left = np.asarray(f(cost[u > 0][:, v > 0], u[u > 0], v[v > 0]))
    close(plan[u > 0][:, v > 0], left, atol=1e-6)  # what has no mass is not there


@pytest.mark.parametrize("small", [1e-2, 1e-6, 1e-30])
def test_tiny_steps_overflow_nothing(small):
    cost, *_ = problem(7, 5)
    for f, axis, size in ((partial(ipot, beta=small), 0, 5), (partial(sinkhorn, epsilon=small), 1, 7)):
        plan = np.asarray(f(jnp.asarray(cost)))
        close(plan.sum(axis), 1 / size, rtol=1e-5)
        assert (plan >= 0).all()


@SOLVERS
def test_float32_under_half_precision_and_no_gradient(solver):
    cost = jnp.asarray(problem(4, 6)[0], jnp.bfloat16)
    plan = solver(cost)
    assert plan.dtype == jnp.float32
    close(plan, solver(cost.astype(jnp.float32)), rtol=1e-6)
    marginals = jnp.full(4, 0.25), jnp.full(6, 1 / 6)
    grads = jax.grad(lambda *args: jnp.sum(solver(*args) ** 2), (0, 1, 2))(cost.astype(jnp.float32), *marginals)
    assert not any(np.any(g) for g in grads)


@SOLVERS
def test_several_problems_at_once(solver):
    costs = np.stack([problem(4, 6, seed)[0] for seed in range(4)]).reshape(2, 2, 4, 6)
    u = np.stack([problem(4, 6, seed, uniform=False)[1] for seed in range(2)])
    plans = solver(jnp.asarray(costs), jnp.asarray(u))
    assert plans.shape == costs.shape
    for i, j in np.ndindex(2, 2):
        close(plans[i, j], solver(jnp.asarray(costs[i, j]), jnp.asarray(u[j])), atol=1e-7)


@SOLVERS
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2), (2, 2, 2), (1, 1, 8)], ids=str)
def test_split_over_devices_nothing_of_the_plan_travels(solver, shape):
    cost = problem(24, 40)[0]
    want = np.asarray(jitted(solver)(cost))
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[: np.prod(shape)])
    split = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    compiled = jitted(solver).lower(jax.ShapeDtypeStruct(cost.shape, cost.dtype, sharding=split)).compile()
    plan = compiled(jax.device_put(cost, split))
    close(plan, want, atol=1e-7)
    assert plan.sharding.is_equivalent_to(split, 2)
    text = compiled.as_text()
    assert "[24,40]" not in text, "no device holds a whole plan, kernel or temporary"
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    assert "all-reduce" in text


def test_wrong_input_is_refused_with_the_numbers():
    cost = jnp.ones((4, 6))
    with pytest.raises(ValueError, match=r"ipot: the cost has shape \(6,\)"):
        ipot(cost[0])
    with pytest.raises(ValueError, match=r"sinkhorn: the cost has shape \(0, 6\)"):
        sinkhorn(cost[:0])
    with pytest.raises(ValueError, match=r"u has shape \(6,\); for a cost of shape \(4, 6\) it must end in 4"):
        ipot(cost, jnp.ones(6) / 6)
    with pytest.raises(ValueError, match="beta is 0; it must be above 0"):
        ipot(cost, beta=0)
    with pytest.raises(ValueError, match="iterations is -1"):
        sinkhorn(cost, iterations=-1)


def test_examples_run():
    result = doctest.testmod(transport)
    assert result.attempted >= 3
    assert not result.failed
