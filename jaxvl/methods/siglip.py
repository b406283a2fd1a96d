r"""SigLIP: Zhai, Mustafa, Kolesnikov and Beyer, Sigmoid Loss for Language Image Pre-Training, ICCV 2023,
https://arxiv.org/abs/2303.15343.

Normalised embeddings x of images and y of texts, a learned temperature t' and bias b, and labels z that are 1 for the pairs
that belong together and -1 for all others (equation 1, algorithm 1):

.. math::
    t = e^{t'} \qquad
    L = -\frac{1}{|B|} \sum_i \sum_j \log \frac{1}{1 + e^{-z_{ij} (t\, x_i \cdot y_j + b)}}

t' starts at log 10 and b at -10: nearly all pairs are negatives, and with this bias they cost little before anything has been
learned, instead of pushing everything apart in the first steps.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxvl.losses.sigmoid import sigmoid
from jaxvl.methods.method import Batch, Method, in_sequence, unchanged
from jaxvl.methods.towers import towers, with_head
from jaxvl.models import kinds
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions


class SiglipOptions(NamedTuple):
    """The keys of the `method` section for SigLIP.

    width: channels of the joint space, to which both towers are projected; 0 takes the image tower as it is and projects
    the texts to its width, as the published models do. temperature: initial t'. bias: initial b. impl: how the loss is
    spread over devices, see `losses/sigmoid.py`.
    """

    name: Literal["siglip"] = "siglip"
    width: int = 0
    temperature: float = math.log(10)
    bias: float = -10.0
    impl: Literal["global", "ring"] = "global"


def build(image: VitOptions, text: TextOptions, options: SiglipOptions = SiglipOptions()) -> Method:
    """SigLIP with params {"image", "text", "t", "b"} and no memory. Raises ValueError for options that cannot be."""
    if options.width < 0:
        raise ValueError(f"config.method.width is {options.width}; it must be positive, or 0 for the image tower's width")
    kind = kinds.of(image)
    image = kind.resolve(with_head(image, options.width, "image") if options.width else image, "image")
    encoders = towers(image, with_head(text, image.head or kind.features(image), "text"))

    def init(key: jax.Array, batch_spec: dict) -> tuple[dict, tuple]:
        t, b = jnp.float32(options.temperature), jnp.float32(options.bias)
        return {**encoders.init(key, batch_spec), "t": t, "b": b}, ()

    def objective(params: dict, memory: Any, embeddings: dict, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict]:
        del memory, batch, key
        t, b = jnp.exp(params["t"]), params["b"]
        return sigmoid(embeddings["image"], embeddings["text"], t, b, impl=options.impl), {"logit_scale": t, "logit_bias": b}

    return Method(
        init=init,
        encode=encoders.encode,
        objective=objective,
        loss=in_sequence(encoders.encode, objective),
        update=unchanged,
        embed_image=encoders.embed_image,
        embed_text=encoders.embed_text,
        flops=encoders.flops,
        rules=((r"(^|/)[tb]$", P()), *encoders.rules),
        constant=encoders.constant,
    )
