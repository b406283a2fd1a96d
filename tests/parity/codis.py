"""CODIS: transport plans, codebook terms and gradients, intra/cross alignment; in float64 and float32, on 1 to 8 devices."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxvl.losses.codebook import Solver, assign, codebook_terms, cosines, log_predictions, row_normalised
from jaxvl.losses.momentum import Candidates, contrast
from jaxvl.losses.pairs import unit
from jaxvl.losses.transport import ipot, sinkhorn
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.methods import codis
from jaxvl.methods.fused_options import HIGH, LOW
from tests.parity.case import Case, Check, has

EPS = np.finfo(np.float32).eps
CONVERGED = 3000  # iterations of Sinkhorn after which nothing moves
VIEWS, ROWS, MATRIX = P(None, ("data", "fsdp")), P(("data", "fsdp")), P(("data", "fsdp"), "tensor")


def problems(case: Case) -> Iterator[Callable[[str], Any]]:
    """`get(name)` of each numbered problem of a file, None where it has none; names of one problem alone are found by `names(get)`."""
    for i in range(int(case["n_cases"])):
        yield lambda name, i=i: case.get(f"c{i}/{name}")


def names(case: Case, get: Callable[[str], Any], start: str) -> list[str]:
    """The names of one problem's arrays that begin with `start`."""
    prefix = f"c{get.__defaults__[0]}/"
    return sorted(n.removeprefix(prefix) for n in case if n.startswith(prefix + start))


def near(got: Any, want: Any, rtol: float, atol: float, name: str) -> None:
    """want: None for an array that the file does not have."""
    if want is not None:
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=name)


