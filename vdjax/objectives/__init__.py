"""Objectives: pure functions from log-probs to losses and metrics.

`OBJECTIVES` is the one list of them. An objective of kind "sft" or "text" takes token log-probs; one of kind
"preference" takes a `Pairs`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from vdjax.objectives.dpo import dpo
from vdjax.objectives.pairs import Pairs
from vdjax.objectives.sft import sft
from vdjax.objectives.simpo import simpo

__all__ = ["OBJECTIVES", "Objective", "Pairs", "dpo", "sft", "simpo"]


class Objective(NamedTuple):
    kind: Literal["text", "sft", "preference"]  # what its data are
    fn: Callable
    needs_reference: bool
    hyper: Mapping[str, Any]  # hyper-parameters with their defaults


OBJECTIVES: Mapping[str, Objective] = {
    "pretrain": Objective("text", sft, False, {}),
    "sft": Objective("sft", sft, False, {}),
    "dpo": Objective("preference", dpo, True, {"beta": 0.1}),
    "simpo": Objective("preference", simpo, False, {"beta": 2.0, "gamma": 1.0}),
}
