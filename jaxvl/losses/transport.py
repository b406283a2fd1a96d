r"""Optimal transport between samples and codes: IPOT and Sinkhorn, in the log domain.

For a cost :math:`D_{ik}`, masses :math:`u_i` of samples and :math:`v_k` of codes, a plan is what :math:`T \ge 0` moves from
each sample to each code, :math:`T 1 = u`, :math:`T^\top 1 = v`, and the best one has the least :math:`\langle T, D \rangle`.

Both solvers rescale rows and columns in turn. Sums over rows and columns are the only traffic between devices: with the samples
of a cost split over some mesh axes and its codes over others, every plan, kernel and temporary stays split the same way, and
what is reduced and exchanged are vectors. Nothing here has a gradient: a plan is a constant to the loss that uses it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp


def ipot(cost: jax.Array, u: jax.Array | None = None, v: jax.Array | None = None, *,
         beta: float = 0.5, iterations: int = 50, inner: int = 1) -> jax.Array:  # fmt: skip
    r"""Inexact proximal point iteration: transport plans that tend to the exact, sparse optimum.

    From :math:`T = 1`, :math:`\sigma = 1/K`, with :math:`A = e^{-D / \beta}`, each iteration is one step of

    .. math::
      Q = A \odot T, \quad \text{inner times:}\ \delta = \frac{u}{Q \sigma},\ \sigma = \frac{v}{Q^\top \delta}, \quad
      T = \mathrm{diag}(\delta)\, Q\, \mathrm{diag}(\sigma).

    The sums of the columns are v to rounding at any `beta`; those of the rows approach u as iterations go on, and no row of
    positive mass is ever empty. Unlike Sinkhorn's, the limit has no entropic blur, whatever `beta` is: it sets the pace.

    >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> print(ipot(cost).round(4))
    [[0.5 0. ]
     [0.  0.5]]

    Args:
      cost: [..., sample, code], finite; each leading index is a problem of its own.
      u: masses of the samples [..., sample], of total 1, zeros allowed; None: uniform.
      v: masses of the codes [..., code], likewise.
      beta: step of the proximal point iteration.
      iterations: outer iterations.
      inner: scalings within one.

    Returns:
      Plans of the shape of `cost`, of total mass 1, float32 (float64 for a float64 cost).

    Raises:
      ValueError: a cost without two axes, marginals of other sizes, or a `beta`, `iterations` or `inner` that is not positive.

    Reference: Xie et al., A Fast Proximal Point Method for Computing Exact Wasserstein Distance, UAI 2019,
    https://arxiv.org/abs/1802.04307, algorithm 1 with this start and order of updates.
    """
    _positive("ipot", beta=beta, iterations=iterations, inner=inner)
    cost, log_u, log_v = _prepare("ipot", cost, u, v)
    step = -cost / beta

    def proximal(_: jax.Array, carry: tuple) -> tuple:
        log_plan, sigma = carry
        q = step + log_plan

        def scale(_: jax.Array, scales: tuple) -> tuple:
            delta = _scaling(log_u, q + scales[1], -1)
            return delta, _scaling(log_v, q + delta, -2)

        # The first scaling stands outside the loop, which with the usual one inner iteration is then no loop at all.
        delta, sigma = lax.fori_loop(1, inner, scale, scale(jnp.int32(0), (log_u, sigma)))
        return q + delta + sigma, sigma

    # Carried as it is, since rebuilding it from accumulated scalings would lose as many digits as there are iterations.
    log_plan, _ = lax.fori_loop(0, iterations, proximal, (jnp.zeros_like(cost), jnp.full_like(log_v, -jnp.log(cost.shape[-1]))))
    return lax.stop_gradient(_with_sums(jnp.exp(log_plan), jnp.exp(log_v), -2))


def sinkhorn(cost: jax.Array, u: jax.Array | None = None, v: jax.Array | None = None, *,
             epsilon: float = 0.05, iterations: int = 3) -> jax.Array:  # fmt: skip
    r"""Plans of the transport problem blurred by an entropy of weight `epsilon`, after some iterations.

    :math:`T_{ik} = e^{f_i + g_k - D_{ik} / \epsilon}` from :math:`f = 0`; an iteration sets g so that the columns sum to v, then f so
    that the rows sum to u. So the sums of the rows are exact to rounding and those of the columns approach v.

    >>> print(sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]), epsilon=1.0).round(4))
    [[0.3655 0.1345]
     [0.1345 0.3655]]

    Args:
      cost, u, v: as for `ipot`.
      epsilon: weight of the entropy.
      iterations: rounds of both updates.

    Returns:
      Plans of the shape of `cost`, of total mass 1, float32 (float64 for a float64 cost).

    Raises:
      ValueError: as for `ipot`.

    Reference: Cuturi, Sinkhorn Distances, NeurIPS 2013, https://arxiv.org/abs/1306.0895; in this order and number of iterations
    Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS 2020,
    https://arxiv.org/abs/2006.09882, section 3.1.
    """
    _positive("sinkhorn", epsilon=epsilon, iterations=iterations)
    cost, log_u, log_v = _prepare("sinkhorn", cost, u, v)
    kernel = -cost / epsilon

    def scale(_: jax.Array, scales: tuple) -> tuple:
        g = _scaling(log_v, kernel + scales[0], -2)
        return _scaling(log_u, kernel + g, -1), g

    f, g = lax.fori_loop(0, iterations, scale, (jnp.where(log_u > -jnp.inf, 0, log_u), jnp.zeros_like(log_v)))
    return lax.stop_gradient(_with_sums(jnp.exp(kernel + f + g), jnp.exp(log_u), -1))


def ipot_flops(samples: int, codes: int, iterations: int, inner: int = 1) -> float:
    """Operations of `ipot` on one cost, an exponential counted as one: two sums of exponentials a scaling, and the new plan."""
    return float(samples * codes * iterations * (2 * 5 * inner + 3))


def sinkhorn_flops(samples: int, codes: int, iterations: int) -> float:
    """Operations of `sinkhorn` on one cost, likewise."""
    return float(samples * codes * iterations * 2 * 5)


def _prepare(solver: str, cost: jax.Array, u: jax.Array | None, v: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cost in float32 or better, and the logarithms of the marginals as [..., sample, 1] and [..., 1, code]."""
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"{solver}: the cost has shape {cost.shape}; it must be [..., sample, code] with at least one of each")
    for name, mass, size in (("u", u, cost.shape[-2]), ("v", v, cost.shape[-1])):
        if mass is not None and (mass.ndim < 1 or mass.shape[-1] != size):
            raise ValueError(f"{solver}: {name} has shape {mass.shape}; for a cost of shape {cost.shape} it must end in {size}")
    cost = lax.stop_gradient(cost.astype(jnp.promote_types(cost.dtype, jnp.float32)))
    log = lambda mass, size: (
        jnp.full(size, -jnp.log(size), cost.dtype) if mass is None else jnp.log(lax.stop_gradient(mass).astype(cost.dtype))
    )
    log_u, log_v = log(u, cost.shape[-2])[..., :, None], log(v, cost.shape[-1])[..., None, :]
    lead = cost.shape[:-2]
    return cost, jnp.broadcast_to(log_u, (*lead, *log_u.shape[-2:])), jnp.broadcast_to(log_v, (*lead, *log_v.shape[-2:]))


def _scaling(log_mass: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """What to add to x along `axis` so that its exponentials sum to the mass; -inf where that is 0, also for an empty line."""
    return jnp.where(log_mass > -jnp.inf, log_mass - logsumexp(x, axis, keepdims=True), -jnp.inf)


def _with_sums(plan: jax.Array, mass: jax.Array, axis: int) -> jax.Array:
    """The plan with the rounding errors of its last update divided out, which with large exponents are more than a few bits."""
    total = jnp.sum(plan, axis, keepdims=True)
    return jnp.where(total > 0, plan * (mass / jnp.where(total > 0, total, 1)), 0)


def _positive(solver: str, **values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{solver}: {name} is {value}; it must be above 0")
