"""Image-text matching: which negatives a pair is told from, and the loss of telling them."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxvl.losses.momentum import NEVER


def allowed(rows: int, ids: jax.Array | None = None) -> jax.Array:
    """Who may be whose negative: bool [group, row, row] (or [1, row, row] without ids); ids int [group, row], never one's equal."""
    other = ~jnp.eye(rows, dtype=bool)[None]
    return other if ids is None else other & (ids[:, :, None] != ids[:, None, :])


def weights(similarity: jax.Array, ids: jax.Array | None = None) -> jax.Array:
    """Probabilities, not normalised again, that row i's negative is j: softmax of [group, row, row] without the rows' own and
    without equal ids."""
    return jnp.where(allowed(similarity.shape[1], ids), jax.nn.softmax(similarity), 0)


def hard_negatives(key: jax.Array, similarity: jax.Array, ids: jax.Array | None = None) -> jax.Array:
    """A negative for every row, drawn in proportion to `weights`: int [group, row], an index into the row's group.

    similarity: [group, row, row] over the temperature, constants to the gradient. The draw is one of logits, so that weights
    too small for a float still count. A row for which nothing can be drawn, since all ids of its group are its own or a similarity is not a
    number, gets any other row with equal chance, and the one row of a group of one gets itself.
    """
    rows = similarity.shape[1]
    logits = jnp.where(allowed(rows, ids), lax.stop_gradient(similarity), NEVER)
    drawable = jnp.all(jnp.isfinite(logits), 2) & jnp.any(logits > NEVER, 2)
    logits = jnp.where(drawable[:, :, None], logits, jnp.where(allowed(rows), 0.0, NEVER))
    return jax.random.categorical(key, logits)


def matching(logits: jax.Array, groups: int = 1) -> jax.Array:
    """Cross entropy of telling pairs that match (column 1) from pairs that do not (column 0); scalar.

    logits: [B, 1 + n, 2]; the first of a row's pairs matches, the n others do not. A group of one row has no negatives, and
    only its match counts. Reference: Li et al. 2021, equation 4.
    """
    each = -jax.nn.log_softmax(logits.astype(jnp.promote_types(jnp.float32, logits.dtype)))
    each = jnp.concatenate([each[:, :1, 1], each[:, 1:, 0]], 1)
    return jnp.mean(each[:, 0] if groups == len(logits) else each)
