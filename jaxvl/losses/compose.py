r"""Losses of composed retrieval: bidirectional matching, the objective of JVSM made of it, and the two losses of TIRG.

Everything takes raw rows and normalises them here, x / max(||x||, 1e-5); arithmetic is float32, or float64 where the rows are.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

Mining = Literal["semi_hard", "semi_hard_val", "hard"]
NEGATIVES = 3  # of an anchor in TIRG's triplets


class Ids(NamedTuple):
    """What each row of a batch is about, int [B] each; equal numbers are the same thing, a negative one is absent.

    target, reference: images. query: the reference image and the modification together; a row without is a pair of an image
    and its text. target_text, reference_text: the texts that describe the images.
    """

    target: jax.Array
    reference: jax.Array
    query: jax.Array
    target_text: jax.Array
    reference_text: jax.Array


class Terms(NamedTuple):
    """The parts of JVSM's objective and their weighted sum, scalars."""

    im: jax.Array
    cs: jax.Array
    vs: jax.Array
    total: jax.Array


def normalise(x: jax.Array) -> jax.Array:
    """Rows of unit norm; a row shorter than 1e-5 is only scaled by 1e5, so zero stays zero and every gradient is finite."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-10))


def match(
    a: jax.Array,
    b: jax.Array,
    *,
    margin: ArrayLike = 0.2,
    mining: Mining = "semi_hard",
    same: Sequence[jax.Array] = (),
    valid: jax.Array | None = None,
) -> jax.Array:
    r"""Triplet hinge of each row against the hardest of its negatives, in both directions.

    With unit rows :math:`A_i, B_i` and :math:`d_{ij} = \|A_i - B_j\|^2 \in [0, 4]`,

    .. math::
      M(A, B) = \frac{1}{B} \sum_i \big[ d_{ii} - \min_{j \in S_i} d_{ij} + m \big]_+ \; + \; \text{the same with A and B exchanged}.

    A row whose :math:`S_i` is empty contributes 0, so a batch of one row gives 0.

    Args:
      a: [B, width]; b: [B, width], row i belongs to row i of `a`.
      margin: m, a scalar.
      mining: "semi_hard": S_i holds the j != i with d_ij >= d_ii, no nearer than the row's own partner. "semi_hard_val": those with
        d_ij >= d_jj, as VAL's released code has it, whose mask is broadcast along the wrong axis. "hard": all j != i.
      same: int [B] arrays; rows that share a non-negative number in any of them are no negatives of each other.
      valid: bool [B]; the mean is over these rows, and the others are nobody's negatives. None: all of them.

    Returns:
      Scalar; 0 where no row is valid.

    Raises:
      ValueError: shapes that do not match or an unknown `mining`.

    Reference: Chen, Gong and Bazzani, Image Search with Text Feedback by Visiolinguistic Attention Learning, CVPR 2020, equation 8.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"match takes two sides of one shape [batch, width], not {a.shape} and {b.shape}")
    if mining not in get_args(Mining):
        raise ValueError(f"match: mining={mining!r} is none of {', '.join(get_args(Mining))}")
    a, b = normalise(a), normalise(b)
    valid = jnp.ones(len(a), bool) if valid is None else valid
    dots = jnp.matmul(a, b.T, precision="highest")
    d = jnp.sum(a * a, 1)[:, None] + jnp.sum(b * b, 1) - 2 * dots  # [B, B]
    rival = ~jnp.eye(len(a), dtype=bool) & valid
    for ids in same:
        rival &= (ids[:, None] != ids) | (ids[:, None] < 0)

    def one_way(d: jax.Array) -> jax.Array:
        own = jnp.diagonal(d)
        floor = {"semi_hard": own[:, None], "semi_hard_val": own, "hard": -jnp.inf}[mining]
        candidates = rival & (d >= floor)
        any_left = candidates.any(1)
        nearest = jnp.where(any_left, jnp.min(jnp.where(candidates, d, jnp.inf), 1), 0)
        hinge = jnp.where(any_left & valid, jnp.maximum(own - nearest + margin, 0), 0)
        return jnp.sum(hinge) / jnp.maximum(jnp.sum(valid), 1)

    return one_way(d) + one_way(d.T)


