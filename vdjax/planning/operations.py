"""Matmul FLOPs of a traced program: what is done, recomputation and masked work included."""

import math
from pathlib import Path
from typing import Any

from jax._src import source_info_util


def matmul_flops(jaxpr: Any, trips: int = 1) -> float:
    """FLOPs of all matrix products of a jaxpr, on all devices together, counted as if no device repeated another's.

    Of branches the one with the most counts, and of loops that follow each other and whose ends depend on data too: the
    train step has one for each size of a microbatch. Kernels (Pallas) count every tile of their grid.

    Args:
      trips: of loops whose end depends on data, such as the sampler's over tokens.
    """
    total = largest = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr, trips) for branch in params["branches"])
        else:
            flops = _times(name, params, trips) * sum(matmul_flops(inner, trips) for inner in _jaxprs(params))
            if name == "while":
                largest = max(largest, flops)
            else:
                total += flops
    return total + largest


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)


def _times(name: str, params: dict[str, Any], trips: int) -> int:
    """How often the jaxprs in `params` run."""
    if name == "scan":
        return params["length"]
    if name == "while":
        return trips
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def kept(jaxpr: Any) -> list[tuple[float, str]]:
    """Bytes and name of the arrays that loops stack up for later, on all devices together, largest first.

    In a train step these are what the forward pass keeps of each layer for the backward pass.
    """
    found = []
    for equation in jaxpr.eqns:
        for inner in _jaxprs(equation.params):
            found += kept(inner)
        if equation.primitive.name == "scan" and not equation.params["reverse"]:
            body, carried = equation.params["jaxpr"].jaxpr, equation.params["num_carry"]
            makers = {out: made for made in body.eqns for out in made.outvars}
            for outer, inside in zip(equation.outvars[carried:], body.outvars[carried:], strict=True):
                size = math.prod(outer.aval.shape) * outer.aval.dtype.itemsize
                found.append((float(size), f"{outer.aval.str_short(short_dtypes=True)}{_origin(makers.get(inside))}"))
    return sorted(found, key=lambda each: -each[0])


def _origin(equation: Any) -> str:
    if equation is None:
        return " that each turn of the loop begins with"
    frame = source_info_util.user_frame(equation.source_info.traceback)
    return f" of {frame.function_name}, {Path(frame.file_name).name}:{frame.start_line}" if frame else ""
