"""The pairwise sigmoid loss of SigLIP."""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.typing import ArrayLike

from jaxvl.losses import pairs, ring as rings
from jaxvl.losses.pairs import dot


def sigmoid(image: jax.Array, text: jax.Array, scale: ArrayLike, bias: ArrayLike, *, impl: str = "global") -> jax.Array:
    r"""Logistic loss of all pairs of an image and a text, summed over the pairs of a row and averaged over rows.

    With rows :math:`x_i` of `image`, :math:`y_j` of `text`, and :math:`z_{ij} = 1` for :math:`i = j`, else -1,

    .. math::
      L = -\frac{1}{B} \sum_i \sum_j \log \sigma \big( z_{ij} (t\, x_i \cdot y_j + b) \big).

    Logits are float32 whatever the dtype of the embeddings.

    >>> x = jnp.eye(4)
    >>> print(f"{sigmoid(x, x, 10.0, -5.0):.6f}")
    0.026861
    >>> print(f"{sigmoid(x, x[::-1], 10.0, -5.0):.6f}")
    10.026861

    Args:
      image: [batch, width], usually of unit norm.
      text: [batch, width]; row i belongs to row i of `image`.
      scale: t, a float32 scalar.
      bias: b, a float32 scalar.
      impl: "global" forms the [batch, batch] logits and leaves their sharding to the compiler. "ring" lets the texts
        travel round the devices of the context mesh (`losses/ring.py`) and forms one block of logits at a time: same
        value and gradient, 1/n of the memory on n devices.

    Returns:
      float32 scalar.

    Raises:
      ValueError: shapes that do not match, an unknown `impl`, or a batch that the ring cannot split evenly.

    Reference: Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023, https://arxiv.org/abs/2303.15343,
    equation 1 and section 3.3 (the loss in blocks).
    """
    pairs.check("sigmoid", image, text, impl)
    scale, bias = (jnp.asarray(c, jnp.float32) for c in (scale, bias))
    return _ring(image, text, scale, bias) if impl == "ring" else _global(image, text, scale, bias)


def _global(x: jax.Array, y: jax.Array, t: jax.Array, b: jax.Array) -> jax.Array:
    logits = dot(t * x, y.T) + b
    z = 2 * jnp.eye(len(x)) - 1
    return -jnp.mean(jnp.sum(log_sigmoid(z * logits), 1))


@jax.custom_vjp
def _ring(x: jax.Array, y: jax.Array, t: jax.Array, b: jax.Array) -> jax.Array:
    return _ring_forward(x, y, t, b)[0]


def _ring_forward(x: jax.Array, y: jax.Array, t: jax.Array, b: jax.Array) -> tuple:
    """Value and gradient in one journey: no term needs a sum over the whole batch, so no block is formed twice."""
    B, ring = len(x), rings.of_batch(len(x))

    def forward(x: jax.Array, y: jax.Array, t: jax.Array, b: jax.Array) -> tuple:
        ids = rings.row_ids(ring)

        def step(home: tuple, block: tuple, dy: jax.Array) -> tuple:
            loss, dx, db = home
            y, visitors = block
            z = jnp.where(ids[:, None] == visitors, 1.0, -1.0)
            logits = dot(t * x, y.T) + b
            p = -z * jax.nn.sigmoid(-z * logits)
            return (loss - jnp.sum(log_sigmoid(z * logits)), dx + dot(p, y), db + jnp.sum(p)), dy + dot(p.T, x)

        zero, rows = jnp.zeros(()), jnp.zeros(x.shape, jnp.float32)
        (loss, dx, db), dy = rings.circulate(step, ring, (zero, rows, zero), (y, ids), rows)
        loss, dt, db = (rings.total(ring, c) / B for c in (loss, jnp.sum(dx * x), db))
        return loss, (t / B * dx).astype(x.dtype), (t / B * dy).astype(y.dtype), dt, db

    loss, *gradient = rings.over_rows(forward, ring, (x, y, t, b), "srrss")
    return loss, gradient


def _ring_backward(gradient: list, g: jax.Array) -> tuple:
    return tuple((g * d).astype(d.dtype) for d in gradient)


_ring.defvjp(_ring_forward, _ring_backward)
