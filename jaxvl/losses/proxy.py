r"""Proxy losses: embeddings against one learned vector a class, for class counts from one to many millions.

Rows x of a batch and proxies p are normalised here, \hat x = x / sqrt(|x|^2 + 1e-12), and meet as cosines s_ij. Proxies are split by
class over the devices of the context mesh (`losses/classes.py`) and met in blocks, whose cosines [batch, block] are formed again for
the gradient: nothing of size [batch, class] exists anywhere. Class counts that do not divide are padded and the padding is masked.

- Proxy-Anchor reduces over the batch for each class, so a device finishes its own classes, and one scalar crosses devices;
- the softmax family reduces over the classes for each row, which takes a maximum and sums of [batch] floats across devices.

With `keep` below 1 the classes of the batch and a uniform share of all classes stand for the rest. A kept class that is not in the
batch counts 1 / keep: Proxy-Anchor's second term is a plain sum over classes, so its value and gradient are right on average; a
log-sum-exp is not, so the softmax family is biased, the less the more classes are kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxvl.losses import classes as axis
from jaxvl.losses.classes import Split, dot, unit

BLOCK = 4096  # classes met at a time


class Kept(NamedTuple):
    """The rows a device meets: `at` int32 [row], where they are among those at home (None: all of them), `ids` int32 [row], their
    classes, -1 for a row that is to be ignored, and `weight` [row], how many classes each stands for as a negative."""

    at: jax.Array | None
    ids: jax.Array
    weight: jax.Array


class How(NamedTuple):
    """What the programs below are specialised on. classes: how many rows of the proxies are classes. kind: "anchor", or of the
    softmax family "nca", where the right class is left out of the denominator, or "softmax"."""

    kind: str
    classes: int
    block: int
    dtype: str
    keep: float
    smoothing: float = 0.0


def proxy_anchor(x: jax.Array, p: jax.Array, labels: jax.Array, *, alpha: float = 32.0, margin: float = 0.1, **how: Any) -> jax.Array:
    r"""Proxy-Anchor: Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020, https://arxiv.org/abs/2003.13911, equation 4.

    .. math::
      L = \frac{1}{|P^+|} \sum_{j \in P^+} \log\Big(1 + \sum_{i: y_i = j} e^{-\alpha (s_{ij} - \delta)}\Big)
        + \frac{1}{C} \sum_j \log\Big(1 + \sum_{i: y_i \ne j} e^{\alpha (s_{ij} + \delta)}\Big)

    with P+ the classes of the batch. One and two classes are legal.

    >>> x = jnp.eye(3)
    >>> print(f"{proxy_anchor(x, x, jnp.arange(3)):.4f}")
    3.9133

    Args:
      x: [batch, width], any float.
      p: [class, width]; `classes`, `block`, `dtype`, `keep`, `key` as in `loss_of`.
      labels: int32 [batch], below `classes`.

    Returns:
      float32 scalar (float64 where x and p are).
    """
    return _run("anchor", x, p, labels, jnp.array([alpha, margin]), **how)


def proxy_nca(x: jax.Array, p: jax.Array, labels: jax.Array, *, scale: float = 9.0, **how: Any) -> jax.Array:
    r"""Proxy-NCA: Movshovitz-Attias et al., No Fuss Distance Metric Learning using Proxies, ICCV 2017, https://arxiv.org/abs/1703.07464.

    :math:`L = \frac1B \sum_i t\, d_{i y_i} + \log \sum_{j \ne y_i} e^{-t d_{ij}}` with squared distances d of unit vectors. The right
    class is not in the sum, so the value can be negative. Raises ValueError for fewer than two classes.
    """
    return _run("nca", x, p, labels, jnp.array([2 * scale, scale]), **how)


def proxy_nca_pp(x: jax.Array, p: jax.Array, labels: jax.Array, *, scale: float = 9.0, smoothing: float = 0.0, **how: Any) -> jax.Array:
    r"""Proxy-NCA++: Teh, DeVries and Taylor, ProxyNCA++, ECCV 2020, https://arxiv.org/abs/2004.01113.

    :math:`L = -\frac1B \sum_i \log \mathrm{softmax}_j (-t d_{ij})_{y_i}`, the right class in the sum. `smoothing` s moves the target to
    1 - s on the right class and s / (C - 1) on each other one, which takes at least two classes (ValueError).
    """
    return _run("softmax", x, p, labels, jnp.array([2 * scale, scale]), smoothing=smoothing, **how)


def norm_softmax(x: jax.Array, p: jax.Array, labels: jax.Array, *, temperature: float = 0.05, **how: Any) -> jax.Array:
    r"""Normalised softmax: cross entropy of s_ij / T. Zhai and Wu, Classification is a Strong Baseline for Deep Metric Learning, BMVC
    2019, https://arxiv.org/abs/1811.12649."""
    return _run("softmax", x, p, labels, jnp.array([1 / temperature, 0.0]), **how)


