import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vdjax import sharding
from vdjax.errors import UserError

MESH = {"snapshot": 1, "data": 2, "fsdp": 4, "tensor": 2}


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


def test_make_mesh() -> None:
    one = jax.devices()[:1]
    mesh = sharding.make_mesh(fsdp=-1, devices=one)
    assert dict(mesh.shape) == {"snapshot": 1, "data": 1, "fsdp": 1, "tensor": 1} and sharding.batch_shards(mesh) == 1
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
