"""The symmetric InfoNCE loss of CLIP."""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jax.typing import ArrayLike

from jaxvl.losses import pairs, ring as rings
from jaxvl.losses.pairs import dot


def infonce(image: jax.Array, text: jax.Array, scale: ArrayLike, *, impl: str = "global") -> jax.Array:
    r"""Cross entropy of each image against all texts and of each text against all images, averaged.

    With rows :math:`x_i` of `image`, :math:`y_i` of `text` and logits :math:`\ell_{ij} = s\, x_i \cdot y_j`,

    .. math::
      L = \frac{1}{2B} \sum_i \Big[ \log \sum_j e^{\ell_{ij}} + \log \sum_j e^{\ell_{ji}} - 2 \ell_{ii} \Big].

    Logits and log-sum-exp are float32 whatever the dtype of the embeddings.

    >>> x = jnp.eye(4)
    >>> print(f"{infonce(x, x, 10.0):.6f}")
    0.000136
    >>> print(f"{infonce(x, x[::-1], 10.0):.6f}")
    10.000136

    Args:
      image: [batch, width], usually of unit norm.
      text: [batch, width]; row i belongs to row i of `image`.
      scale: s, the inverse temperature, a float32 scalar.
      impl: "global" forms the [batch, batch] logits and leaves their sharding to the compiler. "ring" lets the texts
        travel round the devices of the context mesh (`losses/ring.py`), forms one block of logits at a time and forms
        it again for the gradient: same value and gradient, 1/n of the memory on n devices.

    Returns:
      float32 scalar.

    Raises:
      ValueError: shapes that do not match, an unknown `impl`, or a batch that the ring cannot split evenly.

    Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021,
    https://arxiv.org/abs/2103.00020, figure 3; van den Oord et al., Representation Learning with Contrastive Predictive
    Coding, 2018, https://arxiv.org/abs/1807.03748, equation 4.
    """
    pairs.check("infonce", image, text, impl)
    scale = jnp.asarray(scale, jnp.float32)
    return _ring(image, text, scale) if impl == "ring" else _global(image, text, scale)


def _global(x: jax.Array, y: jax.Array, s: jax.Array) -> jax.Array:
    logits = dot(s * x, y.T)
    return jnp.mean(logsumexp(logits, 1) / 2 + logsumexp(logits, 0) / 2 - jnp.diagonal(logits))


@jax.custom_vjp
def _ring(x: jax.Array, y: jax.Array, s: jax.Array) -> jax.Array:
    return _ring_forward(x, y, s)[0]


def _ring_forward(x: jax.Array, y: jax.Array, s: jax.Array) -> tuple:
    B, ring = len(x), rings.of_batch(len(x))

    def forward(x: jax.Array, y: jax.Array, s: jax.Array) -> tuple:
        ids, empty = rings.row_ids(ring), jnp.full(ring.rows, -jnp.inf)

        def step(home: tuple, block: tuple, column: jax.Array) -> tuple:
            row, positive = home
            y, visitors = block
            logits = dot(s * x, y.T)
            positive += jnp.sum(jnp.where(ids[:, None] == visitors, logits, 0), 1)
            return (jnp.logaddexp(row, logsumexp(logits, 1)), positive), jnp.logaddexp(column, logsumexp(logits, 0))

        (row, positive), column = rings.circulate(step, ring, (empty, jnp.zeros(ring.rows)), (y, ids), empty)
        return rings.total(ring, jnp.sum(row / 2 + column / 2 - positive)) / B, row, column

    loss, row, column = rings.over_rows(forward, ring, (x, y, s), "srr")
    return loss, (x, y, s, row, column)


def _ring_backward(residuals: tuple, g: jax.Array) -> tuple:
    B, ring = len(residuals[0]), rings.of_batch(len(residuals[0]))

    def backward(x: jax.Array, y: jax.Array, s: jax.Array, row: jax.Array, column: jax.Array, g: jax.Array) -> tuple:
        ids = rings.row_ids(ring)

        def step(dx: jax.Array, block: tuple, dy: jax.Array) -> tuple:
            y, visitors, column = block
            logits = dot(s * x, y.T)
            p = (jnp.exp(logits - row[:, None]) + jnp.exp(logits - column)) / 2 - (ids[:, None] == visitors)
            return dx + dot(p, y), dy + dot(p.T, x)

        zero = jnp.zeros(x.shape, jnp.float32)
        dx, dy = rings.circulate(step, ring, zero, (y, ids, column), zero)
        ds = rings.total(ring, jnp.sum(dx * x))
        return (g / B * s * dx).astype(x.dtype), (g / B * s * dy).astype(y.dtype), g / B * ds

    return rings.over_rows(backward, ring, (*residuals, g), "rrs")


_ring.defvjp(_ring_forward, _ring_backward)
