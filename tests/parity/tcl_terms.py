"""TCL against the numbers of its published code, term by term: losses, targets, gradients, queues, averages and schedules.

In float32 and float64, and with the batch split over as many of 2, 4 and 8 devices as it divides over.
"""

import math
from functools import cache, partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxvl.losses import matching, mlm
from jaxvl.losses.local import local_information, pool_grid, sample_losses
from jaxvl.losses.momentum import Candidates, average, contrast, enqueue
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.methods.fused_options import HIGH, LOW
from jaxvl.optim import OptimOptions, learning_rate
from tests.parity.case import Case, Check, has


def close(got, want, name="", rtol=2e-5, atol=1e-6):
    """want: None for an array that the file does not have."""
    if want is None:
        return
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=name)


def same_gradient(got, want, name, rtol=2e-4):
    close(got, want, name, rtol=rtol, atol=1e-6 * max(np.abs(0 if want is None else want).max(), 1))


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
            check(lambda name, i=i: case.get(f"c{i}/{name}"))

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
    return {
        "i2t": (wide("image_feat") @ T.T / tau, wide("image_feat_m") @ T.T / tau),
        "t2i": (wide("text_feat") @ V.T / tau, wide("text_feat_m") @ V.T / tau),
    }


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
        if c("text_row_losses") is not None:
            close(np.where(counted, each, np.nan), np.where(counted, c("text_row_losses"), np.nan), where)
        if counted.all():
            close(text, c("loss_text_lmi"), where)
        elif c("loss_text_lmi") is not None:
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
    close(np.arange(3 * B) < B, c("itm_labels"), rtol=0, atol=0)
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
    for where, ((_, got), (grad,)) in everywhere(
        mlm_losses, [c("logits"), c("teacher_logits"), np.int32(c("labels"))], (float(c("alpha")),), (0,)
    ):
        for name, value in got.items():
            want = c(name)  # where nothing is masked the published code divides by zero
            close(value, want if masked else 0.0, f"{name}, {where}")
        same_gradient(grad, wanted_grad if masked else np.zeros_like(grad), where)


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
RATES = {
    "pretrain": (1e-4, 1e-5, 1e-5, 2000),
    "retrieval": (1e-5, 1e-6, 1e-5, 0),
    "nlvr_or_ve": (2e-5, 1e-6, 1e-5, 100),
    "vqa": (2e-5, 1e-6, 1e-5, 400),
}


def lr_schedule(case: Case) -> None:
    for kind in sorted({name.split("/")[0] for name in case}):
        peak, end, start, warmup = RATES[kind]
        epoch, steps = case[f"{kind}/epoch"], len(case[f"{kind}/lr"])
        np.testing.assert_array_equal(case[f"{kind}/iter"], np.concatenate([np.arange(n) for n in np.bincount(epoch)]))
        options = OptimOptions(
            learning_rate=peak,
            schedule="epochs",
            epochs=int(epoch.max()) + 1,
            end_factor=end / peak,
            warmup_from=start / peak,
            warmup_steps=warmup,
            warmup_every=100,
        )
        got = jax.jit(jax.vmap(learning_rate(options, steps)))(np.arange(steps))
        close(got, case[f"{kind}/lr"], kind, rtol=2e-6, atol=1e-12)


CHECKS = {
    "ita_imc": Check(has("n_cases", "c0/loss_i2i", "c0/temp_raw"), each_case(ita_imc)),
    "lmi": Check(has("n_cases", "c0/loss_text_lmi_safe"), each_case(lmi)),
    "itm": Check(has("n_cases", "c0/weights_i2t"), each_case(itm)),
    "mlm": Check(has("n_cases", "c0/loss_distill"), each_case(masked_language_model)),
    "retrieval_targets": Check(has("n_cases", "c0/sim_targets"), each_case(retrieval_targets)),
    "queue": Check(has("image_queue_init", "image_queue_after", "image_feats"), queue),
    "ema": Check(has("momentum", "steps", "param_m_init_0"), ema),
    "lr_schedule": Check(lambda case: bool(case) and all(name.split("/")[-1] in ("epoch", "iter", "lr") for name in case), lr_schedule),
}
