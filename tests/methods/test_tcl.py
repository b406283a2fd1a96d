"""TCL and its trunk: microbatches and parts change nothing, groups are the devices of the published runs, and no edge gives NaN."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl.accumulate import value_and_grad
from jaxvl.losses.mlm import masked_as
from jaxvl.mesh import BATCH, MeshOptions, make_mesh, shardings
from jaxvl.methods import METHODS, tcl
from jaxvl.methods.fused import Draws, trunk
from jaxvl.methods.fused_options import HIGH, LOW, of_method
from jaxvl.models.fusion import Fusion
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.state import STATE_RULES

B, Q, KEY = 4, 6, jax.random.key(3)
TINY = dict(variant="", width=8, depth=1, heads=2, mlp_dim=8, dtype="float32")
IMAGE = VitOptions(**TINY, patch=4)
TEXT = TextOptions(**TINY, vocab_size=20, causal=False, pool="first", mask_id=3)
PLAIN = tcl.resolve(tcl.TclOptions(width=8, fusion_depth=1, queue=Q, pool_grid=2, alpha_steps=10, ids=True, profile="fixed"))


def batch(rows=B):
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 20, (rows, 6)).astype(np.int32)
    tokens[::2, 4:] = 0
    image, second = rng.standard_normal((2, rows, 8, 8, 3)).astype(np.float32)
    return {"image": image, "image_aug": second, "tokens": tokens, "id": np.arange(rows, dtype=np.int32) // 2}


@cache
def built(o=PLAIN):
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()}
    method = METHODS["tcl"].build(IMAGE, TEXT, o)
    params, memory = jax.jit(lambda key: method.init(key, spec))(KEY)
    return (
        method,
        params,
        {**memory, "step": jnp.int32(5)} | ({"pointer": jnp.int32(4), "filled": jnp.int32(4)} if "filled" in memory else {}),
    )


@cache
def stepped(accumulate=1):
    """A program for value and gradients, not cut at all or cut in microbatches and parts."""
    o = PLAIN if accumulate == 1 else PLAIN._replace(chunks=2)
    return jax.jit(value_and_grad(METHODS["tcl"].build(IMAGE, TEXT, o), accumulate))


def test_microbatches_and_parts_change_nothing_and_the_queue_moves_once():
    _, params, memory = built()
    (loss, aux), grads = stepped()(params, memory, batch(), KEY)
    (cut_loss, cut_aux), cut_grads = stepped(2)(params, memory, batch(), KEY)
    np.testing.assert_allclose(cut_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), cut_grads, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), cut_aux["memory"], aux["memory"])
    still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.abs(g).max() > 0]
    assert all("['k']['bias']" in path for path in still), still

    after = aux["memory"]
    assert (int(after["pointer"]), int(after["filled"]), int(after["step"])) == (2, 6, 6)
    np.testing.assert_array_equal(after["id_queue"], [1, 1, -100, -100, 0, 0])
    written = np.abs(after["image_queue"] - memory["image_queue"]).max(1) > 1e-6
    np.testing.assert_array_equal(written, [True, True, False, False, True, True])
    moved = jax.tree.map(lambda t, p, new: np.testing.assert_allclose(new, 0.995 * t + 0.005 * p, rtol=1e-5, atol=1e-7),
                         memory["teacher"], {k: params[k] for k in memory["teacher"]}, after["teacher"])  # fmt: skip
    assert jax.tree.structure(after) == jax.tree.structure(memory) and moved is not None
    np.testing.assert_allclose(aux["alpha"], 0.2, rtol=1e-6)
    six = [aux[f"loss_{k}"] for k in ("i2t", "t2i", "i2i", "t2t", "lmi_image", "lmi_text")]
    np.testing.assert_allclose(aux["loss_ita"], np.mean(six), rtol=1e-5)
    np.testing.assert_allclose(loss, aux["loss_ita"] + aux["loss_itm"] + aux["loss_mlm"], rtol=1e-6)
    np.testing.assert_allclose(aux["loss_mlm"], 0.8 * aux["loss_mlm_hard"] + 0.2 * aux["loss_mlm_soft"], rtol=1e-5)


EDGES = {
    "captions of one token": lambda b, p, m: ({**b, "tokens": np.where(np.arange(6) > 0, 0, b["tokens"])}, p, m),
    "one image four times": lambda b, p, m: ({**b, "id": np.full(B, 7, np.int32)}, p, {**m, "id_queue": jnp.full(Q, 7)}),
    "identical rows": lambda b, p, m: ({k: np.repeat(v[:1], B, 0) for k, v in b.items()}, p, m),
    "cold": lambda b, p, m: (b, {**p, "temperature": jnp.float32(0.0)}, m),
    "hot": lambda b, p, m: (b, {**p, "temperature": jnp.float32(9.0)}, m),
    "empty queue, whole teacher": lambda b, p, m: (b, p, {**m, "filled": jnp.int32(0), "step": jnp.int32(10**6)}),
    "projections of zero": lambda b, p, m: (b, {**p, "text_proj": jax.tree.map(jnp.zeros_like, p["text_proj"])}, m),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_give_finite_numbers(name):
    b, p, m = EDGES[name](batch(), *built()[1:])
    (loss, aux), grads = stepped()(p, m, b, KEY)
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in jax.tree.leaves((grads, aux["memory"])))
    if name == "captions of one token":
        assert aux["loss_lmi_text"] == 0 and aux["loss_mlm"] == 0
    np.testing.assert_allclose(aux["temperature"], np.clip(p["temperature"], LOW, HIGH), rtol=1e-6)


def test_a_batch_of_one_is_legal():
    """The gradients of its terms are in the tests of the losses."""
    method, params, memory = built()
    loss, aux = jax.jit(method.loss)(params, memory, batch(1), KEY)
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in jax.tree.leaves(aux))
    assert aux["loss_lmi_image"] == 0 and aux["loss_lmi_text"] == 0


def test_a_group_is_a_device_of_the_published_runs():
    """Terms of a batch in two groups are the means of what two batches give, each of them against the same queue."""
    options = PLAIN._replace(scope="group", group_size=2)
    _, params, memory = built()
    labels = np.full((B, 6), -100, np.int32)
    labels[0, 2], labels[1, 1], labels[3, 1:3] = 5, 6, (7, 8)
    b, swap = batch(), np.int32([1, 0, 1, 0])
    b["id"] = np.arange(B, dtype=np.int32)

    def run(o):
        base = trunk(IMAGE, TEXT, of_method(o))

        @jax.jit
        def losses(params, memory, b, labels):
            draws = Draws(
                jnp.asarray(swap[: len(labels)]),
                jnp.asarray(swap[: len(labels)]),
                masked_as(jnp.where(labels == -100, b["tokens"], 3), labels),
            )
            return tcl.terms(base, o, params, memory, base.encode(params, b, None), b, None, draws)[1]

        return losses

    whole, half = run(options)(params, memory, b, labels), run(PLAIN)
    first, second = (half(params, memory, {k: v[rows] for k, v in b.items()}, labels[rows]) for rows in (slice(0, 2), slice(2, 4)))
    for name in (k for k in whole if k.startswith("loss")):
        np.testing.assert_allclose(whole[name], (first[name] + second[name]) / 2, rtol=2e-5, err_msg=name)


def test_keys_and_values_computed_once_are_those_computed_for_every_row():
    rng = np.random.default_rng(1)
    base = trunk(IMAGE, TEXT, of_method(PLAIN))
    params, states = built()[1], rng.standard_normal((B, 3, 8)).astype(np.float32)
    images, mask, source = (
        rng.standard_normal((B, 5, 8)).astype(np.float32),
        np.ones((B, 3), bool),
        np.int32([[1, 0], [1, 1]]),
    )  # within two groups
    rows = np.array([1, 0, 3, 3])
    once = lambda p, x, z: jnp.sum(jnp.sin(base.fuse(p, z, mask, base.keys_values(p, x), source)))
    again = lambda p, x, z: jnp.sum(jnp.sin(Fusion(TEXT._replace(depth=1)).apply({"params": p["fusion"]}, z, mask, x[rows])[0]))
    got, want = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(params, images, states) for f in (once, again))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_leaves_are_there_where_they_are_used():
    method = lambda **changed: METHODS["tcl"].build(IMAGE, TEXT, PLAIN._replace(**changed))
    shapes = lambda m: jax.eval_shape(lambda: m.init(KEY, batch()))
    params, memory = shapes(method())
    assert sorted(params) == ["fusion", "image", "image_proj", "itm", "mlm", "temperature", "text", "text_proj"]
    assert sorted(memory["teacher"]) == ["fusion", "image", "image_proj", "mlm", "text", "text_proj"]
    assert sorted(memory) == ["filled", "id_queue", "image_queue", "pointer", "step", "teacher", "text_queue"]
    params, memory = shapes(method(mlm=False, ids=False, unfilled="contrast"))
    assert "mlm" not in params and sorted(memory["teacher"]) == ["image", "image_proj", "text", "text_proj"]
    assert sorted(memory) == ["image_queue", "pointer", "step", "teacher", "text_queue"]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_every_leaf_has_a_place(sizes):
    method, params, memory = built()
    mesh = make_mesh(MeshOptions(*sizes), jax.devices()[: np.prod(sizes)])
    queue = {**memory, **{k: jnp.zeros((8, *memory[k].shape[1:])) for k in ("image_queue", "text_queue", "id_queue")}}
    placed = shardings({"params": params, "memory": queue}, (*STATE_RULES, *method.rules), mesh)
    assert placed["memory"]["image_queue"].spec == placed["memory"]["id_queue"].spec == jax.P(("data", "fsdp"))
    assert placed["params"]["temperature"].is_fully_replicated
    assert (
        placed["memory"]["teacher"]["image"]["blocks"]["mlp"]["up"]["kernel"].spec
        == placed["params"]["image"]["blocks"]["mlp"]["up"]["kernel"].spec
    )


@pytest.mark.parametrize("changed", [{}, {"scope": "group", "group_size": 8, "chunks": 2}], ids=str)
def test_negatives_of_other_devices_change_nothing(changed):
    """Value and gradients on one device, where keys and values of an image are made once for all that read them, and on meshes on which groups span devices."""
    rows, o = batch(16), PLAIN._replace(queue=16, **changed)
    method = METHODS["tcl"].build(IMAGE, TEXT, o)
    params, memory = jax.jit(lambda key: method.init(key, rows))(KEY)
    run = lambda *args: jax.jit(jax.value_and_grad(method.loss, has_aux=True))(*args)
    (want, aux), wanted = run(params, memory, rows, KEY)
    for sizes in ((2, 1, 1), (4, 2, 1)):
        mesh = make_mesh(MeshOptions(*sizes), jax.devices()[: np.prod(sizes)])
        placed = shardings({"params": params, "memory": memory}, (*STATE_RULES, *method.rules), mesh)
        with jax.set_mesh(mesh):
            args = jax.device_put((params, memory), (placed["params"], placed["memory"]))
            step = (
                jax.jit(jax.value_and_grad(method.loss, has_aux=True))
                .lower(*args, jax.device_put(rows, jax.NamedSharding(mesh, BATCH)), KEY)
                .compile()
            )
            (loss, seen), grads = step(*args, jax.device_put(rows, jax.NamedSharding(mesh, BATCH)), KEY)
        # No device is sent the tokens, keys or values of all images, [16, 5 tokens, ...], nor their gradients.
        sent = [line for line in step.as_text().splitlines() if re.search(r" (all-gather|all-reduce)(-start)?\(", line)]
        assert sent and not any(re.search(r"\[(1,)?16,5,", line.partition("(%")[0]) for line in sent)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        np.testing.assert_allclose(seen["loss_itm"], aux["loss_itm"], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grads, wanted)


def test_profiles_decide_what_is_left_to_them():
    plain = tcl.TclOptions()
    assert tcl.resolve(plain)[:2] == plain[:2] and (tcl.resolve(plain).scope, tcl.resolve(plain).unfilled) == ("group", "contrast")
    fixed = tcl.resolve(plain._replace(profile="fixed", unfilled="contrast"))
    assert (fixed.scope, fixed.unfilled) == ("global", "contrast")


def test_the_stored_temperature_is_cut_back():
    method, params, _ = built()
    for raw, want in ((-1.0, LOW), (0.1, 0.1), (3.0, HIGH)):
        np.testing.assert_allclose(method.constrain({**params, "temperature": jnp.float32(raw)})["temperature"], want)


@pytest.mark.parametrize(
    ("changed", "image", "text", "message"),
    [
        ({"queue": 0}, {}, {}, "config.method.queue is 0; it must be at least 1"),
        ({"momentum": 1.5}, {}, {}, r"config.method.momentum is 1.5; it must be in \[0, 1\]"),
        ({"momentum": float("nan")}, {}, {}, "config.method.momentum is nan"),
        ({"temperature": 0.7}, {}, {}, "config.method.temperature is 0.7"),
        ({"lmi_weight": -1.0}, {}, {}, "config.method.lmi_weight is -1.0"),
        ({}, {"pool": "mean"}, {}, "config.image.pool is 'mean'"),
        ({}, {}, {"pool": "last"}, "config.text.pool is 'last'"),
        ({}, {"patch_dropout": 0.5}, {}, "config.image.patch_dropout is 0.5"),
        ({}, {"head": 4}, {}, "config.image has a head of 4"),
        ({}, {}, {"causal": True}, "config.text.causal is True"),
        ({}, {}, {"mask_id": 0}, "config.text.mask_id is 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(changed, image, text, message):
    with pytest.raises(ValueError, match=message):
        METHODS["tcl"].build(IMAGE._replace(**image), TEXT._replace(**text), PLAIN._replace(**changed))


def test_batches_that_do_not_fit_are_refused_with_the_numbers():
    params, memory = built()[1:]
    for changed, left, message in (
        ({"scope": "group", "group_size": 3}, "", "a batch of 4 rows does not divide into groups of 3"),
        ({"chunks": 3}, "", "a batch of 4 rows does not cut into 3|config.method.chunks is 3; it must divide the 4 rows"),
        ({}, "id", "config.method.ids is True, but the batch has no image ids"),
        ({"pool_grid": 4}, "", "2 x 2 patches do not pool to 4 x 4"),
    ):
        method = METHODS["tcl"].build(IMAGE, TEXT, PLAIN._replace(**changed))
        b = {k: v for k, v in batch().items() if k != left}
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: method.loss(params, memory, b, KEY))  # noqa: B023


def test_flops_by_term_are_those_of_the_step():
    method = built()[0]
    base, o = trunk(IMAGE, TEXT, of_method(PLAIN)), PLAIN
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()}
    by_term = tcl.flops(base, o, spec)
    assert method.flops(spec) == sum(by_term.values()) and min(by_term.values()) > 0
    assert {"imc", "lmi"} == by_term.keys() - tcl.flops(base, o._replace(align="cma"), spec).keys()
