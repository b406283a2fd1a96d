"""JVSM as a method: pairs among triplets, running statistics, both schedules, every composition, and the same numbers on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxvl.accumulate import value_and_grad
from jaxvl.losses.compose import match
from jaxvl.mesh import BATCH, MeshOptions, make_mesh, shardings
from jaxvl.methods.jvsm import JvsmOptions, build, first_equal, ids_of
from jaxvl.methods.method import for_faces
from jaxvl.models import mobilenet
from jaxvl.models.lstm import LstmOptions
from jaxvl.models.mobilenet import Mobilenet, MobilenetOptions
from jaxvl.models.resnet import Resnet, ResnetOptions
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions

VIT = VitOptions(variant="", patch=8, width=16, depth=3, heads=2, mlp_dim=32, pool="mean", class_tokens=0, dtype="float32")
LSTM = LstmOptions(vocab_size=32, word_dim=8, width=16, dropout=0.0)
BERT = TextOptions(variant="", vocab_size=32, width=16, depth=1, heads=2, mlp_dim=32, causal=False, pool="mean", dtype="float32")
ROWS = 16


def batch_of(rows=ROWS, seed=0):
    """A batch whose last quarter are pairs, with one caption missing and one target twice."""
    rng = np.random.default_rng(seed)
    tokens = lambda: np.where(np.arange(6) < rng.integers(1, 7, (rows, 1)), rng.integers(3, 32, (rows, 6)), 0).astype(np.int32)
    images = lambda: rng.normal(size=(rows, 32, 32, 3)).astype(np.float32)
    batch = {"image": images(), "image_reference": images(), **{k: tokens() for k in ("tokens", "tokens_reference", "tokens_modification")}}
    batch |= {"id": np.arange(rows, dtype=np.int32), "id_reference": np.arange(rows, 2 * rows, dtype=np.int32)}
    pair = np.arange(rows) >= 3 * rows // 4
    batch["id_reference"][pair] = -1
    for k in ("image_reference", "tokens_reference", "tokens_modification"):
        batch[k][pair] = 0
    batch["tokens"][1] = 0
    batch["id"][2] = batch["id"][3]
    return batch


SPEC = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch_of().items()}


def test_the_same_loss_gradient_and_statistics_on_any_devices_and_in_parts():
    method = build(VIT, LSTM, JvsmOptions(width=8))
    params, memory = method.init(jax.random.key(0), SPEC)
    assert set(memory["batch_stats"]) == {"compose"}
    batch = batch_of()

    def run(devices, fsdp=1, accumulate=1):
        mesh = make_mesh(MeshOptions(devices // fsdp, fsdp, 1), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            placed = jax.device_put((params, memory), shardings((params, memory), method.rules, mesh))
            rows = jax.device_put(batch, NamedSharding(mesh, BATCH))
            (loss, aux), grads = jax.jit(value_and_grad(method, accumulate))(*placed, rows, jax.random.key(1))
            return jax.device_get((loss, method.update(placed[1], placed[0], aux), grads))

    want = run(1)
    for how in ((8, 2), (4, 1, 2)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), run(*how), want)
    before, after = (m["batch_stats"]["compose"]["gate_norm"]["mean"] for m in (memory, want[1]))
    assert not np.allclose(before, after)


def test_running_statistics_are_those_of_the_triplets_and_serve_queries():
    method = build(VIT, LSTM, JvsmOptions(width=8))
    params, memory = method.init(jax.random.key(0), SPEC)
    batch = batch_of()
    z = jax.jit(lambda p: method.encode(p, batch, None))(params)
    valid = ids_of(batch).query >= 0
    assert valid.tolist() == [True] * 12 + [False] * 4
    _, aux = jax.jit(lambda p: method.loss(p, memory, batch, None))(params)
    joined = np.concatenate([z["image_reference"][:, 0], z["tokens_modification"][:, 0]], 1)[:12]
    stats = method.update(memory, params, aux)["batch_stats"]["compose"]["res_norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * joined.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * joined.var(0, ddof=1), rtol=1e-4)
    ready = for_faces(method, params, method.update(memory, params, aux))
    compose = jax.jit(method.compose)
    ask = lambda p, rows: compose(p, batch["image_reference"][rows], batch["tokens_modification"][rows])
    one, all_of_them = ask(ready, slice(3, 4)), ask(ready, slice(0, 12))
    np.testing.assert_allclose(one[0], all_of_them[3], rtol=1e-4, atol=1e-5)
    assert not np.allclose(all_of_them, ask(for_faces(method, params, memory), slice(0, 12)), atol=1e-4)


def test_terms_are_those_of_the_rows_that_have_them():
    method = build(VIT, BERT, JvsmOptions(width=8, composer="concat", use_bn=False))
    params, memory = method.init(jax.random.key(0), SPEC)
    assert memory == {}
    batch = batch_of()
    z = {k: v[:, 0] for k, v in jax.jit(lambda p: method.encode(p, batch, None))(params).items()}
    _, aux = jax.jit(method.loss)(params, memory, batch, None)
    captioned = np.arange(ROWS) != 1
    text = np.asarray(first_equal(batch["tokens"]))
    first = match(z["image"], z["tokens"], same=(jnp.asarray(batch["id"]), jnp.where(captioned, text, -1)), valid=captioned)
    second = match(z["image_reference"][:12], z["tokens_reference"][:12])
    np.testing.assert_allclose(aux["loss_vs"], (first + second) / 2, rtol=1e-5)
    assert aux["triplets"] == 0.75
    plain = {k: batch[k] for k in ("image", "tokens")}
    alone = jax.jit(lambda p: method.loss(p, memory, plain, None))(params)[1]
    assert alone["loss_im"] == alone["loss_cs"] == 0 < alone["loss_vs"]


def test_two_stages_in_one_run():
    method = build(VIT, LSTM, JvsmOptions(width=8, use_bn=False, schedule="two_stage", first_stage=2))
    params, memory = method.init(jax.random.key(0), SPEC)
    step = jax.jit(lambda memory: method.loss(params, memory, batch_of(), None))
    for stage in (1, 1, 2, 2):
        loss, aux = step(memory)
        want = aux["loss_vs"] + (stage == 2) * (aux["loss_im"] + aux["loss_cs"])
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        memory = method.update(memory, params, aux)
    assert memory["step"] == 4


TOWER = ResnetOptions(depth=0, stages=(1, 1, 1), width=4, statistics="batch", dtype="float32")
CASES = {
    "attention over maps, statistics of the batch": (TOWER, LSTM, JvsmOptions(width=8, composer="visiolinguistic_attention")),
    "attention over a vit": (VIT, BERT, JvsmOptions(width=8, composer="visiolinguistic_attention", loss="softmax")),
    "image alone": (VIT, LSTM, JvsmOptions(width=8, composer="image_only", loss="soft_triplet")),
}


def start(method):
    return jax.jit(lambda key: method.init(key, SPEC))(jax.random.key(0))


def with_noise(batch):
    """The batch with pixels in place of the zeros of absent references."""
    noise = 9 * np.random.default_rng(1).normal(size=batch["image"].shape).astype(np.float32)
    return {**batch, "image_reference": np.where((batch["id_reference"] < 0)[:, None, None, None], noise, batch["image_reference"])}


def test_an_absent_reference_is_seen_by_nobody():
    """Its pixels change no loss, gradient or statistic, to the bit; on several devices the numbers are those of one."""
    method = build(TOWER._replace(stages=(1,)), BERT, JvsmOptions(width=8))
    params, memory = start(method)
    batch = batch_of()
    loss = jax.jit(jax.value_and_grad(method.loss, has_aux=True))

    def run(batch, devices):
        mesh = make_mesh(MeshOptions(data=devices), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            placed = jax.device_put((params, memory), shardings((params, memory), method.rules, mesh))
            (value, aux), grads = loss(*placed, jax.device_put(batch, NamedSharding(mesh, BATCH)), None)
            return jax.device_get((value, method.update(placed[1], placed[0], aux), grads))

    dense = run(batch, 1)
    jax.tree.map(np.testing.assert_array_equal, run(with_noise(batch), 1), dense)
    assert any(np.asarray(g).any() for g in jax.tree.leaves(dense[2]["image"]))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 + 1e-4 * np.abs(b).max())
    jax.tree.map(close, run(with_noise(batch), 4), dense)
    there = np.concatenate([batch["image"], batch["image_reference"][batch["id_reference"] >= 0]])
    how = dict(window_strides=(2, 2), padding=[(3, 3)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    seen = jax.lax.conv_general_dilated(there, params["image"]["stem"]["kernel"], **how)
    np.testing.assert_allclose(dense[1]["batch_stats"]["image"]["stem_norm"]["mean"], 0.1 * seen.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "tower",
    [Resnet(TOWER._replace(stages=(1,))), Mobilenet(MobilenetOptions(statistics="batch", dtype="float32"))],
    ids=("resnet", "mobilenet"),
)
def test_every_norm_of_a_tower_leaves_out_rows_that_are_none(tower, monkeypatch):
    monkeypatch.setattr(mobilenet, "BLOCKS", ((8, 2),))
    images, valid = batch_of()["image"], np.arange(ROWS) < 12
    variables = jax.jit(tower.init)(jax.random.key(0), images[:1])
    see = jax.jit(lambda images, valid: tower.apply(variables, images, valid, train=True, mutable=["batch_stats"]))
    out, seen = see(images, valid)
    alone, wanted = see(images[:12], None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (out.pooled[:12], seen), (alone.pooled, wanted))


@pytest.mark.parametrize("name", CASES)
def test_every_composition_trains_and_answers(name):
    image, text, options = CASES[name]
    method = build(image, text, options)
    batch = jax.tree.map(lambda x: x[8:], batch_of())
    params, memory = method.init(jax.random.key(0), SPEC)
    shardings((params, memory), method.rules, make_mesh(MeshOptions(4, 2, 1)))
    step = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (loss, aux), grads = found = step(params, memory, batch, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, step(params, memory, with_noise(batch), jax.random.key(1)), found)
    assert loss > 0 and all(np.isfinite(x).all() for x in jax.tree.leaves((loss, grads)))
    for part in params.keys() - {"scale"}:
        assert any(np.asarray(g).any() for g in jax.tree.leaves(grads[part])), part
    memory = method.update(memory, params, aux)
    assert (method.encode is None) == (image is TOWER)
    if image is TOWER:
        assert set(memory["batch_stats"]) == {"image"} and memory["batch_stats"]["image"]["stem_norm"]["mean"].any()
    ready = for_faces(method, params, memory)
    everything = jax.jit(
        lambda p: (
            method.compose(p, batch["image"], batch["tokens"]),
            method.embed_image(p, batch["image"]),
            method.embed_text(p, batch["tokens"]),
        )
    )
    queries, gallery, texts = everything(ready)
    assert queries.shape == gallery.shape == texts.shape == (8, 24 if "attention" in name else 8)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([queries, gallery, texts]), axis=1), 1, rtol=1e-4)
    if name == "image alone":
        np.testing.assert_allclose(queries, gallery, rtol=1e-5)


def test_rows_that_are_the_same():
    ids = np.array([3, -1, 3, 5])
    assert first_equal(ids).tolist() == [0, 1, 0, 3]
    assert first_equal(np.array([[1, 2], [1, 3], [1, 2], [1, 2]]), ids).tolist() == [0, 1, 0, 3]


def test_options_that_cannot_be():
    for options, message in (
        (JvsmOptions(width=0), "config.method.width is 0"), (JvsmOptions(w_im=0, w_cs=0, w_vs=0), "nothing to train"), (JvsmOptions(margin=-1), "config.method.margin is -1"),
        (JvsmOptions(schedule="two_stage"), "first_stage is 0; it must be above 0"), (JvsmOptions(first_stage=3), "and 0 otherwise"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            build(VIT, LSTM, options)
    with pytest.raises(ValueError, match="reads 3 layers, but the image tower has 2"):
        build(VIT._replace(depth=2), LSTM, JvsmOptions(composer="visiolinguistic_attention"))
    with pytest.raises(ValueError, match="config.image.head is 7"):
        build(VIT._replace(head=7), LSTM, JvsmOptions())