def _run(kind: str, x: jax.Array, p: jax.Array, labels: jax.Array, scalars: jax.Array, *, classes: int | None = None, block: int = BLOCK,
         dtype: str = "float32", keep: float = 1.0, key: jax.Array | None = None, smoothing: float = 0.0) -> jax.Array:  # fmt: skip
    """classes: rows of `p` that are classes, the others being padding (default: all). block: classes met at a time. dtype: "float32", or
    "bfloat16" inputs of the products of x and p. keep: share of the classes that serve as negatives, chosen by `key`."""
    x, p = jnp.asarray(x), jnp.asarray(p)
    classes = len(p) if classes is None else classes
    if x.ndim != 2 or p.ndim != 2 or x.shape[1] != p.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"a proxy loss takes embeddings [batch, width], proxies [class, width] and labels [batch], not {x.shape}, {p.shape}, {labels.shape}"
        )
    least = 2 if kind == "nca" or smoothing else 1
    if not least <= classes <= len(p):
        why = "the right class has no other beside it" if least == 2 else "there must be one"
        raise ValueError(
            f"{classes} classes of {len(p)} proxies cannot be: {why}"
            if classes < least
            else f"{classes} classes need as many proxies, not {len(p)}"
        )
    if not 0 < keep <= 1 or (keep < 1 and key is None):
        raise ValueError(f"keep={keep} must be above 0 and at most 1, with a key where it is below 1")
    if keep < 1 and kind == "nca":
        raise ValueError(f"keep={keep} could leave proxy_nca without a class in its denominator: use 1, or proxy_nca_pp")
    how = How(kind, classes, block, dtype, keep, smoothing)
    seed = jax.random.key_data(key) if keep < 1 and key is not None else jnp.zeros(2, jnp.uint32)
    wide = jnp.promote_types(jnp.result_type(x, p), jnp.float32)
    return _loss(how, unit(x.astype(wide)), p, jnp.asarray(labels, jnp.int32), scalars.astype(wide), seed)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(how: How, x: jax.Array, p: jax.Array, labels: jax.Array, scalars: jax.Array, seed: jax.Array) -> jax.Array:
    """The loss of unit rows x [batch, width]; the gradient is that of x and p."""
    split = axis.of_mesh(len(p), len(x))
    device = (_anchor if how.kind == "anchor" else _softmax_value)(how, split, grad=False)
    return axis.on_devices(device, split, (x, p, labels, scalars, seed), "bcrrr", "r" if how.kind == "anchor" else "rr")[0]


def _loss_forward(how: How, x: jax.Array, p: jax.Array, labels: jax.Array, scalars: jax.Array, seed: jax.Array) -> tuple:
    split, args = axis.of_mesh(len(p), len(x)), (x, p, labels, scalars, seed)
    if how.kind == "anchor":
        loss, dx, dp = axis.on_devices(_anchor(how, split, grad=True), split, args, "bcrrr", "rbc")
        return loss, (dx, dp)
    loss, lse = axis.on_devices(_softmax_value(how, split, grad=True), split, args, "bcrrr", "rr")
    return loss, (*args, lse)


