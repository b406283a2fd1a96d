"""CODIS as its paper states it, from the features of a step: the loss term by term, what moves, what is refused, and what it costs."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl.losses.codebook import assign
from jaxvl.losses.transport import ipot, sinkhorn
from jaxvl.mesh import BATCH, MeshOptions, make_mesh, shardings
from jaxvl.methods import METHODS, codis
from jaxvl.methods.fused import Views, trunk
from jaxvl.methods.fused_options import of_method
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.state import STATE_RULES

B, K, Q, KEY = 8, 12, 16, jax.random.key(3)
TINY = dict(variant="", width=16, depth=1, heads=2, mlp_dim=16, dtype="float32")
IMAGE = VitOptions(**TINY, patch=4, pool="cls")
TEXT = TextOptions(**TINY, vocab_size=20, causal=False, pool="first", mask_id=3)
PLAIN = codis.CodisOptions(width=8, fusion_depth=1, codes=K, queue=Q, group_size=4, ot_group=4, alpha_steps=10)
# Every switch of the losses thrown at once.
OTHER = PLAIN._replace(code_temperature=0.0, code_targets="plan", ot_weight=0.5, cross_weight=2.0, ot_solver="sinkhorn", ot_scope="local",
                       ica_reduction="halves", ica_intra="hard", scope="global", unfilled="mask", freeze_steps=5, renorm_codes=True)  # fmt: skip
OPTIONS = {"plain": PLAIN, "other": OTHER}


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 20, (B, 6)).astype(np.int32)
    tokens[::2, 4:] = 0
    return {"image": rng.standard_normal((B, 8, 8, 3)).astype(np.float32), "tokens": tokens}


SPEC = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()}


@cache
def built(name):
    """(method, trunk, params, memory) at step 5, with 6 entries in the queue where they are counted."""
    o = OPTIONS[name]
    method, base = METHODS["codis"].build(IMAGE, TEXT, o), trunk(IMAGE, TEXT, of_method(o))
    params, memory = jax.jit(lambda key: method.init(key, SPEC))(KEY)
    return method, base, params, memory | {"step": jnp.int32(5)} | ({"filled": jnp.int32(6)} if "filled" in memory else {})


def features(seed=0):
    """Unit features v, t, v_m, t_m [B, D]."""
    z = np.random.default_rng(seed).standard_normal((4, B, 8))
    return tuple(np.float32(z / np.linalg.norm(z, axis=-1, keepdims=True)))


@cache
def aligned(name):
    """A program for L_ica, L_code and what is logged, without the towers: features, codes, temperature, memory -> (loss, logged), gradients."""
    o, base = OPTIONS[name], built(name)[1]

    def loss(features, codes, tau, memory):
        alpha = o.alpha * jnp.minimum(1.0, memory["step"] / o.alpha_steps)
        now = Views(*features, None, None, None, None, tau, alpha, 1 if o.scope == "global" else B // o.group_size)
        each, ica = codis.alignment(base, o, memory, now, {})
        code, watched = codis.codebook(o, codes, memory, now)
        return ica + sum(code.values()), {**each, "loss_ica": ica, **code, **watched}

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def contrast(x, guide, batch, queue, tau, alpha, groups, filled):
    """Cross entropy of every row with its group of the batch and the queue, row by row."""
    total, size = 0.0, B // groups
    for i in range(B):
        own = batch[i // size * size :][:size]
        candidates = np.concatenate([own, queue[:filled]])
        y = np.eye(len(candidates))[i % size]
        if guide is not None:
            y = alpha * softmax(guide[i] @ candidates.T / tau) + (1 - alpha) * y
        total -= y @ np.log(softmax(x[i] @ candidates.T / tau)) / B
    return total


@pytest.mark.parametrize("name", OPTIONS)
def test_terms_are_the_papers_of_the_features(name):
    _, _, params, memory = built(name)
    (_, seen), _ = aligned(name)(features(), params["codebook"], 0.07, memory)
    v, t, v_m, t_m = (np.float64(x) for x in features())
    tau, alpha, plain = 0.07, 0.2, name == "plain"  # half of the 10 steps in which alpha rises to 0.4 are over
    shared = (tau, alpha, 2 if plain else 1, Q if plain else 6)
    V, T = (v_m, np.float64(memory["image_queue"])), (t_m, np.float64(memory["text_queue"]))
    soft = lambda guide: guide if plain else None
    want = {
        "loss_i2t": contrast(v, v_m, *T, *shared), "loss_t2i": contrast(t, t_m, *V, *shared),
        "loss_i2i": contrast(v, soft(v_m), *V, *shared), "loss_t2t": contrast(t, soft(t_m), *T, *shared),
    }  # fmt: skip
    want["loss_ica"] = sum(want.values()) / (4 if plain else 2)

    c = np.float64(params["codebook"])
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    plans = {}
    for view, z in (("image", v_m), ("text", t_m)):
        cost = 1 - z @ c.T
        if plain:
            plans[view] = np.float64(ipot(jnp.asarray(cost, jnp.float32)))
        else:
            plans[view] = np.concatenate([sinkhorn(jnp.asarray(part, jnp.float32)) for part in np.split(cost, 2)]) / 2.0
        want[f"loss_ot_{view}"] = (plans[view] * cost).sum()
    target = {view: plan / plan.sum(1, keepdims=True) / B if plain else plan for view, plan in plans.items()}
    log_p = lambda z: np.log(softmax(z @ c.T / (0.1 if plain else tau)))
    want["loss_t2p"], want["loss_i2p"] = -(target["image"] * log_p(t)).sum(), -(target["text"] * log_p(v)).sum()
    for term, value in want.items():
        np.testing.assert_allclose(seen[term], value, rtol=2e-5, err_msg=term)
    watched = {k: float(x) for k, x in seen.items() if k.startswith("codes/")}
    assert len(watched) == 11
    assert all(np.isfinite(x) for x in watched.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_adds_the_terms_up(name):
    method, _, params, memory = built(name)
    rows = {k: jnp.asarray(v) for k, v in batch().items()}
    loss, aux = jax.jit(method.loss)(params, memory, rows, KEY)
    o, get = OPTIONS[name], lambda *names: sum(float(aux[f"loss_{n}"]) for n in names)
    np.testing.assert_allclose(get("code"), o.ot_weight * get("ot_image", "ot_text") + o.cross_weight * get("t2p", "i2p"), rtol=1e-5)
    np.testing.assert_allclose(get("ica"), get("i2t", "t2i", "i2i", "t2t") / (4 if name == "plain" else 2), rtol=1e-5)
    np.testing.assert_allclose(loss, get("mlm", "itm", "ica", "code"), rtol=1e-5)
    after = method.update(memory, params, aux)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, memory)
    assert after["step"] == 6 and "codebook" not in after["teacher"]


def test_what_moves():
    _, _, params, memory = built("plain")
    _, (dz, dcodes, dtau) = aligned("plain")(features(), params["codebook"], 0.07, memory)
    assert [bool(np.any(d)) for d in dz] == [True, True, False, False], "teachers are constants"
    assert np.any(dcodes) and dtau != 0
    method, _, params, memory = built("other")
    frozen, moving = (aligned("other")(features(), params["codebook"], 0.07, memory | {"step": jnp.int32(step)})[1][1] for step in (4, 5))
    assert not np.any(frozen)
    assert np.any(moving)
    long = {**params, "codebook": 3 * params["codebook"], "temperature": jnp.float32(9)}
    np.testing.assert_allclose(method.constrain(long)["codebook"], params["codebook"], rtol=1e-6)
    assert method.constrain(long)["temperature"] == 0.5
    np.testing.assert_array_equal(built("plain")[0].constrain(long)["codebook"], long["codebook"])


def test_a_codebook_starts_as_directions_and_can_be_left_out():
    params = built("plain")[2]
    assert params["codebook"].shape == (K, 8)
    np.testing.assert_allclose(np.linalg.norm(params["codebook"], axis=1), 1, rtol=1e-5)
    method = METHODS["codis"].build(IMAGE, TEXT, PLAIN._replace(code=False))
    params, memory = jax.eval_shape(lambda key: method.init(key, SPEC), KEY)
    assert "codebook" not in params
    _, aux = jax.eval_shape(method.loss, params, memory, SPEC, KEY)
    assert "loss_ica" in aux and not any("code" in name or "2p" in name for name in aux)


def test_the_queue_counts_in_the_plan_once_it_is_filled():
    """Whole functions of two scopes, without the towers."""
    _, _, params, memory = built("other")
    memory, now, C = {**memory, "filled": jnp.int32(0)}, Views(*features(), *(None,) * 7), params["codebook"]
    queue = PLAIN._replace(ot_scope="batch_plus_queue", unfilled="mask")
    run = jax.jit(lambda o, memory: codis.codebook(o, C, memory, now)[0], static_argnums=0)
    empty, alone, full = run(queue, memory), run(PLAIN, memory), run(queue, memory | {"filled": jnp.int32(Q)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), empty, alone)
    assert abs(full["loss_t2p"] - alone["loss_t2p"]) > 1e-3
    contrasting = run(queue._replace(unfilled="contrast"), memory)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), contrasting, full)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)], ids=str)
def test_equal_on_a_mesh_with_the_codes_split(sizes):
    method, _, params, memory = built("plain")
    args = features(), params["codebook"], 0.07, memory
    want = aligned("plain")(*args)
    mesh = make_mesh(MeshOptions(*sizes))
    with jax.set_mesh(mesh):
        placed = shardings({"params": params, "memory": memory}, (*STATE_RULES, *method.rules), mesh)
        split, codes = jax.NamedSharding(mesh, BATCH), placed["params"]["codebook"]
        assert codes.spec == jax.P(("fsdp", "tensor"), None)
        got = aligned("plain")(
            jax.device_put(features(), split), jax.device_put(args[1], codes), 0.07, jax.device_put(memory, placed["memory"])
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), got, want)


@pytest.mark.parametrize(
    "changed",
    [
        dict(codes=0),
        dict(ot_group=0),
        dict(ipot_iterations=0),
        dict(ipot_beta=0.0),
        dict(sinkhorn_epsilon=-1.0),
        dict(code_temperature=-0.1),
        dict(freeze_steps=-1),
    ],
    ids=str,
)
def test_wrong_options_are_named(changed):
    ((key, value),) = changed.items()
    with pytest.raises(ValueError, match=rf"config\.method\.{key} is {value}; it must be"):
        METHODS["codis"].build(IMAGE, TEXT, PLAIN._replace(**changed))


def test_transport_is_a_small_share_of_a_step_of_the_paper():
    """Sizes of the paper: ViT-B/16 at 256 pixels, 6 + 6 layers of BERT-base, 512 pairs, 4000 codes, 50 iterations."""
    image, text = (
        VitOptions(variant="B/16", pool="cls"),
        TextOptions(variant="B", vocab_size=30_522, depth=6, causal=False, pool="first", mask_id=103),
    )
    o = codis.CodisOptions()
    spec = {"image": jax.ShapeDtypeStruct((512, 256, 256, 3), jnp.float32), "tokens": jax.ShapeDtypeStruct((512, 25), jnp.int32)}
    shares = codis.flops(trunk(image, text, of_method(o)), o, spec)
    total = sum(shares.values())
    assert shares["transport"] * 3 * 512 == 2 * 512 * 4000 * 50 * 13
    assert shares["transport"] < 1e-4 * total
    assert shares["codebook"] < 1e-3 * total
    heavy = o._replace(ot_scope="batch_plus_queue", queue=65_536)
    shares = codis.flops(trunk(image, text, of_method(heavy)), heavy, spec)
    assert shares["transport"] < 0.03 * sum(shares.values())


@pytest.mark.parametrize(
    "options",
    [PLAIN, OTHER, PLAIN._replace(code=False), PLAIN._replace(ot_scope="batch_plus_queue", unfilled="mask")],
    ids=["plain", "other", "no code", "queue"],
)
def test_the_terms_of_the_bench_are_the_steps(options):
    method = METHODS["codis"].build(IMAGE, TEXT, options)
    found = method.terms(SPEC)
    np.testing.assert_allclose(sum(term.flops for term in found.values()), method.flops(SPEC))
    runs = {name: term for name, term in found.items() if term.run}
    assert sorted(runs) == (["codebook", "ica", "transport"] if options.code else ["ica"])
    shapes = {name: jax.eval_shape(term.run, *term.shapes) for name, term in runs.items()}
    assert all(jax.tree.leaves(shapes[name])[0].shape == () for name in runs if name != "transport")
    if options.code:
        assert shapes["transport"].shape == (2, B, K)
        assert [g.shape for g in shapes["codebook"][1]] == [(B, 8), (B, 8), (K, 8)]


def test_scopes_of_the_solver():
    assert codis.solver(PLAIN)._asdict() == dict(name="ipot", beta=0.5, epsilon=0.05, iterations=50, inner=1, scope="global", group=4)
    assert codis.solver(OTHER).iterations == 3
    with pytest.raises(ValueError, match="groups of 5"):
        assign(jnp.zeros((2, B, K)), codis.solver(OTHER._replace(ot_group=5)))
