"""Mesh and logical-axis rules: the one place that knows which array axis lives on which mesh axis."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vdjax.errors import UserError

MESH_AXES = ("snapshot", "data", "fsdp", "tensor")

# Logical axis -> mesh axes. Names ending in _act are of activations.
RULES: Mapping[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
    "rank": (),
    "layer": (),
    "snapshot": ("snapshot",),
    "batch": ("data", "fsdp"),
    "length": (),
    "embed_act": (),
    "heads_act": ("tensor",),
    "kv_heads_act": ("tensor",),
    "mlp_act": ("tensor",),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, snapshot: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"snapshot": snapshot, "data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {sizes}: sizes are positive, and at most one may be -1")
    if free and len(devices) % fixed:
        raise UserError(f"mesh {sizes}: {len(devices)} devices cannot be shared out among {fixed}")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(f"mesh {sizes} needs {math.prod(sizes.values())} devices, but there are {len(devices)}")
    grid = np.asarray(devices).reshape([sizes[axis] for axis in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """The mesh axes of an array with the given logical axes; an axis that does not divide stays whole."""
    spec: list[Any] = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in RULES[axis] if mesh_shape.get(a, 1) > 1) if axis else ()
        divides = size % math.prod(mesh_shape[a] for a in mesh_axes) == 0
        spec.append((mesh_axes if len(mesh_axes) > 1 else mesh_axes[0]) if mesh_axes and divides else None)
    return PartitionSpec(*spec)


def param_shardings(axes_tree: Any, abstract_params: Any, mesh: Mesh) -> Any:
    """NamedShardings for a params tree, from the same tree of logical-axis tuples."""
    return jax.tree.map(
        lambda leaf, axes: NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh.shape)), abstract_params, axes_tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, ndim: int, row_axis: int = 0) -> NamedSharding:
    """Sharding of a batch array whose axis `row_axis` counts rows."""
    return NamedSharding(mesh, PartitionSpec(*[RULES["batch"] if i == row_axis else None for i in range(ndim)]))


def put_global(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from a NumPy array that every process holds whole; each takes its own part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pins an activation's layout; does nothing outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh.shape))


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of a global array, on every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
