"""A class axis split over every device of the mesh: where each device's rows are, and what is sent by hand.

Arrays [class, ...] are cut in equal runs of rows over all axes of the context mesh, `tensor` included: proxies are the largest
array of a model with millions of classes, and nothing else needs them whole. Where the number of classes does not divide, the
last rows are padding that every function masks. Embeddings [batch, width] are split over the batch axes and gathered, since
every device meets every row of the batch with its own classes.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

CLASS_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
PER_DEVICE = P(CLASS_AXES)  # the rule for an array whose leading axis is classes
EPS = 1e-12  # under the root of a norm: a zero row stays zero, with a gradient of order 1e6


class Split(NamedTuple):
    axes: tuple[str, ...]  # mesh axes the classes are split over, none on one device
    batch: tuple[str, ...]  # those of them the batch is split over; none where it does not divide, and every device has all of it
    devices: int
    rows: int  # classes of a device, padding included


def of_mesh(classes: int, batch: int = 1) -> Split:
    """The split of `classes` rows, and of a batch of `batch` rows, over the context mesh (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    sized = lambda axes: tuple(a for a in axes if a in mesh.axis_names and mesh.shape[a] > 1)
    axes, over = sized(CLASS_AXES), sized(BATCH_AXES)
    devices = prod(mesh.shape[a] for a in axes)
    over = over if batch % prod(mesh.shape[a] for a in over) == 0 else ()
    return Split(axes, over, devices, -(-classes // devices))


def on_devices(f: Callable, split: Split, args: tuple, kinds: str, outputs: str) -> Any:
    """`f(*args)` on every device, each argument and each of the values it returns laid out as its letter says.

    "c": classes, the device's own rows; "b": rows of the batch, as `split.batch` says; "r": the same on every device, which of a
    value `f` returns it must have seen to. Class arrays shorter than the split are padded with zeros, and longer results cut.
    """
    lengths = {len(a) for a, kind in zip(args, kinds, strict=True) if kind == "c"}
    if split.devices == 1:
        return f(*args)
    short = split.devices * split.rows - next(iter(lengths))
    pad = lambda a: jnp.pad(a, [(0, short)] + [(0, 0)] * (a.ndim - 1)) if short else a
    args = tuple(pad(a) if kind == "c" else a for a, kind in zip(args, kinds, strict=True))
    spec = {"c": P(split.axes), "b": P(split.batch) if split.batch else P(), "r": P()}
    # Nothing is differentiated through this, and the functions see to it themselves that what they return as equal is equal.
    mapped = jax.shard_map(f, in_specs=tuple(spec[k] for k in kinds), out_specs=tuple(spec[k] for k in outputs), check_vma=False)
    out = mapped(*args)
    return tuple(a[: len(a) - short] if kind == "c" and short else a for a, kind in zip(out, outputs, strict=True))


def first(split: Split, rows: int) -> Any:
    """The class number of the first of the `rows` rows at home."""
    return lax.axis_index(split.axes) * rows if split.axes else 0


def ids(split: Split, rows: int, classes: int) -> jax.Array:
    """Class numbers of the `rows` rows at home, int32; -1 for padding, the rows from `classes` on."""
    number = first(split, rows) + jnp.arange(rows, dtype=jnp.int32)
    return jnp.where(number < classes, number, -1)


def total(split: Split, x: Any) -> Any:
    return lax.psum(x, split.axes) if split.axes else x


def gather(split: Split, x: jax.Array) -> jax.Array:
    """All rows of the batch, from those at home."""
    return lax.all_gather(x, split.batch, tiled=True) if split.batch else x


def scatter(split: Split, dx: jax.Array) -> jax.Array:
    """The transpose of `gather` and of copying to every device: contributions [batch, ...] summed, the rows at home kept."""
    others = tuple(a for a in split.axes if a not in split.batch)
    dx = lax.psum(dx, others) if others else dx
    return lax.psum_scatter(dx, split.batch, tiled=True) if split.batch else dx


def unit(x: jax.Array) -> jax.Array:
    """Rows over sqrt(their squared norm + EPS), in float32 or wider; of a zero row the gradient is large and finite."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + EPS)


def dot(a: jax.Array, b: jax.Array, dtype: str = "float32") -> jax.Array:
    """`a @ b` summed in float32 or wider; of inputs rounded to bfloat16 where `dtype` says so."""
    if dtype == "bfloat16":
        return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def pieces(rows: int, most: int) -> tuple[int, int]:
    """(number, size) of the blocks that `rows` rows are cut in, none above `most`; the last may overlap the one before."""
    number = -(-rows // max(most, 1))
    return number, -(-rows // number)


def over_pieces(f: Callable, rows: int, most: int, carry: Any) -> Any:
    """`carry = f(carry, start, fresh)` for every block: rows start, start + 1, ...; fresh bool [size], not seen in a block before.

    The last block is moved up to end with the array, which saves a padded copy of it; what it sees twice is not fresh.
    """
    number, size = pieces(rows, most)

    def body(i: jax.Array, carry: Any) -> Any:
        start = jnp.minimum(i * size, rows - size)
        return f(carry, start, start + jnp.arange(size) >= i * size)

    return body(jnp.int32(0), carry) if number == 1 else lax.fori_loop(0, number, body, carry)
