"""Contrast of a student's embeddings with a teacher's: those of the batch and those of a queue of earlier batches."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp
from jax.typing import ArrayLike

from jaxvl.losses.pairs import dot

ROOM = 1 << 23  # logits of the queue that a device forms at a time
NEVER = -1e30  # the logit of what is no candidate; finite, so that gradients are


class Candidates(NamedTuple):
    """What each query is compared with: its own group of the teacher's batch, then the queue. Constants to the gradient.

    batch: [B, D]; row i is the positive of query i. queue: [Q, D]. ids, queue_ids: int [B], int [Q], whose equality makes more
    positives, None where only row i is one; a queue id of -100 is unknown. valid: bool [Q], entries that count, None for all.
    """

    batch: jax.Array
    queue: jax.Array
    ids: jax.Array | None = None
    queue_ids: jax.Array | None = None
    valid: jax.Array | None = None


def contrast(
    query: jax.Array,  # [B, D]
    candidates: Candidates,
    temperature: ArrayLike,
    *,
    guide: jax.Array | None = None,  # [B, D]
    alpha: ArrayLike = 0.0,
    groups: int = 1,
) -> jax.Array:
    r"""Cross entropy of queries against soft targets over :math:`[\text{batch} \,\|\, \text{queue}]`, averaged.

    With candidates :math:`c_j`, :math:`s_{ij} = x_i \cdot c_j / \tau` of the queries and :math:`m_{ij}` of the guides, the
    teacher's own embeddings of the same rows, and :math:`P_i` the positives of row i,

    .. math::
      L = -\frac1B \sum_i \sum_j y_{ij} \log \mathrm{softmax}(s_i)_j, \qquad
      y_{ij} = \alpha\, \mathrm{softmax}(m_i)_j + (1 - \alpha) \frac{[j \in P_i]}{|P_i|} .

    Since a row of y sums to one this is logsumexp(s_i) less the mean of s_i under y_i, and both are running sums over blocks of the
    queue: y is never formed, and no more than `ROOM` logits a device at a time, which the backward pass forms again. The queue
    stays where it lies; what travels between devices are queries [B, D] and sums [B].

    Args:
      guide: None for targets that are the positives alone.
      alpha: share of the guide in the targets, in [0, 1].
      groups: number of groups of consecutive rows; the batch part of a row's candidates is its group.

    Returns:
      scalar, float32 or the wider dtype of the input; gradients reach `query` and, through s, `temperature`.

    Reference: Li et al., Align before Fuse, NeurIPS 2021, https://arxiv.org/abs/2107.07651, equations 1, 2 and 6.
    """
    kind = jnp.promote_types(jnp.float32, query.dtype)
    batch, queue = (lax.stop_gradient(x).astype(kind) for x in candidates[:2])
    temperature = jnp.asarray(temperature, kind)
    x = query.astype(kind) / temperature
    # The guide is part of the target, and no gradient goes into a target.
    y = None if guide is None else lax.stop_gradient(guide.astype(kind) / temperature)

    own = jnp.eye(len(x) // groups, dtype=bool)
    cut = lambda a: a.reshape(groups, -1, *a.shape[1:])
    whole = lambda a: a.reshape(len(x), -1)
    within = lambda a: whole(dot(cut(a), jnp.swapaxes(cut(batch), 1, 2)))
    hit = whole(jnp.broadcast_to(own, (groups, *own.shape)))
    if candidates.ids is not None:
        hit = hit | whole(cut(candidates.ids)[:, :, None] == cut(candidates.ids)[:, None, :])
    start = _add(None, within(x), None if y is None else within(y), hit, None)

    mine = None if candidates.ids is None else candidates.ids[:, None]
    everywhere = _replicated(jnp.stack([x] if y is None else [x, y]))

    @jax.checkpoint
    def block(sums: _Sums, part: tuple) -> tuple[_Sums, None]:
        rows, ids, valid = part
        s, *m = dot(everywhere, rows.T)
        hit = None if ids is None else (mine == ids) & (ids != -100)
        return _add(sums, s, m[0] if m else None, hit, valid), None

    parts = blocks(len(x), queue.shape[0])
    strided = lambda a: None if a is None else a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1)
    sums, _ = lax.scan(block, start, (strided(queue), strided(candidates.queue_ids), strided(candidates.valid)))

    target: Any = sums.hits / sums.many
    if sums.guide is not None:
        target = alpha * sums.guide.mean + (1 - alpha) * target
    return jnp.mean(sums.total - target)


class _Guide(NamedTuple):
    """Running over candidates, each [B]: logsumexp(m) and the mean of s under softmax(m)."""

    total: jax.Array
    mean: jax.Array


class _Sums(NamedTuple):
    """Running over candidates, each [B]: logsumexp(s), the sum of s over positives, their number."""

    total: jax.Array
    hits: jax.Array
    many: jax.Array
    guide: _Guide | None


def _add(sums: _Sums | None, s: jax.Array, m: jax.Array | None, hit: jax.Array | None, valid: jax.Array | None) -> _Sums:
    """`sums` with the candidates of logits s and m [B, block] added."""
    if valid is not None:
        s = jnp.where(valid, s, NEVER)
        m = None if m is None else jnp.where(valid, m, NEVER)
        hit = None if hit is None else hit & valid
    total, guide = logsumexp(s, 1), None
    hits, many = (jnp.zeros_like(total),) * 2 if hit is None else (jnp.sum(jnp.where(hit, s, 0), 1), jnp.sum(hit, 1).astype(s.dtype))
    if m is not None:
        before = None if sums is None else sums.guide
        whole = logsumexp(m, 1) if before is None else jnp.logaddexp(before.total, logsumexp(m, 1))
        mean = jnp.sum(jnp.exp(m - whole[:, None]) * s, 1)
        guide = _Guide(whole, mean if before is None else mean + before.mean * jnp.exp(before.total - whole))
    if sums is None:
        return _Sums(total, hits, many, guide)
    return _Sums(jnp.logaddexp(sums.total, total), sums.hits + hits, sums.many + many, guide)


def blocks(batch: int, queue: int) -> int:
    """In how many blocks a queue is read: the fewest that divide it, and what each device has of it, within `ROOM`."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    mine = queue // devices if queue % devices == 0 else queue
    least = max(1, math.ceil(batch * mine / ROOM))
    return next(n for n in range(least, mine + 1) if mine % n == 0)


