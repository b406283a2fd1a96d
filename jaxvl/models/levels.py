"""Composition of feature maps at three levels: visiolinguistic attention on each, and each level's way into the joint space."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvl.models import vit
from jaxvl.models.compose import VisiolinguisticAttention
from jaxvl.models.vit import VitOptions

LEVELS = 3


def count(composer: str, image: Any) -> int:
    """Levels at which images are embedded with this composer. Raises ValueError where the image tower has no such maps."""
    if composer != "visiolinguistic_attention":
        return 1
    if isinstance(image, VitOptions) and vit.resolve(image).depth < LEVELS:
        raise ValueError(f"config.method.composer is {composer!r}, which reads {LEVELS} layers, but the image tower has {image.depth}")
    return LEVELS


class Levels(NamedTuple):
    """`levels` compositions with params {"compose": {"level0": ...}, "joint": {"level0": ...}}."""

    width: int
    levels: int

    def init(self, key: jax.Array, maps: Sequence[jax.ShapeDtypeStruct]) -> dict[str, dict]:
        """Variables of both parts for maps of these shapes."""
        keys = jax.random.split(key, 2 * self.levels)
        text = jnp.zeros((1, self.width), jnp.float32)
        compose, joint = {}, {}
        for i, m in enumerate(maps):
            compose[f"level{i}"] = VisiolinguisticAttention().init(keys[2 * i], jnp.zeros(m.shape, jnp.float32), text)["params"]
            joint[f"level{i}"] = {"dense": nn.Dense(self.width).init(keys[2 * i + 1], jnp.zeros((1, m.shape[-1]), jnp.float32))["params"]}
        return {"compose": {"params": compose}, "joint": {"params": joint}}

    def maps(
        self, tower: nn.Module, variables: dict, images: jax.Array, rngs: dict | None, train: bool, valid: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, ...], dict]:
        """Float32 maps [batch, height, width, channel], finest first, and running statistics, of the rows `valid`; a ViT's are layers, evenly spread, without class tokens."""
        if not isinstance(tower, vit.Vit):
            out, after = tower.apply(variables, images, valid, rngs=rngs, maps=True, train=train, mutable=["batch_stats"])
            return tuple(m.astype(jnp.float32) for m in out.maps), after.get("batch_stats", {})
        o = vit.resolve(tower.options)
        if o.patch_dropout:
            raise ValueError(
                f"config.image.patch_dropout is {o.patch_dropout}, but a composition of feature maps needs every patch; it must be 0"
            )
        seen: Any = tower.apply(variables, images, rngs=rngs, hidden=True)
        hidden = seen.hidden[:, :, o.class_tokens + o.registers :]
        rows, columns = vit.grid(o, *images.shape[1:3])
        chosen = [o.depth * (i + 1) // self.levels for i in range(self.levels)]
        return tuple(hidden[layer].reshape(len(images), rows, columns, -1).astype(jnp.float32) for layer in chosen), {}

    def compose(self, params: dict, maps: Sequence[jax.Array], texts: jax.Array, key: jax.Array | None) -> jax.Array:
        """Queries [batch, levels, width] of maps and texts [batch, levels, width]."""
        rngs = lambda i: None if key is None else {"dropout": jax.random.fold_in(key, i)}
        changed: list[Any] = [
            VisiolinguisticAttention().apply({"params": params["compose"][f"level{i}"]}, m.astype(jnp.float32), texts[:, i], rngs=rngs(i))
            for i, m in enumerate(maps)
        ]
        return project(params, changed)


def project(params: dict, maps: Sequence[jax.Array]) -> jax.Array:
    """[batch, levels, width] of maps: the mean over space, then each level's projection."""
    out = []
    for i, m in enumerate(maps):
        dense = params["joint"][f"level{i}"]["dense"]
        out.append(m.astype(jnp.float32).mean((1, 2)) @ dense["kernel"] + dense["bias"])
    return jnp.stack(out, 1)
