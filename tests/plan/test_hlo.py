"""The parser of compiled programs against programs whose transfers are known, and against what it must not guess."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.plan import hlo

LENGTH, ROWS, WIDTH = 7, 6, 10


def compiled(f, specs, out, shape, options=MeshOptions(data=4, fsdp=2)):
    """The text of f(x) in shard_map on eight devices, and the sizes of the mesh."""
    mesh = make_mesh(options)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(f, in_specs=specs, out_specs=out, check_vma=False)
        return jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text(), dict(mesh.shape)


def scanned(step):
    return lambda x: lax.scan(lambda carry, _: (step(carry), None), x, None, length=LENGTH)[0]


def test_an_all_reduce_in_a_scan_counts_as_often_as_it_runs():
    f = scanned(lambda x: jnp.sin(lax.psum(x, "data")))
    found = hlo.collectives(*compiled(f, P(), P(), (ROWS, WIDTH)))
    size = LENGTH * ROWS * WIDTH * 4
    assert found == [hlo.Collective("all-reduce", ("data",), 4, LENGTH, size, round(size * 2 * 3 / 4))]


def test_nested_loops_multiply():
    f = scanned(scanned(lambda x: jnp.sin(lax.psum(x, ("data", "fsdp")))))
    (found,) = hlo.collectives(*compiled(f, P(), P(), (ROWS, WIDTH)))
    assert (found.axes, found.devices, found.times, found.bytes) == (("data", "fsdp"), 8, LENGTH**2, LENGTH**2 * ROWS * WIDTH * 4)


@pytest.mark.parametrize(
    ("kind", "f", "out", "whole", "sent"),
    [
        ("all-gather", partial(lax.all_gather, axis_name="fsdp", tiled=True), P("data"), ROWS * 2, ROWS),
        ("reduce-scatter", partial(lax.psum_scatter, axis_name="fsdp", tiled=True), P(("data", "fsdp")), ROWS, ROWS / 2),
        (
            "all-to-all",
            partial(lax.all_to_all, axis_name="fsdp", split_axis=0, concat_axis=0, tiled=True),
            P(("data", "fsdp")),
            ROWS,
            ROWS / 2,
        ),
        ("collective-permute", partial(lax.ppermute, axis_name="fsdp", perm=[(0, 1), (1, 0)]), P(("data", "fsdp")), ROWS, ROWS),
    ],
)
def test_each_kind(kind, f, out, whole, sent):
    """x is split over all eight devices, ROWS rows each."""
    (found,) = hlo.collectives(*compiled(f, P(("data", "fsdp")), out, (8 * ROWS, WIDTH)))
    assert found._replace(devices=0) == hlo.Collective(kind, ("fsdp",), 0, 1, whole * WIDTH * 4, sent * WIDTH * 4)


def test_what_only_one_branch_does_is_told_apart():
    def f(x):
        rare = lambda x: lax.fori_loop(0, 3, lambda _, x: jnp.sin(lax.psum(x, "fsdp")), x)
        return lax.cond(x[0, 0] > 0, rare, lambda x: x * 2, lax.psum(x, "data"))

    always, rare = hlo.collectives(*compiled(f, P(), P(), (ROWS, WIDTH)))
    assert (always.axes, always.times, always.sure) == (("data",), 1, True)
    assert (rare.axes, rare.times, rare.sure) == (("fsdp",), 3, False)


def test_a_loop_of_unknown_length_counts_once_and_is_told_apart():
    f = lambda x: lax.while_loop(lambda x: jnp.sum(x) < 5, lambda x: lax.psum(x, "data"), x)
    (found,) = hlo.collectives(*compiled(f, P(), P(), (ROWS, WIDTH)))
    assert (found.times, found.sure) == (1, False)


TPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (p: f32[8,128]) -> f32[1,128] {
  %p = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)S(1)} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%add
  ROOT %slice = f32[1,128]{1,0:T(1,128)} dynamic-slice(%all-reduce.1, %i, %z), dynamic_slice_sizes={1,128}
}

%condition (c: (s32[], f32[8,128])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(12)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%n, %bound), direction=LT
}

%body (c.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %c.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%c.1), index=1
  %start = (f32[8,128]{1,0:T(8,128)}, /*index=1*/f32[16,128]{1,0:T(8,128)}) all-gather-start(%x), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, use_global_device_ids=true
  %done = f32[16,128]{1,0:T(8,128)} all-gather-done(%start)
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%n, %x)
}

ENTRY %main (q: f32[8,128]) -> f32[1,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%t), condition=%condition, body=%body
  ROOT %fusion = f32[1,128]{1,0:T(1,128)} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_the_forms_of_tpu_programs():
    """Asynchronous halves are one transfer, a loop's length is in its condition, and a reduce-scatter is dressed as an all-reduce."""
    gather, scatter = hlo.collectives(TPU, {"data": 2, "fsdp": 4, "tensor": 1})
    size = 8 * 128 * 4
    assert gather == hlo.Collective("all-gather", ("data",), 2, 12, 12 * 2 * size, 12 * size)
    assert scatter == hlo.Collective("reduce-scatter", ("data", "fsdp"), 8, 1, size, size * 7 // 8)


def test_groups_that_are_named_by_the_axes_of_a_mesh():
    named = TPU.replace("replica_groups=[4,2]<=[2,4]T(1,0)", "replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=1] {'axis_0','axis_2'}")
    assert hlo.collectives(named, {"data": 2, "fsdp": 4, "tensor": 1}) == hlo.collectives(TPU, {"data": 2, "fsdp": 4, "tensor": 1})
    with pytest.raises(ValueError, match="names its devices"):
        hlo.collectives(named.replace("{'axis_0','axis_2'}", "{'axis_1':(1)2}"), {"data": 2, "fsdp": 4, "tensor": 1})


def test_groups_that_are_written_in_an_unknown_way_are_an_error():
    with pytest.raises(ValueError, match="names its devices in a way that is not known here"):
        hlo.collectives(TPU.replace("replica_groups=[1,8]<=[8]", "replica_groups=@everyone"), {"data": 8})
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.collectives("nothing", {"data": 8})


@pytest.mark.parametrize(
    ("named", "groups"),
    [
        ("mesh['a'=2,'b'=3] {'b'}", [[0, 1, 2], [3, 4, 5]]),
        ("mesh['a'=2,'b'=3] {'a'}", [[0, 3], [1, 4], [2, 5]]),
        ("mesh['a'=1,'b'=2,'c'=3], device_ids=([3,2]T(1,0)) {'b'}", [[0, 1], [2, 3], [4, 5]]),
        ("mesh['a'=2,'b'=3], device_ids=([6]) {'b'}", [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_groups_named_by_the_axes_of_a_mesh(named, groups):
    i = hlo.Instruction(
        "x", "f32[2]", "all-gather", "%y", f", channel_id=82, replica_groups={named}, dimensions={{1}}, use_global_device_ids=true"
    )
    assert hlo._groups(i, {"data": 2, "fsdp": 3}) == (groups, True)
