"""Low-rank adapters: which kernels have them, parameters with and without them, merging them in."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vdjax.errors import UserError, nearest

Params = dict[str, Any]

KERNELS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIDES = ("_lora_a", "_lora_b")


class Lora(NamedTuple):
    """Adapters beside some kernels of every layer: x @ W + (x @ A) @ B * alpha / rank.

    Hu et al., "LoRA", arXiv 2106.09685, section 4.1.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]  # of KERNELS


def from_config(config: ConfigDict, where: str) -> Lora | None:
    """A stage's adapters; None where their rank is 0.

    Raises:
      UserError: no target, or one that no layer has.
    """
    if not config.rank:
        return None
    for name in config.targets:
        if name not in KERNELS:
            raise UserError(f"{where}.targets: {name!r} is no kernel of a layer{nearest(name, KERNELS)}")
    if not config.targets:
        raise UserError(f"{where}.targets is empty; expected some of {', '.join(KERNELS)}")
    return Lora(config.rank, config.alpha, tuple(name for name in KERNELS if name in config.targets))


def adapters_of(params: Params) -> Params:
    """What a stage with adapters trains: the adapters alone, and the head "score" where there is one."""
    adapters = {"layers": {name: leaf for name, leaf in params["layers"].items() if name.endswith(SIDES)}}
    return adapters | {name: params[name] for name in ("score",) if name in params}


def without_adapters(params: Params) -> Params:
    """The rest, which stays as it is: `join` of the two is `params`."""
    layers = {name: leaf for name, leaf in params["layers"].items() if not name.endswith(SIDES)}
    return {name: value for name, value in params.items() if name != "score"} | {"layers": layers}


def join(base: Params, trained: Params) -> Params:
    """One tree of two: that of the frozen parameters and that of the trained ones. Either may be empty."""
    out = dict(base)
    for name, value in trained.items():
        out[name] = join(base[name], dict(value)) if isinstance(value, Mapping) and name in base else value
    return out


def merge(params: Params, lora: Lora) -> Params:
    """Parameters of the same function without adapters: W + A @ B * alpha / rank, summed in float32."""

    def merged(name: str, kernel: Array) -> Array:
        if name not in lora.targets:
            return kernel
        a, b = (params["layers"][name + side].astype(jnp.float32) for side in SIDES)
        return (kernel + jnp.matmul(a, b, precision="highest") * (lora.alpha / lora.rank)).astype(kernel.dtype)

    layers = without_adapters(params)["layers"]
    return params | {"layers": {name: merged(name, kernel) for name, kernel in layers.items()}}
