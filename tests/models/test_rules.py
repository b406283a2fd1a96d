import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxvl.mesh import BATCH, MeshOptions, ShardingError, make_mesh, path_str, shardings
from jaxvl.models.rules import RULES
from jaxvl.models.text import Text, TextOptions
from jaxvl.models.vit import Vit, VitOptions
from tests.models.reference import draw, jit

IMAGE = VitOptions(variant="", patch=4, width=16, depth=2, heads=4, mlp_dim=24, dtype="float32", head=8)
TEXT = TextOptions(variant="", vocab_size=32, width=16, depth=2, heads=4, mlp_dim=24, eos_id=20, dtype="float32")
TOWERS = {
    "vit": (Vit, IMAGE), "dinov2": (Vit, IMAGE._replace(registers=2, mask_token=True, layer_scale=0.1, gated=True)),
    "clip_vision": (Vit, IMAGE._replace(pre_norm=True, patch_bias=False, act="quick_gelu")),
    "siglip_vision": (Vit, IMAGE._replace(class_tokens=0, pool="map")), "map_gated": (Vit, IMAGE._replace(pool="map", gated=True, pooler=16, head_bias=True)),
    "clip_text": (Text, TEXT._replace(head=8)), "siglip_text": (Text, TEXT._replace(causal=False, mask_padding=False, pool="end", head=8, head_bias=True)),
    "bert": (Text, TEXT._replace(causal=False, post_norm=True, embed_norm=True, final_norm=False, token_types=2, pool="first", pooler=16)),
    "llama": (Text, TEXT._replace(position="rope", norm="rms", kv_heads=2, gated=True, pool="last", qkv_bias=False, out_bias=False, mlp_bias=False)),
}  # fmt: skip
INPUTS = {Vit: jax.random.normal(jax.random.key(0), (8, 8, 8, 3)), Text: jnp.tile(jnp.array([[3, 7, 20, 0], [4, 20, 0, 0]]), (4, 1))}


@pytest.mark.parametrize("name", TOWERS)
def test_every_leaf_has_a_rule_also_inside_an_optimiser_state(name):
    kind, options = TOWERS[name]
    params = jax.eval_shape(kind(options).init, jax.random.key(0), INPUTS[kind])["params"]
    mesh = make_mesh(MeshOptions(2, 2, 2))
    state = {"params": {"tower": params}, "opt_state": jax.eval_shape(optax.scale_by_adam().init, {"tower": params})}
    placed = shardings(state, (*RULES, ("count$", P())), mesh)
    assert jax.tree.map(lambda s: s.spec, placed["params"]) == jax.tree.map(lambda s: s.spec, placed["opt_state"].mu)
    split = {path_str(path): spec.spec for path, spec in jax.tree_util.tree_leaves_with_path(placed["params"])}
    for path, leaf in jax.tree_util.tree_leaves_with_path({"tower": params}):
        if "blocks/" in (where := path_str(path)):
            assert leaf.shape[0] == 2 and (not split[where] or split[where][0] is None)
        if leaf.ndim - ("blocks/" in where) >= 2 and leaf.shape[-2] > 2:
            assert "fsdp" in str(split[where]), f"{where} is held whole by every device"


def test_a_leaf_nobody_thought_of_is_refused():
    for pattern, _ in RULES:
        assert not re.search(pattern, "tower/blocks/mixer/kernel") and not re.search(pattern, "tower/position")
    with pytest.raises(ShardingError, match="tower/blocks/mixer/kernel"):
        shardings({"tower": {"blocks": {"mixer": {"kernel": jnp.zeros((2, 4, 4))}}}}, RULES, make_mesh(MeshOptions()))


@pytest.mark.parametrize("name, sizes", [("map_gated", (2, 2, 2)), ("llama", (1, 4, 2))])
def test_a_sharded_tower_equals_the_whole_one_in_value_and_gradient(name, sizes):
    kind, options = TOWERS[name]
    model, inputs = kind(options), INPUTS[kind]
    params = draw(model, inputs)
    target = jax.random.normal(jax.random.key(2), (8, options.head or options.width))
    step = jax.value_and_grad(lambda p, x: ((model.apply({"params": p}, x).pooled - target) ** 2).sum())
    value, gradient = jit(step)(params, inputs)

    mesh = make_mesh(MeshOptions(*sizes))
    with jax.set_mesh(mesh):
        placed = shardings(params, RULES, mesh)
        split = jit(step, in_shardings=(placed, jax.NamedSharding(mesh, BATCH)), out_shardings=(None, placed))
        sharded_value, sharded_gradient = split(jax.device_put(params, placed), inputs)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), sharded_gradient, gradient)


@pytest.mark.parametrize("name", ["vit", "clip_text"])
def test_fsdp_gathers_weights_and_leaves_activations_on_the_batch_axes(name):
    kind, options = TOWERS[name]
    model = kind(options._replace(scan=False))
    inputs = jnp.tile(INPUTS[kind], (8, *[1] * (INPUTS[kind].ndim - 1)))
    params = jax.eval_shape(model.init, jax.random.key(1), inputs)["params"]
    mesh = make_mesh(MeshOptions(1, 8, 1))
    with jax.set_mesh(mesh):
        placed = shardings(params, RULES, mesh)
        run = jit(lambda p, x: model.apply({"params": p}, x).pooled, in_shardings=(placed, jax.NamedSharding(mesh, BATCH)))
        text = run.lower(params, inputs).compile().as_text()
    assert "all-gather" in text
    assert not re.search(r"= f32\[64,", text), "a device computes activations of the whole batch"
    assert "all-to-all" not in text and "all-reduce" not in text
