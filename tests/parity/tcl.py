"""TCL against the numbers of its published code: every loss, target, gradient, queue, average and schedule, and whole steps.

Closed forms are compared in float32 and float64, whole models in float32; all of it but the trajectory also with the batch split
over as many of 2, 4 and 8 devices as it divides over.
"""
import contextlib
import itertools
import json
import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxvl.interop import albef
from jaxvl.losses import matching, mlm
from jaxvl.losses.local import local_information, pool_grid, sample_losses
from jaxvl.losses.momentum import Candidates, average, contrast, enqueue
from jaxvl.mesh import MeshOptions, ShardingError, make_mesh, path_str, shardings
from jaxvl.methods import tcl
from jaxvl.methods.fused import Draws, trunk
from jaxvl.methods.fused_options import HIGH, LOW, of_method
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.optim import OptimOptions, learning_rate, make_optimizer
from tests.parity.case import Case, Check, has

# E7: the published optimiser decays every parameter that is no vector, embeddings and the temperature among them.
DECAYED = r"(kernel|embed|types|pos|cls|temperature)$"


def close(got, want, name="", rtol=2e-5, atol=1e-6):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=name)


def same_gradient(got, want, name, rtol=2e-4):
    close(got, want, name, rtol=rtol, atol=1e-6 * max(np.abs(want).max(), 1))


@cache
def compiled(f, value_and_grad=()):
    return jax.jit(jax.value_and_grad(f, value_and_grad, has_aux=True) if value_and_grad else f)


def everywhere(f, rows, whole=(), argnums=()):
    """f(*rows, *whole) (or its value and gradients) in float64, in float32, and in float32 with the rows on 2, 4 and 8 devices."""
    run = compiled(f, argnums)
    wide = lambda x, kind: np.asarray(x, kind) if np.asarray(x).dtype.kind == "f" else np.asarray(x)
    with jax.enable_x64(True):
        yield "float64", run(*(wide(x, np.float64) for x in (*rows, *whole)))
    args = [wide(x, np.float32) for x in (*rows, *whole)]
    yield "float32", run(*args)
    for devices in (2, 4, 8):
        if all(len(x) % devices == 0 for x in rows):
            mesh = make_mesh(MeshOptions(devices, 1, 1), jax.devices()[:devices])
            with jax.set_mesh(mesh):
                placed = [jax.device_put(x, NamedSharding(mesh, P("data") if i < len(rows) else P())) for i, x in enumerate(args)]
                yield f"{devices} devices", run(*placed)


def each_case(check):
    def run(case: Case) -> None:
        for i in range(int(case["n_cases"])):
            check(lambda name, i=i: case[f"c{i}/{name}"])

    return run


def alignment(v, t, v_m, t_m, ids, image_queue, text_queue, queue_ids, tau, alpha):
    """The four contrasts; ids may be None."""
    V, T = Candidates(v_m, image_queue, ids, queue_ids), Candidates(t_m, text_queue, ids, queue_ids)
    soft = partial(contrast, temperature=tau, alpha=alpha)
    losses = soft(v, T, guide=v_m), soft(t, V, guide=t_m), contrast(v, V, tau), contrast(t, T, tau)
    return sum(losses), losses


def one_hot_alignment(v, t, v_m, t_m, *rest):
    return alignment(v, t, v_m, t_m, None, *rest[:2], None, *rest[2:])


def similarities(c, tau):
    wide = lambda name: np.float64(c(name))
    V, T = (np.concatenate([wide(f"{k}_feat_m"), wide(f"{k}_queue").T]) for k in ("image", "text"))
    return {"i2t": (wide("image_feat") @ T.T / tau, wide("image_feat_m") @ T.T / tau), "t2i": (wide("text_feat") @ V.T / tau, wide("text_feat_m") @ V.T / tau)}


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def targets(c, tau, alpha, positives):
    for way, (s, m) in similarities(c, tau).items():
        close(s, c(f"sim_{way}"), f"sim_{way}", rtol=1e-6)
        close(alpha * softmax(m) + (1 - alpha) * positives, c(f"targets_{way}"), f"targets_{way}", rtol=1e-5)


def four_losses(c, losses, where, tau):
    for way, got in zip(("i2t", "t2i", "i2i", "t2t"), losses, strict=True):
        close(got, c(f"loss_{way}"), f"{way}, {where}", rtol=1e-3 if tau <= 0.002 and where != "float64" else 2e-5)


