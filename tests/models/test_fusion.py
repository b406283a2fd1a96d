import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl.mesh import MeshOptions, make_mesh, shardings
from jaxvl.models.fusion import Fusion, LmHead, MlmHead
from jaxvl.models.rules import RULES
from jaxvl.models.text import TextOptions, block_options
from tests.models import reference
from tests.models.reference import draw, run

BERT = TextOptions(
    variant="",
    vocab_size=21,
    width=12,
    depth=2,
    heads=4,
    mlp_dim=20,
    causal=False,
    post_norm=True,
    embed_norm=True,
    final_norm=False,
    pool="first",
    dtype="float32",
)
STATES = jax.random.normal(jax.random.key(0), (2, 5, 12))
IMAGES = jax.random.normal(jax.random.key(1), (2, 4, 7))
MASK = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)


@pytest.mark.parametrize("options", [BERT, BERT._replace(post_norm=False, final_norm=True, causal=True)])
def test_fusion_layers_equal_the_blocks_written_out(options):
    model = Fusion(options)
    params = draw(model, STATES, MASK, IMAGES)
    seen = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    got, hidden = run(model, params, STATES, MASK, IMAGES, seen, hidden=True)
    o = block_options(options)._replace(cross=True)
    for row in range(2):
        want, images = np.asarray(STATES[row], np.float64), np.asarray(IMAGES[row][seen[row]], np.float64)
        allowed = lambda i, j: MASK[row, j] and (j <= i or not o.causal)  # noqa: B023
        for layer in range(2):
            want = reference.block(o, jax.tree.map(lambda x: np.asarray(x[layer], np.float64), params["blocks"]), want, images, allowed)  # noqa: B023
            np.testing.assert_allclose(hidden[layer, row][MASK[row]], want[MASK[row]], atol=1e-4, rtol=1e-4)
        if options.final_norm:
            want = reference.norm(o, params["norm"], want)
        np.testing.assert_allclose(got[row][MASK[row]], want[MASK[row]], atol=1e-4, rtol=1e-4)


def test_image_tokens_need_no_mask_and_may_have_any_width():
    model = Fusion(BERT)
    params = draw(model, STATES, None, IMAGES)
    assert params["blocks"]["cross"]["k"]["kernel"].shape == (2, 7, 12)
    np.testing.assert_allclose(
        run(model, params, STATES, None, IMAGES)[0], run(model, params, STATES, MASK | True, IMAGES, jnp.ones((2, 4), bool))[0], atol=1e-6
    )


@pytest.mark.parametrize("tied", [True, False])
def test_masked_word_head_is_dense_activation_norm_and_decoder_with_its_bias(tied):
    embedding = np.asarray(jax.random.normal(jax.random.key(2), (21, 12)))
    model = MlmHead(BERT, tied)
    p = draw(model, STATES, embedding)
    decoder = embedding.T if tied else p["decoder"]["kernel"]
    o = block_options(BERT)
    hidden = reference.norm(o, p["norm"], reference.ACT["gelu"](reference.linear(p["transform"], np.asarray(STATES))))
    got = run(model, p, STATES, embedding)
    assert got.dtype == jnp.float32 and ("spare_bias" in p) is not tied
    np.testing.assert_allclose(got, hidden @ decoder + p["bias"], atol=1e-4)


def test_word_logits_are_float32_tied_or_not():
    embedding = jax.random.normal(jax.random.key(2), (21, 12))
    states = STATES.astype(jnp.bfloat16)
    own = draw(LmHead(BERT), states)
    for kernel, logits in ((embedding.T, run(LmHead(BERT), {}, states, embedding)), (own["kernel"], run(LmHead(BERT), own, states))):
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, np.asarray(states, np.float32) @ kernel, atol=0.05)


def test_heads_and_fusion_have_sharding_rules():
    embedding = jnp.zeros((21, 12))
    tree = {
        "fusion": draw(Fusion(BERT), STATES, MASK, IMAGES),
        "mlm": draw(MlmHead(BERT, False), STATES, embedding),
        "lm_head": draw(LmHead(BERT), STATES),
    }
    tree["fusion"]["blocks"]["cross"]["k"]["kernel"] = tree["fusion"]["blocks"]["cross"]["v"]["kernel"] = jnp.zeros((2, 8, 12))
    specs = jax.tree.map(lambda s: s.spec, shardings(tree, RULES, make_mesh(MeshOptions(2, 2, 2))))
    assert specs["fusion"]["blocks"]["cross"]["k"]["kernel"] == jax.P(None, "fsdp", "tensor")
    assert specs["mlm"]["decoder"]["kernel"] == specs["lm_head"]["kernel"] == jax.P(("fsdp", "tensor"), None)
