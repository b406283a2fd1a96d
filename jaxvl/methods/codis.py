r"""CODIS: Duan, Chen, Tran, Yang, Xu, Zeng and Chilimbi, Multi-modal Alignment using Representation Codebook, CVPR 2022,
https://arxiv.org/abs/2203.00048, on the trunk of ALBEF (`fused.py`).

Image and caption are two views of one entity. Both are assigned to the codes of one dictionary, a learned codebook
:math:`C` of K unit vectors, and the momentum teacher of one view tells the student of the other which codes to predict. With
student features :math:`z_v, z_t`, the teacher's :math:`z_v^m, z_t^m`, :math:`H(p, y) = -\sum y \log p` averaged over rows:

.. math::
    T_v = \operatorname*{arg\,min}_{T \in \Pi(u, v)} \langle T, D(z_v^m, C) \rangle, \quad D_{ik} = 1 - \cos(z^m_i, c_k),
    \qquad T_t \text{ likewise}

    L_\text{code} = \langle T_v, D(z_v^m, C) \rangle + \langle T_t, D(z_t^m, C) \rangle
      + H(\mathrm{softmax}(z_t C / \tau_c), \bar T_v) + H(\mathrm{softmax}(z_v C / \tau_c), \bar T_t)

    L_\text{ica} = \text{mean of } H(z_v T^*), H(z_t V^*), H(z_v V^*), H(z_t T^*)
      \text{ against } \alpha \text{ teacher} + (1 - \alpha) \text{ one-hot}

    L = L_\text{mlm} + L_\text{itm} + L_\text{ica} + L_\text{code}

The masses u of samples and v of codes are uniform: that all codes are used alike is what keeps them from collapsing.

The authors published no code. The paper fixes the form of the terms, the shared codebook, who teaches whom, and the trunk with its
schedule; it names IPOT as the solver. The solver's constants are those of the published IPOT routine of UNITER (Chen et al.,
ECCV 2020, https://arxiv.org/abs/1909.11740). What is our choice is said at its key in `CodisOptions`.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxvl.losses.codebook import Solver, assign, codebook_terms, cosines, log_predictions, usage
from jaxvl.losses.momentum import contrast
from jaxvl.losses.transport import ipot_flops, sinkhorn_flops
from jaxvl.methods.fused import Draws, Trunk, Views, on_trunk, trunk
from jaxvl.methods.fused_options import of_method
from jaxvl.methods.method import Batch, Method, split_key, unit
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions


class CodisOptions(NamedTuple):
    """The keys of the `method` section for CODIS; those not told here are the trunk's, see `TrunkOptions` in `fused_options.py`.

    code: whether L_code and its codebook are there; without, this is ALBEF with intra-modal terms.
    codes: K. code_temperature: τ_c, 0 for the learned temperature of the other terms; a constant of its own is our choice.
    code_targets: "rows" rescales the rows of a plan to sum to 1, "plan" takes it as it is; they differ by the solver's error.
    ot_weight, cross_weight: of the transport terms and of the predictions in L_code; 1 in the paper.
    ot_solver: "ipot" takes ipot_beta, ipot_iterations and ipot_inner; "sinkhorn", which SwAV uses, sinkhorn_epsilon and
    sinkhorn_iterations. ot_scope: which samples share the codes out among them: "global" the whole batch; "local" groups of ot_group
    consecutive rows, as on the devices of a run that gathers nothing; "batch_plus_queue" the batch and the view's queue, a plan of
    (batch + queue) x codes floats for each view, split over the devices. The paper leaves
    it open; with many more codes than samples a plan spreads every sample over many of them, so the batch is the default.
    freeze_steps: steps in which the codebook does not move yet. renorm_codes: whether the stored codes are cut back to unit norm
    before every step; the forward pass normalises them in any case, so this keeps their learning rate from sinking. Both are
    habits of SwAV, and off. Initial codes are Gaussian directions; config.optim.decay should not match "codebook".
    ica_reduction: "mean4" averages the four alignment terms, "sum" adds them up, "halves" adds the means of the cross-modal two and
    of the intra-modal two. ica_intra: targets of the intra-modal terms, "soft" with the teacher's share, "hard" without as in TCL. The
    paper leaves both open. A soft target of this kind is close to one-hot: nothing is more like a feature than itself.
    Two views of an image, where TCL has them and ALBEF has one, are config.augment.views.
    """

    name: Literal["codis"] = "codis"
    code: bool = True
    codes: int = 4000
    code_temperature: float = 0.1
    code_targets: Literal["rows", "plan"] = "rows"
    ot_weight: float = 1.0
    cross_weight: float = 1.0
    ot_solver: Literal["ipot", "sinkhorn"] = "ipot"
    ot_scope: Literal["global", "local", "batch_plus_queue"] = "global"
    ot_group: int = 64
    ipot_beta: float = 0.5
    ipot_iterations: int = 50
    ipot_inner: int = 1
    sinkhorn_epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    freeze_steps: int = 0
    renorm_codes: bool = False
    ica_reduction: Literal["mean4", "sum", "halves"] = "mean4"
    ica_intra: Literal["soft", "hard"] = "soft"
    width: int = 256
    fusion_depth: int = 6
    temperature: float = 0.07
    queue: int = 65_536
    momentum: float = 0.995
    alpha: float = 0.4
    alpha_steps: int = 0
    unfilled: Literal["contrast", "mask"] = "contrast"
    scope: Literal["group", "global"] = "group"
    group_size: int = 64
    ids: bool = False
    mlm: bool = True
    mlm_rate: float = 0.15
    mlm_cap: int = 0
    mlm_distill_axis: Literal["vocab", "seq_legacy"] = "vocab"
    chunks: int = 1


RULES = ((r"(?:^|/)codebook$", P(("fsdp", "tensor"), None)),)


def build(image: VitOptions, text: TextOptions, options: CodisOptions = CodisOptions()) -> Method:
    """CODIS: the params and memory of `fused.py`, and params["codebook"] float32 [K, D]. Raises ValueError for options that cannot be."""
    check(options)
    o = options
    base = trunk(image, text, of_method(o))

    def init(key: jax.Array, batch_spec: dict) -> tuple[dict, dict]:
        key_base, key_codes = jax.random.split(key)
        params, memory = base.init(key_base, batch_spec)
        return ({**params, "codebook": unit(jax.random.normal(key_codes, (o.codes, o.width)))} if o.code else params), memory

    def constrain(params: dict) -> dict:
        params = base.constrain(params)
        return {**params, "codebook": unit(params["codebook"])} if o.code and o.renorm_codes else params

    plain = on_trunk(base, partial(terms, base, o), partial(flops, base, o), partial(programs, base, o))
    waits = (*plain.waits, *([("freeze_steps", o.freeze_steps)] if o.code else []))
    return plain._replace(init=init, constrain=constrain, rules=(*RULES, *base.rules), waits=waits)


def terms(
    base: Trunk, o: CodisOptions, params: dict, memory: dict, encoded: dict, batch: Batch, key: jax.Array | None, draws: Draws = Draws()
) -> tuple[jax.Array, dict, dict]:
    """(loss, aux, what was computed on the way) of a step; `draws` fixes what would be random."""
    key_teacher, key_pairs = split_key(key)
    now = base.views(params, memory, encoded, batch, key_teacher)

    each, ica = alignment(base, o, memory, now, batch)
    code, watched = codebook(o, params["codebook"], memory, now) if o.code else ({}, {})
    weights = {"loss_ot_image": o.ot_weight, "loss_ot_text": o.ot_weight, "loss_t2p": o.cross_weight, "loss_i2p": o.cross_weight}
    each |= code
    if o.code:
        each["loss_code"] = sum((weights[name] * term for name, term in code.items()), jnp.float32(0))

    paired, on_the_way = base.pair_losses(params, now, encoded, batch, key_pairs, draws)
    loss = paired.get("loss_mlm", 0.0) + paired["loss_itm"] + ica + each.get("loss_code", 0.0)
    aux = {
        **each,
        "loss_ica": ica,
        **paired,
        **watched,
        "temperature": now.temperature,
        "alpha": now.alpha,
        "memory": base.remember(memory, now, batch),
    }
    return loss, aux, {"views": now, **on_the_way}


def alignment(base: Trunk, o: CodisOptions, memory: dict, now: Views, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
    """The four terms of L_ica, and what they come to."""
    V, T = base.candidates(memory, now, batch)

    def H(x: jax.Array, C: Any, guide: jax.Array | None) -> jax.Array:
        return contrast(x, C, now.temperature, guide=guide, alpha=now.alpha, groups=now.groups)

    soft = o.ica_intra == "soft"
    each = {
        "loss_i2t": H(now.v, T, now.v_m),
        "loss_t2i": H(now.t, V, now.t_m),
        "loss_i2i": H(now.v, V, now.v_m if soft else None),
        "loss_t2t": H(now.t, T, now.t_m if soft else None),
    }
    return each, sum(each.values(), jnp.float32(0)) / {"mean4": 4, "sum": 1, "halves": 2}[o.ica_reduction]


def codebook(o: CodisOptions, C: jax.Array, memory: dict, now: Views) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The four terms of L_code, and how the codes are used."""
    C = jnp.where(memory["step"] < o.freeze_steps, lax.stop_gradient(C), C) if o.freeze_steps else C
    z, z_m = jnp.stack([now.v, now.t]), lax.stop_gradient(jnp.stack([now.v_m, now.t_m]))
    cosine = cosines(z_m, C)
    queue = valid = None
    if o.ot_scope == "batch_plus_queue":
        queue = cosines(jnp.stack([memory["image_queue"], memory["text_queue"]]), lax.stop_gradient(C))
        valid = jnp.arange(o.queue) < memory["filled"] if o.unfilled == "mask" else None
    plan = assign(cosine, solver(o), queue, valid)
    log_p = log_predictions(z, C, o.code_temperature or now.temperature)
    found = codebook_terms(cosine, log_p, plan, normalise_rows=o.code_targets == "rows")
    return {f"loss_{name}": term for name, term in found._asdict().items()}, usage(cosine, log_p, plan)


