"""Adapters against their equation: what they start as, what they add, what moves, what is merged, how they are sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl import mesh as meshes
from jaxvl.data.augment import AugmentOptions
from jaxvl.methods import clip
from jaxvl.models import lora
from jaxvl.models.lora import LoraOptions
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.optim import OptimOptions, frozen, learning_rate, make_optimizer
from jaxvl.state import STATE_RULES, create
from jaxvl.step import make_train_step

TINY = dict(variant="", width=16, depth=2, heads=2, mlp_dim=32, dtype="float32")
METHOD = clip.build(VitOptions(**TINY, patch=4), TextOptions(**TINY, vocab_size=20, pool="last"), clip.ClipOptions(width=8))
SPEC = {"image": jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32), "tokens": jax.ShapeDtypeStruct((8, 6), jnp.int32)}
EVERYTHING = LoraOptions(rank=4, alpha=6.0, targets="kernel$", base_dtype="float32")
OPTIM = OptimOptions(learning_rate=0.05, schedule="constant", groups=lora.groups(((r"^t$", 1.0),)))


def batch():
    rng = np.random.default_rng(0)
    return {"image": rng.standard_normal((8, 8, 8, 3)).astype(np.float32), "tokens": rng.integers(1, 20, (8, 6)).astype(np.int32)}


def wrapped(options):
    return lora.wrap(METHOD, options, partial(frozen, OPTIM))


def trained(options):
    """Parameters as if trained: no adapter is zero."""
    rng = np.random.default_rng(1)
    shapes, _ = jax.eval_shape(lambda key: wrapped(options).init(key, SPEC), jax.random.key(0))
    return jax.tree.map(lambda p: jnp.asarray(0.2 * rng.standard_normal(p.shape), p.dtype), shapes)


def test_separate_merged_and_plain_are_the_same_function():
    params, data = trained(EVERYTHING), batch()
    merged = lora.merge(params, EVERYTHING)
    assert "lora" not in merged
    for rslora in (False, True):
        kernel, pair = (tree["image"]["blocks"]["mlp"]["up"]["kernel"] for tree in (params, params["lora"]))
        a, b = (np.asarray(pair[x][1], np.float64) for x in "ab")
        got = lora.merge(params, EVERYTHING._replace(rslora=rslora))["image"]["blocks"]["mlp"]["up"]["kernel"][1]
        np.testing.assert_allclose(got, kernel[1] + 6 / (2 if rslora else 4) * a @ b, atol=1e-6)
    plain = jax.jit(METHOD.encode)(merged, data, None)
    for apply in ("separate", "merged"):
        got = jax.jit(wrapped(EVERYTHING._replace(apply=apply)).encode)(params, data, None)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-6), got, plain)
    base = jax.jit(METHOD.encode)({k: v for k, v in params.items() if k != "lora"}, data, None)
    assert min(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), base, plain))) > 1e-2


def test_it_starts_as_the_model_without_adapters():
    both = jax.jit(lambda key: (wrapped(EVERYTHING).init(key, SPEC)[0], METHOD.init(key, SPEC)[0]))
    params, plain = both(jax.random.key(3))
    assert 0.9 < float(jnp.abs(params["lora"]["image"]["patch"]["kernel"]["a"]).max()) * (4 * 4 * 3) ** 0.5 <= 1
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, EVERYTHING), plain)


def test_gradients_of_the_adapters_are_those_of_the_merged_kernel():
    """Both ways of applying them, against the chain rule on the plain method: dA = s dW Bᵀ, dB = s Aᵀ dW."""
    options = EVERYTHING._replace(targets="text/.*kernel$")
    params, data = trained(options), batch()
    grad = lambda method: jax.jit(jax.grad(lambda p: method.loss(p, (), data, None)[0]))
    dense = grad(METHOD)(lora.merge(params, options))["text"]["blocks"]["attn"]["k"]["kernel"]
    pair = params["lora"]["text"]["blocks"]["attn"]["k"]["kernel"]
    for apply in ("separate", "merged"):
        got = grad(wrapped(options._replace(apply=apply)))(params)["lora"]["text"]["blocks"]["attn"]["k"]["kernel"]
        np.testing.assert_allclose(got["a"], 1.5 * jnp.einsum("lio,lro->lir", dense, pair["b"]), atol=1e-5)
        np.testing.assert_allclose(got["b"], 1.5 * jnp.einsum("lir,lio->lro", pair["a"], dense), atol=1e-5)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    options = EVERYTHING._replace(dropout=0.5, targets="image/head/kernel$")
    params, data = trained(options), batch()
    encode = jax.jit(lambda p, key: wrapped(options).encode(p, data, key)["image"])
    still = jax.jit(
        lambda p: (wrapped(options).encode(p, data, None)["image"], wrapped(options._replace(dropout=0.0)).encode(p, data, None)["image"])
    )
    np.testing.assert_array_equal(*still(params))
    assert float(jnp.abs(encode(params, jax.random.key(0)) - encode(params, jax.random.key(1))).max()) > 1e-3
    without = {**params, "lora": jax.tree.map(jnp.zeros_like, params["lora"])}
    np.testing.assert_allclose(encode(without, jax.random.key(0)), still(without)[0], atol=1e-6)


def test_sharded_training_moves_adapters_and_named_groups_alone():
    """A bfloat16 base split over fsdp and tensor axes: two steps change the adapters and `t`, and no bit of the base."""
    options = LoraOptions(rank=4, targets=r"blocks/.*kernel$")
    method = wrapped(options)
    tx = make_optimizer(OPTIM, jax.eval_shape(lambda k: method.init(k, SPEC)[0], jax.random.key(0)), 10)
    mesh = meshes.make_mesh(meshes.MeshOptions(1, 2, 2), jax.devices()[:4])
    with jax.set_mesh(mesh):

        def init(key):
            params, memory = method.init(key, SPEC)
            return create(params, memory, tx.init(params), key, ema=False)

        placed = meshes.shardings(jax.eval_shape(init, jax.random.key(0)), (*STATE_RULES, *method.rules), mesh)
        state = jax.jit(init, out_shardings=placed)(jax.random.key(0))
        pair = placed.params["lora"]["image"]["blocks"]["attn"]["q"]["kernel"]
        assert pair["a"].spec == jax.P(None, "fsdp", None) and pair["b"].spec == jax.P(None, None, "tensor")
        pair = placed.params["lora"]["text"]["blocks"]["mlp"]["down"]["kernel"]
        assert pair["a"].spec == jax.P(None, "tensor", None) and pair["b"].spec == jax.P(None, None, "fsdp")
        base = state.params["image"]["blocks"]["mlp"]["up"]["kernel"]
        assert base.dtype == jnp.bfloat16 and base.addressable_shards[0].data.size == base.size // 4
        assert state.params["image"]["norm"]["scale"].dtype == jnp.float32
        moments = [jax.tree_util.keystr(p) for p, m in jax.tree_util.tree_leaves_with_path(state.opt_state) if m.ndim]
        assert moments and all("lora" in name for name in moments)

        step = jax.jit(
            make_train_step(
                method, tx, AugmentOptions(), OPTIM, learning_rate(OPTIM, 10), image_size=8, accumulate=2, grad_shardings=placed.params
            )
        )
        pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 8, 3), np.uint8)
        arrays = meshes.place({**batch(), "image": pixels}, mesh)
        after = step(step(state, arrays)[0], arrays)[0]
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, after.params)
    assert changed["t"] and all(jax.tree.leaves(changed["lora"]))
    assert not any(jax.tree.leaves({k: v for k, v in changed.items() if k not in ("t", "lora")}))


@pytest.mark.parametrize("kw, words", [
    ({"rank": -1}, "config.lora.rank is -1"), ({"dropout": 1.0}, "config.lora.dropout is 1.0"), ({"targets": "("}, "not a regular expression"),
    ({"dropout": 0.1, "apply": "merged"}, "config.lora.apply must be 'separate'"), ({"targets": "query"}, "'query' matches no kernel; there are image/"),
])  # fmt: skip
def test_values_that_cannot_be(kw, words):
    with pytest.raises(ValueError, match="config.lora") as error:
        method = wrapped(LoraOptions(**{"rank": 2, **kw}))
        jax.eval_shape(lambda key: method.init(key, SPEC), jax.random.key(0))
    assert words in str(error.value)


def test_rank_0_is_the_method_itself():
    assert wrapped(LoraOptions()) is METHOD
