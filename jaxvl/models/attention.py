"""Scaled dot-product attention and rotary position embedding, as functions of arrays."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Kernel = Literal["auto", "xla", "cudnn"]


def attend(
    q: jax.Array,  # [batch, query, head, head_width]
    k: jax.Array,  # [batch, key, kv_head, head_width]; query head h reads kv head h // (heads // kv_heads)
    v: jax.Array,  # [batch, key, kv_head, head_width]
    *,
    mask: jax.Array | None = None,  # bool, broadcastable to [batch, head, query, key]; True takes part
    causal: bool = False,
    kernel: Kernel = "auto",
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q kᵀ / √head_width) v, softmax in float32; [batch, query, head, head_width].

    With more keys than queries, `causal` lets query i see the keys up to i + (keys - queries): the extra keys are a prefix.
    A query whose keys are all masked gets a finite value of no meaning. `dropout` acts on the attention weights.
    kernel: cuDNN's fused attention or XLA's; "auto" takes cuDNN's where it serves.
    """
    extra = k.shape[1] - q.shape[1]
    fused = not dropout and (kernel == "cudnn" or (kernel == "auto" and _cudnn_takes(q, mask)))
    if causal and (extra or not fused):
        allowed = (jnp.arange(q.shape[1])[:, None] + extra >= jnp.arange(k.shape[1]))[None, None]
        mask, causal = allowed if mask is None else mask & allowed, False
    if dropout:
        return _attend_with_dropout(q, k, v, mask, dropout, key)
    if fused and mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))  # it broadcasts batch and head only
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn" if fused else "xla")


def _cudnn_takes(q: jax.Array, mask: jax.Array | None) -> bool:
    """Whether the fused kernel serves: CUDA, bfloat16, its head widths. Masks would reach it as a bias of the size of the
    attention matrix, in even lengths and in the sharding of the queries only; it is not worth it for captions."""
    legal = q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and mask is None
    return legal and "cuda" in jax.devices()[0].client.platform_version.lower()


def _attend_with_dropout(q, k, v, mask, rate, key):
    """The same, written out, since no library kernel drops attention weights."""
    batch, queries, heads, width = q.shape
    q = q.reshape(batch, queries, k.shape[2], heads // k.shape[2], width)
    logits = jnp.einsum("bqhgd,bkhd->bhgqk", q, k, preferred_element_type=jnp.float32) * width**-0.5
    if mask is not None:
        logits = jnp.where(mask[:, :, None], logits, -1e30)
    weights = jax.nn.softmax(logits)
    weights = jnp.where(jax.random.bernoulli(key, 1 - rate, weights.shape), weights / (1 - rate), 0)
    return jnp.einsum("bhgqk,bkhd->bqhgd", weights.astype(v.dtype), v).reshape(batch, queries, heads, width)


class Rope(NamedTuple):
    """Rotary position embedding (Su et al. 2021); `factor` > 1 adds Llama 3's frequency scaling."""

    theta: float = 10_000.0
    factor: float = 1.0
    low: float = 1.0  # low_freq_factor
    high: float = 4.0  # high_freq_factor
    length: float = 8192  # original_max_position_embeddings


def rope_tables(rope: Rope, positions: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [..., width], of positions [...] for heads of `width` channels.

    Frequencies are theta^(-2i/width). Llama 3 divides those with wavelengths above length/low by `factor`, keeps
    those below length/high, and interpolates between.
    """
    frequency = np.float32(1) / np.float32(rope.theta) ** (np.arange(0, width, 2, dtype=np.float32) / width)
    if rope.factor != 1.0:
        turns = rope.length * frequency / (2 * np.pi)
        keep = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
        frequency = frequency * (keep + (1 - keep) / rope.factor)
    angle = positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the channel pairs (i, i + width/2) of x [batch, token, head, width] by the angles of `rope_tables`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)