def ita_imc(c):
    tau, alpha = float(np.clip(np.float64(c("temp_raw")), LOW, HIGH)), float(c("alpha"))
    close(tau, c("temp"), rtol=1e-6)
    targets(c, tau, alpha, np.eye(*c("targets_i2t").shape))
    rows = [c(f"{k}_feat{m}") for m in ("", "_m") for k in ("image", "text")]
    for where, ((_, losses), grads) in everywhere(one_hot_alignment, rows, (c("image_queue").T, c("text_queue").T, tau, alpha), (0, 1, 6)):
        four_losses(c, losses, where, tau)
        close((losses[0] + losses[1]) / 2, c("loss_cma_mean2"), where, rtol=1e-3 if tau <= 0.002 else 2e-5)
        close((losses[2] + losses[3]) / 2, c("loss_imc_mean2"), where, rtol=1e-3 if tau <= 0.002 else 2e-5)
        for got, name in zip(grads, ("image_feat", "text_feat", "temp"), strict=True):
            same_gradient(got, c(f"grad_{name}"), f"{name}, {where}", rtol=1e-3 if tau <= 0.002 else 2e-4)


def retrieval_targets(c):
    tau, alpha, ids, queue_ids = float(c("temp")), float(c("alpha")), np.int32(c("idx")), np.int32(c("idx_queue"))
    positives = ids[:, None] == np.concatenate([ids, queue_ids])
    positives = positives / positives.sum(1, keepdims=True)
    close(positives, c("sim_targets"))
    targets(c, tau, alpha, positives)
    rows = [*(c(f"{k}_feat{m}") for m in ("", "_m") for k in ("image", "text")), ids]
    for where, (_, losses) in everywhere(alignment, rows, (c("image_queue").T, c("text_queue").T, queue_ids, tau, alpha)):
        four_losses(c, losses, where, tau)


def local_terms(text, image, text_local, mask, image_local, tau):
    grid = (math.isqrt(image_local.shape[1]),) * 2
    pooled = pool_grid(image_local, grid, math.isqrt(grid[0]))
    of_text = local_information(text, text_local, tau, valid=mask)
    of_image = local_information(image, pooled, tau)
    return of_text + of_image, (of_text, of_image, pooled, sample_losses(text, text_local, tau, valid=mask)[0][0])


def lmi(c):
    mask, tau = c("text_mask_wo_cls").astype(bool), float(c("temp"))
    rows, counted = [c("text_global"), c("image_global"), c("text_local_m"), mask, c("image_local_m")], mask.any(1)
    for where, ((_, (text, image, pooled, each)), grads) in everywhere(local_terms, rows, (tau,), (0, 1, 5)):
        close(pooled, c("image_local_pooled"), where)
        close(image, c("loss_image_lmi"), where)
        close(text, c("loss_text_lmi_safe"), where)
        close(np.where(counted, each, np.nan), np.where(counted, c("text_row_losses"), np.nan), where)
        if counted.all():
            close(text, c("loss_text_lmi"), where)
        else:
            assert not np.isfinite(c("loss_text_lmi")), "the published code divides by zero here"
        for got, name in zip(grads, ("text_global", "image_global", "temp"), strict=True):
            same_gradient(got, c(f"grad_{name}"), f"{name}, {where}")


def itm_losses(sim_i2t, sim_t2i, ids, logits):
    """Batch columns of the similarities; weights as published, with and without ids, and the loss of logits [B, 3, 2]."""
    own = {"i2t": sim_i2t[None], "t2i": sim_t2i[None]}
    plain = {f"weights_{way}": matching.weights(s)[0] for way, s in own.items()}
    by_id = {f"weights_{way}_retrieval": matching.weights(s, ids[None])[0] for way, s in own.items()}
    return {**plain, **by_id, "loss_itm": matching.matching(logits)}


def itm(c):
    B = len(c("idx"))
    np.testing.assert_array_equal(c("itm_labels"), np.arange(3 * B) < B)
    logits = c("itm_logits").reshape(3, B, 2).swapaxes(0, 1)
    rows = [c("sim_i2t")[:, :B], c("sim_t2i")[:, :B], np.int32(c("idx")), logits]
    for where, got in everywhere(itm_losses, rows):
        for name, value in got.items():
            close(value, c(name), f"{name}, {where}")


