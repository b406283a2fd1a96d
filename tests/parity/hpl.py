"""Proxy losses, hierarchies, clustering, whole schedules and the optimiser's groups; float64 and float32, on 1, 2, 4 and 8 devices."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxvl.losses import cluster, hierarchy, proxy
from jaxvl.losses.hierarchy import Hierarchy
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.optim import OptimOptions, learning_rate, make_optimizer
from tests.parity.case import Case, Check, has

DEVICES = {1: MeshOptions(1), 2: MeshOptions(2), 4: MeshOptions(1, 2, 2), 8: MeshOptions(2, 2, 2)}
WAYS = [(dtype, devices) for devices in DEVICES for dtype in ("float64", "float32")]
# Compiling is what takes time: half of the pairs, and a quarter for schedules, unless JAXVL_PARITY_WAYS=all asks for every one.
ALL = os.environ.get("JAXVL_PARITY_WAYS") == "all"
HALF = WAYS if ALL else [("float64", 1), ("float32", 2), ("float32", 4), ("float64", 8)]
QUARTER = WAYS if ALL else [("float32", 1), ("float64", 8)]
BASES = {"pa": proxy.proxy_anchor, "nca": proxy.proxy_nca_pp}  # with the numbers of the files, which are the defaults


def ways(which: list = WAYS) -> Iterator[tuple[str, int]]:
    """Every precision and number of devices, inside which arrays keep their precision and losses find their mesh."""
    for dtype, devices in which:
        mesh = make_mesh(DEVICES[devices], jax.devices()[:devices])
        with jax.enable_x64(dtype == "float64"), jax.set_mesh(mesh):
            yield dtype, devices


def near(got: Any, want: np.ndarray | None, dtype: str, name: str, *, grad: bool = False) -> None:
    if want is None:
        return  # an array that the file does not have
    rtol, atol = (1e-9, 1e-10) if dtype == "float64" else (2e-3, 2e-5) if grad else (2e-5, 1e-6)
    np.testing.assert_allclose(np.asarray(got), want, rtol=rtol, atol=atol, err_msg=f"{name}, {dtype}")


def gradient(loss: Callable, x: np.ndarray, p: np.ndarray, dtype: str) -> tuple:
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.asarray(x, dtype), jnp.asarray(p, dtype))


def anchor(case: Case) -> None:
    """The loss, its two terms, and its gradients, except where a zero vector makes them huge; the official code's defect is not ours."""
    x, p, labels = case["embeddings"], case["proxies"], case["labels"]
    alpha, margin = float(case["alpha"]), float(case["margin"])
    whole = [np.abs(a).sum(1) > 0 for a in (x, p)]
    references = [end for end in ("_ref", "_oracle", "_lib_ref") if f"loss{end}" in case]
    if "loss_official_defect" in case:
        assert not np.isclose(case["loss_official_defect"], case["loss_oracle"], rtol=1e-6)
    if "n_positive_proxies" in case:
        assert case["n_positive_proxies"] == len(np.unique(labels))
        near(case["loss_pos_oracle"] + case["loss_neg_oracle"], case.get("loss_ref"), "float64", "terms")
    for dtype, _ in ways(HALF):
        loss, grads = gradient(lambda x, p: proxy.proxy_anchor(x, p, labels, alpha=alpha, margin=margin, block=4), x, p, dtype)
        assert np.isfinite(loss) and all(np.isfinite(g).all() for g in grads)
        for end in references:
            if end == "_lib_ref" and not all(map(np.all, whole)):
                continue
            near(loss, case.get(f"loss{end}"), dtype, f"loss{end}")
            for name, g, rows in zip(("embeddings", "proxies"), grads, whole, strict=True):
                if f"grad_{name}{end}" in case:
                    steep = 1e-6 if dtype == "float64" and not rows.all() else None
                    want = case[f"grad_{name}{end}"]
                    if dtype == "float32" and alpha > 100:
                        continue  # a sum of few terms that float32 cosines times alpha cannot tell apart
                    if steep or not rows.all():
                        np.testing.assert_allclose(g[rows], want[rows], rtol=steep or 2e-3, atol=2e-5)
                    else:
                        near(g, want, dtype, f"grad_{name}{end}", grad=True)


