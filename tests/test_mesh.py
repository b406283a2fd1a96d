"""Path rules to shardings: every fault is named, every process gets its rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxvl.mesh import MeshOptions, ShardingError, make_mesh, place, process_rows, shardings

LEAF = jax.ShapeDtypeStruct


def test_axes_are_always_three_and_fill_the_devices():
    assert dict(make_mesh(MeshOptions()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshOptions(2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshOptions(fsdp=2), jax.devices()[:4]).shape) == {"data": 2, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (4, 4, 1)])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(ValueError, match="config.mesh"):
        make_mesh(MeshOptions(*sizes))


def test_first_rule_wins_and_optimiser_state_follows_its_parameter():
    mesh = make_mesh(MeshOptions(2, 2, 2))
    params = {"blocks": {"mlp": {"kernel": LEAF((3, 8, 16), jnp.float32)}}, "bias": LEAF((5,), jnp.float32)}
    rules = ((r"blocks/.*kernel$", P(None, "fsdp", "tensor")), (r"kernel$", P("fsdp")), (r"bias$", P()))
    got = shardings({"params": params, "opt_state": ({"mu": params},)}, rules, mesh)
    assert got["params"]["blocks"]["mlp"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert got["opt_state"][0]["mu"]["blocks"]["mlp"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert got["params"]["bias"].spec == P()


def test_all_faults_are_listed_with_leaf_dimension_and_axis():
    mesh = make_mesh(MeshOptions(2, 4, 1))
    tree = {"odd": LEAF((6, 7), jnp.float32), "strange": LEAF((8,), jnp.float32), "flat": LEAF((8,), jnp.float32)}
    rules = ((r"odd", P("fsdp", None)), (r"flat", P(None, "fsdp")))
    with pytest.raises(ShardingError) as error:
        shardings(tree, rules, mesh)
    text = str(error.value)
    assert "odd (6, 7): dimension 0 of size 6 does not divide over fsdp = 4" in text
    assert "strange (8,): no sharding rule matches" in text
    assert "flat (8,)" in text and "more dimensions" in text


def test_rows_and_placement_cover_the_global_batch():
    mesh = make_mesh(MeshOptions(2, 2, 2))
    assert process_rows(mesh, 16) == (0, 16)
    with pytest.raises(ValueError, match=r"batch_size is 6; to be split over data\*fsdp = 4 it must be a multiple of 4"):
        process_rows(mesh, 6)
    array = place({"x": np.arange(16)}, mesh)["x"]
    np.testing.assert_array_equal(array, np.arange(16))
    assert {s.data.shape for s in array.addressable_shards} == {(4,)}
