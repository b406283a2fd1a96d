"""An image tower and a text tower that map into one space of unit vectors: what all dual encoders are built on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxvl.methods.method import Batch, split_key, unit
from jaxvl.models import kinds
from jaxvl.models.rules import RULES


class Towers(NamedTuple):
    """Functions of params {"image": ..., "text": ...}; embeddings are float32 [b, width] of unit norm.

    init: (key, batch_spec) -> params. encode: (params, batch, key) -> {"image": embeddings, "text": embeddings}.
    flops: (batch_spec) -> FLOPs for one example, the products with all candidates of the batch included.
    """

    init: Callable[[jax.Array, dict], dict]
    encode: Callable[[dict, Batch, jax.Array | None], dict[str, jax.Array]]
    embed_image: Callable[[dict, jax.Array], jax.Array]
    embed_text: Callable[[dict, jax.Array], jax.Array]
    flops: Callable[[dict], float]
    rules: tuple[tuple[str, PartitionSpec], ...]
    constant: str


def towers(image: Any, text: Any) -> Towers:
    """Both towers, of any kind (models/kinds.py), with the `head` their options name. Raises ValueError where they do not end in one width."""
    kinds.row_wise(image)
    of_image, of_text = kinds.of(image), kinds.of(text)
    image, text = of_image.resolve(image, "image"), of_text.resolve(text, "text")
    width, text_width = image.head or of_image.features(image), text.head or of_text.features(text)
    if width != text_width:
        raise ValueError(
            f"the image tower ends in {width} channels and the text tower in {text_width}; set config.method.width to project both"
        )
    vision, language = of_image.module(image), of_text.module(text)

    def init(key: jax.Array, batch_spec: dict) -> dict:
        key_image, key_text = jax.random.split(key)
        one = {k: jnp.zeros((1, *batch_spec[k].shape[1:]), dtype) for k, dtype in (("image", jnp.float32), ("tokens", jnp.int32))}
        return {"image": vision.init(key_image, one["image"])["params"], "text": language.init(key_text, one["tokens"])["params"]}

    def embed(tower: Any, params: dict, inputs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return unit(tower.apply({"params": params}, inputs, rngs=None if key is None else {"dropout": key}).pooled)

    def encode(params: dict, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
        key_image, key_text = split_key(key)
        return {
            "image": embed(vision, params["image"], batch["image"], key_image),
            "text": embed(language, params["text"], batch["tokens"], key_text),
        }

    def flops(batch_spec: dict) -> float:
        (batch, height, wide, _), (_, length) = batch_spec["image"].shape, batch_spec["tokens"].shape
        return of_image.flops(image, height, wide, True) + of_text.flops(text, length) + 2.0 * batch * width

    return Towers(
        init,
        encode,
        embed_image=lambda params, images: embed(vision, params["image"], images),
        embed_text=lambda params, tokens: embed(language, params["text"], tokens),
        flops=flops,
        rules=RULES,
        constant=kinds.constant(image),
    )


def with_head(options: Any, width: int, section: str) -> Any:
    """Tower options with a projection to `width`. Raises ValueError where the options name another one."""
    if options.head not in (0, width):
        raise ValueError(
            f"config.{section}.head is {options.head}, but the method projects to {width} channels: leave it at 0 and set config.method.width"
        )
    return options._replace(head=width)