def mlm_losses(logits, teacher, labels, alpha):
    masked = mlm.masked_as(labels, labels)
    sums = mlm.word_losses(logits, teacher, masked.labels, masked.counted)
    legacy = mlm.word_losses(logits, teacher, masked.labels, masked.counted, axis=1)
    loss, hard, soft = mlm.masked_words(sums, alpha)
    return loss, {"loss_mlm": loss, "loss_ce": hard, "loss_distill": soft, "loss_distill_seqaxis_bug": mlm.masked_words(legacy, alpha)[2]}


def masked_language_model(c):
    masked, wanted_grad = (c("labels") != -100).any(), c("grad_logits")
    for where, ((_, got), (grad,)) in everywhere(mlm_losses, [c("logits"), c("teacher_logits"), np.int32(c("labels"))], (float(c("alpha")),), (0,)):
        for name, value in got.items():
            want = c(name)  # where nothing is masked the published code divides by zero
            close(value, want if masked else 0.0, f"{name}, {where}")
        same_gradient(grad, wanted_grad if masked else np.zeros_like(wanted_grad), where)


def queue(case: Case) -> None:
    """Also with the queues split over as many of 8 devices as divide them."""
    size, feats = int(case["queue_size"]), {k: case[f"{k}_feats"] for k in ("image", "text")}
    assert feats["image"].shape[1] == int(case["batch"])
    devices = max(n for n in (1, 2, 4, 8) if size % n == 0)
    mesh = make_mesh(MeshOptions(devices, 1, 1), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
        queues = {k: put(case[f"{k}_queue_init"].T) for k in feats} | {"idx": put(np.full(size, -100, np.int32))}
        pointer = 0
        for step in range(len(feats["image"])):
            for name, rows in (("image", feats["image"]), ("text", feats["text"]), ("idx", np.int32(case["idx"]))):
                queues[name] = compiled(enqueue)(queues[name], pointer, rows[step])
                np.testing.assert_array_equal(queues[name].T if name != "idx" else queues[name][None], case[f"{name}_queue_after"][step])
            assert queues["image"].sharding.spec == P("data") or devices == 1
            pointer = (pointer + feats["image"].shape[1]) % size
            assert pointer == case["ptr_after"][step]


def ema(case: Case) -> None:
    names = sorted(name.removeprefix("param_m_init_") for name in case if name.startswith("param_m_init_"))
    teacher, student = ({n: case[f"{kind}_{n}"] for n in names} for kind in ("param_m_init", "param"))
    for step in range(1, int(case["steps"]) + 1):
        teacher = average(teacher, student, float(case["momentum"]))
        for n in names:
            close(teacher[n], case[f"param_m_step{step}_{n}"], rtol=0)


# Table 8 of the specification and its downstream recipes: peak, end and start of the warm-up, and its steps.
RATES = {"pretrain": (1e-4, 1e-5, 1e-5, 2000), "retrieval": (1e-5, 1e-6, 1e-5, 0), "nlvr_or_ve": (2e-5, 1e-6, 1e-5, 100), "vqa": (2e-5, 1e-6, 1e-5, 400)}


def lr_schedule(case: Case) -> None:
    for kind in sorted({name.split("/")[0] for name in case}):
        peak, end, start, warmup = RATES[kind]
        epoch, steps = case[f"{kind}/epoch"], len(case[f"{kind}/lr"])
        np.testing.assert_array_equal(case[f"{kind}/iter"], np.concatenate([np.arange(n) for n in np.bincount(epoch)]))
        options = OptimOptions(
            learning_rate=peak, schedule="epochs", epochs=int(epoch.max()) + 1, end_factor=end / peak, warmup_from=start / peak, warmup_steps=warmup, warmup_every=100
        )
        got = jax.jit(jax.vmap(learning_rate(options, steps)))(np.arange(steps))
        close(got, case[f"{kind}/lr"], kind, rtol=2e-6, atol=0)


class Tiny:
    """The model of an end-to-end file: its options, its state as params and memory, and the meshes it is run on."""

    def __init__(self, case: Case, retrieval: bool = False):
        self.case, self.config = case, json.loads(str(case["config"]))
        c = self.config
        self.state = {name.removeprefix("sd/"): case[name] for name in case if name.startswith("sd/")}
        sizes = dict(variant="", heads=c["heads"], dtype="float32")
        image = VitOptions(**sizes, patch=c["P"], width=c["W"], depth=c["VD"], mlp_dim=4 * c["W"])
        text = TextOptions(
            **sizes, vocab_size=c["V"], mask_id=2, width=c["H"], depth=c["FL"], mlp_dim=c["I"], positions=c["maxpos"], token_types=2, causal=False, pool="first",
            post_norm=True, embed_norm=True, final_norm=False, eps=1e-12,
        )  # fmt: skip
        grid = c["img"] // c["P"]
        # Any share of the teacher can be told in millionths of `alpha_steps`, which the step count of the memory sets.
        self.options = tcl.resolve(tcl.TclOptions(
            width=c["D"], queue=c["Q"], fusion_depth=c["NL"] - c["FL"], momentum=float(c["mom"]), alpha=1.0, alpha_steps=1_000_000, scope="global",
            pool_grid=4 if retrieval else math.isqrt(grid), ids=retrieval, mlm=not retrieval,
        ))  # fmt: skip
        self.trunk = trunk(image, text, of_method(self.options))
        self.depth = c["FL"]
        spec = {"image": np.zeros((1, c["img"], c["img"], 3)), "tokens": np.zeros((1, c["L"]), np.int32)}
        self.shapes = jax.eval_shape(lambda: self.trunk.init(jax.random.key(0), spec))
        self.params, self.memory = self.read(self.state)
        # The files keep views of integer buffers, so that in `sd` the pointer and the ids are as the call left them.
        self.memory["pointer"] = np.int32(c["ptr0"])
        if retrieval:  # its files keep the parts of pre-training that the loss has no use for
            left = list(albef.unknown(self.state, {**self.shapes[0], **self.rest()}, self.shapes[1]["teacher"], text_layers=self.depth))
            assert all(re.match(r"(text_encoder_m|text_encoder)\.", name) for name in left), left
        else:
            assert not albef.unknown(self.state, {**self.shapes[0], **self.rest()}, self.shapes[1]["teacher"], text_layers=self.depth)

    def rest(self):
        return {name: leaf for name, leaf in self.shapes[1].items() if name not in ("teacher", "step")}

    def read(self, state):
        params = albef.tree(state, self.shapes[0], text_layers=self.depth)
        teacher = albef.tree(state, self.shapes[1]["teacher"], text_layers=self.depth, teacher=True)
        return params, {**albef.tree(state, self.rest(), text_layers=self.depth), "teacher": teacher, "step": np.int32(0)}

    def everywhere(self, f, *rows):
        """f(params, memory, *rows) on one device, and on eight of which as many split the batch as it divides over."""
        run = jax.jit(f)
        yield run(self.params, self.memory, *rows)
        state = (self.params, self.memory)
        mesh, place = next(self.meshes(state))
        with jax.set_mesh(mesh):
            split = lambda x: jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
            yield run(*jax.device_put(state, place), *jax.tree.map(split, rows))

    def meshes(self, state):
        """Meshes over which the batch and every leaf divide, eight devices first."""
        for ways in (8, 4, 2, 1):
            for sizes in ((ways // 2, 2, 8 // ways), (ways, 1, 8 // ways), (ways, 1, 1)):
                if self.config["B"] % ways == 0 and min(sizes) > 0:
                    mesh = make_mesh(MeshOptions(*sizes), jax.devices()[: math.prod(sizes)])
                    with contextlib.suppress(ShardingError):
                        yield mesh, shardings(state, self.trunk.rules, mesh)


def batch_of(case, at=lambda name: name):
    pixels = lambda name: np.float32(case[at(name)]).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(case[at("attention_mask")] == 1, case[at("input_ids")] != 0)
    return {"image": pixels("image"), "image_aug": pixels("image_aug"), "tokens": np.int32(case[at("input_ids")])}


def at_alpha(memory, alpha):
    return {**memory, "step": np.int32(np.round(1e6 * np.float64(alpha)))}


def draws_of(case, at=lambda name: name):
    masked = mlm.masked_as(jnp.int32(case[at("mlm_input_ids")]), jnp.int32(case[at("mlm_labels")])) if at("mlm_labels") in case else None
    return Draws(jnp.int32(case[at("neg_image_idx")]), jnp.int32(case[at("neg_text_idx")]), masked)


def in_order(logits):
    """[B, 3, 2] as published: all matches, then all with another image, then all with another text."""
    return np.asarray(logits).swapaxes(0, 1).reshape(-1, 2)


LOSSES = {"loss_i2t": "", "loss_t2i": "", "loss_i2i": "", "loss_t2t": "", "loss_ita": "", "loss_itm": "", "loss_mlm": "", "loss_lmi_text": "", "loss_lmi_image": "",
          "loss_mlm_ce": "loss_mlm_hard", "loss_mlm_distill": "loss_mlm_soft"}  # fmt: skip


def whole_step(tiny, batch, draws):
    """(params, memory, batch, draws) -> loss, aux, what was on the way, gradients."""

    def f(params, memory, batch, draws):
        def loss(params):
            encoded = tiny.trunk.encode(params, batch, None)
            value, aux, way = tcl.terms(tiny.trunk, tiny.options, params, memory, encoded, batch, None, draws)
            return value, (aux, way, encoded)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return tiny.everywhere(f, batch, draws)


def compare_gradients(tiny, grads, want):
    """Leaf by leaf and layer by layer, by the distance relative to the length."""
    flat = lambda tree: {path_str(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    got, want = flat(grads), flat(want)
    for name in want:
        for a, b in zip(got[name], want[name], strict=True) if "/blocks/" in name else [(got[name], want[name])]:
            assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b) + 2e-6, name


def e2e_pretrain(case: Case) -> None:
    tiny = Tiny(case)
    tiny.memory = at_alpha(tiny.memory, case["alpha"])
    c, batch, draws = tiny.config, batch_of(case), draws_of(case)
    assert math.isclose(tiny.options.momentum, case["momentum"], rel_tol=1e-6)
    want = albef.tree({n.removeprefix("grad/"): case[n] for n in case if n.startswith("grad/")}, tiny.shapes[0], text_layers=tiny.depth)
    for (loss, (aux, way, encoded)), grads in whole_step(tiny, batch, draws):
        now = way["views"]
        for name, ours in LOSSES.items():
            close(aux[ours or name], case[name], name, rtol=1e-4)
        close(loss, case["loss_total"], "total", rtol=1e-4)
        state = partial(close, rtol=1e-5, atol=2e-5)
        for name, got in (
            ("image_embeds", encoded["image"]), ("text_embeds", encoded["text"]), ("image_embeds_m", now.image_m), ("text_embeds_m", now.text_m),
            ("image_feat", now.v), ("text_feat", now.t), ("image_feat_m", now.v_m), ("text_feat_m", now.t_m),
            ("image_local_pooled_m", way["image_local"]), ("text_local_m", way["text_local"]),
        ):  # fmt: skip
            state(got, case[name], name)
        for name, a, b in (("itm_weights_i2t", now.v, now.t_m), ("itm_weights_t2i", now.t, now.v_m)):
            state(matching.weights((np.asarray(a) @ np.asarray(b).T / aux["temperature"])[None])[0], case[name], name)
        state(in_order(way["itm_logits"]), case["itm_logits"], "itm_logits", atol=1e-4)
        close(aux["temperature"], case["temp_after_clamp"])
        after = aux["memory"]
        assert int(after["pointer"]) == int(case["queue_ptr_after"][0])
        for kind in ("image", "text"):
            state(after[f"{kind}_queue"].T, case[f"{kind}_queue_after"], kind)
        some = {name.removeprefix("ema_after/"): case[name] for name in case if name.startswith("ema_after/")}
        flat = {path_str(path): x for path, x in jax.tree_util.tree_leaves_with_path(after["teacher"])}
        ours = {albef.theirs(n, text_layers=tiny.depth, teacher=True): n for n in albef.NAMES if "{i}" not in n.theirs and "{u}" not in n.theirs}
        for name, value in some.items():
            state(flat[ours[name].ours], ours[name].transform.ours(value), name, atol=1e-6)
        compare_gradients(tiny, grads, want)
    words_of_both(case, tiny, encoded, now)
    groups(case, tiny)
    assert c["lens"] == case["attention_mask"].sum(1).tolist()


def words_of_both(case, tiny, encoded, now):
    """Vocabulary logits of every position, the student's from its view and the teacher's from its own."""

    @jax.jit
    def logits(params, tokens, mask, images):
        t = tiny.trunk
        return t.words(params, t.fuse(params, t.text_states(params, tokens, mask), mask, t.keys_values(params, images)))

    tokens, mask = np.int32(case["mlm_input_ids"]), case["attention_mask"] == 1
    one_device = lambda tree: jax.tree.map(np.asarray, tree)
    for name, params, images in (("mlm_logits", tiny.params, encoded["image"]), ("mlm_logits_teacher", now.teacher, now.image_m)):
        close(np.asarray(logits(*one_device((params, tokens, mask, images))))[mask], case[name][mask], name, rtol=1e-4, atol=1e-4)


def groups(case, tiny):
    """The optimiser's two groups: our pattern says the same of every parameter."""
    flat = {path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tiny.shapes[0])}
    for name in albef.NAMES:
        if name.ours in flat:
            group = "params_decay" if re.search(DECAYED, name.ours) else "params_no_decay"
            assert albef.theirs(name, text_layers=tiny.depth) in case[group], name.ours


def trajectory(case: Case) -> None:
    """AdamW with the published groups; float32 throughout."""
    tiny = Tiny(case)
    optim = OptimOptions(learning_rate=float(case["lr"]), schedule="constant", weight_decay=float(case["weight_decay"]), b1=0.9, b2=0.999, eps=1e-8, clip_norm=0.0, decay=DECAYED)
    steps = len(case["steps/alpha"])
    tx = make_optimizer(optim, tiny.shapes[0], steps)

    @jax.jit
    def step(params, opt_state, memory, batch, draws):
        def loss(params):
            value, aux, _ = tcl.terms(tiny.trunk, tiny.options, params, memory, tiny.trunk.encode(params, batch, None), batch, None, draws)
            return value, aux

        params = tiny.trunk.constrain(params)
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, aux

    params, memory, opt_state = tiny.params, tiny.memory, tx.init(tiny.params)
    everything = {name: case[name] for name in case if name.startswith("steps/")}
    for i in range(steps):
        mine = {name.removeprefix("steps/"): value[i] for name, value in everything.items()}
        params, opt_state, aux = step(params, opt_state, at_alpha(memory, mine["alpha"]), batch_of(mine), draws_of(mine))
        memory = aux["memory"]
        for name in ("loss_mlm", "loss_ita", "loss_itm"):
            close(aux[name], mine[name], f"step {i}, {name}", rtol=1e-3)
        assert int(memory["pointer"]) == int(mine["queue_ptr"])
        close(params["temperature"], mine["temp"], f"temperature after step {i}", rtol=1e-4)
    want = tiny.read({name.removeprefix("sd_final/"): case[name] for name in case if name.startswith("sd_final/")})
    flat = lambda tree: {path_str(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    got, want = flat((params, memory)), flat(want)
    for name, value in want.items():
        if name.endswith(("attn/k/bias", "cross/k/bias")):
            # It shifts all logits of a query alike, so its gradient is rounding noise, which Adam turns into steps of any size up to the rate.
            close(got[name], value, name, rtol=0, atol=1.1 * steps * optim.learning_rate)
        elif not name.endswith("/step"):
            assert np.linalg.norm(got[name] - value) <= 5e-3 * np.linalg.norm(value), name


def e2e_retrieval(case: Case) -> None:
    tiny = Tiny(case, retrieval=True)
    tiny.memory = at_alpha(tiny.memory, case["alpha"])
    batch, draws = {**batch_of(case), "id": np.int32(case["idx"])}, draws_of(case)
    np.testing.assert_array_equal(case["idx"], tiny.config["idx"])
    tiny.memory["id_queue"] = ids_before(case, tiny, batch)
    for (_, (aux, way, _)), grads in whole_step(tiny, batch, draws):
        for name in ("loss_ita", "loss_itm", "loss_lmi_text", "loss_lmi_image"):
            close(aux[name], case[name], name, rtol=1e-4)
        close(in_order(way["itm_logits"]), case["itm_logits"], "itm_logits", rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(aux["memory"]["id_queue"][None], case["idx_queue_after"])
        assert int(aux["memory"]["pointer"]) == int(case["queue_ptr_after"][0])
        want = {"temperature": case["grad_temp"], "image_proj": {"kernel": case["grad_vision_proj"].T}, "text_proj": {"kernel": case["grad_text_proj"].T}}
        compare_gradients(tiny, {"temperature": grads["temperature"], **{k: {"kernel": grads[k]["kernel"]} for k in ("image_proj", "text_proj")}}, want)
    re_ranked(case, tiny, batch)


def ids_before(case, tiny, batch):
    """The id queue before the call, of which the file has the state after it: the ids that the call has overwritten are known by the loss alone.

    Of an overwritten entry it matters only which image of the batch it is, if any; all choices are tried.
    """
    queue, ids, start = np.array(tiny.memory["id_queue"]), batch["id"], tiny.config["ptr0"]
    slots = (start + np.arange(len(ids))) % len(queue)
    if int(case["sd/queue_ptr"][0]) == start:
        return queue
    np.testing.assert_array_equal(queue[slots], ids)

    @jax.jit
    def losses(params, memory, queues):
        now = tiny.trunk.views(params, memory, tiny.trunk.encode(params, batch, None), batch, None)
        args = now.v, now.t, now.v_m, now.t_m, ids, memory["image_queue"], memory["text_queue"]
        return jax.lax.map(lambda queue: alignment(*args, queue, now.temperature, now.alpha)[0], queues, batch_size=512)

    choices = np.array(list(itertools.product([*np.unique(ids), -100], repeat=len(slots))), np.int32)
    queues = np.repeat(queue[None], len(choices), 0)
    queues[:, slots] = choices
    locals_ = float(case["loss_lmi_text"]) + float(case["loss_lmi_image"])
    return queues[np.argmin(np.abs(losses(tiny.params, tiny.memory, queues) + locals_ - 6 * float(case["loss_ita"])))]


def re_ranked(case, tiny, batch):
    """Cosines of all pairs, then match logits of the k_test best of each query, -100 for the rest."""
    t, p, k = tiny.trunk, tiny.params, tiny.config["k_test"]

    @jax.jit
    def pairs(params, image, tokens):
        v, w, n = t.embed_image(params, image), t.embed_text(params, tokens), len(image)
        side = jax.tree.map(lambda x: jnp.repeat(x, n, 0), t.score_pair.text_side(params, tokens))
        logits = t.score_pair.score(params, t.score_pair.image_side(params, image), side, jnp.tile(jnp.arange(n), n)[None])
        return v @ w.T, logits.reshape(n, n).T

    sims, logits = map(np.asarray, pairs(p, batch["image"], batch["tokens"]))
    close(sims, case["eval_sims"], "eval_sims", rtol=1e-4, atol=2e-5)
    for way, s, score in (("i2t", sims, logits), ("t2i", sims.T, logits.T)):
        best = np.argsort(-s, 1, kind="stable")[:, :k]
        want = np.full(s.shape, -100.0)
        np.put_along_axis(want, best, np.take_along_axis(score, best, 1), 1)
        close(want, case[f"eval_score_{way}"], way, rtol=1e-4, atol=1e-4)


def downstream(case: Case) -> None:
    pytest.skip("answer decoder, NLVR2 and VE heads are not built yet")


CHECKS = {
    "ita_imc": Check(has("n_cases", "c0/loss_i2i", "c0/temp_raw"), each_case(ita_imc)),
    "lmi": Check(has("n_cases", "c0/loss_text_lmi_safe"), each_case(lmi)),
    "itm": Check(has("n_cases", "c0/weights_i2t"), each_case(itm)),
    "mlm": Check(has("n_cases", "c0/loss_distill"), each_case(masked_language_model)),
    "retrieval_targets": Check(has("n_cases", "c0/sim_targets"), each_case(retrieval_targets)),
    "queue": Check(has("image_queue_init", "image_queue_after", "image_feats"), queue),
    "ema": Check(has("momentum", "steps", "param_m_init_0"), ema),
    "lr_schedule": Check(lambda case: bool(case) and all(name.split("/")[-1] in ("epoch", "iter", "lr") for name in case), lr_schedule),
    "e2e_pretrain": Check(has("sd/temp", "mlm_labels", "loss_total"), e2e_pretrain),
    "trajectory": Check(has("sd/temp", "steps/image", "sd_final/temp"), trajectory),
    "e2e_retrieval": Check(has("sd/temp", "idx", "eval_sims"), e2e_retrieval),
    "downstream": Check(has("vqa/loss_distill"), downstream),
}
