"""Optimisers, schedules, parameter groups and clipping, all on optax."""
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvl.mesh import path_str

Schedule = Callable[[jax.Array], jax.Array]
# What a tower computes before its first layer; everything else outside `blocks` comes after its last.
BEFORE = ("patch", "pos", "cls", "distill", "registers", "mask_token", "pre_norm", "embed", "types", "embed_norm")


class OptimOptions(NamedTuple):
    """How parameters move.

    learning_rate: peak, reached after `warmup_steps` of linear warm-up. schedule: what follows until the last step;
    `end_factor` is the final fraction of the peak (cosine, linear). `rsqrt` decays as sqrt(timescale / step) and cools down
    linearly over the last `cooldown_steps`.
    weight_decay: decoupled, on leaves whose path matches `decay`. groups: (pattern, learning-rate factor) pairs, first match wins;
    factor 0 freezes the leaves and keeps no optimiser state for them. unlock: (pattern, n) pairs; of a tower whose leaves match,
    only the top n layers and what follows them train. layer_decay: (pattern, decay) pairs; the rate of a tower's layer is
    multiplied by decay once for every layer from there to the top, and that of its embeddings once more (Clark et al. 2020,
    Bao et al. 2021). A locked tower (Zhai et al. 2022, LiT) is the group ("^image/", 0.0). clip_norm: global gradient norm, 0 = off.
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
    decay: str = r"(kernel|embed)$"
    groups: tuple[tuple[str, float], ...] = ()
    unlock: tuple[tuple[str, int], ...] = ()
    layer_decay: tuple[tuple[str, float], ...] = ()
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
    for pattern, decay in options.layer_decay:
        if not 0 < decay <= 1:
            raise ValueError(f"config.optim.layer_decay of {pattern!r} is {decay}; it must be above 0 and at most 1")
    for pattern in (options.decay, *(p for p, _ in (*options.groups, *options.unlock, *options.layer_decay))):
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
    """Learning-rate factor of every leaf: a float, or float32 [layer, 1, ...] where the layers of a leaf differ.

    Raises ValueError for a pattern that matches nothing (it is a typing error) and for more layers unlocked than there are.
    """
    shapes = {path_str(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    towers = {name.rpartition("blocks/")[0]: shape[0] for name, shape in shapes.items() if "blocks/" in name}
    for key in ("groups", "unlock", "layer_decay"):
        for pattern, value in getattr(options, key):
            found = [name for name in shapes if re.search(pattern, name)]
            if not found:
                raise ValueError(f"config.optim.{key}: {pattern!r} matches no parameter; paths look like {', '.join(list(shapes)[:3])}")
            depths = {depth for tower, depth in towers.items() if any(name.startswith(tower) for name in found)}
            if key == "unlock" and not 0 <= value <= min(depths, default=-1):
                raise ValueError(f"config.optim.unlock of {pattern!r} is {value}; the tower has {min(depths, default='no')} layers")
    first = lambda pairs, name, otherwise: next((value for pattern, value in pairs if re.search(pattern, name)), otherwise)

    def one(path: Any, leaf: Any) -> Any:
        name = path_str(path)
        factor = first(options.groups, name, 1.0)
        below = _layers_to_the_top(name, leaf.shape, towers)
        factor = factor * np.float32(first(options.layer_decay, name, 1.0)) ** below * (below <= first(options.unlock, name, np.inf))
        if np.all(factor == np.ravel(factor)[0]):
            return float(np.ravel(factor)[0])
        return factor.astype(np.float32).reshape(-1, *(1,) * (len(leaf.shape) - 1))

    return jax.tree_util.tree_map_with_path(one, params)


def _layers_to_the_top(name: str, shape: tuple[int, ...], towers: dict[str, int]) -> np.ndarray:
    """0 for what follows a tower's layers, n, ..., 1 for its n layers [layer], n + 1 for what comes before them."""
    tower = max((t for t in towers if name.startswith(t)), key=len, default=None)
    if tower is None:
        return np.zeros(())
    if name.startswith(tower + "blocks/"):
        return np.arange(shape[0], 0, -1)
    return np.full((), towers[tower] + 1 if name.removeprefix(tower).split("/")[0] in BEFORE else 0)


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
    moving = _without_still(moving, jax.tree.map(lambda f: int(np.sum(f == 0)) if np.ndim(f) else bool(f == 0), by_group))
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    return optax.chain(clip, moving, scale)


def _without_still(tx: optax.GradientTransformation, still: Any) -> optax.GradientTransformation:
    """`tx` of what moves alone, so that the rest has no state: True for a leaf that stands still, n for its n lowest layers."""
    if not any(jax.tree.leaves(still)):
        return tx

    def cut(tree: Any) -> Any:
        return jax.tree.map(lambda n, x: optax.MaskedNode() if n is True else x[n:] if n else x, still, tree)

    def whole(n: Any, update: jax.Array, moved: Any) -> jax.Array:
        return jnp.zeros_like(update) if n is True else jnp.concatenate([jnp.zeros_like(update[:n]), moved]) if n else moved

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        moved, state = tx.update(cut(updates), state, cut(params))
        return jax.tree.map(whole, still, updates, moved), state

    return optax.GradientTransformation(lambda params: tx.init(cut(params)), update)


def frozen(options: OptimOptions, params: Any) -> Any:
    """Whether a leaf stands still: True, False, or bool [layer, 1, ...] where some of its layers do."""
    return jax.tree.map(lambda f: f == 0, factors(options, params))
