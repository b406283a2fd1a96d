"""Which entries of a lexical vector are kept: those above a value, or the greatest few. What is kept is not rescaled, unless asked for."""

import jax
import jax.numpy as jnp


def default_threshold(entries: int) -> float:
    """1/√V: the root mean square of the entries of a unit vector. Li et al. 2024, section 3.3."""
    return entries**-0.5


def above(s: jax.Array, threshold: float, *, renormalize: bool = False) -> jax.Array:
    """s [..., V] with every entry that is not strictly greater than `threshold` set to 0."""
    return _kept(s, s > threshold, renormalize)


def top(s: jax.Array, k: int, *, renormalize: bool = False) -> jax.Array:
    """s [..., V] with all but its k greatest entries set to 0; of equal ones the first stay.

    Raises ValueError for a k that is not in [1, V].
    """
    return _kept(s, jnp.put_along_axis(jnp.zeros(s.shape, bool), top_indices(s, k), True, -1, inplace=False), renormalize)


def top_indices(s: jax.Array, k: int) -> jax.Array:
    """Places of the k greatest entries of s [..., V], greatest first, of equal ones the lowest first; int32 [..., k]."""
    if not 1 <= k <= s.shape[-1]:
        raise ValueError(f"k is {k}; it must be from 1 to the {s.shape[-1]} entries of a vector")
    return jax.lax.top_k(s, k)[1]


def active(s: jax.Array, threshold: float = 0.0) -> jax.Array:
    """How many entries of each vector are strictly greater than `threshold`; int32 [...]."""
    return jnp.sum(s > threshold, -1, dtype=jnp.int32)


def _kept(s: jax.Array, kept: jax.Array, renormalize: bool) -> jax.Array:
    s = jnp.where(kept, s, 0)
    if not renormalize:
        return s
    square = jnp.sum(s * s, -1, keepdims=True)  # a vector of which nothing is kept stays zero
    return s * jax.lax.rsqrt(jnp.where(square > 0, square, 1))
