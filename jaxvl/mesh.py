"""Three mesh axes, path rules to shardings, and placing host batches on devices.

`data` splits the batch, `fsdp` splits the batch and the parameters, `tensor` splits parameters inside a layer.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

log = logging.getLogger(__name__)
AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the batch axis is split over both, and replicated over `tensor`
Rules = Sequence[tuple[str, P]]


class MeshOptions(NamedTuple):
    """Axis sizes; one of them may be -1 and takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class ShardingError(ValueError):
    """A leaf that no rule matches or that does not divide; names leaf, dimension and axis."""


def check(options: MeshOptions) -> None:
    """Raises ValueError for sizes that fit no number of devices."""
    if any(s != -1 and s < 1 for s in options) or options.count(-1) > 1:
        raise ValueError(f"config.mesh is {options._asdict()}; sizes must be positive, and at most one of them -1")


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh, accumulate: int = 1) -> None:
    """Raises ValueError where a batch does not divide over the devices, or a microbatch does not."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (devices * accumulate):
        cuts = f" and cut in {accumulate} microbatches" if accumulate > 1 else ""
        raise ValueError(
            f"config.train.batch_size is {batch_size}; to be split over data*fsdp = {devices}{cuts} it must be a multiple of {devices * accumulate}"
        )


def sizes(options: MeshOptions, devices: int) -> tuple[int, ...]:
    """The sizes of the three axes over so many devices. Raises ValueError where they do not multiply to that number."""
    check(options)
    found = list(options)
    fixed = int(np.prod([s for s in found if s != -1]))
    if -1 in found:
        found[found.index(-1)] = devices // fixed
    if int(np.prod(found)) != devices:
        raise ValueError(f"config.mesh is {options._asdict()}, which does not fill {devices} devices: {fixed} must divide that number")
    return tuple(found)


def make_mesh(options: MeshOptions, devices: Sequence[Any] | None = None) -> Mesh:
    """The ("data", "fsdp", "tensor") mesh over all devices. Raises ValueError where the sizes do not multiply to their number."""
    devices = list(jax.devices() if devices is None else devices)
    shape, types = sizes(options, len(devices)), (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # A TPU torus such as 4x4x4 has no axes whose product is 8; one is cut, and a ring over it does not close.
        log.warning(
            "mesh %s does not follow the axes of the TPU torus, so its collectives are slower than sizes that do",
            dict(zip(AXES, shape, strict=True)),
        )
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES, axis_types=types)


def path_str(path: Any) -> str:
    """ "params/image/blocks/mlp/kernel" of a key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shardings(tree: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """NamedSharding of every leaf of `tree` (arrays or shapes): the first rule whose pattern is found in its path.

    Raises ShardingError listing every leaf that matches no rule or whose dimension the axis sizes do not divide.
    """
    faults: list[str] = []

    def one(path: Any, leaf: Any) -> NamedSharding:
        name, shape = path_str(path), tuple(leaf.shape)
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            faults.append(f"{name} {shape}: no sharding rule matches; add one to the method's rules")
            return NamedSharding(mesh, P())
        if len(spec) > len(shape):
            faults.append(f"{name} {shape}: rule {spec} has more dimensions than the leaf")
            return NamedSharding(mesh, P())
        for dim, axes in enumerate(spec):
            names = (axes,) if isinstance(axes, str) else (axes or ())
            parts = int(np.prod([mesh.shape[a] for a in names]))
            if shape[dim] % parts:
                faults.append(f"{name} {shape}: dimension {dim} of size {shape[dim]} does not divide over {'*'.join(names)} = {parts}")
        return NamedSharding(mesh, spec)

    out = jax.tree_util.tree_map_with_path(one, tree)
    if faults:
        raise ShardingError("cannot shard:\n  " + "\n  ".join(faults))
    return out


def process_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """The rows [lo, hi) of a global batch that this process feeds. Raises ValueError where the batch does not divide."""
    check_batch(batch_size, mesh)
    index = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    spans = {s[0].indices(batch_size)[:2] for s in index.values() if s}
    lo, hi = min(s[0] for s in spans), max(s[1] for s in spans)
    if sum(b - a for a, b in spans) != hi - lo:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: this process holds rows {sorted(spans)}, which are not contiguous; make `tensor` the innermost axis"
        )
    return lo, hi


def place(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of each array as global arrays, split over the batch axes."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}
