"""CLIP and SigLIP as their papers state them: parameters, loss from embeddings, gradients of the scale, and what is refused."""

import math
import subprocess
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl import mesh as meshes
from jaxvl.accumulate import value_and_grad
from jaxvl.methods import METHODS, clip, siglip
from jaxvl.methods.method import bounded_exp, unit
from jaxvl.models.flops import text_flops, vit_flops
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.state import STATE_RULES

B, KEY = 8, jax.random.key(3)
TINY = dict(variant="", width=16, depth=1, heads=2, mlp_dim=32, dtype="float32")
IMAGE = VitOptions(**TINY, patch=4, patch_dropout=0.5)
TEXT = TextOptions(**TINY, vocab_size=20, pool="last")
OPTIONS = {"clip": clip.ClipOptions(width=8), "siglip": siglip.SiglipOptions()}
EACH = pytest.mark.parametrize("name", OPTIONS)


def batch():
    rng = np.random.default_rng(0)
    return {"image": rng.standard_normal((B, 8, 8, 3)).astype(np.float32), "tokens": rng.integers(1, 20, (B, 6)).astype(np.int32)}


@cache
def built(name):
    """The method, its parameters, and one program for embeddings and loss."""
    method = METHODS[name].build(IMAGE, TEXT, OPTIONS[name])
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()}
    params, memory = jax.jit(lambda key: method.init(key, spec))(KEY)
    run = jax.jit(lambda p, b: (method.embed_image(p, b["image"]), method.embed_text(p, b["tokens"]), *method.loss(p, memory, b, None)))
    return method, spec, params, memory, run


@EACH
def test_parameters_start_as_published(name):
    method, _, params, memory, _ = built(name)
    assert memory == ()
    assert method.update(memory, params, {}) == ()
    if name == "clip":
        assert sorted(params) == ["image", "t", "text"]
        np.testing.assert_allclose(math.e ** params["t"], 1 / 0.07, rtol=1e-6)
        assert jax.tree.map(jnp.shape, (params["image"]["head"], params["text"]["head"])) == ({"kernel": (16, 8)},) * 2
    else:
        assert sorted(params) == ["b", "image", "t", "text"]
        np.testing.assert_allclose(params["t"], math.log(10), rtol=1e-6)
        assert params["b"] == -10
        assert "head" not in params["image"]
        assert jax.tree.map(jnp.shape, params["text"]["head"]) == {"kernel": (16, 16)}
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


@EACH
def test_loss_is_the_papers_loss_of_the_embeddings(name):
    _, _, params, _, run = built(name)
    x, y, loss, aux = run(params, batch())
    x, y = np.float64(x), np.float64(y)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1, rtol=1e-5)
    if name == "clip":
        logits = x @ y.T / 0.07
        softmax = lambda l: np.exp(l) / np.exp(l).sum(1, keepdims=True)
        want = -np.mean(np.log(np.diagonal(softmax(logits))) + np.log(np.diagonal(softmax(logits.T)))) / 2
        np.testing.assert_allclose(aux["logit_scale"], 1 / 0.07, rtol=1e-6)
    else:
        z = 2 * np.eye(B) - 1
        want = np.sum(np.log1p(np.exp(-z * (10 * x @ y.T - 10)))) / B
        assert aux["logit_bias"] == -10
    np.testing.assert_allclose(loss, want, rtol=1e-5)


@EACH
def test_an_embedding_depends_on_its_own_row(name):
    _, _, params, _, run = built(name)
    order = np.roll(np.arange(B), 3)
    *plain, loss, _ = run(params, batch())
    *permuted, permuted_loss, _ = run(params, {k: v[order] for k, v in batch().items()})
    for got, want in zip(permuted, plain, strict=True):
        np.testing.assert_allclose(got, want[order], atol=1e-6)
    np.testing.assert_allclose(permuted_loss, loss, rtol=1e-5)


def test_accumulation_and_descent():
    """One program serves three questions: microbatches repeat their patch dropout, every gradient is there, and descent learns."""
    method, _, params, memory, _ = built("clip")
    step = jax.jit(value_and_grad(method, 2))
    (loss, _), grads = step(params, memory, batch(), KEY)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    still = [jax.tree_util.keystr(path) for path, g in leaves if not np.abs(g).max() > 0]
    assert all("['k']['bias']" in path for path in still), "a key's bias shifts all logits of a query alike; nothing else may stand still"

    norm = math.sqrt(sum(np.vdot(g, g) for _, g in leaves))
    move = lambda a: float(step(jax.tree.map(lambda p, g: p + a / norm * g, params, grads), memory, batch(), KEY)[0][0])
    np.testing.assert_allclose((move(1e-4) - move(-1e-4)) / 2e-4, norm, rtol=1e-2)

    for _ in range(60):
        params = jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads)
        (after, _), grads = step(params, memory, batch(), KEY)
    assert after < loss / 2


@EACH
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_every_leaf_has_a_place(name, shape):
    method, spec, *_ = built(name)
    shapes = jax.eval_shape(lambda: method.init(KEY, spec))
    mesh = meshes.make_mesh(meshes.MeshOptions(*shape))
    placed, _ = meshes.shardings(shapes, (*STATE_RULES, *method.rules), mesh)
    assert placed["t"].is_fully_replicated
    assert not placed["image"]["blocks"]["mlp"]["up"]["kernel"].is_fully_replicated


@EACH
def test_flops_are_those_of_towers_and_logits(name):
    method, spec, *_ = built(name)
    width = OPTIONS[name].width
    image, text = IMAGE._replace(head=width), TEXT._replace(head=width or 16)
    want = vit_flops(image, 8, 8, train=True) + text_flops(text, 6) + 2 * B * (width or 16)
    assert method.flops(spec) == want
    assert vit_flops(image, 8, 8, train=True) < vit_flops(image, 8, 8), "dropped patches cost nothing"


def test_the_scale_rests_at_its_bound_and_can_leave_it():
    t = jnp.log(jnp.float32([50, 100.001, 1e6]))
    np.testing.assert_allclose(bounded_exp(t, 100.0), [50, 100, 100], rtol=1e-5)
    slope = lambda sign: jax.grad(lambda t: sign * bounded_exp(t, 100.0).sum())(t)
    np.testing.assert_allclose(slope(1), [50, 100, 100], rtol=1e-5)  # descent lowers t
    np.testing.assert_allclose(slope(-1), [-50, 0, 0], rtol=1e-5)  # descent would raise t


def test_unit_of_a_zero_row_is_zero_with_a_finite_gradient():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]], jnp.bfloat16)
    np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert unit(x).dtype == jnp.float32
    assert np.isfinite(np.float32(jax.grad(lambda x: unit(x)[:, 0].sum())(x))).all()


def test_what_cannot_be_built_is_refused_by_name():
    for options, image, message in (
        (clip.ClipOptions(width=0), IMAGE, r"config.method.width is 0"),
        (clip.ClipOptions(temperature=0.0), IMAGE, r"temperature \(0.0\)"),
        (clip.ClipOptions(temperature=0.001), IMAGE, r"max_scale \(100.0\)"),
        (clip.ClipOptions(width=8), IMAGE._replace(head=4), r"config.image.head is 4, but the method projects to 8 channels"),
        (siglip.SiglipOptions(width=-1), IMAGE, r"config.method.width is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            METHODS[options.name].build(image, TEXT, options)


def test_the_list_of_methods_is_light():
    code = "import sys, jaxvl.methods as m; assert set(m.METHODS) >= {'clip', 'siglip'}; assert not {'jax', 'flax', 'jaxvl.methods.clip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert METHODS["clip"].options() is clip.ClipOptions
