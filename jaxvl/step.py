"""The train step: one pure function of (state, batch)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxvl.accumulate import value_and_grad
from jaxvl.data.augment import AugmentOptions, preprocess, resize
from jaxvl.methods.method import Method
from jaxvl.optim import OptimOptions, Schedule, forget, frozen
from jaxvl.state import TrainState, advance

Metrics = dict[str, jax.Array]


def make_train_step(
    method: Method,
    tx: optax.GradientTransformation,
    augment: AugmentOptions,
    optim: OptimOptions,
    schedule: Schedule,
    *,
    image_size: int,
    accumulate: int = 1,
    grad_shardings: Any = None,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """A pure (state, batch) -> (state, metrics), to be jitted once with the state donated.

    batch: {"image": uint8 [B, S, S, 3], "tokens": int32 [B, L] or "label": int32 [B], ...}, or with data.resize="device" canvases [B, C, C, 3] as "image"
    and the crops in them as "frame" float32 [B, 6], resized here to `image_size`; with augment.views=2 "image_aug" (and "frame_aug")
    likewise; with data.triplets "image_reference"; with augment.hflip="unsided" bool "sided" [B]. metrics: scalars, those of `aux` among them.
    grad_shardings: the params' shardings; without the pin XLA may keep whole gradients on every device.
    A step whose loss or gradient norm is not finite changes nothing but `step`, `position` and the `skipped` count.
    """
    grad_fn = value_and_grad(method, accumulate)

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        key_pixels, key_model = jax.random.split(key)
        # The halves of a split are fold_in(key, 0) and fold_in(key, 1), so the second view takes the next.
        views = {"image": key_pixels, "image_aug": jax.random.fold_in(key, 2), "image_reference": jax.random.fold_in(key, 3)}

        def seen(image: str, key: jax.Array) -> jax.Array:
            frame = image.replace("image", "frame")
            pixels = resize(batch[image], batch[frame], image_size) if frame in batch else batch[image]
            return preprocess(pixels, key, augment, batch.get("sided"))

        seen_views = {image: seen(image, key) for image, key in views.items() if image in batch}
        batch = {k: v for k, v in batch.items() if k not in ("frame", "frame_aug", "frame_reference", "sided")} | seen_views

        if method.constrain is not None:
            state = state._replace(params=method.constrain(state.params))
        if method.refresh is not None:
            renewed = method.refresh(state.params, state.memory, state.step)
            state = state._replace(params=renewed.params, memory=renewed.memory, opt_state=forget(state.opt_state, renewed.forget))
        hold = frozen(optim, state.params)
        (loss, aux), grads = grad_fn(state.params, state.memory, batch, key_model)
        if grad_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, grad_shardings)
        # The gradient of a frozen leaf is used by nothing after this, so the compiler leaves its computation out.
        zero = lambda g, h: g if h is False else jnp.zeros_like(g) if h is True else jnp.where(h, jnp.zeros_like(g), g)
        grads = jax.tree.map(zero, grads, hold)

        norm = optax.global_norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda e, p: optax.incremental_update(p, e, 1 - optim.ema_decay), state.ema, params) if optim.ema_decay else ()
        memory = method.update(state.memory, params, aux)

        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        after = state._replace(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            memory=keep(memory, state.memory),
            position=advance(state.position, batch["image"].shape[0]),
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )
        scalars = {k: v for k, v in aux.items() if getattr(v, "ndim", None) == 0}
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": schedule(state.step), "skipped": after.skipped, **scalars}
        return after, metrics

    return train_step
