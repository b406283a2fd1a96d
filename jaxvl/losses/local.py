"""Local mutual information: what a caption or an image says as a whole against what each part of it says."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp
from jax.typing import ArrayLike

from jaxvl.losses.momentum import NEVER
from jaxvl.losses.pairs import dot


def local_information(
    whole: jax.Array,  # [B, D]
    parts: jax.Array,  # [B, P, D]; constants to the gradient
    temperature: ArrayLike,
    *,
    valid: jax.Array | None = None,  # bool [B, P]
    groups: int = 1,
) -> jax.Array:
    r"""Contrast of each sample's embedding with its own parts, the parts of all other samples of its group being negatives.

    With :math:`s_{ijp} = g_i \cdot l_{jp} / \tau` over parts that are valid,

    .. math::
      n_i = \log \sum_{j \ne i} \sum_q e^{s_{ijq}}, \qquad
      \ell_{ip} = \log\big(e^{s_{iip}} + e^{n_i}\big) - s_{iip}, \qquad
      L = \operatorname{mean}_i \operatorname{mean}_p \ell_{ip} .

    The other parts of the same sample are neither positives nor negatives. n_i does not depend on p, so that memory is B² P
    numbers, where contrasting every positive by itself takes B² P². A sample without a part is left out of the mean, and the
    loss of a group is 0 where it has one sample or none with parts.

    Args:
      groups: number of groups of consecutive rows; the loss is the mean of theirs.

    Returns:
      scalar, float32 or the wider dtype of the input; gradients reach `whole` and `temperature`.

    Reference: Yang et al., Vision-Language Pre-Training with Triple Contrastive Learning, CVPR 2022, section 3.3; Hjelm et
    al., Learning Deep Representations by Mutual Information Estimation and Maximization, ICLR 2019, equation 5.
    """
    row, spoken = sample_losses(whole, parts, temperature, valid=valid, groups=groups)
    return jnp.mean(row.sum(1) / jnp.maximum(spoken.sum(1), 1))


def sample_losses(
    whole: jax.Array, parts: jax.Array, temperature: ArrayLike, *, valid: jax.Array | None = None, groups: int = 1
) -> tuple[jax.Array, jax.Array]:
    """mean_p of the samples, 0 for one without parts, and which samples have any; both [group, B / group]."""
    kind = jnp.promote_types(jnp.float32, whole.dtype)
    B, P, D = parts.shape
    G, n = groups, B // groups
    g = (whole.astype(kind) / jnp.asarray(temperature, kind)).reshape(G, n, D)
    l = lax.stop_gradient(parts.astype(kind)).reshape(G, n * P, D)
    counted = jnp.ones((G, n, P), bool) if valid is None else valid.reshape(G, n, P)

    s = dot(g, jnp.swapaxes(l, 1, 2)).reshape(G, n, n, P)  # [group, whole, sample, part]
    own = jnp.eye(n, dtype=bool)[:, :, None]
    positive = jnp.einsum("gijp,ij->gip", s, jnp.eye(n, dtype=kind))
    negative = logsumexp(jnp.where(own | ~counted[:, None], NEVER, s), (2, 3))  # [group, whole]
    each = jnp.where(counted, jnp.logaddexp(positive, negative[:, :, None]) - positive, 0)

    many = counted.sum(2)
    return each.sum(2) / jnp.maximum(many, 1), many > 0


def pool_grid(tokens: jax.Array, grid: tuple[int, int], side: int) -> jax.Array:
    """Means of patch tokens [B, rows * columns, D] over the windows of a side x side grid, row by row: [B, side², D].

    Raises ValueError where the windows do not divide the patches.
    """
    rows, columns = grid
    if rows % side or columns % side:
        raise ValueError(f"{rows} x {columns} patches do not pool to {side} x {side}: config.method.pool_grid must divide both")
    windows = tokens.reshape(len(tokens), side, rows // side, side, columns // side, -1)
    return windows.mean((2, 4)).reshape(len(tokens), side * side, -1)
