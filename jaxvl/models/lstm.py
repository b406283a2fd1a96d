"""LSTM text encoder of composed retrieval: words, one recurrent layer, pooling over time, a projection."""

from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvl.models import parts
from jaxvl.models.tower import Tower, check_sizes


class LstmOptions(NamedTuple):
    """The keys of the `text` section where its kind is "lstm"."""

    kind: Literal["lstm"] = "lstm"
    vocab_size: int = 0  # rows of the embedding table; at least the tokenizer's size
    pad_id: int = 0
    word_dim: int = 512
    width: int = 1024  # channels of the hidden state
    pool: Literal["max", "last"] = "max"  # element-wise over time, or the last word's state (TIRG)
    pool_padding: Literal["mask", "zero"] = "mask"  # what padding is to the maximum: nothing, or zeros (VAL)
    learned_start: bool = True  # hidden and cell state before the first word are parameters (VAL)
    dropout: float = 0.1  # of the pooled state; 1 - keep_prob of VAL
    head: int = 0  # width of a final projection of the pooled state; 0: none
    head_bias: bool = True
    dtype: parts.Dtype = "float32"


def resolve(options: LstmOptions, section: str = "text") -> LstmOptions:
    """The options, checked. Raises ValueError naming key, value and remedy."""
    check_sizes(options, section)
    for key in ("vocab_size", "word_dim", "width"):
        if getattr(options, key) < 1:
            raise ValueError(f"{section}.{key}={getattr(options, key)} must be at least 1")
    if not 0 <= options.dropout < 1:
        raise ValueError(f"{section}.dropout={options.dropout} is not in [0, 1)")
    for key, legal in (("pool", ("max", "last")), ("pool_padding", ("mask", "zero")), ("dtype", get_args(parts.Dtype))):
        if getattr(options, key) not in legal:
            raise ValueError(f"{section}.{key}={getattr(options, key)!r} is none of {', '.join(legal)}")
    return options


class Lstm(nn.Module):
    """tokens int [batch, token] -> Tower, its tokens the hidden states [batch, token, width] of every step."""

    options: LstmOptions

    @nn.compact
    def __call__(self, tokens, mask=None) -> Tower:
        """mask: bool [batch, token], True for words, which come first (default: tokens != pad_id)."""
        o = resolve(self.options)
        counted = (tokens != o.pad_id) if mask is None else mask.astype(bool)
        small = nn.initializers.uniform(2 * o.width**-0.5)
        centred = lambda *args: small(*args) - o.width**-0.5  # U(-1/sqrt(width), 1/sqrt(width)), PyTorch's start
        words = self.param("embed", nn.initializers.normal(1.0), (o.vocab_size, o.word_dim), jnp.float32)
        kernel_in = self.param("lstm_in", centred, (o.word_dim, 4 * o.width), jnp.float32)
        kernel = self.param("lstm_hidden", centred, (o.width, 4 * o.width), jnp.float32)
        bias = self.param("lstm_bias", centred, (4 * o.width,), jnp.float32)  # PyTorch has two, of which only the sum matters

        dtype = jnp.dtype(o.dtype) if words.dtype == jnp.float32 else words.dtype  # parameters in double precision are computed in it
        x = parts.look_up(words, tokens, dtype)
        # The inputs' part of all gates at once, outside the loop: gates in the order input, forget, cell, output.
        gates = x @ kernel_in.astype(dtype) + bias.astype(dtype)  # [batch, token, 4 width]
        state = jnp.promote_types(dtype, jnp.float32)  # the cell adds up over time, so it stays in full precision
        if o.learned_start:
            start = [self.param(name, nn.initializers.zeros, (o.width,), jnp.float32) for name in ("start_hidden", "start_cell")]
        else:
            start = [jnp.zeros((o.width,))] * 2
        hidden, cell = (jnp.broadcast_to(v.astype(state), (tokens.shape[0], o.width)) for v in start)

        def step(carry: tuple, gate: jax.Array) -> tuple[tuple, jax.Array]:
            hidden, cell = carry
            i, f, g, out = jnp.split((gate + hidden.astype(dtype) @ kernel.astype(dtype)).astype(state), 4, -1)
            cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
            hidden = nn.sigmoid(out) * jnp.tanh(cell)
            return (hidden, cell), hidden

        _, states = jax.lax.scan(step, (hidden, cell), gates.swapaxes(0, 1))
        states = states.swapaxes(0, 1)  # [batch, token, width]
        pooled = pool(o, states, counted)
        pooled = nn.Dropout(o.dropout)(pooled, deterministic=not self.has_rng("dropout"))
        if o.head:
            pooled = nn.Dense(o.head, use_bias=o.head_bias, dtype=dtype, name="head")(pooled)
        return Tower(pooled.astype(state), states)


def pool(o: LstmOptions, states: jax.Array, counted: jax.Array) -> jax.Array:
    """One state a text; states [batch, token, width], counted bool [batch, token] -> [batch, width], zero for an empty text."""
    some = counted.any(1)[:, None]
    if o.pool == "last":
        last = states.shape[1] - 1 - jnp.argmax(counted[:, ::-1], 1)
        return jnp.where(some, jnp.take_along_axis(states, last[:, None, None], 1)[:, 0], 0)
    if o.pool_padding == "zero":
        return jnp.max(jnp.where(counted[..., None], states, 0), 1)
    return jnp.where(some, jnp.max(jnp.where(counted[..., None], states, -jnp.inf), 1), 0)
