r"""JVSM: Chen and Bazzani, Learning Joint Visual Semantic Matching Embeddings for Language-guided Retrieval, ECCV 2020.

One space for images v, texts s, and queries q made of a reference image and a modification text. With pooled features f of an image
and g of a text,

.. math::
    v = W_v f + b_v \qquad s = W_s g + b_s \qquad q = \mathrm{compose}(v_r, s_m)

    L_{im} = M(q, v_t) \qquad L_{cs} = M(q, s_t) \qquad L_{vs} = \tfrac12 [ M(v_t, s_t) + M(v_r, s_r) ] \qquad
    L = w_{im} L_{im} + w_{cs} L_{cs} + w_{vs} L_{vs}

M is the bidirectional semi-hard hinge of `losses/compose.py`; m, t and r are the modification, the target and the reference. L_im trains
language-guided retrieval, L_cs the composition against texts, L_vs text-to-image and image-to-text retrieval. Rows of a batch
without a reference are pairs of an image and its text and count in L_vs alone; a text that is not there leaves the terms it is in.

No code of the authors exists. The compositions are TIRG's and, on three feature maps, that of the same authors' VAL (CVPR 2020);
departures, each with its switch, are:

- composer "visiolinguistic_attention" projects each level to the joint space, so that texts meet it there; VAL matches raw channels;
- schedule "two_stage" is one run whose first `first_stage` steps train L_vs alone, where VAL starts a second run from the first;
- `mask_same`: rows of one target, text or question are no negatives of each other; VAL takes them for negatives.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxvl.losses import compose as losses
from jaxvl.losses.compose import Ids, Mining, normalise
from jaxvl.methods.method import Batch, Method, split_key
from jaxvl.methods.towers import with_head
from jaxvl.models import compose as composers, kinds
from jaxvl.models.compose import Composer
from jaxvl.models.levels import Levels, count, project
from jaxvl.models.rules import RULES

TEXTS = ("tokens", "tokens_reference", "tokens_modification")
IMAGES = ("image", "image_reference")


class JvsmOptions(NamedTuple):
    """The keys of the `method` section for JVSM.

    width: E, channels of the joint space. composer: how q is made; image_only and text_only are the baselines q = v_r and q = s_m. use_bn:
    batch normalisation in gated_residual and concat, its running statistics in the memory. w_im, w_cs, w_vs: weights of the terms.
    loss: of L_im; "softmax" and "soft_triplet" are TIRG's, with a learned scale from 4 on. margin, mining, mask_same: of M. schedule:
    "two_stage" trains L_vs alone for `first_stage` steps.
    """

    name: Literal["jvsm"] = "jvsm"
    width: int = 512
    composer: Composer = "gated_residual"
    use_bn: bool = True
    w_im: float = 1.0
    w_cs: float = 1.0
    w_vs: float = 1.0
    loss: Literal["match", "softmax", "soft_triplet"] = "match"
    margin: float = 0.2
    mining: Mining = "semi_hard"
    mask_same: bool = True
    schedule: Literal["joint", "two_stage"] = "joint"
    first_stage: int = 0


def check(o: JvsmOptions) -> None:
    """Raises ValueError naming the key, its value and what would be right."""
    if o.width < 1:
        raise ValueError(f"config.method.width is {o.width}; it must be at least 1")
    for key in ("w_im", "w_cs", "w_vs", "margin"):
        if getattr(o, key) < 0:
            raise ValueError(f"config.method.{key} is {getattr(o, key)}; it must be at least 0")
    if not o.w_im + o.w_cs + o.w_vs:
        raise ValueError("config.method: w_im, w_cs and w_vs are all 0, so there is nothing to train")
    if (o.schedule == "two_stage") != (o.first_stage > 0):
        raise ValueError(f"config.method.first_stage is {o.first_stage}; it must be above 0 where schedule is 'two_stage', and 0 otherwise")


def build(image: Any, text: Any, options: JvsmOptions = JvsmOptions()) -> Method:
    """JVSM with params {"image", "text", "compose", ...} and memory {"batch_stats", "step"}, those that it has. Raises ValueError."""
    o = options
    check(o)
    levels = count(o.composer, image)
    mapped = levels > 1  # v, q and s then have one vector a level
    image = kinds.of(image).resolve(image if mapped else with_head(image, o.width, "image"), "image")
    text = kinds.of(text).resolve(with_head(text, o.width * levels, "text"), "text")
    if mapped and image.head:
        raise ValueError(f"config.image.head is {image.head}, but composer {o.composer!r} reads feature maps: leave it at 0")
    vision, language = kinds.of(image).module(image), kinds.of(text).module(text)
    batch_bn = getattr(image, "statistics", "frozen") == "batch"
    bottleneck = {"gated_residual": composers.GatedResidual, "concat": composers.Concat}.get(o.composer)
    composer = bottleneck(o.use_bn) if bottleneck else None
    attention = Levels(o.width, levels)
    learned_scale = o.loss != "match"

    def init(key: jax.Array, batch_spec: dict) -> tuple[dict, dict]:
        keys = jax.random.split(key, 3)
        pixels = jnp.zeros((1, *batch_spec["image"].shape[1:]), jnp.float32)
        e = jnp.zeros((1, o.width), jnp.float32)
        parts: dict[str, Any] = {
            "image": vision.init(keys[0], pixels),
            "text": language.init(keys[1], jnp.zeros((1, *batch_spec["tokens"].shape[1:]), jnp.int32)),
        }
        if composer:
            parts["compose"] = composer.init(keys[2], e, e)
        if mapped:
            parts |= attention.init(keys[2], jax.eval_shape(lambda: attention.maps(vision, parts["image"], pixels, None, False)[0]))
        params = {name: variables["params"] for name, variables in parts.items()}
        memory: dict[str, Any] = {"batch_stats": {name: v["batch_stats"] for name, v in parts.items() if v.get("batch_stats")}}
        if learned_scale:
            params["scale"] = jnp.float32(4.0)
        return params, {k: v for k, v in memory.items() if v} | ({"step": jnp.zeros((), jnp.int32)} if o.first_stage else {})

    def rngs(key: jax.Array | None) -> dict | None:
        return None if key is None else {"dropout": key}

    def see(
        params: dict, stats: dict, images: jax.Array, key: jax.Array | None, train: bool = False, valid: jax.Array | None = None
    ) -> tuple[jax.Array, Any, dict]:
        """v [b, levels, E], the maps where there are levels, and the image tower's running statistics, of the images `valid` alone."""
        variables: Any = {"params": params["image"], **({"batch_stats": stats["image"]} if batch_bn else {})}
        if mapped:
            maps, running = attention.maps(vision, variables, images, rngs(key), train, valid)
            return project(params, maps), maps, running
        more: dict[str, Any] = {"train": train, "valid": valid} if batch_bn else {}
        out, after = vision.apply(variables, images, rngs=rngs(key), mutable=["batch_stats"], **more)
        return out.pooled[:, None], None, after.get("batch_stats", {})

    def say(params: dict, tokens: jax.Array, key: jax.Array | None) -> jax.Array:
        """s [b, levels, E]."""
        out: Any = language.apply({"params": params["text"]}, tokens, rngs=rngs(key))
        return out.pooled.reshape(tokens.shape[0], levels, o.width)

    def join(
        params: dict, stats: dict, v: jax.Array, maps: Any, s: jax.Array, valid: Any, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, dict]:
        """q [b, levels, E] of references and modifications, and the composition's running statistics."""
        if mapped:
            return attention.compose(params, maps, s, key), {}
        if composer is None:
            return (v if o.composer == "image_only" else s), {}
        variables = {"params": params["compose"], **({"batch_stats": stats["compose"]} if o.use_bn else {})}
        q, after = composer.apply(variables, v[:, 0], s[:, 0], valid, train=train, rngs=rngs(key), mutable=["batch_stats"])
        return q[:, None], after.get("batch_stats", {})

    def towers_of(params: dict, memory: Any, batch: Batch, key: jax.Array | None) -> tuple[dict, dict]:
        """What `encode` returns, and the running statistics of the image tower after this batch."""
        key_image, key_text = split_key(key)
        key_text, key_join = split_key(key_text)
        stats = memory.get("batch_stats", {}) if batch_bn else {}
        images, texts = ([name for name in names if name in batch] for names in (IMAGES, TEXTS))
        together = lambda names: jnp.stack([batch[name] for name in names], 1).reshape(-1, *batch[names[0]].shape[1:])
        apart = lambda x, names: dict(zip(names, x.reshape(-1, len(names), *x.shape[1:]).swapaxes(0, 1), strict=True))
        there = {"image": jnp.ones(len(batch["image"]), bool), "image_reference": ids_of(batch).reference >= 0}
        valid = jnp.stack([there[name] for name in images], 1).reshape(-1)  # an absent reference is zeros, no image to take statistics of
        v, maps, after = see(params, stats, together(images), key_image, train=True, valid=valid)
        z = {**apart(v, images), **apart(say(params, together(texts), key_text), texts)}
        if mapped and len(images) > 1:
            references = [apart(m, images)["image_reference"] for m in maps]
            z["query"], _ = join(params, {}, z["image_reference"], references, z["tokens_modification"], None, key_join, True)
        return z, after

    def encode(params: dict, batch: Batch, key: jax.Array | None) -> dict:
        return towers_of(params, {}, batch, key)[0]

    def objective(params: dict, memory: Any, z: dict, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict]:
        key_join, key_draw = split_key(key)
        ids = ids_of(batch)
        after: dict[str, Any] = {}
        v_t, s_t = z["image"], z["tokens"]
        v_r, s_r, s_m = (z.get(name, jnp.zeros_like(v_t)) for name in ("image_reference", "tokens_reference", "tokens_modification"))
        if "query" in z:
            q = z["query"]
        else:
            q, after = join(params, memory.get("batch_stats", {}), v_r, None, s_m, ids.query >= 0, key_join, True)
        weights = [jnp.float32(w) for w in (o.w_im, o.w_cs, o.w_vs)]
        if o.first_stage:
            second = (memory["step"] >= o.first_stage).astype(jnp.float32)
            weights[:2] = [w * second for w in weights[:2]]
        shared: dict[str, Any] = {"weights": tuple(weights), "margin": o.margin, "mining": o.mining, "mask_same": o.mask_same}
        terms = [losses.jvsm(q[:, i], v_t[:, i], v_r[:, i], s_t[:, i], s_r[:, i], ids, **shared) for i in range(levels)]
        mean = jax.tree.map(lambda *x: sum(x) / levels, *terms)
        if learned_scale:
            im = sum(tirg(q[:, i], v_t[:, i], params["scale"], ids.query >= 0, key_draw) for i in range(levels)) / levels
            mean = mean._replace(im=im, total=mean.total + weights[0] * (im - mean.im))
        aux = {"loss_im": mean.im, "loss_cs": mean.cs, "loss_vs": mean.vs, "triplets": jnp.mean(ids.query >= 0, dtype=jnp.float32)}
        return mean.total, aux | ({"batch_stats": {"compose": after}} if after else {})

    def tirg(q: jax.Array, v: jax.Array, scale: jax.Array, valid: jax.Array, key: jax.Array | None) -> jax.Array:
        if o.loss == "softmax":
            return losses.in_batch_softmax(q, v, scale, valid)
        drawn = losses.draw_triplets(jax.random.key(0) if key is None else key, len(q))
        features = scale * normalise(jnp.concatenate([q, v]))
        return losses.soft_triplet(features, drawn, jnp.all(jnp.concatenate([valid, valid])[drawn], 1))

    def loss(params: dict, memory: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict]:
        key_encode, key_objective = split_key(key)
        z, after = towers_of(params, memory, batch, key_encode)
        value, aux = objective(params, memory, z, batch, key_objective)
        return value, aux | ({"batch_stats": {**aux.get("batch_stats", {}), "image": after}} if after else {})

    def update(memory: Any, params: Any, aux: dict) -> Any:
        del params
        memory = {**memory, **({"batch_stats": aux["batch_stats"]} if "batch_stats" in aux else {})}
        return memory | ({"step": memory["step"] + 1} if o.first_stage else {})

    def unit(x: jax.Array) -> jax.Array:
        """Levels [b, levels, E] made unit vectors, side by side, as one unit vector."""
        return (normalise(x) / jnp.sqrt(jnp.float32(levels))).reshape(x.shape[0], -1)

    def compose(params: dict, images: jax.Array, tokens: jax.Array) -> jax.Array:
        stats = params.get("batch_stats", {})
        v, maps, _ = see(params, stats, images, None)
        return unit(join(params, stats, v, maps, say(params, tokens, None), None, None, False)[0])

    def flops(batch_spec: dict) -> float:
        (batch, height, wide, _), (_, length) = batch_spec["image"].shape, batch_spec["tokens"].shape
        seen, said = (sum(name in batch_spec for name in names) for names in (IMAGES, TEXTS))
        per_image, per_text = kinds.of(image).flops(image, height, wide, True), kinds.of(text).flops(text, length)
        return seen * per_image + said * per_text + 2.0 * 4 * batch * o.width * levels + 2.0 * (8 * o.width**2 if composer else 0)

    return Method(
        init=init,
        encode=None if batch_bn else encode,
        objective=None if batch_bn else objective,
        loss=loss,
        update=update,
        embed_image=lambda params, images: unit(see(params, params.get("batch_stats", {}), images, None)[0]),
        embed_text=lambda params, tokens: unit(say(params, tokens, None)),
        flops=flops,
        rules=((r"(^|/)(scale|memory/step)$", P()), *RULES),
        compose=compose,
        waits=(("first_stage", o.first_stage),) if o.first_stage else (),
        constant=kinds.constant(image),
        with_memory=lambda params, memory: {**params, **{k: v for k, v in memory.items() if k == "batch_stats"}},
    )


def ids_of(batch: Batch) -> Ids:
    """Which rows of a batch are about the same images and texts; a text of padding alone is absent, and so is what needs it."""
    said = {name: jnp.where(jnp.any(batch[name] != 0, 1), first_equal(batch[name]), -1) for name in TEXTS if name in batch}
    rows = jnp.arange(len(batch["tokens"]))
    absent = jnp.full_like(rows, -1)
    target, reference = batch.get("id", rows), batch.get("id_reference", absent)
    modification = said.get("tokens_modification", absent)
    query = jnp.where((reference >= 0) & (modification >= 0), first_equal(reference, modification), -1)
    return Ids(target, reference, query, said["tokens"], said.get("tokens_reference", absent))


def first_equal(*keys: jax.Array) -> jax.Array:
    """int32 [B]: the first row that is the same in all of the int arrays, each [B] or [B, L]."""
    same = jnp.ones((), bool)
    for key in keys:
        key = key.reshape(len(key), -1)
        same &= jnp.all(key[:, None] == key[None], -1)
    return jnp.argmax(same, 1).astype(jnp.int32)
