"""Mesh and logical-axis rules: the one place that knows which array axis lives on which mesh axis."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vdjax.errors import UserError

MESH_AXES = ("snapshot", "data", "fsdp", "context", "tensor")  # from the least traffic to the most

# Logical axis -> mesh axes. Names ending in _act are of activations.
RULES: Mapping[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
    "rank": (),
    "layer": (),
    "snapshot": ("snapshot",),
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "embed_act": (),
    "heads_act": ("tensor",),
    "kv_heads_act": ("tensor",),
    "mlp_act": ("tensor",),
    "batch_looked_up": ("data",),
    "width_looked_up": ("fsdp",),
}


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    snapshot: int = 1,
    context: int = 1,
    devices: list | None = None,
) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what the others leave. TPU slices lie along `data`.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the number of slices does not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"snapshot": snapshot, "data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
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
    return as_mesh(device_grid(sizes, devices))


def as_mesh(grid: np.ndarray) -> Mesh:
    """The mesh of devices with the axes MESH_AXES."""
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def device_grid(sizes: Mapping[str, int], devices: Sequence[Any], across: Sequence[str] = ("data",)) -> np.ndarray:
    """The devices as an array with the axes MESH_AXES: on TPU those of one axis are neighbours, and those of one slice
    together, as between slices there is the slow data-center network.

    Args:
      across: axes that slices may be laid along: the first whose size is a multiple of their number.

    Raises:
      UserError: several slices, and their number divides no axis of `across`.
    """
    shape = [sizes[axis] for axis in MESH_AXES]
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    devices, slices = sorted(devices, key=lambda device: device.id), slice_count(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    axis = next((axis for axis in across if sizes[axis] % slices == 0), None)
    if axis is None:
        sizes_of = " or ".join(f"mesh.{axis}={sizes[axis]}" for axis in across)
        raise UserError(f"{sizes_of} is no multiple of the {slices} slices, which are laid along that axis")
    outer = [slices if name == axis else 1 for name in MESH_AXES]
    inner = [size // parts for size, parts in zip(shape, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def slice_count(devices: Sequence[Any]) -> int:
    """How many TPU slices the devices are of; 1 for others."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


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


def parts_of(axis: str, size: int) -> int:
    """How many parts a logical axis of this size is split into under `jax.set_mesh`; 1 outside it."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in mesh_axes(partition_spec((axis,), (size,), mesh.shape)))


def mesh_axes(spec: Any) -> tuple[str, ...]:
    """The names of the mesh axes in a PartitionSpec, or in a part of one."""
    if spec is None or isinstance(spec, str):
        return (spec,) if spec else ()
    return tuple(name for part in spec for name in mesh_axes(part))


def param_shardings(axes_tree: Any, abstract_params: Any, mesh: Mesh) -> Any:
    """NamedShardings for a params tree, from the same tree of logical-axis tuples."""
    return jax.tree.map(
        lambda leaf, axes: NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh.shape)), abstract_params, axes_tree
    )


def of_reduced(layout: NamedSharding, shape: tuple[int, ...], reduced: tuple[int, ...]) -> NamedSharding:
    """Sharding of what is kept of an array with this layout and shape: an array like it, or one without one of its
    axes, lies as it does along the axes that are left; any other is whole."""
    spec = [*layout.spec, *[None] * (len(shape) - len(layout.spec))]
    if reduced == shape:
        return layout
    for axis in range(len(shape)):
        if shape[:axis] + shape[axis + 1 :] == reduced:
            return NamedSharding(layout.mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return NamedSharding(layout.mesh, PartitionSpec())


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
