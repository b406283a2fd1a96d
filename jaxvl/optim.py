"""Optimisers, schedules, parameter groups and clipping, all on optax."""

import re
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvl.mesh import path_str
from jaxvl.patterns import check_pattern

Schedule = Callable[[jax.Array], jax.Array]
# What a tower computes before its first layer; everything else outside `blocks` comes after its last.
BEFORE = ("patch", "pos", "cls", "distill", "registers", "mask_token", "pre_norm", "embed", "types", "embed_norm")


class OptimOptions(NamedTuple):
    """How parameters move.

    learning_rate: peak, reached after `warmup_steps` of linear warm-up. schedule: what follows until the last step;
    `end_factor` is the final fraction of the peak (cosine, linear, epochs). `rsqrt` decays as sqrt(timescale / step) and cools down
    linearly over the last `cooldown_steps`. `step` multiplies the rate by `step_factor` every `step_every` steps. `epochs` is the schedule of
    ALBEF and TCL, see `by_epoch`: the steps are cut in `epochs` equal epochs, the warm-up starts at `warmup_from` of the peak and rises
    every `warmup_every` steps, and where it does not fit in the first epoch it is cut off there as in their code, or with
    `warmup_across_epochs` finished.
    weight_decay: decoupled, on leaves whose path matches `decay`. groups: (pattern, learning-rate factor) pairs, first match wins;
    factor 0 freezes the leaves and keeps no optimiser state for them. unlock: (pattern, n) pairs; of a tower whose leaves match,
    only the top n layers and what follows them train. layer_decay: (pattern, decay) pairs; the rate of a tower's layer is
    multiplied by decay once for every layer from there to the top, and that of its embeddings once more (Clark et al. 2020,
    Bao et al. 2021). A locked tower (Zhai et al. 2022, LiT) is the group ("^image/", 0.0). hold: (pattern, n) pairs, first match wins;
    leaves that match stand still, without decay, for the first n steps, and their optimiser begins to count at step n. lazy: patterns of
    tables [row, ...] of which a step moves only the rows whose gradient is not zero; see `lazily`. clip_norm: global gradient norm,
    clip_value: of each number of the gradient, before the norm; 0 = off.
    ema_decay: exponential moving average of the parameters, 0 = off. moment_dtype: storage of the first moment.
    """

    name: Literal["adamw", "lion"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "rsqrt", "constant", "step", "epochs"] = "cosine"
    warmup_steps: int = 0
    epochs: int = 0
    warmup_from: float = 0.0
    warmup_every: int = 1
    warmup_across_epochs: bool = False
    end_factor: float = 0.0
    timescale: int = 10_000
    cooldown_steps: int = 0
    step_every: int = 0
    step_factor: float = 0.5
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.1
    decay: str = r"(kernel|embed)$"
    groups: tuple[tuple[str, float], ...] = ()
    unlock: tuple[tuple[str, int], ...] = ()
    layer_decay: tuple[tuple[str, float], ...] = ()
    hold: tuple[tuple[str, int], ...] = ()
    lazy: tuple[str, ...] = ()
    clip_norm: float = 1.0
    clip_value: float = 0.0
    ema_decay: float = 0.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"


def check(options: OptimOptions, steps: int) -> None:
    """Raises ValueError naming the key, its value and what would be right."""
    for key, low, high in (("learning_rate", 0, None), ("warmup_steps", 0, steps - 1), ("cooldown_steps", 0, steps), ("end_factor", 0, 1), ("timescale", 1, None),
                           ("warmup_from", 0, 1), ("warmup_every", 1, None), ("epochs", 0, steps),
                           ("b1", 0, 1), ("b2", 0, 1), ("weight_decay", 0, None), ("clip_norm", 0, None), ("clip_value", 0, None),
                           ("step_every", int(options.schedule == "step"), None), ("step_factor", 0, 1), ("ema_decay", 0, 1)):  # fmt: skip
        value = getattr(options, key)
        if value < low or (high is not None and value > high):
            raise ValueError(
                f"config.optim.{key} is {value}; it must be at least {low}" + (f" and at most {high}" if high is not None else "")
            )
    if (options.schedule == "epochs") != (options.epochs > 0):
        raise ValueError(
            f"config.optim.epochs is {options.epochs} and config.optim.schedule {options.schedule!r}; the schedule 'epochs' needs their number, and no other reads it"
        )
    for pattern, decay in options.layer_decay:
        if not 0 < decay <= 1:
            raise ValueError(f"config.optim.layer_decay of {pattern!r} is {decay}; it must be above 0 and at most 1")
    for pattern, held in options.hold:
        if held < 0:
            raise ValueError(f"config.optim.hold of {pattern!r} is {held}; it must be a number of steps, at least 0")
    for pattern in (options.decay, *options.lazy, *(p for p, _ in (*options.groups, *options.unlock, *options.layer_decay, *options.hold))):
        check_pattern("optim", pattern)


