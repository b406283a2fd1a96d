r"""Losses of lexical vectors: rows of non-negative numbers of unit norm, one column a word.

With the mean use :math:`m_j = \frac1N \sum_i s_{ij}` of word j in a batch, one word for everything costs V times as much under the
overuse penalty as under FLOPs, an even use of all words costs the same:

.. math::
    \ell_\text{FLOPs} = \sum_j m_j^2 \qquad
    \ell_\text{overuse} = V \sum_j \frac{m_j}{\sum_k m_k} m_j^2

Li et al., Unified Lexical Representation for Interpretable Visual-Language Alignment, NeurIPS 2024, https://arxiv.org/abs/2407.17827,
equations 5 to 8; FLOPs: Paria et al., Minimizing FLOPs to Learn Efficient Sparse Representations, ICLR 2020.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp
from jax.typing import ArrayLike

from jaxvl.losses import pairs
from jaxvl.losses.infonce import infonce
from jaxvl.losses.pairs import dot


def cross_entropies(image: jax.Array, text: jax.Array, scale: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """(image to text, text to image): mean cross entropies of the logits scale · image textᵀ, matching pairs on the diagonal.

    image, text: [batch, V]. Logits and results are float32 at least. Raises ValueError for shapes that do not match.
    """
    pairs.check("cross_entropies", image, text, "global")
    logits = dot(jnp.asarray(scale) * image, text.T)
    right = jnp.diagonal(logits)
    return jnp.mean(logsumexp(logits, 1) - right), jnp.mean(logsumexp(logits, 0) - right)


def contrastive(image: jax.Array, text: jax.Array, scale: ArrayLike, *, reduce: str = "sum", impl: str = "global") -> jax.Array:
    """Both cross entropies, added up as in LexVLA (equation 8), or with reduce="mean" averaged as in CLIP.

    impl: "global" or "ring", see `infonce`. Raises ValueError for another `reduce` or `impl` and shapes that do not match.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"contrastive: reduce={reduce!r} is not one of: sum, mean")
    return (2.0 if reduce == "sum" else 1.0) * infonce(image, text, scale, impl=impl)


def mean_use(s: jax.Array) -> jax.Array:
    """m of the formulas: the mean of each column of s [batch, V], over all devices; float32 [V] at least."""
    return jnp.mean(s.astype(jnp.promote_types(jnp.float32, s.dtype)), 0)


def flops(s: jax.Array, entries: int = 0) -> jax.Array:
    """FLOPs regulariser of s [batch, V], a scalar. `entries` changes nothing: it is here so that both penalties are called alike."""
    del entries
    return jnp.sum(mean_use(s) ** 2)


def overuse(s: jax.Array, entries: int = 0, *, stop_weight_grad: bool = False) -> jax.Array:
    """Overuse penalty of s [batch, V], a scalar; 0, with a gradient of 0, where s is all zeros.

    entries: V of the formula, where s has columns beyond it that are always 0; by default all of them count. stop_weight_grad: take
    the weight m_j / Σ m_k for a constant, which the paper does not say.
    """
    m = mean_use(s)
    total = jnp.sum(m)
    weight = m / jnp.where(total > 0, total, 1)
    return (entries or s.shape[1]) * jnp.sum((lax.stop_gradient(weight) if stop_weight_grad else weight) * m**2)


def by_parts(penalty: Callable, s: jax.Array, parts: int, **options: Any) -> jax.Array:
    """The mean of a penalty over `parts` equal parts of the batch: what it comes to where each device sees its own rows alone.

    Both penalties are greater like this than on the whole batch, the more so the fewer rows a part has.
    Raises ValueError where the batch does not divide.
    """
    if len(s) % parts:
        raise ValueError(f"a batch of {len(s)} rows does not divide into {parts} parts")
    return jnp.mean(jax.vmap(lambda rows: penalty(rows, **options))(s.reshape(parts, -1, s.shape[1])))


def growing(step: jax.Array, weight: float, warmup: int) -> jax.Array:
    """weight · min(1, step / warmup)², the weight of a penalty at a step counted from 0; constant where warmup is 0."""
    return weight * jnp.minimum(1.0, step / warmup) ** 2 if warmup else jnp.asarray(weight, jnp.float32)
