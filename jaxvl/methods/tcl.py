r"""TCL: Yang, Duan, Tran, Xu, Chanda, Chen, Zeng, Chilimbi and Huang, Vision-Language Pre-Training with Triple Contrastive
Learning, CVPR 2022, https://arxiv.org/abs/2202.10401; and ALBEF, on which it builds (`fused.py`), by switches.

Student features :math:`v_i, t_i` of images and captions, the teacher's :math:`v'_i` (of a second view) and :math:`t'_i`, and the
candidates :math:`V^* = [v' \,\|\, \text{queue}]`, :math:`T^*` likewise. With :math:`H(x, C, y)` the cross entropy of
softmax(x C / τ) and targets y, and :math:`y^\alpha` targets that are α parts the teacher's own softmax,

.. math::
    L_\text{cma} = H(v, T^*, y^\alpha) + H(t, V^*, y^\alpha) \qquad L_\text{imc} = H(v, V^*, y) + H(t, T^*, y)

    L_\text{lmi} = \text{local information of } v \text{ in } v'_{ip} \text{ and of } t \text{ in } t'_{ip}

    L = L_\text{ita}(L_\text{cma}, L_\text{imc}, L_\text{lmi}) + L_\text{itm} + L_\text{mlm}
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxvl.losses.local import local_information, pool_grid
from jaxvl.losses.momentum import Candidates, contrast
from jaxvl.methods.fused import Draws, Trunk, on_trunk, trunk
from jaxvl.methods.fused_options import of_method
from jaxvl.methods.method import Batch, Method, split_key
from jaxvl.models import vit as vits
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions

# What the published code does where it differs from what one would do; a switch that says "profile" follows this.
PROFILES = {"reference": {"scope": "group", "unfilled": "contrast"}, "fixed": {"scope": "global", "unfilled": "mask"}}


class TclOptions(NamedTuple):
    """The keys of the `method` section for TCL and ALBEF; those not told here are the trunk's, see `TrunkOptions` in `fused.py`.

    align: which alignment terms there are; "cma" alone is ALBEF. align_reduction: "mean6" averages the alignment terms that are there, as
    the published code does; "paper_halves" adds up the means of the two directions of CMA, IMC and LMI. cma_weight, imc_weight, lmi_weight: of
    the terms, in either. pool_grid: image locals are the means over a grid of this many windows a side. profile: what switches
    that say "profile" are set to: "reference" draws in-batch negatives in groups of the published batch a device and contrasts
    with the noise that queues start with; "fixed" takes the whole batch and no noise.
    """

    name: Literal["tcl"] = "tcl"
    profile: Literal["reference", "fixed"] = "reference"
    align: Literal["cma", "cma+imc", "cma+lmi", "cma+imc+lmi"] = "cma+imc+lmi"
    align_reduction: Literal["mean6", "paper_halves"] = "mean6"
    cma_weight: float = 1.0
    imc_weight: float = 1.0
    lmi_weight: float = 1.0
    pool_grid: int = 4
    width: int = 256
    fusion_depth: int = 6
    temperature: float = 0.07
    queue: int = 65_536
    momentum: float = 0.995
    alpha: float = 0.4
    alpha_steps: int = 0
    unfilled: Literal["profile", "contrast", "mask"] = "profile"
    scope: Literal["profile", "group", "global"] = "profile"
    group_size: int = 64
    ids: bool = False
    mlm: bool = True
    mlm_rate: float = 0.15
    mlm_cap: int = 0
    mlm_distill_axis: Literal["vocab", "seq_legacy"] = "vocab"
    chunks: int = 1


def build(image: VitOptions, text: TextOptions, options: TclOptions = TclOptions()) -> Method:
    """TCL with the params and memory of `fused.py`. Raises ValueError for options that cannot be."""
    o = resolve(options)
    base = trunk(image, text, of_method(o))
    if "lmi" in o.align and image.patch_dropout:
        raise ValueError(
            f"config.image.patch_dropout is {image.patch_dropout}; the local terms of config.method.align={o.align!r} pool all patches: set it to 0"
        )

    return on_trunk(base, partial(terms, base, o), partial(flops, base, o), partial(programs, o))


def terms(
    base: Trunk, o: TclOptions, params: dict, memory: dict, encoded: dict, batch: Batch, key: jax.Array | None, draws: Draws = Draws()
) -> tuple[jax.Array, dict, dict]:
    """(loss, aux, what was computed on the way) of a step; `draws` fixes what would be random."""
    key_teacher, key_pairs = split_key(key)
    now = base.views(params, memory, encoded, batch, key_teacher)
    v, t, tau, G = now.v, now.t, now.temperature, now.groups
    V, T = base.candidates(memory, now, batch)

    def H(x: jax.Array, C: Any, guide: jax.Array | None = None) -> jax.Array:
        return contrast(x, C, tau, guide=guide, alpha=now.alpha, groups=G)

    each = {"loss_i2t": H(v, T, now.v_m), "loss_t2i": H(t, V, now.t_m)}  # CMA: the teacher is part of the target
    weights = {"loss_i2t": o.cma_weight, "loss_t2i": o.cma_weight}
    seen = {}
    if "imc" in o.align:
        each |= {"loss_i2i": H(v, V), "loss_t2t": H(t, T)}  # IMC: it is not
        weights |= {"loss_i2i": o.imc_weight, "loss_t2t": o.imc_weight}
    if "lmi" in o.align:
        # Locals are the teacher's last tokens, projected like the class token; pooled ones are not made unit vectors again.
        patches = now.image_m[:, base.image.class_tokens + base.image.registers :]
        grid = vits.grid(base.image, *batch["image"].shape[1:3])
        image_local = pool_grid(base.project(now.teacher, "image", patches), grid, o.pool_grid)
        text_local = base.project(now.teacher, "text", now.text_m[:, 1:])
        each["loss_lmi_image"] = local_information(v, image_local, tau, groups=G)
        each["loss_lmi_text"] = local_information(t, text_local, tau, valid=now.mask[:, 1:], groups=G)
        weights |= {"loss_lmi_image": o.lmi_weight, "loss_lmi_text": o.lmi_weight}
        seen = {"image_local": image_local, "text_local": text_local}
    # The published code divides all terms by their number; the paper's halves weigh alignment three times as much.
    share = len(each) if o.align_reduction == "mean6" else 2
    ita = sum(weights[name] * term for name, term in each.items()) / share

    paired, on_the_way = base.pair_losses(params, now, encoded, batch, key_pairs, draws)
    loss = ita + paired["loss_itm"] + paired.get("loss_mlm", 0.0)
    aux = {**each, "loss_ita": ita, **paired, "temperature": tau, "alpha": now.alpha, "memory": base.remember(memory, now, batch)}
    return loss, aux, {"views": now, **seen, **on_the_way}


def resolve(options: TclOptions) -> TclOptions:
    """Options with what the profile decides filled in. Raises ValueError for values that cannot be."""
    for key in ("cma_weight", "imc_weight", "lmi_weight"):
        if getattr(options, key) < 0:
            raise ValueError(f"config.method.{key} is {getattr(options, key)}; it must be at least 0")
    if options.pool_grid < 1:
        raise ValueError(f"config.method.pool_grid is {options.pool_grid}; it must be at least 1")
    decided: dict[str, Any] = {key: value for key, value in PROFILES[options.profile].items() if getattr(options, key) == "profile"}
    return options._replace(**decided)


def flops(base: Trunk, o: TclOptions, batch_spec: dict) -> dict[str, float]:
    """Forward FLOPs of one example by term; for what has no backward pass, and for constants that need none, see `Trunk.flops`."""
    (B, height, wide, _), (_, length) = batch_spec["image"].shape, batch_spec["tokens"].shape
    rows, columns = vits.grid(base.image, height, wide)
    group = B if o.scope == "global" else o.group_size
    product = 2.0 * o.width  # a logit; a student's also costs one product of the backward pass, a teacher's none
    cma, imc = (product * (group + o.queue) * n / 3 for n in (2 * (2 + 1), 2 * 2))
    local = 2.0 * o.width * (rows * columns * base.image.width + (length - 1) * base.text.width) / 3
    lmi = local + product * group * (o.pool_grid**2 + length - 1) * 2 / 3
    return {
        **base.flops(batch_spec),
        "cma": cma,
        **({"imc": imc} if "imc" in o.align else {}),
        **({"lmi": lmi} if "lmi" in o.align else {}),
    }


def programs(o: TclOptions, batch_spec: dict) -> dict[str, tuple]:
    """The alignment terms as programs of the features, with their shapes."""
    B, length = batch_spec["tokens"].shape
    G = 1 if o.scope == "global" else B // o.group_size
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    feature, queue = of(B, o.width), of(o.queue, o.width)
    both = (feature,) * 4 + (queue,) * 2 + (of(),)

    def cma(v: jax.Array, t: jax.Array, v_m: jax.Array, t_m: jax.Array, V: jax.Array, T: jax.Array, tau: jax.Array) -> jax.Array:
        H = lambda x, C, guide: contrast(x, C, tau, guide=guide, alpha=o.alpha, groups=G)
        return H(v, Candidates(t_m, T), v_m) + H(t, Candidates(v_m, V), t_m)

    def imc(v: jax.Array, t: jax.Array, v_m: jax.Array, t_m: jax.Array, V: jax.Array, T: jax.Array, tau: jax.Array) -> jax.Array:
        return contrast(v, Candidates(v_m, V), tau, groups=G) + contrast(t, Candidates(t_m, T), tau, groups=G)

    def lmi(v: jax.Array, t: jax.Array, image_local: jax.Array, text_local: jax.Array, tau: jax.Array) -> jax.Array:
        return local_information(v, image_local, tau, groups=G) + local_information(t, text_local, tau, groups=G)

    return {
        "cma": (jax.value_and_grad(cma, (0, 1, 6)), both),
        "imc": (jax.value_and_grad(imc, (0, 1, 6)), both),
        "lmi": (jax.value_and_grad(lmi, (0, 1, 4)), (feature, feature, of(B, o.pool_grid**2, o.width), of(B, length - 1, o.width), of())),
    }
