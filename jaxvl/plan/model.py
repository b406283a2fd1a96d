"""A memory model of a step from its shapes, for accelerators whose compiler is not here: no program is compiled, so it is an estimate.

The step is traced, and its equations are walked in order with the arrays alive at each. An array that only fusible equations make and read is taken
to be part of a fused loop and to need no memory; the new state lies where the old one was. An array with an axis of a multiple of the (micro)batch
is split over the batch axes, and so is one with neighbouring axes into which it is cut, or with an axis of the devices in front; one of the shape of a leaf of the state is split like that
leaf, any other is whole on each device. A compiler orders, recomputes and pads in ways that this does not know.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh

from jaxvl.assembly import Program
from jaxvl.plan.shapes import Planned

# What XLA fuses into its neighbours: elementwise maps, and what only names elements anew.
FUSED = frozenset(re.findall(r"\w+", """
    abs add add_any and atan2 broadcast_in_dim ceil clamp convert_element_type copy copy_p cos div eq erf erf_inv exp exp2 expand_dims expm1 floor ge gt integer_pow
    iota is_finite le log log1p logistic lt max min mul name ne neg nextafter not optimization_barrier or pad population_count pow real reduce_precision rem reshape
    rev round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin slice sqrt square squeeze stop_gradient sub tan tanh
    transpose xor
"""))  # fmt: skip


def temporaries(plan: Planned, program: Program, mesh: AbstractMesh) -> int:
    """Bytes a device that a step needs beside its arguments at its widest point, estimated."""
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(program.step)(program.state, program.batch).jaxpr
    needed, _ = dce_jaxpr(traced, [True] * len(traced.outvars))  # without what only the gradients of frozen leaves would read
    train = plan.parts.recipe.train
    rows, parts = train.batch_size // train.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    cuts = {rows, rows // getattr(plan.parts.recipe.method, "chunks", 1)}  # the objective of the fusion models takes the batch in parts
    shards = {a.shape: math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(program.state) if a.shape}

    def split(aval: Any) -> int:
        shape = getattr(aval, "shape", ())
        count = shards.get(shape) or math.prod(shape) // (parts if any(n > 1 and _has_rows(shape, n, parts) for n in cuts) else 1)
        return count * _itemsize(aval)

    return _peak(needed, split, escaping=False)


def _has_rows(shape: tuple[int, ...], rows: int, parts: int) -> bool:
    """Whether an axis is that of the batch, two axes are, or the first is that of the devices, of rows which each takes a few at a time."""
    few = len(shape) > 2 and shape[0] == parts and shape[1] <= rows // parts
    return few or any(n and n % rows == 0 for n in shape) or any(n * m == rows for n, m in itertools.pairwise(shape))


def _itemsize(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    return getattr(dtype, "itemsize", 0) or 0


def _whole(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ())) * _itemsize(aval)


def _peak(jaxpr: Any, size: Callable[[Any], int], *, escaping: bool = True) -> int:
    """The most bytes of arrays made inside `jaxpr` that are alive at once. escaping: whether its results count."""
    is_var = lambda v: hasattr(v, "count") or not hasattr(v, "val")
    last: dict[Any, int] = {}
    fused = set()
    for i, eqn in enumerate(jaxpr.eqns):
        fusible = eqn.primitive.name in FUSED
        for v in eqn.invars:
            if is_var(v):
                last[v] = i
                if not fusible:
                    fused.discard(v)
        if fusible:
            fused.update(eqn.outvars)
    results = {v for v in jaxpr.outvars if is_var(v)}
    fused -= results
    alive: dict[Any, int] = {}
    now = most = 0
    for i, eqn in enumerate(jaxpr.eqns):
        inner = max((_peak(sub, _whole if eqn.primitive.name == "shard_map" else size) for sub in _inside(eqn)), default=0)
        for v in eqn.outvars:
            held = 0 if v in fused or (v in results and not escaping) else size(v.aval)
            alive[v] = held
            now += held
        most = max(most, now + inner)
        for v in {v for v in (*eqn.invars, *eqn.outvars) if is_var(v)}:
            if v in alive and last.get(v, -1) <= i and not (v in results and escaping):
                now -= alive.pop(v)
    return most


def _inside(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs."""
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(one, "jaxpr"):
                yield one.jaxpr
            elif hasattr(one, "eqns"):
                yield one