def nca(case: Case) -> None:
    """Classic, ++, smoothed (always with scale 9) and normalised softmax, in one program."""
    x, p, labels = case["embeddings"], case["proxies"], case["labels"]
    scale, smoothing, temperature = (float(case[k]) for k in ("scale2", "smoothing", "temperature"))
    losses = {
        "prob": partial(proxy.proxy_nca_pp, scale=scale),
        "classic": partial(proxy.proxy_nca, scale=scale),
        "lib": partial(proxy.proxy_nca_pp, scale=scale),
        "smoothed": partial(proxy.proxy_nca_pp, scale=9.0, smoothing=smoothing),
        "normsoftmax": partial(proxy.norm_softmax, temperature=temperature),
    }

    def every(x: jax.Array, p: jax.Array) -> dict:
        return {
            name: jax.value_and_grad(partial(loss, labels=jnp.asarray(labels), block=4), (0, 1))(x, p)
            for name, loss in losses.items()
            if name != "lib"
        }

    for dtype, _ in ways():
        results = jax.jit(every)(jnp.asarray(x, dtype), jnp.asarray(p, dtype))
        for name in losses:
            loss, grads = results["prob" if name == "lib" else name]
            near(loss, case.get(f"loss_{name}_ref"), dtype, name)
            for which, g in zip(("embeddings", "proxies"), grads, strict=True):
                near(g, case.get(f"grad_{which}_{name}_ref"), dtype, f"{name} {which}", grad=True)


def given(case: Case) -> None:
    """A hierarchy of any number of levels whose coarse proxies are parameters."""
    x, weights = case["embeddings"], case["weights"]
    levels = len(weights)
    proxies = [case[f"proxies_{l}"] for l in range(levels)]
    parents = [jnp.asarray(case[f"parent_{l}"], jnp.int32) for l in range(levels - 1)]
    for l, y in enumerate(hierarchy.labels_of(parents, jnp.asarray(case["labels"], jnp.int32))):
        if l:
            np.testing.assert_array_equal(y, case[f"labels_{l}"])

    def every(x: jax.Array, proxies: list) -> dict:
        labels = hierarchy.labels_of(parents, jnp.asarray(case["labels"], jnp.int32))
        run = lambda base: lambda x, proxies: hierarchy.hierarchical(base, x, proxies, labels, weights, len(proxies[0]))
        return {name: jax.value_and_grad(run(base), (0, 1), has_aux=True)(x, proxies) for name, base in BASES.items()}

    for dtype, _ in ways(HALF):
        for name, ((loss, parts), (dx, dp)) in jax.jit(every)(jnp.asarray(x, dtype), [jnp.asarray(p, dtype) for p in proxies]).items():
            near(loss, case.get(f"{name}_loss"), dtype, f"{name} loss")
            near(dx, case.get(f"{name}_grad_embeddings"), dtype, f"{name} embeddings", grad=True)
            for l in range(levels):
                near(parts[l], case.get(f"{name}_loss_level_{l}"), dtype, f"{name} level {l}")
                near(dp[l], case.get(f"{name}_grad_proxies_{l}"), dtype, f"{name} proxies {l}", grad=True)


def learned(case: Case) -> None:
    """The three ways coarse proxies take part in gradients, of raw and of unit means."""
    x, p, old, weights = case["embeddings"], case["proxies"], case["old_coarse"], case["weights"]
    assign, labels = case["assignment"].astype(np.int32), case["labels"].astype(np.int32)
    case["member_count"]
    for dtype, _ in ways(HALF):

        def every(x: jax.Array, p: jax.Array, old: jax.Array) -> dict:
            above = Hierarchy((jnp.asarray(assign),), (old,), ())
            y = hierarchy.labels_of(above.parents, jnp.asarray(labels))
            out: dict = {}
            for space in ("raw", "unit"):
                means = hierarchy.averaged(p, above, len(p), space)
                out[space] = means.coarse[0], means.counts[0]
                for name, base in BASES.items():
                    free = lambda x, p, c, base=base: hierarchy.hierarchical(base, x, (p, c), y, weights, len(p))[0]
                    tied = lambda x, p, base=base, space=space: hierarchy.hierarchical(
                        base, x, (p, *hierarchy.tie(p, above, len(p), space)), y, weights, len(p)
                    )[0]
                    out[name, space] = jax.value_and_grad(free, (0, 1, 2))(x, p, means.coarse[0]), jax.value_and_grad(tied, (0, 1))(x, p)
            return {"/".join(k) if isinstance(k, tuple) else k: v for k, v in out.items()}

        out = jax.jit(every)(*(jnp.asarray(a, dtype) for a in (x, p, old)))
        for space in ("raw", "unit"):
            coarse, counts = out[space]
            near(coarse, case.get(f"coarse_{space}"), dtype, f"coarse_{space}", grad=True)
            np.testing.assert_array_equal(counts, case["member_count"])
            for name in BASES:
                key = f"{name}_{space}_"
                (loss, (dx, dp, dc)), (tied_loss, (tied_dx, tied_dp)) = out[f"{name}/{space}"]
                for value in (loss, tied_loss):
                    near(value, case.get(key + "loss"), dtype, key + "loss")
                for value in (dx, tied_dx):
                    near(value, case.get(key + "grad_embeddings"), dtype, key + "embeddings", grad=True)
                near(dc, case.get(key + "grad_coarse_free"), dtype, key + "coarse", grad=True)
                near(dp, case.get(key + "grad_proxies_free"), dtype, key + "free", grad=True)
                near(tied_dp, case.get(key + "grad_proxies_tied"), dtype, key + "tied", grad=True)