def solver(o: CodisOptions) -> Solver:
    """How samples are assigned to codes."""
    iterations = o.ipot_iterations if o.ot_solver == "ipot" else o.sinkhorn_iterations
    return Solver(o.ot_solver, o.ipot_beta, o.sinkhorn_epsilon, iterations, o.ipot_inner, o.ot_scope, o.ot_group)


def check(o: CodisOptions) -> None:
    """Raises ValueError naming the key, its value and what would be right."""
    for key in ("codes", "ot_group", "ipot_iterations", "ipot_inner", "sinkhorn_iterations"):
        if getattr(o, key) < 1:
            raise ValueError(f"config.method.{key} is {getattr(o, key)}; it must be at least 1")
    for key in ("code_temperature", "ot_weight", "cross_weight", "freeze_steps"):
        if getattr(o, key) < 0:
            raise ValueError(f"config.method.{key} is {getattr(o, key)}; it must be at least 0")
    for key in ("ipot_beta", "sinkhorn_epsilon"):
        if getattr(o, key) <= 0:
            raise ValueError(f"config.method.{key} is {getattr(o, key)}; it must be above 0")


def flops(base: Trunk, o: CodisOptions, batch_spec: dict) -> dict[str, float]:
    """Forward FLOPs of one example by term; for what has no backward pass, and for constants that need none, see `Trunk.flops`."""
    B = batch_spec["image"].shape[0]
    product = 2.0 * o.width  # a logit; a student's also costs two products of the backward pass, a teacher's none
    group = B if o.scope == "global" else o.group_size
    guides = 4 if o.ica_intra == "soft" else 2
    shares = {**base.flops(batch_spec), "ica": product * (group + o.queue) * (4 * 2 + guides) / 3}
    if not o.code:
        return shares
    queue = o.queue if o.ot_scope == "batch_plus_queue" else 0
    rows = o.ot_group if o.ot_scope == "local" else B + queue
    plans = B // o.ot_group if o.ot_scope == "local" else 1
    s = solver(o)
    solve = ipot_flops(rows, o.codes, s.iterations, s.inner) if s.name == "ipot" else sinkhorn_flops(rows, o.codes, s.iterations)
    # Of the teacher's cosines the codes alone have a gradient, of those of the queue nothing has.
    return {**shares, "codebook": 2 * product * o.codes * (3 + 2 + queue / B) / 3, "transport": 2 * plans * solve / B / 3}


