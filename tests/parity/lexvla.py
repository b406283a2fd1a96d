"""LexVLA: head, adapters, losses and penalties in float64 and float32, on 1 to 8 devices; schedules, sparse vectors, metrics, PatchDis."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.sharding import PartitionSpec as P

from jaxvl.evals import patchdis, ranking
from jaxvl.losses import lexical as losses
from jaxvl.models import lexical, sparse
from jaxvl.models.lexical import Adapter, AdapterOptions
from jaxvl.optim import OptimOptions, learning_rate
from tests.parity.case import Case, Check, has
from tests.parity.codis import everywhere, run

ROWS = P(("data", "fsdp"), "tensor")


def near(got: Any, want: Any, name: str, rtol: float = 0.0, atol: float = 0.0) -> None:
    """want: None for an array that the file does not have. What is compared relatively may be zero, and then rounding of float32 is left."""
    if want is not None:
        np.testing.assert_allclose(got, want, rtol=rtol, atol=max(atol, 1e-7 if rtol else 0.0), err_msg=name)


def contrastive_terms(s_img: jax.Array, s_txt: jax.Array, t: jax.Array) -> dict[str, Any]:
    def total(s_img: jax.Array, s_txt: jax.Array, t: jax.Array, reduce: str, impl: str) -> jax.Array:
        return losses.contrastive(s_img, s_txt, jnp.minimum(jnp.exp(t), 100.0), reduce=reduce, impl=impl)

    args, scale = (s_img, s_txt, t), jnp.minimum(jnp.exp(t), 100.0)
    both = losses.cross_entropies(s_img, s_txt, scale)
    # The ring is written in float32, and needs a mesh.
    impls = ("global",) if jax.sharding.get_abstract_mesh().empty else ("global", "ring")
    sums = {impl: jax.value_and_grad(total, (0, 1, 2))(*args, "sum", impl) for impl in impls}
    return {"terms": both, "logits": scale * s_img @ s_txt.T, "mean": total(*args, "mean", "global"), "sums": sums}


def contrastive(case: Case) -> None:
    starts = [name.removesuffix("_log_scale") for name in case if name.endswith("_log_scale") and not name.endswith("_grad_log_scale")]
    assert starts
    for dtype, devices in everywhere(len(case["s_img"])):
        for start in starts:
            args = (case["s_img"], case["s_txt"], case[f"{start}_log_scale"])
            with jax.default_matmul_precision("highest"):
                got = run(contrastive_terms, dtype, *args, specs=(ROWS, ROWS, P()), devices=devices)
            where, want = f"{start}, {dtype.__name__}, {devices} devices", lambda name, start=start: case.get(f"{start}_{name}")
            near(got["logits"], want("logits_per_image"), where, 2e-5, 1e-5)
            for term, name in zip(got["terms"], ("loss_i2t", "loss_t2i"), strict=True):
                near(term, want(name), where + name, 1e-5, 1e-5)
            near(got["mean"], want("loss_mean"), where, 1e-5, 1e-5)
            for impl, (value, grads) in got["sums"].items():
                near(value, want("loss_sum"), where + impl, 1e-5, 1e-5)
                for grad, name in zip(grads, ("grad_s_img", "grad_s_txt", "grad_log_scale"), strict=True):
                    slack = 1e-4 * np.abs(want(name)).max() if grad.ndim and want(name) is not None else 0.0
                    near(grad, want(name), f"{where} {impl} {name}", 1e-4, max(slack, 1e-6))


def penalty_terms(s: jax.Array) -> dict[str, Any]:
    whole = {"flops": jax.value_and_grad(losses.flops)(s), "overuse": jax.value_and_grad(losses.overuse)(s)}
    return {**whole, "l1": jnp.sum(losses.mean_use(s)), "l0": jnp.mean(sparse.active(s).astype(s.dtype))}


def penalties(case: Case) -> None:
    batches = [name.removesuffix("_S") for name in case if name.endswith("_S")]
    for batch in batches:
        s = case[f"{batch}_S"]
        for dtype, devices in everywhere(len(s)):
            got, where = run(penalty_terms, dtype, s, specs=(ROWS,), devices=devices), f"{batch}, {dtype.__name__}, {devices} devices"
            near(got["l1"], case.get(f"{batch}_l1"), where, 1e-5)
            near(got["l0"], case.get(f"{batch}_l0"), where, 1e-6)
            for name in ("flops", "overuse"):
                value, grad = got[name]
                near(value, case.get(f"{batch}_{name}"), where + name, 1e-5)
                if f"{batch}_grad_{name}_row" in case:
                    near(grad, np.broadcast_to(case[f"{batch}_grad_{name}_row"], s.shape), where + name, 1e-4, 1e-6)
    for name in [name for name in case if "_mean_of_" in name]:
        batch, which, parts = *name.split("_mean_of_")[0].rsplit("_", 1), int(name.split("_mean_of_")[1].split("_")[0])
        near(losses.by_parts(getattr(losses, which), jnp.asarray(case[f"{batch}_S"]), parts), case.get(name), name, 1e-5)


def schedules(case: Case) -> None:
    steps = jnp.asarray(case["steps"])
    near(losses.growing(steps, 5e-4, 2000), case.get("lambda_t"), "lambda_t", atol=1e-9)
    options = OptimOptions(learning_rate=5e-4, schedule="cosine")
    for name, warmup in (("lr_cosine", 0), ("lr_warm1000_cosine", 1000)):
        near(jax.vmap(learning_rate(options._replace(warmup_steps=warmup), 17_969))(steps), case[name], name, atol=1e-9)


def sparsify(case: Case) -> None:
    s = case["S"]
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            x = jnp.asarray(s, dtype)
            threshold = sparse.default_threshold(s.shape[1])
            near(threshold, case.get("threshold"), "threshold", 1e-6)
            kept = np.asarray(sparse.above(x, threshold))
            near(kept, case.get("thresholded"), "thresholded")
            np.testing.assert_array_equal(sparse.active(x, threshold), case["thr_nnz"])
            sparsity = 1 - np.asarray(sparse.active(kept)) / s.shape[1]
            near(sparsity, case.get("thr_sparsity"), "sparsity", atol=1e-6)
            near(sparsity**2, case.get("quadratic_sparsity_axis"), "squared", atol=1e-6)
            near(np.linalg.norm(kept, axis=1), case.get("thr_norm"), "norm", atol=1e-6)
            for name in [name for name in case if name.startswith("top") and name.endswith("_idx")]:
                k = int(name[3:-4])
                np.testing.assert_array_equal(sparse.top_indices(x, k), case[name], err_msg=name)
                near(sparse.top(x, k), case.get(f"top{k}_S"), name)
                near(np.asarray(sparse.top(x, k)).sum(1), case.get(f"top{k}_vdr_S_sum"), name, 1e-5)
            rows = scipy.sparse.csr_matrix(kept)
            for part in ("data", "indices", "indptr"):
                near(getattr(rows, part), case.get(f"csr_{part}"), part)
            near((rows @ case["Q"].T).T, case.get("scores"), "scores", atol=1e-5)


def head_terms(
    z_img: jax.Array, Z_img: jax.Array, z_txt: jax.Array, Z_txt: jax.Array, c_img: jax.Array, c_txt: jax.Array
) -> dict[str, Any]:
    image = lambda z, Z: lexical.vectors(lexical.max_logits(z, Z))
    text = lambda z, Z: lexical.vectors(lexical.logits(z, Z))
    plain = lambda z, Z: lexical.vectors(jnp.max(lexical.logits(z, Z), 1))
    out = {
        f"{way}_grads": jax.grad(lambda z, Z, f=f: jnp.sum(f(z, Z) * c_img), (0, 1))(z_img, Z_img)
        for way, f in (("fused", image), ("plain", plain))
    }
    return out | {
        "logits_img": lexical.logits(z_img, Z_img), "logits_txt": lexical.logits(z_txt, Z_txt), "s_img_all": image(z_img, Z_img),
        "s_img_patches": image(z_img[:, 1:], Z_img), "s_patch": text(z_img[:, 1:], Z_img), "s_txt": text(z_txt, Z_txt), "s_word": text(Z_txt, Z_txt),
        "argmax_token_all": lexical.winners(z_img, Z_img), "grad_z_txt": jax.grad(lambda z: jnp.sum(text(z, Z_txt) * c_txt))(z_txt),
    }  # fmt: skip


def lexical_head(case: Case) -> None:
    names = ("z_img", "Z_img", "z_txt", "Z_txt", "cotangent_img", "cotangent_txt")
    rows, words = P(("data", "fsdp")), P("tensor")
    for dtype, devices in everywhere(len(case["z_img"])):
        got = run(head_terms, dtype, *(case[n] for n in names), specs=(rows, words, rows, words, rows, rows), devices=devices)
        where = f"{dtype.__name__}, {devices} devices"
        np.testing.assert_array_equal(got.pop("argmax_token_all"), case["argmax_token_all"], err_msg=where)
        near(got.pop("s_word")[case["word_ids"]], case.get("s_word"), f"s_word, {where}", atol=1e-5)
        for way in ("fused", "plain"):
            for grad, name in zip(got.pop(f"{way}_grads"), ("grad_z_img", "grad_Z_img"), strict=True):
                near(grad, case.get(name), f"{way} {name}, {where}", atol=1e-5)
        for name, value in got.items():
            near(value, case.get(name), f"{name}, {where}", 1e-5, 1e-5)
    for dtype in (np.float32, np.float64):
        f = lambda x: (lexical.ACTIVATIONS["elu1p"](x), jax.vmap(jax.grad(lexical.ACTIVATIONS["elu1p"]))(x))
        y, dy = run(f, dtype, case["elu1p_x"])
        near(y, case.get("elu1p_y"), "elu1p", 1e-6, 1e-7)
        near(dy, case.get("elu1p_dy"), "elu1p'", 1e-6, 1e-7)


# Their name of a part of the adapter to ours.
PARTS = {"norm1": "attn_norm", "norm2": "mlp1_norm", "norm_out": "mlp2_norm", "mlp1.fc1": "mlp1_up", "mlp1.fc2": "mlp1_down", "mlp2.fc1": "mlp2_up",
         "mlp2.fc2": "mlp2_down", **{f"attn.{k}": f"attn/{k}" for k in "qkv"}, "attn.o": "attn/out"}  # fmt: skip


def adapter_params(case: Case, start: str) -> dict:
    """The adapter of the arrays whose names begin with `start`, in our layout."""
    out: dict = {}
    for name in [name for name in case if name.startswith(start)]:
        module, leaf = name.removeprefix(start).rsplit(".", 1)
        *groups, last = PARTS[module].split("/")
        at = out
        for group in groups:
            at = at.setdefault(group, {})
        at.setdefault(last, {})[leaf] = case[name]
    return out


def adapter_options(params: dict, heads: int, dtype: Any = "float32") -> AdapterOptions:
    width, out = params["mlp2_up"]["kernel"].shape[0], params["mlp2_down"]["kernel"].shape[1]
    layout: lexical.Layout = "block_mlp" if "mlp1_up" in params else "attn_mlp"
    hidden = {name: params[f"{name}_up"]["kernel"].shape[1] for name in ("mlp1", "mlp2") if f"{name}_up" in params}
    return AdapterOptions(layout, width, out, heads, **hidden, dtype=dtype)


def adapter(case: Case) -> None:
    params, want = adapter_params(case, "p:"), adapter_params(case, "g:")
    module = Adapter(adapter_options(params, int(case["num_heads"])))

    def f(x: jax.Array, cotangent: jax.Array) -> Any:
        whole = lambda x, p: (lambda y: (jnp.sum(y * cotangent), y))(module.apply({"params": p}, x))
        return jax.value_and_grad(whole, (0, 1), has_aux=True)(x, params)

    with jax.default_matmul_precision("highest"):
        for devices in {len(case["x"]) % 2 or 2, 1}:
            (_, y), (dx, dp) = run(f, np.float32, case["x"], case["cotangent"], specs=(P(("data", "fsdp")),) * 2, devices=devices)
            near(y, case.get("y"), "y", 2e-5, 2e-5)
            near(dx, case.get("grad_x"), "grad_x", 1e-4, 1e-4)
            jax.tree.map(lambda got, want: near(got, want, "parameters", 1e-4, 1e-4), dp, want)


def retrieval_metrics(case: Case) -> None:
    sim, each = case["sim"], int(case["captions_per_image"])
    right = np.arange(len(sim))[:, None] == np.arange(sim.shape[1]) // each
    for way, ranks in (("i2t", ranking.exact_ranks(sim, right)), ("t2i", ranking.exact_ranks(sim.T, right.T))):
        np.testing.assert_array_equal(ranks.stable, case[f"rank_{way}"])
        near(100 * ranking.recall_at(ranks.stable, (1, 5, 10)), case.get(f"{way}_recall_1_5_10"), way, 1e-6)


def patchdis_file(case: Case) -> None:
    labels, (rows, columns), patch, classes = case["gt_pixels"], case["grid"], int(case["patch"]), len(case["s_class"])
    shaped = case["s_patch"].reshape(len(labels), rows, columns, -1)
    present = patchdis.present_classes(labels, classes)
    chosen = {
        "pixel": patchdis.classify(shaped, case["s_class"]),
        "present": patchdis.classify(shaped, case["s_class"], present[:, None, None]),
    }
    np.testing.assert_array_equal(chosen["pixel"], case["pred_all"])
    np.testing.assert_array_equal(chosen["present"], case["pred_present"])
    voted = patchdis.to_patches(labels, patch)
    np.testing.assert_array_equal(voted, case["patch_gt"])
    found = {kind: patchdis.overlap(patchdis.to_pixels(grid, patch), labels, classes) for kind, grid in chosen.items()}
    found["patch"] = patchdis.overlap(chosen["pixel"], voted, classes)
    for kind, counts in found.items():
        np.testing.assert_array_equal(counts.intersection, case[f"inter_{kind}"])
        np.testing.assert_array_equal(counts.union, case[f"union_{kind}"])
        near(patchdis.miou(counts), case.get(f"miou_{kind}"), kind, atol=1e-6)


CHECKS = {
    "contrastive": Check(has("s_img", "s_txt", "init_log_scale"), contrastive),
    "penalties": Check(
        lambda case: any(name.endswith(("_overuse", "_flops")) and name.rpartition("_")[0] + "_S" in case for name in case), penalties
    ),
    "schedules": Check(has("steps", "lambda_t", "lr_cosine"), schedules),
    "sparsify": Check(has("S", "threshold", "csr_data", "scores"), sparsify),
    "lexical_head": Check(has("z_img", "Z_img", "z_txt", "elu1p_x"), lexical_head),
    "adapter": Check(has("x", "y", "cotangent", "p:attn.q.kernel"), adapter),
    "retrieval_metrics": Check(has("sim", "captions_per_image", "rank_i2t"), retrieval_metrics),
    "patchdis": Check(has("s_patch", "s_class", "gt_pixels"), patchdis_file),
}