def _loss_backward(how: How, residuals: tuple, g: jax.Array) -> tuple:
    if how.kind == "anchor":
        dx, dp = residuals
    else:
        split = axis.of_mesh(len(residuals[1]), len(residuals[0]))
        dx, dp = axis.on_devices(_softmax_gradient(how, split), split, residuals, "bcrrrr", "bc")
    return g * dx, (g * dp).astype(dp.dtype), None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _kept(how: How, split: Split, rows: int, labels: jax.Array, seed: jax.Array, dtype: Any) -> Kept:
    """All rows at home, or those of the batch's classes, each once, and after them a uniform share of all, without those."""
    ids = axis.ids(split, rows, how.classes)
    if how.keep == 1:
        return Kept(None, ids, (ids >= 0).astype(dtype))
    first = axis.first(split, rows)
    local = labels - first
    ours = _first_of_each(labels) & (local >= 0) & (local < rows)
    number = min(rows, -int(-how.keep * rows // 1))
    key = jax.random.fold_in(jax.random.wrap_key_data(seed), first)
    _, drawn = lax.sort_key_val(jax.random.bits(key, (rows,)), jnp.arange(rows, dtype=jnp.int32))
    drawn = drawn[:number]
    present = jnp.zeros(rows, bool).at[jnp.where(ours, local, rows)].set(True, mode="drop")
    at = jnp.concatenate([jnp.clip(local, 0, rows - 1), drawn])
    kept = jnp.concatenate([ours, ~present[drawn] & (ids[drawn] >= 0)])
    weight = jnp.concatenate([jnp.ones(len(labels), dtype), jnp.full(number, rows / number, dtype)])
    return Kept(at, jnp.where(kept, ids[at], -1), jnp.where(kept, weight, 0.0))


def _first_of_each(labels: jax.Array) -> jax.Array:
    """bool [batch]: whether no earlier row has the label."""
    order = jnp.argsort(labels, stable=True)
    new = jnp.concatenate([jnp.ones(1, bool), labels[order][1:] != labels[order][:-1]])
    return jnp.zeros(len(labels), bool).at[order].set(new)


def _blocks(kept: Kept, p: jax.Array, block: int, carry: Any, f: Callable) -> Any:
    """`carry = f(carry, proxies, ids, weight, start)` for each block of the rows that are met; `start` for `_put`."""
    rows = len(kept.ids)

    def body(carry: Any, start: jax.Array, fresh: jax.Array) -> Any:
        cut = lambda a: lax.dynamic_slice_in_dim(a, start, len(fresh))
        proxies = cut(p) if kept.at is None else p[cut(kept.at)]
        return f(carry, proxies, jnp.where(fresh, cut(kept.ids), -1), jnp.where(fresh, cut(kept.weight), 0.0), start)

    return axis.over_pieces(body, rows, block, carry)


def _put(kept: Kept, dp: jax.Array, start: jax.Array, d: jax.Array) -> jax.Array:
    """`dp` with the gradient `d` of a block's rows added."""
    if kept.at is None:
        return lax.dynamic_update_slice_in_dim(dp, lax.dynamic_slice_in_dim(dp, start, len(d)) + d.astype(dp.dtype), start, 0)
    return dp.at[lax.dynamic_slice_in_dim(kept.at, start, len(d))].add(d.astype(dp.dtype))


def _log_1_plus_sum(z: jax.Array, mask: jax.Array) -> jax.Array:
    """log(1 + sum over rows of e^z where `mask`), [row, class] -> [class], without overflow; 0 where no row counts."""
    z = jnp.where(mask, z, -jnp.inf)
    m = lax.stop_gradient(jnp.maximum(z.max(0), 0))
    return m + jnp.log(jnp.exp(-m) + jnp.sum(jnp.exp(z - m), 0))


def _anchor(how: How, split: Split, *, grad: bool) -> Callable:
    """On a device: the loss, and with `grad` the gradients of its rows of the batch and its classes.

    A class needs the batch and nothing of other classes, and |P+| follows from the labels alone, so value and gradient take one
    journey over the classes and no block is formed twice.
    """

    def device(x: jax.Array, p: jax.Array, labels: jax.Array, scalars: jax.Array, seed: jax.Array) -> tuple:
        x, (alpha, margin) = axis.gather(split, x), scalars
        kept = _kept(how, split, len(p), labels, seed, x.dtype)
        present = jnp.sum(_first_of_each(labels)).astype(x.dtype)

        def of_block(x: jax.Array, p: jax.Array, ids: jax.Array, weight: jax.Array) -> jax.Array:
            s = dot(x, unit(p).T, how.dtype)
            positive = labels[:, None] == ids
            pull = _log_1_plus_sum(-alpha * (s - margin), positive)
            push = _log_1_plus_sum(alpha * (s + margin), ~positive)
            return jnp.sum(jnp.where(ids >= 0, pull, 0)) / present + jnp.sum(weight * jnp.where(ids >= 0, push, 0)) / how.classes

        def step(carry: tuple, p: jax.Array, ids: jax.Array, weight: jax.Array, start: jax.Array) -> tuple:
            if not grad:
                return (carry[0] + of_block(x, p, ids, weight),)
            loss, dx, dp = carry
            value, (dx_block, dp_block) = jax.value_and_grad(of_block, (0, 1))(x, p, ids, weight)
            return loss + value, dx + dx_block, _put(kept, dp, start, dp_block)

        zero = (jnp.zeros((), x.dtype), jnp.zeros_like(x), jnp.zeros_like(p))
        loss, *gradient = _blocks(kept, p, how.block, zero if grad else zero[:1], step)
        loss = axis.total(split, loss)
        return (loss, axis.scatter(split, gradient[0]), gradient[1]) if grad else (loss,)

    return device


def _logits(how: How, scalars: jax.Array, x: jax.Array, p: jax.Array) -> jax.Array:
    """-t d_ij without t |x_i|^2, which no softmax over j can tell from none: a s_ij - b |p_j|^2."""
    a, b = scalars
    p = unit(p)
    return a * dot(x, p.T, how.dtype) - b * jnp.sum(p * p, 1)


def _in_sum(how: How, labels: jax.Array, ids: jax.Array, weight: jax.Array) -> jax.Array:
    """How often a class counts in the denominator of a row, [batch, class]; 0 where it is ignored."""
    counts = jnp.broadcast_to(jnp.where(ids >= 0, weight, 0), (len(labels), len(ids)))
    return jnp.where(labels[:, None] == ids, 0, counts) if how.kind == "nca" else counts


def _softmax_value(how: How, split: Split, *, grad: bool) -> Callable:
    """On a device: the loss and the log-sum-exp of each row [batch], by a running maximum over blocks and then over devices."""
    del grad

    def device(x: jax.Array, p: jax.Array, labels: jax.Array, scalars: jax.Array, seed: jax.Array) -> tuple:
        x = axis.gather(split, x)
        kept = _kept(how, split, len(p), labels, seed, x.dtype)
        zero = jnp.zeros(len(x), x.dtype)

        def step(carry: tuple, p: jax.Array, ids: jax.Array, weight: jax.Array, start: jax.Array) -> tuple:
            del start
            most, some, right, every = carry
            logits, counts = _logits(how, scalars, x, p), _in_sum(how, labels, ids, weight)
            above = jnp.maximum(most, jnp.where(counts > 0, logits, -jnp.inf).max(1))
            safe = jnp.where(jnp.isfinite(above), above, 0)
            some = some * jnp.exp(most - safe) + jnp.sum(
                jnp.where(counts > 0, counts * jnp.exp(jnp.minimum(logits - safe[:, None], 0)), 0), 1
            )
            right = right + jnp.sum(jnp.where(labels[:, None] == ids, logits, 0), 1)
            return above, some, right, every + jnp.sum(logits * jnp.where(ids >= 0, weight, 0), 1)

        most, some, right, every = _blocks(kept, p, how.block, (zero - jnp.inf, zero, zero, zero), step)
        greatest = lax.pmax(most, split.axes) if split.axes else most
        some, right, every = axis.total(split, jnp.stack([some * jnp.exp(most - greatest), right, every]))
        lse = greatest + jnp.log(some)
        other = how.smoothing / max(how.classes - 1, 1)
        return jnp.mean(lse - (1 - how.smoothing - other) * right - other * every), lse

    return device


def _softmax_gradient(how: How, split: Split) -> Callable:
    """On a device: the gradients of its rows of the batch and its classes, the blocks formed a second time."""

    def device(x: jax.Array, p: jax.Array, labels: jax.Array, scalars: jax.Array, seed: jax.Array, lse: jax.Array) -> tuple:
        x = axis.gather(split, x)
        kept = _kept(how, split, len(p), labels, seed, x.dtype)
        other = how.smoothing / max(how.classes - 1, 1)

        def step(carry: tuple, p: jax.Array, ids: jax.Array, weight: jax.Array, start: jax.Array) -> tuple:
            dx, dp = carry
            logits, pull = jax.vjp(partial(_logits, how, scalars), x, p)
            counts = _in_sum(how, labels, ids, weight)
            share = jnp.where(counts > 0, counts * jnp.exp(jnp.minimum(logits - lse[:, None], 0)), 0)
            target = jnp.where(labels[:, None] == ids, 1 - how.smoothing - other, 0) + other * jnp.where(ids >= 0, weight, 0)
            dx_block, dp_block = pull((share - target) / len(x))
            return dx + dx_block, _put(kept, dp, start, dp_block)

        dx, dp = _blocks(kept, p, how.block, (jnp.zeros_like(x), jnp.zeros_like(p)), step)
        return axis.scatter(split, dx), dp

    return device


LOSSES: dict[str, Callable[..., jax.Array]] = {
    "proxy_anchor": proxy_anchor,
    "proxy_nca": proxy_nca,
    "proxy_nca_pp": proxy_nca_pp,
    "proxy_nca_smoothed": partial(proxy_nca_pp, smoothing=0.1),
    "norm_softmax": norm_softmax,
}
