"""What every loss over all pairs of an image and a text needs."""

import jax
import jax.numpy as jnp
from jax import lax


def check(loss: str, image: jax.Array, text: jax.Array, impl: str) -> None:
    """Raises ValueError naming the loss and what it was given, where that cannot be."""
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"{loss} takes image and text embeddings of one shape [batch, width], not {image.shape} and {text.shape}")
    if impl not in ("global", "ring"):
        raise ValueError(f"{loss}: impl={impl!r} is not one of: global, ring")


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in full float32 or more, also where the hardware's default is less: logits are differences of large numbers."""
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.promote_types(jnp.float32, jnp.result_type(a, b)))


def unit(x: jax.Array) -> jax.Array:
    """Rows of x divided by their norm, float32 or wider; a zero row stays zero and its gradient is finite."""
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))
