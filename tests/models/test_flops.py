import jax
import jax.numpy as jnp
import pytest

from jaxvl.models.flops import text_flops, vit_flops
from jaxvl.models.text import Text, TextOptions
from jaxvl.models.vit import Vit, VitOptions


def counted(model, *args):
    """XLA's count of the forward program, layers unrolled so that each is counted; nothing is compiled or run."""
    params = jax.eval_shape(model.init, jax.random.key(0), *args)
    return jax.jit(lambda p, *a: model.apply(p, *a).pooled).lower(params, *args).cost_analysis()["flops"]


SMALL = VitOptions("B/16", depth=2, scan=False)


@pytest.mark.parametrize("options, size", [
    (SMALL, 224), (SMALL._replace(pool="map", class_tokens=0, head=512), 224), (SMALL._replace(gated=True, mlp_dim=2048, registers=4, pooler=768), 112),
])  # fmt: skip
def test_image_flops_agree_with_the_compiler(options, size):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    assert vit_flops(options, size, size) == pytest.approx(counted(Vit(options), images), rel=0.03)


TEXT = TextOptions(variant="B", depth=2, vocab_size=1000, eos_id=999, scan=False)


@pytest.mark.parametrize("options", [
    TEXT, TEXT._replace(head=512), TEXT._replace(causal=False, pool="map"), TEXT._replace(kv_heads=4, gated=True, position="rope", norm="rms"),
])  # fmt: skip
def test_caption_flops_agree_with_the_compiler(options):
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    assert text_flops(options, 64) == pytest.approx(counted(Text(options), tokens), rel=0.03)


def test_published_figures_and_patch_dropout():
    assert vit_flops(VitOptions("B/16"), 224, 224) / 2 == pytest.approx(17.56e9, rel=0.01)  # multiply-adds
    half = vit_flops(VitOptions("B/16", patch_dropout=0.5), 224, 224, train=True)
    assert 0.45 < half / vit_flops(VitOptions("B/16"), 224, 224) < 0.52