def _replicated(x: jax.Array) -> jax.Array:
    return x if jax.sharding.get_abstract_mesh().empty else lax.with_sharding_constraint(x, jax.P())


def enqueue(queue: jax.Array, pointer: jax.Array, rows: jax.Array) -> jax.Array:
    """A circular queue [Q, ...] with rows [n, ...] written from `pointer` on; of more rows than Q the last Q remain.

    The queue keeps its sharding: each entry looks up which row, if any, falls on it.
    """
    length, count = queue.shape[0], rows.shape[0]
    # The last row that falls on an entry: they come back to it every `length` rows.
    row = (jnp.arange(length) - pointer) % length
    row = row + (count - 1 - row) // length * length
    written = _replicated(rows.astype(queue.dtype))[jnp.clip(row, 0, count - 1)]
    return jnp.where((row >= 0).reshape(-1, *(1,) * (queue.ndim - 1)), written, queue)


def average(teacher: dict, student: dict, momentum: float) -> dict:
    """The leaves of `teacher` moved towards the same ones of `student`: m θ' + (1 - m) θ, without gradient."""
    pick: Callable = lambda t, s: {
        k: pick(t[k], s[k]) if isinstance(t[k], dict) else momentum * t[k] + (1 - momentum) * lax.stop_gradient(s[k]) for k in t
    }
    return pick(teacher, student)
