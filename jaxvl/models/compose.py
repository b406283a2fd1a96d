"""Image and modification text to one query: the composition layers of composed retrieval.

All take the image and the text in the joint space and return what is compared with target images. `valid` marks the rows that
have both, whose statistics batch normalisation takes; with a `dropout` key a pass is random.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvl.models.batch_norm import BatchNorm

Composer = Literal["gated_residual", "concat", "visiolinguistic_attention", "image_only", "text_only"]
DROPOUT = 0.1


class GatedResidual(nn.Module):
    """TIRG's composition: the image, gated by both, plus a change (Vo et al., CVPR 2019, equations 1 to 3).

        z = [v; s]    q = a_0 sigmoid(gate(z)) v + a_1 res(z)

    where gate and res are one and two linear maps behind BatchNorm and ReLU, 2E -> E, and a is learned from (1, 10) on.
    """

    use_bn: bool = True

    @nn.compact
    def __call__(self, v, s, valid=None, *, train: bool = False):
        """v, s: [batch, E] -> q [batch, E], not normalised."""
        width, z = v.shape[-1], jnp.concatenate([v, s], -1)
        enter = lambda name: nn.relu(BatchNorm(name=name)(z, valid, train=train) if self.use_bn else z)
        gate = nn.Dense(width, name="gate")(enter("gate_norm"))
        change = nn.Dense(width, name="res_out")(nn.relu(nn.Dense(2 * width, name="res_in")(enter("res_norm"))))
        a = self.param("a", lambda _: jnp.array([1.0, 10.0], jnp.float32))
        return a[0] * nn.sigmoid(gate) * v + a[1] * change


class Concat(nn.Module):
    """A two-layer map of [v; s]: BatchNorm, ReLU, linear 2E, BatchNorm, ReLU, dropout, linear E (the baseline of TIRG)."""

    use_bn: bool = True

    @nn.compact
    def __call__(self, v, s, valid=None, *, train: bool = False):
        """v, s: [batch, E] -> q [batch, E], not normalised."""
        width, x = v.shape[-1], jnp.concatenate([v, s], -1)
        norm = lambda name, x: BatchNorm(name=name)(x, valid, train=train) if self.use_bn else x
        x = nn.Dense(2 * width, name="in")(nn.relu(norm("in_norm", x)))
        x = nn.relu(norm("mid_norm", x))
        x = nn.Dropout(DROPOUT)(x, deterministic=not self.has_rng("dropout"))
        return nn.Dense(width, name="out")(x)


class VisiolinguisticAttention(nn.Module):
    """VAL's composition of one feature map (Chen, Gong and Bazzani, CVPR 2020, equations 2 to 6).

    A joint attention, channel gate times spatial gate, keeps parts of the image; a self-attention over the fused map adds a
    change. output = r * joint * image + w * self, with r and w learned from 1 and 0 on.
    """

    heads: int = 2

    @nn.compact
    def __call__(self, x, s):
        """x: map [batch, height, width, channel], s: text [batch, E] -> map like x."""
        batch, height, width, channels = x.shape
        if channels % self.heads:
            raise ValueError(f"the {channels} channels of a feature map do not divide into {self.heads} attention heads")
        tiled = jnp.broadcast_to(s[:, None, None].astype(x.dtype), (batch, height, width, s.shape[-1]))
        z = nn.Dense(channels, name="fuse")(jnp.concatenate([x, tiled], -1))

        channel = nn.Dense(channels, name="channel_gate")(z.mean((1, 2), keepdims=True))
        spatial = nn.Conv(1, (height, width), name="spatial_gate")(z.mean(-1, keepdims=True))
        joint = nn.sigmoid(channel) * nn.sigmoid(spatial)

        flat = z.reshape(batch, height * width, channels)
        split = lambda name: nn.Dense(channels, name=name)(flat).reshape(*flat.shape[:2], self.heads, -1)
        q, k, v = split("q"), split("k"), split("v")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -1).astype(x.dtype)
        weights = nn.Dropout(DROPOUT)(weights, deterministic=not self.has_rng("dropout"))
        change = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(flat.shape)
        change = nn.Dense(channels, name="out")(change).reshape(x.shape)

        r = self.param("r", nn.initializers.ones, (), jnp.float32).astype(x.dtype)
        w = self.param("w", nn.initializers.zeros, (), jnp.float32).astype(x.dtype)
        return r * joint * x + w * change
