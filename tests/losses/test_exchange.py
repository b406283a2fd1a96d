"""Rows of other devices, and their gradients, against plain indexing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxvl.losses.exchange import fetch
from jaxvl.mesh import BATCH, MeshOptions, make_mesh

B = 24
MESHES = [(1, MeshOptions()), (2, MeshOptions()), (4, MeshOptions(fsdp=2)), (8, MeshOptions()), (8, MeshOptions(data=2, fsdp=2, tensor=2))]


@pytest.mark.parametrize("groups", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("devices, options", MESHES, ids=str)
def test_rows_and_gradients_are_those_of_plain_indexing(devices, options, groups):
    """Groups that devices hold whole, that span some or all devices, and that do not line up with them; one row is asked for many times, some never."""
    rng = np.random.default_rng(groups)
    x, weights = rng.normal(size=(2, B, 5, 3)).astype(np.float32)
    rows = rng.integers(0, B // groups, (groups, B // groups))
    rows[:, ::2] = 0
    flat = (rows + B // groups * np.arange(groups)[:, None]).ravel()
    words = rng.integers(0, 100, (B, 2))
    wanted = np.zeros_like(x)
    np.add.at(wanted, flat, 2 * x[flat] * weights)
    mesh = make_mesh(options, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        place = lambda a: jax.device_put(a, NamedSharding(mesh, BATCH))
        loss = lambda x: (weights * fetch(x, jnp.asarray(rows)) ** 2).sum()
        found, gradient = jax.jit(
            lambda x, words: (
                (fetch(x, jnp.asarray(rows)), fetch(words, jnp.asarray(rows)), fetch(words > 50, jnp.asarray(rows))),
                jax.grad(loss)(x),
            )
        )(place(x), place(words))
    for got, want in zip(found, (x[flat], words[flat], words[flat] > 50), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)


def test_no_device_holds_the_batch():
    """The rows are nowhere gathered or summed over devices, neither forwards nor backwards."""
    mesh, width = make_mesh(MeshOptions(), jax.devices()), 1024
    x = jax.ShapeDtypeStruct((256, width), jnp.float32, sharding=NamedSharding(mesh, BATCH))
    rows = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(lambda x, rows: (fetch(x, rows) ** 3).sum())).lower(x, rows).compile()
    assert not {"all-gather", "all-reduce"} & set(re.findall("all-gather|all-reduce", compiled.as_text()))
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 256 * width * 4 / 8  # six devices' shares of eight
