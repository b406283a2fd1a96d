"""The streamed maximum over tokens: the plain one in value and gradient, whatever the blocks and the mesh; ties; memory at full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl.mesh import BATCH, MeshOptions, make_mesh
from jaxvl.models import lexical
from jaxvl.models.lexical import Adapter, AdapterOptions, check_adapter, max_logits, vectors

B, n, V, d = 4, 5, 22, 6
close = np.testing.assert_allclose


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((B, n, d)).astype(dtype),
        rng.standard_normal((V, d)).astype(np.float32),
        rng.standard_normal((B, V)).astype(np.float32),
    )


def plain(z, Z):
    return jnp.max(lexical.logits(z, Z), 1)


def value_and_grads(f):
    return jax.jit(lambda z, Z, c: (f(z, Z), *jax.grad(lambda z, Z: jnp.sum(vectors(f(z, Z), entries=V - 2) * c), (0, 1))(z, Z)))


@pytest.mark.parametrize("elements", [1, B * n * 4, 1 << 20], ids=["a row at a time", "blocks that overlap", "one block"])
def test_equals_the_plain_maximum(elements, monkeypatch):
    monkeypatch.setattr(lexical, "ELEMENTS", elements)
    z, Z, c = arrays()
    for got, want in zip(value_and_grads(lambda z, Z: max_logits(z, Z))(z, Z, c), value_and_grads(plain)(z, Z, c), strict=True):
        close(got, want, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_equals_it_on_meshes(shape, monkeypatch):
    monkeypatch.setattr(lexical, "ELEMENTS", 32)
    z, Z, c = arrays()
    want = value_and_grads(plain)(z, Z, c)
    mesh = make_mesh(MeshOptions(*shape), jax.devices()[: np.prod(shape)])
    with jax.set_mesh(mesh):
        specs = BATCH, jax.P("tensor"), BATCH
        got = value_and_grads(max_logits)(*(jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip((z, Z, c), specs, strict=True)))
    for a, b in zip(got, want, strict=True):
        close(a, b, atol=1e-5)


def test_a_tie_goes_to_the_first_token():
    z, Z, _ = arrays()
    z[:, 3] = z[:, 1]
    winner = np.asarray(lexical.winners(z, Z))
    assert winner.dtype == np.int16
    assert 1 in winner
    assert 3 not in winner
    dz = jax.grad(lambda z: jnp.sum(max_logits(z, Z)))(z)
    assert not np.any(dz[:, 3])
    assert np.any(dz[:, 1])


def test_bfloat16_keeps_float32_logits():
    z, Z, c = arrays(jnp.bfloat16)
    value, dz, dZ = value_and_grads(lambda z, Z: max_logits(z, Z))(z, Z, c)
    assert (value.dtype, dz.dtype, dZ.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    close(value, plain(np.float32(z), Z), atol=0.05)


@pytest.mark.parametrize("activation", ["elu1p", "log1p_relu", "relu"])
def test_vectors_have_unit_norm_or_none(activation):
    x = jnp.asarray([[-200.0, 100.0, 0.0, 3.0], [-1.0, -2.0, -3.0, 9.0]])
    s = vectors(x, activation, entries=3)
    assert not np.any(s[:, 3])
    nothing = activation != "elu1p"  # no word of the second row is active
    close(np.linalg.norm(s, axis=1), [1, 0 if nothing else 1], rtol=1e-6)
    grad = jax.grad(lambda x: jnp.sum(vectors(x, activation, entries=3) ** 3))(x)
    assert np.isfinite(grad).all()
    f, y = lexical.ACTIVATIONS[activation], jnp.maximum(x, 0)
    slow = {"elu1p": jnp.where(x >= 0, x + 1, jnp.exp(x)), "log1p_relu": jnp.log(1 + y), "relu": y}[activation]
    close(f(x), slow, rtol=1e-6)


def test_memory_at_full_size():
    """Compiled and not run: ViT-B/14 at 224 pixels, 17,182 words, the width of Llama 2 7B, 64 images on a device."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 257, 4096), (17_182, 4096), (64, 17_182))]
    bytes_of = {
        name: jax.jit(jax.grad(lambda z, Z, c, f=f: jnp.sum(f(z, Z) * c), (0, 1)))
        .lower(*shapes)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for name, f in (("plain", plain), ("fused", max_logits))
    }
    assert bytes_of["fused"] <= bytes_of["plain"] / 20, bytes_of


def test_adapters_are_refused_where_they_cannot_be():
    check_adapter(AdapterOptions("block_mlp", 24, 8, 4), "config.method")
    for change, message in ((dict(layout="mlp"), "adapter is 'mlp'; it must be one of block_mlp, attn_mlp"), (dict(heads=5), "adapter_heads is 5, which does not divide"),
                            (dict(mlp1=0), "config.method.mlp1 is 0")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_adapter(AdapterOptions("block_mlp", 24, 8, 4)._replace(**change), "config.method")


def test_adapter_has_the_size_that_the_paper_tells():
    """About 17 million parameters between DINOv2-B and Llama 2."""
    for layout, mlp1, mlp2, wanted in (("block_mlp", 3072, 2048, 17.06e6), ("attn_mlp", 3072, 3072, 17.31e6)):
        module = Adapter(AdapterOptions(layout, 768, 4096, 12, mlp1, mlp2))
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 768)))
        close(sum(np.prod(x.shape) for x in jax.tree.leaves(shapes)), wanted, rtol=2e-3)