def jvsm(
    q: jax.Array,
    v_target: jax.Array,
    v_reference: jax.Array,
    s_target: jax.Array,
    s_reference: jax.Array,
    ids: Ids,
    *,
    weights: tuple[ArrayLike, ArrayLike, ArrayLike] = (1.0, 1.0, 1.0),
    margin: ArrayLike = 0.2,
    mining: Mining = "semi_hard",
    mask_same: bool = True,
) -> Terms:
    r"""The objective of JVSM over composed embeddings q, visual v and semantic s, each [B, width].

    .. math::
      L_{im} = M(q, v_t) \qquad L_{cs} = M(q, s_t) \qquad L_{vs} = \tfrac12 \big[ M(v_t, s_t) + M(v_r, s_r) \big] \qquad
      L = w_{im} L_{im} + w_{cs} L_{cs} + w_{vs} L_{vs}

    Each M is over the rows that have both of its sides. `mask_same` keeps rows with the same target, the same text or, for
    composed queries, the same question from being each other's negatives; without it every other row is one.

    Reference: Chen and Bazzani, Learning Joint Visual Semantic Matching Embeddings for Language-guided Retrieval, ECCV 2020.
    The terms are those of its abstract; M is that of the same authors' VAL.
    """

    def term(a: jax.Array, b: jax.Array, present: tuple[jax.Array, ...], same: tuple[jax.Array, ...]) -> jax.Array:
        valid = jnp.all(jnp.stack(present) >= 0, 0)
        return match(a, b, margin=margin, mining=mining, same=same if mask_same else (), valid=valid)

    of_target, of_reference = (ids.target, ids.target_text), (ids.reference, ids.reference_text)
    im = term(q, v_target, (ids.query, ids.target), (*of_target, ids.query))
    cs = term(q, s_target, (ids.query, ids.target_text), (*of_target, ids.query))
    vs = (term(v_target, s_target, of_target, of_target) + term(v_reference, s_reference, of_reference, of_reference)) / 2
    w_im, w_cs, w_vs = map(jnp.asarray, weights)
    return Terms(im, cs, vs, w_im * im + w_cs * cs + w_vs * vs)


def in_batch_softmax(query: jax.Array, target: jax.Array, scale: ArrayLike, valid: jax.Array | None = None) -> jax.Array:
    r"""TIRG's batch-based classification: cross entropy of each query against all targets, one way.

    Features are :math:`s\,x / \|x\|`, so logits are :math:`s^2 \cos`. query, target: [B, width]; scale: s, a learned scalar that starts
    at 4; valid: bool [B], the rows that are queries and whose targets are candidates. Scalar; 0 where no row is valid.

    Reference: Vo et al., Composing Text and Image for Image Retrieval, CVPR 2019, equation 4.
    """
    valid = jnp.ones(len(query), bool) if valid is None else valid
    logits = scale * scale * jnp.matmul(normalise(query), normalise(target).T, precision="highest")
    row = jax.nn.logsumexp(jnp.where(valid, logits, -1e30), 1) - jnp.diagonal(logits)
    return jnp.sum(jnp.where(valid, row, 0)) / jnp.maximum(jnp.sum(valid), 1)


def soft_triplet(features: jax.Array, triplets: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    r"""TIRG's soft triplet loss, the mean of :math:`\log(1 + e^{d(a,p) - d(a,n)})` with squared distances.

    features: [rows, width], already normalised and scaled; triplets: int [M, 3], rows of anchor, positive and negative; valid: bool
    [M]. TIRG's hand-written backward pass gives half of this gradient, since it drops the factor 2 of a square.

    Reference: Vo et al., CVPR 2019, equation 5.
    """
    x = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    anchor, positive, negative = (x[triplets[:, i]] for i in range(3))
    loss = jax.nn.softplus(jnp.sum((anchor - positive) ** 2, 1) - jnp.sum((anchor - negative) ** 2, 1))
    valid = jnp.ones(len(loss), bool) if valid is None else valid
    return jnp.sum(jnp.where(valid, loss, 0)) / jnp.maximum(jnp.sum(valid), 1)


def draw_triplets(key: jax.Array, batch: int) -> jax.Array:
    """int32 [M, 3] of the 2 * batch rows that are queries and then their targets: each row is an anchor up to three times.

    Its positive is its partner, its negatives different rows of other pairs, drawn evenly.
    """
    rows = jnp.arange(2 * batch)
    count = min(NEGATIVES, 2 * batch - 2)
    chances = jax.random.uniform(key, (2 * batch, 2 * batch)).at[rows, rows].set(-1).at[rows, (rows + batch) % (2 * batch)].set(-1)
    negatives = lax.top_k(chances, count)[1]
    anchors = jnp.broadcast_to(rows[:, None], negatives.shape)
    return jnp.stack([anchors, (anchors + batch) % (2 * batch), negatives], -1).reshape(-1, 3)
