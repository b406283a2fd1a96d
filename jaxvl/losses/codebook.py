r"""Contrast through a codebook: samples assigned to shared codes by optimal transport, the teacher of one view guiding the
student of the other.

Both views travel as one array with a leading axis of 2, image then text, so that one loop of the solver serves both. With rows
:math:`z` of a student, :math:`z^m` of its teacher and :math:`c` of the codebook, :math:`\hat c = c / \|c\|`:

.. math::
  D_{ik} = 1 - \cos(z^m_i, c_k) \qquad
  L_\text{ot} = \langle T, D \rangle \qquad
  L_\text{t2p} = -\frac1N \sum_{ik} \bar T^v_{ik} \log \mathrm{softmax}_k(z^t_i \cdot \hat c_k / \tau) \qquad
  L_\text{i2p} = -\frac1N \sum_{ik} \bar T^t_{ik} \log \mathrm{softmax}_k(z^v_i \cdot \hat c_k / \tau)

with :math:`T` the plan of a view's teacher and :math:`\bar T` its rows rescaled to sum to 1.

Reference: Duan et al., Multi-modal Alignment using Representation Codebook, CVPR 2022, https://arxiv.org/abs/2203.00048, section 3.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import log_softmax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxvl.losses import transport
from jaxvl.losses.pairs import dot, unit

IMAGE, TEXT = 0, 1  # places on the axis of views


class Solver(NamedTuple):
    """How samples are assigned to codes.

    name: "ipot" takes beta, iterations and inner; "sinkhorn" takes epsilon and iterations; see `losses/transport.py`.
    scope: the samples that share the codes out among them. "global": the whole batch. "local": groups of `group` consecutive
      rows, each for itself. "batch_plus_queue": the batch and the teacher's queue.
    """

    name: Literal["ipot", "sinkhorn"] = "ipot"
    beta: float = 0.5
    epsilon: float = 0.05
    iterations: int = 50
    inner: int = 1
    scope: Literal["global", "local", "batch_plus_queue"] = "global"
    group: int = 64

    def solve(self, cost: jax.Array, u: jax.Array | None = None) -> jax.Array:
        """Plans of costs [..., sample, code]; u: masses of the samples, None: uniform. The codes have one mass each."""
        if self.name == "sinkhorn":
            return transport.sinkhorn(cost, u, epsilon=self.epsilon, iterations=self.iterations)
        return transport.ipot(cost, u, beta=self.beta, iterations=self.iterations, inner=self.inner)


class CodebookTerms(NamedTuple):
    """float32 scalars; their sum is the loss of the codebook."""

    ot_image: jax.Array
    ot_text: jax.Array
    t2p: jax.Array
    i2p: jax.Array


def cosines(z: jax.Array, codes: jax.Array) -> jax.Array:
    """Cosines [view, sample, code] of samples [view, sample, width] and codes [code, width]; 0 for a zero row."""
    return _split(dot(unit(z), unit(codes).T))


def assign(cosine: jax.Array, solver: Solver, queue: jax.Array | None = None, valid: jax.Array | None = None) -> jax.Array:
    """The plan of each view over the samples of the batch, a constant.

    Args:
      cosine: [view, sample, code], of the teachers' features and the codes.
      solver: see `Solver`.
      queue: cosines [view, queue, code] of the features in the queues, where the scope asks for them.
      valid: bool [queue], the entries that are features already; None: all.

    Returns:
      [view, sample, code], float32 or better. Whatever the scope, the total mass of a view is 1 to the solver's error, so that
      a loss on these rows does not depend on how many others took part.

    Raises:
      ValueError: a group that does not divide the batch, or a queue missing.
    """
    views, samples, codes = cosine.shape
    if solver.scope == "local":
        if samples % solver.group:
            raise ValueError(
                f"codebook: scope 'local' cuts the batch into groups of {solver.group}, which does not divide its {samples} rows"
            )
        groups = samples // solver.group
        return _split(solver.solve(1 - cosine.reshape(views, groups, solver.group, codes)).reshape(cosine.shape) / groups)
    if solver.scope == "global":
        return _split(solver.solve(1 - cosine))
    if queue is None:
        raise ValueError("codebook: scope 'batch_plus_queue' needs the cosines of the queues")
    there = jnp.ones(queue.shape[1], bool) if valid is None else valid
    u = _beside(jnp.ones((1, samples, 1), cosine.dtype), there.astype(cosine.dtype)[None, :, None])[0, :, 0]
    plan = solver.solve(1 - _split(_beside(cosine, queue)), u / jnp.sum(u))
    return _split(_first(plan, samples) * (jnp.sum(u) / samples))


def row_normalised(plan: jax.Array) -> jax.Array:
    """Rows rescaled to sum to 1: the codes of each sample as a distribution; an empty row stays empty."""
    total = jnp.sum(plan, -1, keepdims=True)
    return plan / jnp.where(total > 0, total, 1)


def log_predictions(z: jax.Array, codes: jax.Array, tau: ArrayLike) -> jax.Array:
    """log softmax over the codes [view, sample, code] of student features [view, sample, width], taken as they are."""
    return log_softmax(_split(dot(z, unit(codes).T)) / tau, -1)


def codebook_terms(cosine: jax.Array, log_p: jax.Array, plan: jax.Array, *, normalise_rows: bool = True) -> CodebookTerms:
    """The four terms for the image and text views of a batch.

    Args:
      cosine: [2, sample, code], of features without gradient and codes: the transport terms move the codes alone.
      log_p: [2, sample, code], `log_predictions` of the students.
      plan: [2, sample, code], a constant; each student is told the plan of the other view.
      normalise_rows: targets are rows of sum 1, averaged. False: the plan itself, of total mass 1, summed: the same but for
        the error that the solver leaves in the sums of the rows.
    """
    samples = cosine.shape[1]
    targets = row_normalised(plan) / samples if normalise_rows else plan
    ot = jnp.sum(plan * (1 - cosine), (1, 2))
    cross = -jnp.sum(targets[::-1] * log_p, (1, 2))
    return CodebookTerms(ot[IMAGE], ot[TEXT], t2p=cross[TEXT], i2p=cross[IMAGE])


def usage(cosine: jax.Array, log_p: jax.Array, plan: jax.Array) -> dict[str, jax.Array]:
    """How the codes are used in a batch: float32 scalars, without gradient; arguments as for `codebook_terms`.

    By view ("codes/..._image", "codes/..._text"):
      usage_entropy: of the mean assignment by the student, over log K: 1 where all codes are used alike, 0 where one is. The
        plans cannot tell, since they are made to use all codes alike.
      dead: codes that the students give less than a tenth of an equal share.
      target_entropy: of a sample's row of the plan, over log K, averaged: 0 where each sample has one code.
      row_error: largest distance between the sum of a row of the plan and its share 1/N, in shares.
      nearest: cosine of a teacher's feature and its nearest code, averaged.
    Of both:
      codes/agreement: samples whose image and text have the same strongest code in their plans, of 1.
    """
    cosine, log_p, plan = lax.stop_gradient((cosine, log_p, plan))
    samples, codes = plan.shape[1:]
    targets, used = row_normalised(plan), jnp.mean(jnp.exp(log_p), 1)
    by_view = {
        "usage_entropy": _entropy(used),
        "dead": jnp.sum(used < 0.1 / codes, -1).astype(jnp.float32),
        "target_entropy": jnp.mean(_entropy(targets), -1),
        "row_error": jnp.max(jnp.abs(jnp.sum(plan, -1) * samples - 1), -1),
        "nearest": jnp.mean(jnp.max(cosine, -1), -1),
    }
    strongest = jnp.argmax(plan, -1)
    scalars = {f"codes/{name}_{view}": value[i] for name, value in by_view.items() for i, view in ((IMAGE, "image"), (TEXT, "text"))}
    return {**scalars, "codes/agreement": jnp.mean(strongest[IMAGE] == strongest[TEXT])}


def _entropy(p: jax.Array) -> jax.Array:
    """Entropy over the last axis as a fraction of the largest possible; 0 where there is one code."""
    most = jnp.log(jnp.maximum(p.shape[-1], 2))
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), -1) / most


def _beside(batch: jax.Array, queue: jax.Array) -> jax.Array:
    """Rows of the batch and of the queue [view, row, any] as one axis on which every device holds a part of both.

    The order of rows means nothing to a plan, and in this one none of them moves to another device.
    """
    parts = [x.reshape(len(x), _devices(), -1, x.shape[-1]) for x in (batch, queue)]
    return jnp.concatenate(parts, 2).reshape(len(batch), -1, batch.shape[-1])


def _first(rows: jax.Array, samples: int) -> jax.Array:
    """The rows of the batch of what `_beside` joined."""
    parts = rows.reshape(len(rows), _devices(), -1, rows.shape[-1])
    return parts[:, :, : samples // _devices()].reshape(len(rows), samples, -1)


def _devices() -> int:
    """How many the batch is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def _split(x: jax.Array) -> jax.Array:
    """Samples over the batch axes and codes over the tensor axis of the context mesh: no device holds a whole plan."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return lax.with_sharding_constraint(x, P(None, ("data", "fsdp"), "tensor"))