def clusters(case: Case) -> None:
    """One online step and Lloyd's algorithm under both policies; rows are taken as they are."""
    fine, start = case["fine"], case["init_coarse"]
    for dtype, _ in ways(HALF):

        def every(fine: jax.Array, start: jax.Array) -> dict:
            how = {empty: cluster.How(len(fine), "raw", empty) for empty in ("keep", "reseed_farthest")}
            return {empty: (cluster.online_step(fine, start, h), cluster.lloyd(fine, start, h)) for empty, h in how.items()}

        for policy, found in jax.jit(every)(jnp.asarray(fine, dtype), jnp.asarray(start, dtype)).items():
            for end, got in zip(("1", "conv"), found, strict=True):
                np.testing.assert_array_equal(got.assign, case[f"{policy}_assign_{end}"], err_msg=f"{policy} {end} {dtype}")
                np.testing.assert_array_equal(got.counts, case[f"{policy}_count_{end}"])
                np.testing.assert_allclose(
                    got.centroids, case[f"{policy}_coarse_{end}"], rtol=0, atol=1e-10 if dtype == "float64" else 1e-5
                )
            inertia = np.square(fine - np.asarray(got.centroids, np.float64)[np.asarray(got.assign)]).sum()
            np.testing.assert_allclose(inertia, case[f"{policy}_inertia_conv"], rtol=1e-9 if dtype == "float64" else 1e-5, atol=1e-10)
            if policy == "keep" and "sk_labels" in case:
                np.testing.assert_array_equal(got.assign, case["sk_labels"])
                np.testing.assert_allclose(inertia, case["sk_inertia"], rtol=1e-9 if dtype == "float64" else 1e-5)


def trajectory(case: Case) -> None:
    """A whole schedule in one program, refreshes and all. The file's name says which; where it does not, the first numbers do."""
    words = case.path.stem.split("_")
    bases = [b for b in BASES if b in words] or list(BASES)
    modes = [m for m in ("free", "tied", "frozen") if m in words] or ["free", "tied", "frozen"]
    names = ("x_in", "w0", "proxies0", "init_centroids", "assign0", "coarse0", "lr", "weights")
    given = {name: case[name] for name in names}
    labels, period = case["labels"].astype(np.int32), int(case["period"])
    faults: list[AssertionError] = []
    for base in bases:
        for mode in modes:
            try:
                for dtype, _ in ways(QUARTER):
                    run = jax.jit(partial(_schedule, BASES[base], mode, labels, period))
                    got = run({k: jnp.asarray(v, dtype) for k, v in given.items() if k != "assign0"})
                    _compare_schedule(case, got, dtype, period, mode)
                return
            except AssertionError as fault:
                faults.append(fault)
    raise faults[0]


def _schedule(base: Callable, mode: str, labels: np.ndarray, period: int, given: dict) -> dict:
    p0, weights, lr = given["proxies0"], given["weights"], given["lr"]
    first = cluster.lloyd(p0, given["init_centroids"], cluster.How(len(p0)))

    def step(carry: tuple, now: tuple) -> tuple:
        t, x_in, y = now
        w, p, above = carry
        renew = (t > 0) & (t % period == 0)
        above = lax.cond(renew, lambda p, above: hierarchy.refresh(p, above, len(p)), lambda p, above: above, p, above)

        def loss(w: jax.Array, p: jax.Array, coarse: tuple) -> tuple:
            coarse = hierarchy.tie(p, above, len(p)) if mode == "tied" else coarse
            return hierarchy.hierarchical(base, x_in @ w, (p, *coarse), hierarchy.labels_of(above.parents, y), weights, len(p))

        (total, parts), (dw, dp, dc) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(w, p, above.coarse)
        moved = tuple(c - lr * d for c, d in zip(above.coarse, dc, strict=True)) if mode == "free" else above.coarse
        return (w - lr * dw, p - lr * dp, above._replace(coarse=moved)), (jnp.stack([total, *parts]), above)

    steps = len(labels)
    above = Hierarchy((first.assign,), (first.centroids,), (first.counts,))
    (w, p, last), (losses, aboves) = lax.scan(step, (given["w0"], p0, above), (jnp.arange(steps), given["x_in"], jnp.asarray(labels)))
    return {"first": first, "losses": losses, "above": aboves, "w": w, "p": p, "coarse": last.coarse[0]}


