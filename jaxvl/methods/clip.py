r"""CLIP: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021,
https://arxiv.org/abs/2103.00020.

An image encoder and a text encoder, each followed by a linear projection without bias into one space (figure 3; I_f and T_f
are features, W_i and W_t projections, t the learned temperature parameter):

.. math::
    I_e = \frac{I_f W_i}{\|I_f W_i\|} \qquad T_e = \frac{T_f W_t}{\|T_f W_t\|} \qquad
    \text{logits} = e^t\, I_e T_e^\top \qquad
    L = \tfrac12 (\mathrm{CE}_\text{rows} + \mathrm{CE}_\text{columns})

with the matching pairs on the diagonal. Section 2.5: e^t starts at 1/0.07 and is clipped to at most 100. The paper cuts the
parameter t back after each step; here the forward pass is clipped and the gradient arranged to the same effect
(`bounded_exp`), so that no optimiser needs to know about t.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxvl.losses.infonce import infonce
from jaxvl.methods.method import Batch, Method, bounded_exp, in_sequence, unchanged
from jaxvl.methods.towers import towers, with_head
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions


class ClipOptions(NamedTuple):
    """The keys of the `method` section for CLIP.

    width: channels of the joint space. temperature: initial e^-t. max_scale: upper bound of e^t in the logits.
    impl: how the loss is spread over devices, see `losses/infonce.py`.
    """

    name: Literal["clip"] = "clip"
    width: int = 512
    temperature: float = 0.07
    max_scale: float = 100.0
    impl: Literal["global", "ring"] = "global"


def build(image: VitOptions, text: TextOptions, options: ClipOptions = ClipOptions()) -> Method:
    """CLIP with params {"image", "text", "t"} and no memory. Raises ValueError for options that cannot be."""
    if options.width < 1:
        raise ValueError(f"config.method.width is {options.width}; it must be at least 1")
    if options.temperature <= 0 or options.max_scale * options.temperature < 1:
        raise ValueError(
            f"config.method: an initial scale of 1 / temperature ({options.temperature}) must lie between 0 and max_scale ({options.max_scale})"
        )
    encoders = towers(with_head(image, options.width, "image"), with_head(text, options.width, "text"))

    def init(key: jax.Array, batch_spec: dict) -> tuple[dict, tuple]:
        return {**encoders.init(key, batch_spec), "t": -jnp.log(jnp.float32(options.temperature))}, ()

    def objective(params: dict, memory: Any, embeddings: dict, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict]:
        del memory, batch, key
        scale = bounded_exp(params["t"], options.max_scale)
        return infonce(embeddings["image"], embeddings["text"], scale, impl=options.impl), {"logit_scale": scale}

    return Method(
        init=init,
        encode=encoders.encode,
        objective=objective,
        loss=in_sequence(encoders.encode, objective),
        update=unchanged,
        embed_image=encoders.embed_image,
        embed_text=encoders.embed_text,
        flops=encoders.flops,
        rules=((r"(^|/)t$", P()), *encoders.rules),
        constant=encoders.constant,
    )
