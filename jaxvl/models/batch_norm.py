"""Batch normalisation whose statistics are those of the global batch, on any number of devices and with rows left out."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

# frozen: statistics and affine map stand still among the parameters, so that a row depends on itself alone.
# batch: those of the batch in training, running averages otherwise, which a method keeps in its memory.
Statistics = Literal["frozen", "batch"]


class BatchNorm(nn.Module):
    """x [batch, ..., channel] normalised per channel (Ioffe and Szegedy 2015), computed in at least float32.

    Running averages are variables of the collection "batch_stats": running = momentum * running + (1 - momentum) * batch, the
    variance in its unbiased form there and in its biased one for the normalisation, as in PyTorch.
    """

    eps: float = 1e-5
    momentum: float = 0.9
    statistics: Statistics = "batch"

    @nn.compact
    def __call__(self, x, valid=None, *, train: bool = False):
        """valid: bool [batch], the rows whose statistics are taken; where there are none the running ones serve and stay."""
        channels, dtype = (x.shape[-1],), x.dtype
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        if self.statistics == "frozen":
            mean = self.param("mean", nn.initializers.zeros, channels, jnp.float32)
            var = self.param("var", nn.initializers.ones, channels, jnp.float32)
            scale, bias, mean, var = map(lax.stop_gradient, (scale, bias, mean, var))
        else:
            running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
            running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
            mean, var = running_mean.value, running_var.value
            if train and not self.is_initializing():
                weight = jnp.ones(x.shape[0], x.dtype) if valid is None else valid.astype(x.dtype)
                weight = jnp.broadcast_to(weight.reshape(-1, *(1,) * (x.ndim - 1)), (*x.shape[:-1], 1))
                axes = tuple(range(x.ndim - 1))
                n = jnp.sum(weight)
                batch_mean = jnp.sum(x * weight, axes) / jnp.maximum(n, 1)
                batch_var = jnp.sum((x - batch_mean) ** 2 * weight, axes) / jnp.maximum(n, 1)
                step = lambda old, new: jnp.where(n > 0, self.momentum * old + (1 - self.momentum) * lax.stop_gradient(new), old)
                running_mean.value = step(mean, batch_mean)
                running_var.value = step(var, batch_var * n / jnp.maximum(n - 1, 1))
                mean, var = jnp.where(n > 0, batch_mean, mean), jnp.where(n > 0, batch_var, var)
        return ((x - mean) * lax.rsqrt(var + self.eps) * scale + bias).astype(dtype)