def programs(base: Trunk, o: CodisOptions, batch_spec: dict) -> dict[str, tuple]:
    """Some terms as programs of the features, with their shapes; that of the codebook solves its plans itself."""
    B = batch_spec["tokens"].shape[0]
    G = 1 if o.scope == "global" else B // o.group_size
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    feature, queue, codes = of(B, o.width), of(o.queue, o.width), of(o.codes, o.width)

    def views(v: jax.Array, t: jax.Array, v_m: jax.Array, t_m: jax.Array, tau: jax.Array) -> Views:
        return Views(v, t, v_m, t_m, *(None,) * 4, temperature=tau, alpha=jnp.float32(o.alpha), groups=G)  # type: ignore[arg-type]

    def ica(v: jax.Array, t: jax.Array, v_m: jax.Array, t_m: jax.Array, V: jax.Array, T: jax.Array, tau: jax.Array) -> jax.Array:
        memory = {"image_queue": V, "text_queue": T, "id_queue": jnp.zeros(o.queue, jnp.int32), "filled": jnp.int32(o.queue)}
        return alignment(base, o, memory, views(v, t, v_m, t_m, tau), {"id": jnp.arange(B)})[1]

    def code(
        v: jax.Array, t: jax.Array, v_m: jax.Array, t_m: jax.Array, V: jax.Array, T: jax.Array, C: jax.Array, tau: jax.Array
    ) -> jax.Array:
        memory = {"image_queue": V, "text_queue": T, "filled": jnp.int32(o.queue), "step": jnp.int32(o.freeze_steps)}
        return sum(codebook(o, C, memory, views(v, t, v_m, t_m, tau))[0].values(), jnp.float32(0))

    def plans(v_m: jax.Array, t_m: jax.Array, V: jax.Array, T: jax.Array, C: jax.Array) -> jax.Array:
        queues = cosines(jnp.stack([V, T]), C) if o.ot_scope == "batch_plus_queue" else None
        return assign(cosines(jnp.stack([v_m, t_m]), C), solver(o), queues)

    return {
        "ica": (jax.value_and_grad(ica, (0, 1, 6)), (*(feature,) * 4, queue, queue, of())),
        "codebook": (jax.value_and_grad(code, (0, 1, 6)), (*(feature,) * 4, queue, queue, codes, of())),
        "transport": (plans, (feature, feature, queue, queue, codes)),
    }
