import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from vdjax import sharding
from vdjax.errors import UserError

MESH = {"snapshot": 1, "data": 2, "fsdp": 4, "tensor": 2}
LONG_ROWS = {"snapshot": 1, "data": 2, "fsdp": 1, "context": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "want"),
    [
        (("layer", "embed", "heads"), (3, 32, 64), (None, "fsdp", "tensor")),
        (("vocab", "embed"), (260, 32), ("tensor", "fsdp")),
        (("vocab", "embed"), (261, 30), (None, None)),  # what does not divide stays whole
        (("layer", "norm"), (3, 32), (None, None)),
        (("batch", "length", "embed_act"), (8, 5, 32), (("data", "fsdp"), None, None)),
        (("batch", "length", "heads_act", None), (4, 5, 2, 16), (None, None, "tensor", None)),
    ],
)
def test_partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], want: tuple) -> None:
    assert sharding.partition_spec(axes, shape, MESH) == PartitionSpec(*want)


def test_mesh_axes_of_size_one_are_left_out() -> None:
    spec = sharding.partition_spec(("batch", "embed"), (8, 8), {"data": 2, "fsdp": 1, "tensor": 1})
    assert spec == PartitionSpec("data", None)


@pytest.mark.parametrize(
    ("axes", "shape", "want"),
    [
        (("batch", "length", "embed_act"), (8, 64, 32), ("data", "context", None)),
        (("batch", "length", "heads_act", None), (8, 1, 4, 16), ("data", None, "tensor", None)),  # one token a row
        (("layer", "embed", "heads"), (3, 32, 64), (None, "context", "tensor")),
    ],
)
def test_partition_spec_with_a_context_axis(axes: tuple[str | None, ...], shape: tuple[int, ...], want: tuple) -> None:
    assert sharding.partition_spec(axes, shape, LONG_ROWS) == PartitionSpec(*want)


def test_parts_of() -> None:
    assert sharding.parts_of("length", 64) == 1
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(LONG_ROWS.values()), tuple(LONG_ROWS))):
        assert [sharding.parts_of("length", n) for n in (64, 1, 66)] == [4, 1, 1]
        assert sharding.parts_of("batch", 2) == 2


def test_of_reduced() -> None:
    mesh = AbstractMesh(tuple(MESH.values()), tuple(MESH))
    layout, shape = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")), (3, 32, 64)
    for reduced, want in (
        ((3, 32, 64), (None, "fsdp", "tensor")),
        ((3, 32), (None, "fsdp")),
        ((3, 64), (None, "tensor")),
        ((32, 64), ("fsdp", "tensor")),
        ((1,), ()),
        ((), ()),
    ):
        assert sharding.of_reduced(layout, shape, reduced) == NamedSharding(mesh, PartitionSpec(*want))
    short = NamedSharding(mesh, PartitionSpec("fsdp"))
    assert sharding.of_reduced(short, (4, 8), (4,)) == NamedSharding(mesh, PartitionSpec("fsdp"))


def test_make_mesh() -> None:
    one = jax.devices()[:1]
    mesh = sharding.make_mesh(fsdp=-1, devices=one)
    assert dict(mesh.shape) == {"snapshot": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    assert sharding.batch_shards(mesh) == 1
    for sizes, match in (
        ({"data": 2, "fsdp": -1}, "1 devices cannot be shared out among 2"),
        ({"data": 3}, "needs 3 devices, but there are 1"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0}, "sizes are positive"),
    ):
        with pytest.raises(UserError, match=match):
            sharding.make_mesh(**sizes, devices=one)


def test_put_and_fetch() -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    array = np.arange(24.0).reshape(2, 3, 4)
    placed = sharding.put_global(array, sharding.rows_sharding(mesh, 3, row_axis=1))
    assert placed.sharding == NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), None))
    np.testing.assert_array_equal(sharding.fetch(placed), array)


def test_constrain_is_nothing_without_a_mesh() -> None:
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, ("batch", None)) is x


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX says of a TPU v5e chip."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def chips(slices: int, side: int) -> list[Chip]:
    """Slices of side x side chips, four to a host, in no order."""
    places = itertools.product(range(slices), range(side), range(side))
    found = [Chip(i, s, (x, y, 0), (s * side + y // 2) * side + x // 2) for i, (s, y, x) in enumerate(places)]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def apart(one: Chip, other: Chip) -> int:
    return sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True))


def sizes_of(**sizes: int) -> dict[str, int]:
    return dict.fromkeys(sharding.MESH_AXES, 1) | sizes


@pytest.mark.parametrize("sizes", [{"fsdp": 64}, {"fsdp": 16, "tensor": 4}, {"data": 2, "fsdp": 8, "context": 4}])
def test_chips_of_a_slice_are_laid_out_by_where_they_are(sizes: dict[str, int]) -> None:
    grid = sharding.device_grid(sizes_of(**sizes), chips(1, 8))
    assert grid.shape == tuple(sizes_of(**sizes).values()) and len({chip.id for chip in grid.flat}) == 64
    # The chips of the last axis that there is are neighbours, or make a square.
    groups = grid.reshape(-1, list(sizes.values())[-1])
    nearest = [min(apart(chip, other) for other in group if other != chip) for group in groups for chip in group]
    assert set(nearest) == {1}


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 16}, {"data": 8, "fsdp": 2, "tensor": 2}])
def test_slices_lie_along_the_data_axis(sizes: dict[str, int]) -> None:
    grid = sharding.device_grid(sizes_of(**sizes), chips(2, 4))
    assert grid.shape == tuple(sizes_of(**sizes).values()) and len({chip.id for chip in grid.flat}) == 32
    slices = np.vectorize(lambda chip: chip.slice_index, otypes=[int])(np.moveaxis(grid, 1, 0))
    half = sizes["data"] // 2
    assert (slices[:half] == 0).all() and (slices[half:] == 1).all()


def test_slices_that_cannot_lie_along_the_data_axis() -> None:
    for sizes in (sizes_of(fsdp=32), sizes_of(data=1, fsdp=8, tensor=4)):
        with pytest.raises(UserError, match="mesh.data=1 is no multiple of the 2 slices"):
            sharding.device_grid(sizes, chips(2, 4))
    # The evaluator's snapshots never speak to each other, so that it lays slices along their axis where it can.
    grid = sharding.device_grid(sizes_of(snapshot=4, fsdp=8), chips(2, 4), across=("snapshot", "fsdp"))
    assert [len({chip.slice_index for chip in part.flat}) for part in grid] == [1, 1, 1, 1]
    grid = sharding.device_grid(sizes_of(snapshot=1, fsdp=32), chips(2, 4), across=("snapshot", "fsdp"))
    assert len({chip.slice_index for chip in grid.flat}) == 2
