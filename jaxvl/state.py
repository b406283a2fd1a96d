"""The train state: everything a run is, in one frozen pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


class TrainState(NamedTuple):
    """One pytree, donated to the step, saved and restored as one unit.

    step: int32 [], optimiser steps done. params: float32, trained. ema: like params, or () where it is off.
    opt_state: optax. memory: what a method keeps beside params (teachers, queues, hierarchies).
    key: uint32 key data; the key of a step is fold_in(key, step), so it never changes.
    position: uint32 [2], high and low word of the global sample count consumed (int64 needs x64 mode, which jaxvl leaves off).
    skipped: int32 [], steps whose update was dropped because the loss or a gradient was not finite.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    memory: Any
    key: jax.Array
    position: jax.Array
    skipped: jax.Array


STATE_RULES = ((r"^(step|key|position|skipped)$", P()), (r"(^|/)count$", P()))


def create(params: Any, memory: Any, opt_state: Any, key: jax.Array, *, ema: bool) -> TrainState:
    """A state at step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if ema else (),
        opt_state=opt_state,
        memory=memory,
        key=jax.random.key_data(key),
        position=jnp.zeros(2, jnp.uint32),
        skipped=jnp.zeros((), jnp.int32),
    )


def advance(position: jax.Array, samples: int) -> jax.Array:
    """`position` plus `samples` (< 2^32), with the carry into the high word."""
    low = position[1] + jnp.uint32(samples)
    return jnp.stack([position[0] + (low < position[1]).astype(jnp.uint32), low])


def samples_seen(position: Any) -> int:
    """The global sample count as a Python int (host side)."""
    return (int(position[0]) << 32) | int(position[1])