def run(f: Callable, dtype: Any, *args: Any, specs: tuple = (), devices: int = 1) -> Any:
    """f(*args) under jit in one precision; arrays with a spec are split over that many devices where their axes divide."""
    with jax.enable_x64(dtype == np.float64):
        cast = [jnp.asarray(a, dtype) for a in args]
        if devices == 1:
            return jax.tree.map(np.asarray, jax.jit(f)(*cast))
        tensor = 2 if devices == 8 else 1
        mesh = make_mesh(MeshOptions(data=devices // tensor, tensor=tensor), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, jax.NamedSharding(mesh, fitting(mesh, a, spec))) for a, spec in zip(cast, specs, strict=True)]
            return jax.tree.map(np.asarray, jax.jit(f)(*placed))


def fitting(mesh: jax.sharding.Mesh, a: jax.Array, spec: P) -> P:
    """`spec` without the axes that do not divide."""
    size = lambda axes: int(np.prod([mesh.shape[x] for x in ((axes,) if isinstance(axes, str) else axes or ())]))
    return P(*(axes if n % size(axes) == 0 else None for n, axes in zip(a.shape, spec, strict=False)))


def decimal(scalar: np.ndarray) -> float:
    """A scalar that the files keep in float32 though the computation may have had its decimal: exact to EPS, its softmax to EPS / tau."""
    return float(str(scalar))


def everywhere(rows: int) -> list[tuple[Any, int]]:
    """Float64 on one device; float32 on one, and on as many of 2, 4 and 8 as the rows divide over."""
    return [(np.float64, 1), *((np.float32, n) for n in (1, 2, 4, 8) if rows % n == 0)]


def plan_tolerance(dtype: Any, want: np.ndarray, step: float, iterations: int) -> float:
    """In float32 each iteration rounds exponents of up to 2 / step; the roundings add up as a random walk does."""
    return 1e-12 if dtype == np.float64 else 1e-6 + want.max() * EPS * (2 / step) * np.sqrt(iterations)


def ipot_file(case: Case) -> None:
    for get in problems(case):
        mode = str(get("mode"))  # a label: what it means is in cost and marginals
        cost, u, v, beta, inner = get("cost"), get("u"), get("v"), float(get("beta")), int(get("inner"))
        np.testing.assert_allclose(1 - run(cosines, np.float64, get("features")[None], get("codebook").T)[0], cost, atol=2 * EPS)
        wanted = {int(get("iters")): get("plan")} | {int(n.rpartition("_")[2]): get(n) for n in names(case, get, "plan_after_")}
        np.testing.assert_array_equal(wanted[int(get("iters"))], get("plan"))
        for iterations, want in wanted.items():
            f = lambda cost, u, v, n=iterations, beta=beta, inner=inner: ipot(cost, u, v, beta=beta, iterations=n, inner=inner)
            for dtype, devices in everywhere(len(cost)) if iterations == int(get("iters")) else [(np.float64, 1)]:
                got = run(f, dtype, cost, u, v, specs=(MATRIX, P(), P()), devices=devices)
                atol = plan_tolerance(dtype, want, beta, iterations)
                np.testing.assert_allclose(
                    got, want, rtol=0, atol=atol, err_msg=f"{mode}, {iterations} iterations, {dtype.__name__}, {devices} devices"
                )
                if iterations == int(get("iters")):
                    np.testing.assert_allclose(got.sum(1), get("row_marginal"), atol=atol * want.shape[1])
                    np.testing.assert_allclose(got.sum(0), get("col_marginal"), atol=atol)
                    np.testing.assert_allclose((got * cost).sum(), get("ot_value"), atol=2 * atol * want.size)
        # The plan is no cheaper than the best one but for what its rows, which are not exact yet, leave undone.
        undone = np.abs(get("row_marginal") - u).sum() * np.ptp(cost)
        assert get("exact_ot_value") <= get("ot_value") + undone + 1e-7
        far = run(lambda cost, u, v, beta=beta: ipot(cost, u, v, beta=beta, iterations=5000), np.float64, cost, u, v)
        np.testing.assert_allclose((far * cost).sum(), get("exact_ot_value"), atol=5e-5)


def sinkhorn_file(case: Case) -> None:
    for get in problems(case):
        cost, u, v, epsilon = get("cost"), get("u"), get("v"), float(get("eps"))
        for iterations, name in ((3, "plan_3iters"), (CONVERGED, "plan_converged")):
            want = get(name)
            f = lambda cost, u, v, n=iterations, epsilon=epsilon: sinkhorn(cost, u, v, epsilon=epsilon, iterations=n)
            for dtype, devices in everywhere(len(cost)) if iterations == 3 else [(np.float64, 1)]:
                got = run(f, dtype, cost, u, v, specs=(MATRIX, P(), P()), devices=devices)
                atol = 1e-9 if iterations == CONVERGED else plan_tolerance(dtype, want, epsilon, 1)
                np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=f"{name}, {dtype.__name__}, {devices} devices")
        # SwAV's assignment knows no masses: it is this plan, rows rescaled, for uniform ones.
        codes = run(lambda cost, epsilon=epsilon: row_normalised(sinkhorn(cost, epsilon=epsilon, iterations=3)), np.float64, cost)
        np.testing.assert_allclose(codes, get("swav_code_3iters"), rtol=0, atol=1e-12)


def codebook_losses(case: Case) -> None:
    for get in problems(case):
        name, tau, iterations = str(get("solver")), decimal(get("tau")), int(get("iters"))
        assert name in ("ipot", "sinkhorn"), f"solver {name!r} is not known"
        step = float(get("beta"))
        solver = Solver(name, iterations=iterations, **({"beta": step} if name == "ipot" else {"epsilon": step}))
        students, teachers = (np.stack([get(f"z_v{m}"), get(f"z_t{m}")]) for m in ("", "_m"))

        def terms(students, teachers, codebook, solver=solver, tau=tau, rows=True):
            cosine = cosines(jax.lax.stop_gradient(teachers), codebook.T)
            plan, log_p = assign(cosine, solver), log_predictions(students, codebook.T, tau)
            found = codebook_terms(cosine, log_p, plan, normalise_rows=rows)
            return sum(found), (found, plan, jnp.exp(log_p))

        def whole(*args, terms=terms):
            (loss, aux), grads = jax.value_and_grad(terms, (0, 1, 2), has_aux=True)(*args)
            return loss, *aux, grads, terms(*args, rows=False)[1][0], unit(args[2].T).T

        for dtype, devices in everywhere(students.shape[1]):
            exact = dtype == np.float64
            specs = (VIEWS, VIEWS, P(None, "tensor"))
            loss, found, plan, p, grads, by_plan, normalised = run(
                whole, dtype, students, teachers, get("codebook"), specs=specs, devices=devices
            )
            where = f"{dtype.__name__}, {devices} devices"
            value, zero = (EPS / tau, 1e-9) if exact else (2e-5, 1e-6)  # a loss may be nothing but rounding
            close = lambda got, want, rtol, atol=zero, where=where, get=get: near(got, get(want), rtol, atol, f"{want}, {where}")
            for view, letter, target in ((0, "v", "target_i2p"), (1, "t", "target_t2p")):
                atol = plan_tolerance(dtype, get(f"plan_{letter}"), step, iterations)
                close(plan[view], f"plan_{letter}", 0, atol)
                close(plan[view] / plan[view].sum(1, keepdims=True), target, 0, atol * plan.shape[1])
                close(p[view], "P_i2p" if view == 0 else "P_t2p", value, 1e-12 if exact else 1e-7)
            close(loss, "loss_code", value)
            close(found.ot_image, "loss_ot_v", value)
            close(found.ot_text, "loss_ot_t", value)
            for term in ("t2p", "i2p"):
                close(getattr(found, term), f"loss_{term}", value)
                close(getattr(by_plan, term), f"loss_{term}_unnormalized", value)
            slack = lambda want, get=get, exact=exact, zero=zero: (
                (1e-7 if exact else 2e-5) * np.abs(0 if get(want) is None else get(want)).max() + zero
            )
            gradient = 10 * EPS / tau if exact else 2e-4
            close(grads[0][0], "grad_z_v", gradient, slack("grad_z_v"))
            close(grads[0][1], "grad_z_t", gradient, slack("grad_z_t"))
            close(grads[2], "grad_codebook", gradient, slack("grad_codebook"))
            assert not grads[1].any(), "teachers are constants"
            close(normalised, "codebook_normalized", 1e-12 if exact else 1e-6, 0 if exact else 1e-7)


def ica(case: Case) -> None:
    for get in problems(case):
        tau, alpha = decimal(get("gamma")), decimal(get("alpha"))
        np.testing.assert_allclose(np.clip(get("gamma_raw"), LOW, HIGH), tau, rtol=1e-6)
        features = [get(name) for name in ("z_v", "z_t", "z_v_m", "z_t_m")]
        queues = [get(name).T for name in ("image_queue", "text_queue")]

        def aligned(v, t, v_m, t_m, image_queue, text_queue, tau=tau, alpha=alpha, **options):
            now = SimpleNamespace(v=v, t=t, v_m=v_m, t_m=t_m, temperature=tau, alpha=alpha, groups=1)
            base = SimpleNamespace(candidates=lambda *_: (Candidates(v_m, image_queue), Candidates(t_m, text_queue)))
            return codis.alignment(base, codis.CodisOptions(**options), {}, now, {})

        def all_ways(*args, aligned=aligned):
            return aligned(*args, alpha=0.0), {name: aligned(*args, **options) for name, options in REDUCTIONS.items()}

        ways = ("i2t", "t2i", "i2i", "t2t")
        for dtype, devices in everywhere(len(features[0])):
            rtol = EPS / tau if dtype == np.float64 else 2e-5
            zero = 1e-9 if dtype == np.float64 else 1e-6
            hard, mixed = run(all_ways, dtype, *features, *queues, specs=(*(ROWS,) * 4, ROWS, ROWS), devices=devices)
            where = f"{dtype.__name__}, {devices} devices"
            for way in ways:
                near(hard[0][f"loss_{way}"], get(f"loss_{way}_hard"), rtol, zero, f"{way} hard, {where}")
                near(mixed["loss_ica_mean4_allsoft"][0][f"loss_{way}"], get(f"loss_{way}_soft"), rtol, zero, f"{way} soft, {where}")
            for name in REDUCTIONS:
                if name in names(case, get, "loss_ica"):
                    near(mixed[name][1], get(name), rtol, zero, f"{name}, {where}")
            near(mixed["loss_ica_halves_allsoft"][1], mixed["loss_ica_sum_allsoft"][1] / 2, rtol, zero, where)
        for way in ways:
            own, other = (np.float64(get(f"z_{letter}_m")) for letter in ("v" if way[0] == "i" else "t", "v" if way[2] == "i" else "t"))
            candidates = np.concatenate([other, queues[0 if way[2] == "i" else 1]])
            near(targets_of(own, candidates, tau, alpha), get(f"target_{way}"), 2 * EPS / tau, 1e-12, way)
        assert set(names(case, get, "loss_ica")) <= set(REDUCTIONS), "a combination that nothing compares"


def targets_of(guide: np.ndarray, candidates: np.ndarray, tau: float, alpha: float) -> np.ndarray:
    """The targets that `contrast` never forms, read from its gradient: candidate j gets a channel of its own, which only a query sees.

    There the gradient of a query of zeros is that of its logits, (softmax - y) / (B tau), and the softmax of equal logits is 1/M.
    """
    (B, D), M = guide.shape, len(candidates)
    marked = np.concatenate([candidates, np.eye(M)], 1)

    def loss(query, marked, guide):
        return contrast(query, Candidates(marked[:B], marked[B:]), tau, guide=guide, alpha=alpha)

    slope = run(jax.grad(loss), np.float64, np.zeros((B, D + M)), marked, np.concatenate([guide, np.zeros((B, M))], 1))
    return 1 / M - B * tau * slope[:, D:]


REDUCTIONS: dict[str, dict[str, Any]] = {
    "loss_ica_mean4_allsoft": {},
    "loss_ica_mean4_softcross_hardintra": {"ica_intra": "hard"},
    "loss_ica_sum_allsoft": {"ica_reduction": "sum"},
    "loss_ica_halves_allsoft": {"ica_reduction": "halves"},
    "loss_ica_halves_softcross_hardintra": {"ica_intra": "hard", "ica_reduction": "halves"},
    "loss_ica_sum_softcross_hardintra": {"ica_intra": "hard", "ica_reduction": "sum"},
}
CHECKS = {
    "ica": Check(has("n_cases", "c0/z_v_m", "c0/image_queue", "c0/loss_i2i_soft", "c0/loss_i2t_hard"), ica),
    "ipot": Check(has("n_cases", "c0/cost", "c0/beta", "c0/plan", "c0/ot_value"), ipot_file),
    "sinkhorn": Check(has("n_cases", "c0/cost", "c0/eps", "c0/plan_3iters"), sinkhorn_file),
    "codebook_losses": Check(has("n_cases", "c0/z_v_m", "c0/codebook", "c0/plan_v", "c0/loss_code"), codebook_losses),
}