def learning_rate(options: OptimOptions, steps: int) -> Schedule:
    """Step number int32 [] -> learning rate float32 []."""
    peak, warmup = options.learning_rate, options.warmup_steps
    after = max(steps - warmup, 1)
    if options.schedule == "cosine":
        decay: Schedule = optax.cosine_decay_schedule(peak, after, options.end_factor)
    elif options.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * options.end_factor, after)
    elif options.schedule == "step":
        decay = lambda step: peak * options.step_factor ** (step // options.step_every)
    elif options.schedule == "epochs":
        return by_epoch(options, steps)
    elif options.schedule == "constant":
        decay = optax.constant_schedule(peak)
    else:
        decay = lambda step: peak * jnp.sqrt(options.timescale / jnp.maximum(step + options.timescale, options.timescale))
    joined = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay
    if options.schedule != "rsqrt" or not options.cooldown_steps:
        return joined
    return lambda step: joined(step) * jnp.clip((steps - step) / options.cooldown_steps, 0.0, 1.0)


def by_epoch(options: OptimOptions, steps: int) -> Schedule:
    r"""The published schedule of ALBEF and TCL, constant within an epoch but for the warm-up, which belongs to the first.

    With peak p and end q = p · end_factor, epoch e ≥ 1 of E has the rate :math:`q + \tfrac12 (p - q)(1 + \cos(\pi e / E))`. Their code sets the
    rate after a step, so that level n of the warm-up begins one step after n · warmup_every.
    """
    peak, end = options.learning_rate, options.learning_rate * options.end_factor
    warmup, every, length = options.warmup_steps, options.warmup_every, max(steps // options.epochs, 1)
    if warmup > length and not options.warmup_across_epochs:
        warnings.warn(f"config.optim.warmup_steps is {warmup}, but an epoch has {length} steps and the warm-up ends with the first: the peak is never reached. "
                      f"Set config.optim.warmup_across_epochs to finish it", stacklevel=2)  # fmt: skip

    def schedule(step: jax.Array) -> jax.Array:
        epoch = jnp.minimum(step // length, options.epochs - 1)
        decayed = jnp.where(epoch > 0, end + 0.5 * (peak - end) * (1 + jnp.cos(jnp.pi * epoch / options.epochs)), peak)
        level = jnp.clip((step - 1) // every, 0, warmup // every)
        risen = peak * (options.warmup_from + (1 - options.warmup_from) * level / max(warmup // every, 1))
        rising = (step <= warmup) & ((epoch == 0) | options.warmup_across_epochs)
        return jnp.where(rising, risen, decayed) if warmup else decayed

    return schedule


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


def make_optimizer(options: OptimOptions, params: Any, steps: int, renewed: str = "") -> optax.GradientTransformation:
    """The transformation for `params` (arrays or shapes): clip, direction, decoupled decay, schedule, group factors.

    renewed: pattern of the leaves whose moments, and the count that corrects their bias, `forget` can empty apart from the others'.
    Raises ValueError for values that cannot be (see `check`).
    """
    check(options, steps)
    by_group = factors(options, params)
    moment = jnp.dtype(options.moment_dtype) if options.moment_dtype != "float32" else None  # None: as the parameters, which are float32
    direction = {
        "adamw": lambda: optax.scale_by_adam(options.b1, options.b2, options.eps, mu_dtype=moment),
        "lion": lambda: optax.scale_by_lion(options.b1, options.b2, mu_dtype=moment),
    }[options.name]()
    direction = _renewable(direction, renewed) if renewed else direction
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: re.search(options.decay, path_str(path)) is not None, params)
    scale = optax.GradientTransformation(
        lambda _: optax.EmptyState(), lambda updates, state, _=None: (jax.tree.map(lambda u, f: u * f, updates, by_group), state)
    )
    rate = learning_rate(options, steps)
    moving_from = lambda start: optax.chain(
        direction,
        optax.add_decayed_weights(options.weight_decay, mask=decayed) if options.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(lambda step: rate(step + start)),
    )
    moving = _held(moving_from, _matching(params, "hold", options.hold, 0)) if options.hold else moving_from(0)
    moving = _without_still(moving, jax.tree.map(lambda f: int(np.sum(f == 0)) if np.ndim(f) else bool(f == 0), by_group))
    if options.lazy:
        moving = lazily(moving, _matching(params, "lazy", [(pattern, True) for pattern in options.lazy], False))
    clips = [clip(bound) for clip, bound in ((optax.clip, options.clip_value), (optax.clip_by_global_norm, options.clip_norm)) if bound]
    return optax.chain(*clips, moving, scale)


def _matching(params: Any, key: str, pairs: Any, otherwise: Any) -> Any:
    """The value of the first pattern that a leaf's path matches. Raises ValueError for a pattern that matches nothing."""
    names = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern, _ in pairs:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"config.optim.{key}: {pattern!r} matches no parameter; paths look like {', '.join(names[:3])}")
    find = lambda path, _: next((value for pattern, value in pairs if re.search(pattern, path_str(path))), otherwise)
    return jax.tree_util.tree_map_with_path(find, params)


class _HeldState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # under this name state.py finds it
    inner: dict[int, Any]  # by first step


def _held(make: Callable[[int], optax.GradientTransformation], starts: Any) -> optax.GradientTransformation:
    """`make(n)` for the leaves whose first step is n, asleep until then: no update, and a state that has seen nothing.

    The gradient of a sleeping leaf is dropped here, after the clipping; where a global norm is clipped it has counted in it.
    """
    transforms = {n: make(n) for n in sorted(set(jax.tree.leaves(starts)))}
    only = lambda n, tree: jax.tree.map(lambda start, x: x if start == n else optax.MaskedNode(), starts, tree)

    def init(params: Any) -> _HeldState:
        return _HeldState(jnp.zeros((), jnp.int32), {n: tx.init(only(n, params)) for n, tx in transforms.items()})

    def update(updates: Any, state: _HeldState, params: Any) -> tuple[Any, _HeldState]:
        out, inner = updates, {}
        for n, tx in transforms.items():
            moved, after = tx.update(only(n, updates), state.inner[n], only(n, params))
            awake = state.count >= n
            inner[n] = jax.tree.map(lambda new, old, awake=awake: jnp.where(awake, new, old), after, state.inner[n]) if n else after
            # A leaf that never moves is not there at all (`_without_still`).
            mine = lambda start, new, n=n: start == n and not isinstance(new, optax.MaskedNode)
            pick = lambda start, old, new, n=n, awake=awake, mine=mine: (
                (jnp.where(awake, new, 0) if n else new) if mine(start, new) else old
            )
            out = jax.tree.map(pick, starts, out, moved)
        return out, _HeldState(state.count + 1, inner)

    return optax.GradientTransformation(init, update)


def lazily(tx: optax.GradientTransformation, tables: Any) -> optax.GradientTransformation:
    """`tx` that leaves rows without a gradient as they are in every table (leaf of `tables` True), values and moments both.

    This departs from AdamW in three ways: the moments of a row that a step does not touch do not decay, so the row does not go on moving
    by them; its weights do not decay in that step; and the bias correction counts the run's steps, not the row's own. What it costs is
    one pass over table and moments, as the dense update does; what it saves is drift of rows that sampling has not drawn.
    """
    named = {path_str(path) for path, table in jax.tree_util.tree_leaves_with_path(tables) if table}

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        touched = {}
        for path, g in jax.tree_util.tree_leaves_with_path(updates):
            if path_str(path) in named:
                touched[path_str(path)] = jnp.any(g != 0, axis=tuple(range(1, g.ndim)), keepdims=True)
        moved, after = tx.update(updates, state, params)

        def only_touched(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
            name = path_str(path)
            table = next((t for t in named if name == t or name.endswith("/" + t)), None)
            return new if table is None or new.ndim != touched[table].ndim else jnp.where(touched[table], new, old)

        moved = jax.tree_util.tree_map_with_path(lambda path, u: only_touched(path, u, jnp.zeros_like(u)), moved)
        return moved, jax.tree_util.tree_map_with_path(only_touched, after, state)

    return optax.GradientTransformation(tx.init, update)


def check_constant(options: OptimOptions, params: Any, pattern: str) -> None:
    """Raises ValueError where a parameter that the method takes as a constant (`Method.constant`) would be moved, by decay for one."""
    for path, still in jax.tree_util.tree_leaves_with_path(frozen(options, params)) if pattern else ():
        if re.search(pattern, path_str(path)) and still is not True:
            raise ValueError(
                f"config.optim trains {path_str(path)}, which config.method takes as a constant; freeze it with the group ({pattern!r}, 0.0)"
            )


class _RenewableState(NamedTuple):
    rest: Any
    renewed: Any


def _renewable(tx: optax.GradientTransformation, pattern: str) -> optax.GradientTransformation:
    """`tx` with a state of its own, its count included, for the leaves that match."""

    def only(tree: Any, mine: bool) -> Any:
        pick = lambda path, x: x if (re.search(pattern, path_str(path)) is not None) == mine else optax.MaskedNode()
        return jax.tree_util.tree_map_with_path(pick, tree)

    def init(params: Any) -> _RenewableState:
        return _RenewableState(tx.init(only(params, False)), tx.init(only(params, True)))

    def update(updates: Any, state: _RenewableState, params: Any) -> tuple[Any, _RenewableState]:
        rest, after = tx.update(only(updates, False), state.rest, only(params, False))
        mine, after_mine = tx.update(only(updates, True), state.renewed, only(params, True))
        moved = jax.tree.map(lambda _, a, b: b if isinstance(a, optax.MaskedNode) else a, updates, rest, mine)
        return moved, _RenewableState(after, after_mine)

    return optax.GradientTransformation(init, update)


def forget(state: Any, when: jax.Array) -> Any:
    """An optimiser state that has seen nothing yet of its `renewed` leaves where `when`.

    With the moments alone emptied, Adam would take the old count for theirs and not correct their bias: with the usual decay rates
    its next steps would be up to four times too long.
    """
    renewable = lambda x: isinstance(x, _RenewableState)
    empty = lambda x: jnp.where(when, jnp.zeros_like(x), x)
    return jax.tree.map(lambda x: x._replace(renewed=jax.tree.map(empty, x.renewed)) if renewable(x) else x, state, is_leaf=renewable)


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