def _compare_schedule(case: Case, got: dict, dtype: str, period: int, mode: str) -> None:
    exact, until = dtype == "float64", None if dtype == "float64" else period
    close = (
        partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9) if exact else partial(np.testing.assert_allclose, rtol=5e-3, atol=1e-4)
    )
    np.testing.assert_array_equal(got["first"].assign, case["assign0"])
    close(got["first"].centroids, case["coarse0"])
    close(got["losses"][:until], case["losses"][:until])
    renewed = np.arange(0, len(case["losses"]), period)
    parents, coarse = np.asarray(got["above"].parents[0])[renewed], np.asarray(got["above"].coarse[0])[renewed]
    if exact:
        np.testing.assert_array_equal(parents, case["assigns"])
        close(coarse, case["coarses"])
        for name, value in (("w_final", got["w"]), ("proxies_final", got["p"]), ("coarse_final", got["coarse"])):
            close(value, case[name], err_msg=f"{name} {mode}")


def optimiser(case: Case) -> None:
    """AdamW with the proxies' own rate, clipped values, rates that fall in steps, and a backbone that is frozen at first."""
    params0 = {"backbone": case["b0"], "head": case["w0"], "proxies": case["proxies0"]}
    lr, mult, warm = float(case["lr"]), float(case["proxy_lr_mult"]), int(case["warm"])
    steps = len(case["losses"])
    options = OptimOptions(
        learning_rate=lr, schedule="step", step_every=int(case["sched_step"]), step_factor=float(case["gamma"]), b1=0.9, b2=0.999, eps=1e-8,
        weight_decay=float(case["weight_decay"]), decay="", groups=(("^proxies$", mult),), hold=(("^backbone$", warm),), clip_norm=0.0, clip_value=10.0,
    )  # fmt: skip
    rates = np.array([float(learning_rate(options, steps)(jnp.int32(t))) for t in range(steps)])
    np.testing.assert_allclose(rates[:, None] * [1, 1, mult], case["lrs"], rtol=1e-6)
    labels = case["labels"].astype(np.int32)
    for dtype, _ in ways([("float64", 1), ("float32", 8)]):
        params = {k: jnp.asarray(v, dtype) for k, v in params0.items()}
        tx = make_optimizer(options, params, steps)

        def step(carry: tuple, now: tuple, tx: optax.GradientTransformation = tx) -> tuple:
            params, state = carry
            x_in, y = now
            loss = lambda q: proxy.proxy_anchor(jnp.tanh(x_in @ q["backbone"]) @ q["head"], q["proxies"], y)
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (final, _), losses = jax.jit(partial(lax.scan, step))(
            (params, tx.init(params)), (jnp.asarray(case["x_in"], dtype), jnp.asarray(labels))
        )
        exact = dtype == "float64"
        np.testing.assert_allclose(losses, case["losses"], rtol=1e-8 if exact else 1e-3, atol=1e-10 if exact else 1e-6)
        for name, leaf in (("b_final", "backbone"), ("w_final", "head"), ("proxies_final", "proxies")):
            np.testing.assert_allclose(final[leaf], case[name], rtol=1e-8 if exact else 1e-2, atol=1e-9 if exact else 1e-3, err_msg=name)


CHECKS = {
    "proxy_anchor": Check(has("embeddings", "proxies", "labels", "alpha", "margin"), anchor),
    "proxy_nca": Check(has("embeddings", "proxies", "scale2", "loss_prob_ref"), nca),
    "hpl_given": Check(has("proxies_0", "parent_0", "weights"), given),
    "hpl_learned": Check(has("assignment", "old_coarse", "coarse_unit"), learned),
    "cluster": Check(has("fine", "init_coarse"), clusters),
    "trajectory": Check(has("x_in", "assigns", "coarses"), trajectory),
    "adamw": Check(has("x_in", "b0", "lrs"), optimiser),
}
