"""Optimisers, schedules, parameter groups and clipping, all on optax."""
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxvl.mesh import path_str

Schedule = Callable[[jax.Array], jax.Array]


class OptimOptions(NamedTuple):
    """How parameters move.

    learning_rate: peak, reached after `warmup_steps` of linear warm-up. schedule: what follows until the last step;
    `end_factor` is the final fraction of the peak (cosine, linear). `rsqrt` decays as sqrt(timescale / step) and cools down
    linearly over the last `cooldown_steps`.
    weight_decay: decoupled, on leaves whose path matches `decay`. groups: (pattern, learning-rate factor) pairs, first match wins;
    factor 0 freezes the leaves and keeps no optimiser state for them. clip_norm: global gradient norm, 0 = off.
    ema_decay: exponential moving average of the parameters, 0 = off. moment_dtype: storage of the first moment.
    """

    name: Literal["adamw", "lion"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup_steps: int = 0
    end_factor: float = 0.0
    timescale: int = 10_000
    cooldown_steps: int = 0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.1
    decay: str = r"(kernel|embedding)$"
    groups: tuple[tuple[str, float], ...] = ()
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"


def check(options: OptimOptions, steps: int) -> None:
    """Raises ValueError naming the key, its value and what would be right."""
    for key, low, high in (("learning_rate", 0, None), ("warmup_steps", 0, steps - 1), ("cooldown_steps", 0, steps), ("end_factor", 0, 1), ("timescale", 1, None),
                           ("b1", 0, 1), ("b2", 0, 1), ("weight_decay", 0, None), ("clip_norm", 0, None), ("ema_decay", 0, 1)):  # fmt: skip
        value = getattr(options, key)
        if value < low or (high is not None and value > high):
            raise ValueError(f"config.optim.{key} is {value}; it must be at least {low}" + (f" and at most {high}" if high is not None else ""))
    for pattern in (options.decay, *(p for p, _ in options.groups)):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"config.optim: {pattern!r} is not a regular expression: {error}") from None


def learning_rate(options: OptimOptions, steps: int) -> Schedule:
    """Step number int32 [] -> learning rate float32 []."""
    peak, warmup = options.learning_rate, options.warmup_steps
    after = max(steps - warmup, 1)
    if options.schedule == "cosine":
        decay: Schedule = optax.cosine_decay_schedule(peak, after, options.end_factor)
    elif options.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * options.end_factor, after)
    elif options.schedule == "constant":
        decay = optax.constant_schedule(peak)
    else:
        decay = lambda step: peak * jnp.sqrt(options.timescale / jnp.maximum(step + options.timescale, options.timescale))
    joined = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay
    if options.schedule != "rsqrt" or not options.cooldown_steps:
        return joined
    return lambda step: joined(step) * jnp.clip((steps - step) / options.cooldown_steps, 0.0, 1.0)


def factors(options: OptimOptions, params: Any) -> Any:
    """Learning-rate factor of every leaf. Raises ValueError for a group that matches no leaf: it is a typing error."""
    paths = [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern, _ in options.groups:
        if not any(re.search(pattern, p) for p in paths):
            raise ValueError(f"config.optim.groups: {pattern!r} matches no parameter; paths look like {', '.join(paths[:3])}")
    first = lambda name: next((f for pattern, f in options.groups if re.search(pattern, name)), 1.0)
    return jax.tree_util.tree_map_with_path(lambda path, _: first(path_str(path)), params)


def make_optimizer(options: OptimOptions, params: Any, steps: int) -> optax.GradientTransformation:
    """The transformation for `params` (arrays or shapes): clip, direction, decoupled decay, schedule, group factors.

    Raises ValueError for values that cannot be (see `check`).
    """
    check(options, steps)
    by_group = factors(options, params)
    moment = jnp.dtype(options.moment_dtype)
    direction = {
        "adamw": lambda: optax.scale_by_adam(options.b1, options.b2, options.eps, mu_dtype=moment),
        "lion": lambda: optax.scale_by_lion(options.b1, options.b2, mu_dtype=moment),
    }[options.name]()
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: re.search(options.decay, path_str(path)) is not None, params)
    scale = optax.GradientTransformation(
        lambda _: optax.EmptyState(), lambda updates, state, _=None: (jax.tree.map(lambda u, f: u * f, updates, by_group), state)
    )
    moving = optax.chain(
        direction,
        optax.add_decayed_weights(options.weight_decay, mask=decayed) if options.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(options, steps)),
    )
    labels = jax.tree.map(lambda f: "frozen" if f == 0 else "moving", by_group)
    if "frozen" in jax.tree.leaves(labels):
        moving = optax.partition({"moving": moving, "frozen": optax.set_to_zero()}, labels)
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    return optax.chain(clip, moving, scale)


def frozen(options: OptimOptions, params: Any) -> Any:
    """True for every leaf that a group with factor 0 freezes."""
    return jax.tree.map(lambda f: f == 0, factors(options, params))
