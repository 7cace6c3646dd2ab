"""TPU chips and how slices of them are named."""

import math
import os
from typing import Any, NamedTuple

from jax.experimental import topologies

from vdjax.errors import UserError, nearest


class Chip(NamedTuple):
    """Published figures of a chip: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e."""

    kinds: tuple[str, ...]  # how JAX calls it (`device_kind`)
    flops: float  # a second, dense bfloat16
    hbm_gib: float  # that the compiler gives to a program
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float  # bytes a second that it sends over all its links, half of what is published for both ways
    cores: int  # TensorCores, by which slices of some generations are named


CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 30.75, 1200e9, 300e9, 2),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 15.75, 819e9, 200e9, 1),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95.73, 2765e9, 600e9, 2),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 31.24, 1638e9, 400e9, 1),
}

# The shape that a slice has by default, by its chips.
FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16"
SHAPES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT}


def parse(name: str) -> str:
    """GENERATION:SHAPE, such as v5e:8x8, of a slice written so or as v5e-64 (on v4 and v5p TensorCores are counted).

    Raises:
      UserError: no such generation or shape.
    """
    generation, _, shape = name.replace("-", ":", 1).partition(":")
    if generation not in CHIPS:
        raise UserError(f"--topology {name}: expected GENERATION:SHAPE, such as v5e:8x8{nearest(generation, CHIPS)}")
    shapes = SHAPES[generation].split()
    if shape.isdecimal():
        found = {str(CHIPS[generation].cores * size(each)): each for each in shapes}
        if shape not in found:
            raise UserError(f"--topology {name}: there is no such slice{nearest(shape, found)}")
        shape = found[shape]
    sides = shape.split("x")
    if len(sides) != shapes[0].count("x") + 1 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"--topology {name}: expected a shape such as {shapes[3]}{nearest(shape, shapes)}")
    return f"{generation}:{shape}"


def size(shape: str) -> int:
    """The chips of a shape."""
    return math.prod(map(int, shape.split("x")))


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of one or several slices that are not there, for the TPU's compiler.

    Raises:
      UserError: the compiler (package libtpu) is not installed, or knows no such shape.
    """
    # The compiler needs no TPU: neither its metadata nor to be the only process that holds it.
    os.environ.update({"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4"):
        more["chip_config_name"] = "megacore"  # both cores as one device, as on the machine itself
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:  # jaxlib raises what the plugin does
        hint = "pip install 'vdjax[tpu]' brings the TPU's compiler" if "libtpu" in str(error) else "see SHAPES"
        raise UserError(f"--topology {topology}: {str(error).splitlines()[0]}; {hint}") from error
    return list(found.devices)
