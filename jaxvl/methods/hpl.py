r"""HPL: Yang, Bastan, Zhu, Gray and Samaras, Hierarchical Proxy-based Loss for Deep Metric Learning, WACV 2022,
https://arxiv.org/abs/2103.13538, on any proxy loss; with `hierarchy="none"` that loss alone, for one Proxy-Anchor
(Kim et al., CVPR 2020, https://arxiv.org/abs/2003.13911).

An encoder f maps images to embeddings X; every class has a proxy, a row of P_0, and level by level above them stand fewer, coarser
proxies P_1, P_2, ... that children share through the parents a_l:

.. math::
    y_{l+1} = a_l[y_l] \qquad L = \sum_l w_l \, L_\text{base}(X, y_l, P_l)

Given hierarchy: a_l is known, from the data, and P_l are parameters like any proxy. Learned hierarchy, as its authors describe it:
(0) train the base loss alone; (1) cluster the fine proxies; (2) train encoder and fine proxies for T steps; (3) assign them anew and
average them into the coarse proxies; again from (2). All of it happens inside the jitted step.

Where the paper's text could not be had, the reading is a switch, and the default is the first:

- `coarse_mode`: between refreshes the coarse proxies of a learned hierarchy stand still (frozen), are parameters that a refresh
  overwrites, its moments zeroed (free), or are the means of their children at every step, through which those get a gradient (tied);
- `refresh`: one assignment from the coarse proxies in force, so that clusters keep their identity (online_step), or k-means anew;
- `cluster_space`: distances and means are of unit vectors or of raw ones. Only their direction matters to the losses;
- `empty_cluster`: a coarse proxy without children stays as it is and is a negative to all (keep), or takes the child farthest from its
  own centroid (reseed_farthest);
- levels are weighted by `level_weights` without dividing by their sum.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxvl.losses import hierarchy
from jaxvl.losses.classes import PER_DEVICE
from jaxvl.losses.cluster import Empty, Space
from jaxvl.losses.hierarchy import Hierarchy
from jaxvl.losses.proxy import LOSSES
from jaxvl.methods.method import Batch, Method, Renewed, Run, in_sequence, unchanged, unit
from jaxvl.methods.towers import with_head
from jaxvl.models import kinds
from jaxvl.models.rules import RULES

Base = Literal["proxy_anchor", "proxy_nca", "proxy_nca_pp", "proxy_nca_smoothed", "norm_softmax"]
LEAST_PERIOD = 100  # steps between refreshes where the data are small


class HplOptions(NamedTuple):
    """The keys of the `method` section for HPL.

    width: channels of the embedding. base_loss: on every level. alpha, margin: of Proxy-Anchor; scale: of the Proxy-NCA family, times the
    squared distance; temperature: of norm_softmax. hierarchy: none for the base loss alone. level_weights: w_l, fine first; as many levels
    as weights. classes: 0 for as many as the training data have. num_coarse: proxies of each coarse level, 0 for sqrt of the level below
    (learned) or as many as the data have groups (given; data.levels), which is all that a given one takes. parents: a_l for a given hierarchy, by default the data's.
    hierarchy_start: the step before which the hierarchy is learned first; "half" of the run, or "end_of_warmup". refresh_every: steps from one
    renewal to the next, whatever becomes of the start, 0 for an epoch and at least 100. coarse_mode: "auto" is frozen where the hierarchy is learned and free where it is given. See the module
    for the others. negative_sampling: share of the classes that are negatives in a step (losses/proxy.py); with optim.lazy=("^proxies$",)
    the proxies that a step does not draw stay as they are. block: classes met at a time. pad_to: proxies are padded to a multiple of this,
    whatever the mesh, so that a run can go on on another; the devices must divide it. dtype: of the inputs of the products of embeddings
    and proxies.
    """

    name: Literal["hpl"] = "hpl"
    width: int = 512
    base_loss: Base = "proxy_anchor"
    alpha: float = 32.0
    margin: float = 0.1
    scale: float = 9.0
    temperature: float = 0.05
    hierarchy: Literal["learned", "given", "none"] = "learned"
    level_weights: tuple[float, ...] = (1.0, 0.1)
    classes: int = 0
    num_coarse: tuple[int, ...] = (0,)
    parents: tuple[tuple[int, ...], ...] = ()
    hierarchy_start: Literal["half", "end_of_warmup"] | int = "half"
    refresh_every: int = 0
    refresh: Literal["online_step", "full_kmeans"] = "online_step"
    cluster_space: Space = "unit"
    coarse_mode: Literal["auto", "frozen", "free", "tied"] = "auto"
    empty_cluster: Empty = "keep"
    reset_moments_on_refresh: bool = True
    negative_sampling: float = 1.0
    block: int = 4096
    pad_to: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"


def complete(o: HplOptions, run: Run) -> HplOptions:
    """Options with every number that the run decides filled in. Raises ValueError where it is not known, or contradicts the options."""
    if o.classes and run.classes and o.classes != run.classes:
        raise ValueError(
            f"config.method.classes is {o.classes}, but the training data have {run.classes}: leave it at 0, or set data.classes to what it should be"
        )
    classes, levels = o.classes or run.classes, 0 if o.hierarchy == "none" else len(o.num_coarse)
    if not classes:
        raise ValueError(
            "config.method.classes is 0 and there are no training data to count them in: set it, and data.label and data.classes to deliver them"
        )
    parents = o.parents or run.parents[:levels]
    if run.steps and not run.classes:
        raise ValueError(
            "config.data.classes is '', with which labels are whatever the data hold: set it to all, first or second, which numbers the classes kept"
        )
    if run.steps and o.hierarchy == "given" and len(parents) < levels:
        raise ValueError(
            f"config.method.hierarchy is given, and the data give {len(parents)} of {levels} levels: set data.hierarchy and data.levels, or method.parents"
        )
    groups = tuple(max(a) + 1 for a in run.parents[:levels])
    if o.hierarchy == "given" and not o.parents and any(size not in (0, n) for size, n in zip(o.num_coarse, groups, strict=False)):
        raise ValueError(
            f"config.method.num_coarse is {o.num_coarse}, but the hierarchy of the data has {groups} groups: set it to that, or to {(0,) * levels}"
        )
    start = {"half": run.steps // 2, "end_of_warmup": run.warmup}.get(str(o.hierarchy_start), o.hierarchy_start)
    sizes, below = [], classes
    for level, size in enumerate(o.num_coarse[:levels]):
        if o.hierarchy == "given" and not size and len(parents) > level:
            size = max(parents[level]) + 1
        below = size or round(below**0.5)
        sizes.append(below)
    return o._replace(
        classes=classes, num_coarse=tuple(sizes), parents=parents if o.hierarchy == "given" else (), hierarchy_start=int(start),
        refresh_every=o.refresh_every or max(LEAST_PERIOD, run.epoch), level_weights=o.level_weights if levels else o.level_weights[:1],
        coarse_mode=o.coarse_mode if o.coarse_mode != "auto" else "free" if o.hierarchy == "given" else "frozen",
    )  # fmt: skip


def check(o: HplOptions) -> None:
    """Raises ValueError for completed options that cannot be, naming key, value and what would be right."""
    key = "config.method."
    for name, low in (
        ("width", 1),
        ("alpha", 1e-6),
        ("scale", 1e-6),
        ("temperature", 1e-6),
        ("block", 1),
        ("pad_to", 1),
        ("classes", 1),
        ("hierarchy_start", 0),
    ):
        if getattr(o, name) < low:
            raise ValueError(f"{key}{name} is {getattr(o, name)}; it must be at least {low}")
    if len(o.level_weights) != 1 + len(o.num_coarse):
        raise ValueError(
            f"{key}level_weights is {o.level_weights}; with {len(o.num_coarse)} coarse levels it must have {1 + len(o.num_coarse)} entries"
        )
    if min(o.level_weights) < 0:
        raise ValueError(f"{key}level_weights is {o.level_weights}; no weight may be negative")
    if not 0 < o.negative_sampling <= 1 or (o.negative_sampling < 1 and o.base_loss == "proxy_nca"):
        raise ValueError(
            f"{key}negative_sampling is {o.negative_sampling} with {o.base_loss}; it must be above 0 and at most 1, and 1 for proxy_nca"
        )
    for below, size in zip((o.classes, *o.num_coarse), o.num_coarse, strict=False):
        if not (2 if o.base_loss in ("proxy_nca", "proxy_nca_smoothed") else 1) <= size <= below:
            raise ValueError(
                f"{key}num_coarse is {o.num_coarse} above {o.classes} classes; levels must not grow, nor have one proxy where {o.base_loss} needs two"
            )
    if o.hierarchy == "given":
        sizes = tuple(len(a) for a in o.parents)
        if o.parents and (sizes != (o.classes, *o.num_coarse)[: len(sizes)] or len(sizes) != len(o.num_coarse)):
            raise ValueError(
                f"{key}parents has {sizes} entries; {o.classes} classes and {o.num_coarse} groups need {(o.classes, *o.num_coarse)[:-1]}; see data.levels"
            )
        for a, size in zip(o.parents, o.num_coarse, strict=True) if o.parents else ():
            if min(a) < 0 or max(a) >= size:
                raise ValueError(f"{key}parents names the group {max(a) if max(a) >= size else min(a)}, but num_coarse is {o.num_coarse}")


def build(image: Any, text: Any, options: HplOptions = HplOptions()) -> Method:
    """HPL with params {"image", "proxies" [classes padded, width], "coarse" where they are trained} and memory {"hierarchy"}, () without one.

    `options` as `complete` leaves them. Raises ValueError for options that cannot be. No text: `embed_text` is None.
    """
    del text
    o = options
    check(o)
    kinds.row_wise(image)
    kind = kinds.of(image)
    image = kind.resolve(with_head(image, o.width, "image"), "image")
    encoder, rows = kind.module(image), -(-o.classes // o.pad_to) * o.pad_to
    trained, levels = o.coarse_mode == "free", len(o.num_coarse)
    base = partial(LOSSES[o.base_loss], **_numbers(o), block=o.block, dtype=o.dtype)
    names = [str(level + 1) for level in range(levels)]

    def init(key: jax.Array, batch_spec: dict) -> tuple[dict, Any]:
        keys = jax.random.split(key, 2 + levels)
        pixels = jnp.zeros((1, *batch_spec["image"].shape[1:]), jnp.float32)
        params = {"image": encoder.init(keys[0], pixels)["params"], "proxies": _proxies(keys[1], o.classes, rows, o.width)}
        if not levels:
            return params, ()
        coarse = tuple(_proxies(k, n, n, o.width) for k, n in zip(keys[2:], o.num_coarse, strict=True))
        parents = [np.zeros(n, np.int32) for n in (rows, *o.num_coarse[:-1])]
        for level, a in enumerate(o.parents):
            parents[level][: len(a)] = a
        counts = [np.bincount(a[:n], minlength=k) for a, n, k in zip(parents, (o.classes, *o.num_coarse), o.num_coarse, strict=False)]
        above = Hierarchy(tuple(map(jnp.asarray, parents)), () if trained else coarse, tuple(jnp.asarray(c, jnp.int32) for c in counts))
        if trained:
            params["coarse"] = dict(zip(names, coarse, strict=True))
        # refreshed: the step of the last refresh, -1 before the first; key: what k-means starts from.
        return params, {"hierarchy": above, "refreshed": jnp.int32(-1), "key": jax.random.key_data(jax.random.fold_in(key, 1))}

    def hierarchy_of(params: dict, memory: dict) -> Hierarchy:
        above = memory["hierarchy"]
        return above._replace(coarse=tuple(params["coarse"][n] for n in names)) if trained else above

    def embed(params: dict, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        tower: Any = encoder.apply({"params": params["image"]}, images, rngs=None if key is None else {"dropout": key})
        return tower.pooled

    def encode(params: dict, batch: Batch, key: jax.Array | None) -> jax.Array:
        return embed(params, batch["image"], key)

    def objective(params: dict, memory: Any, x: jax.Array, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict]:
        fine = partial(base, keep=o.negative_sampling, key=key) if o.negative_sampling < 1 and key is not None else base
        if not levels:
            loss = fine(x, params["proxies"], batch["label"], classes=o.classes)
            return loss, {"level_0": loss}
        above = hierarchy_of(params, memory)
        coarse = hierarchy.tie(params["proxies"], above, o.classes, o.cluster_space) if o.coarse_mode == "tied" else above.coarse
        begun = jnp.float32(1) if o.hierarchy == "given" else (memory["refreshed"] >= 0).astype(jnp.float32)
        weights = [o.level_weights[0], *(w * begun for w in o.level_weights[1:])]
        y = hierarchy.labels_of(above.parents, batch["label"])
        # Coarse proxies are few: only the fine ones are sampled.
        bases = lambda x, p, labels, classes: (fine if p is params["proxies"] else base)(x, p, labels, classes=classes)
        loss, parts = hierarchy.hierarchical(bases, x, (params["proxies"], *coarse), y, weights, o.classes)
        return loss, {f"level_{l}": part for l, part in enumerate(parts)}

    def refresh(params: dict, memory: dict, step: jax.Array) -> Renewed:
        p, above = params["proxies"], hierarchy_of(params, memory)
        begun = memory["refreshed"] >= 0  # counted from there, a start that moves with the length of the run changes nothing any more
        first, due = ~begun & (step >= int(o.hierarchy_start)), begun & (step - memory["refreshed"] >= o.refresh_every)
        key = jax.random.fold_in(jax.random.wrap_key_data(memory["key"]), step)
        anew = lambda p, above: hierarchy.build(key, p, above.coarse, o.classes, o.cluster_space, o.empty_cluster)
        online = lambda p, above: hierarchy.refresh(p, above, o.classes, o.cluster_space, o.empty_cluster)
        if o.hierarchy == "given":
            anew = online = lambda p, above: hierarchy.averaged(p, above, o.classes, o.cluster_space)
        elif o.refresh == "full_kmeans":
            online = anew
        kind = jnp.where(first, 1, jnp.where(due, 2, 0))
        above = lax.switch(kind, (lambda p, above: above, anew, online), p, above)
        now = first | due
        after = {
            **memory,
            "hierarchy": above._replace(coarse=()) if trained else above,
            "refreshed": jnp.where(now, step, memory["refreshed"]),
        }
        if trained:
            params = {**params, "coarse": dict(zip(names, above.coarse, strict=True))}
        return Renewed(params, after, now & o.reset_moments_on_refresh)

    def resumed(memory: dict, step: int) -> None:
        if int(memory["refreshed"]) < 0 and step > int(o.hierarchy_start):
            raise ValueError(
                f"config.method.hierarchy_start comes to step {o.hierarchy_start:,} in a run of this length, and the run is at step {step:,} without "
                f"a hierarchy: set it to {step:,} or a later step"
            )

    def flops(batch_spec: dict) -> float:
        _, height, wide, _ = batch_spec["image"].shape
        met = o.negative_sampling * o.classes + sum(o.num_coarse)
        return kind.flops(image, height, wide, True) + 2.0 * met * o.width

    # A given hierarchy whose proxies are parameters has nothing to renew.
    renews = levels > 0 and not (o.hierarchy == "given" and trained)
    return Method(
        init=init,
        encode=encode,
        objective=objective,
        loss=in_sequence(encode, objective),
        update=unchanged,
        embed_image=lambda params, images: unit(embed(params, images)),
        embed_text=None,
        flops=flops,
        rules=PROXY_RULES + RULES,
        refresh=refresh if renews else None,
        renewed="^coarse/" if renews and trained else "",
        waits=(("hierarchy_start", int(o.hierarchy_start)),) if renews else (),
        resumed=resumed if renews else None,
        reads=("image", "label"),
        constant=kinds.constant(image),
    )


# The classes are split over every axis of the mesh, the parents of the classes like them; coarse proxies are few and lie on every device.
PROXY_RULES = (
    (r"(^|/)proxies$", PER_DEVICE),
    (r"(^|/)hierarchy/parents/0$", PER_DEVICE),
    (r"(^|/)hierarchy/(parents|coarse|counts)/\d+$", P()),
    (r"(^|/)coarse/\d+$", P()),
    (r"^memory/(refreshed|key)$", P()),
)


def _proxies(key: jax.Array, classes: int, rows: int, width: int) -> jax.Array:
    """Normal with the fan-out variance of Kaiming, 2 / classes; padding is zero. Only the direction of a proxy matters to the losses, but
    an optimiser's steps turn short ones faster."""
    return jnp.where(jnp.arange(rows)[:, None] < classes, jax.random.normal(key, (rows, width)) * (2 / classes) ** 0.5, 0)


def _numbers(o: HplOptions) -> dict[str, float]:
    if o.base_loss == "proxy_anchor":
        return {"alpha": o.alpha, "margin": o.margin}
    return {"temperature": o.temperature} if o.base_loss == "norm_softmax" else {"scale": o.scale}
