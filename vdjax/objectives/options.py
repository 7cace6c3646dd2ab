"""What objectives take besides their own hyper-parameters: an SFT term and an f-divergence. Both are applied here."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdjax.errors import UserError, nearest
from vdjax.objectives.pairs import Pairs, log_ratios, per_token

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 40.0  # beyond it exp is cut: the square of exp(40) is still a float32
RANGES = {  # of hyper-parameters by name, wherever they occur: lowest, highest, and whether these are allowed
    "beta": (0.0, math.inf, False, False),
    "label_smoothing": (0.0, 0.5, True, False),
    "ld_alpha": (0.0, 1.0, True, True),
    "momentum": (0.0, 1.0, True, False),
    "filter_ratio": (0.0, 1.0, True, False),
}


def bounded_exp(x: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    return jnp.exp(jnp.minimum(x, LARGEST_EXPONENT))


def sft_term(pairs: Pairs) -> Float[Array, "*pairs"]:
    """-log pi(yw)/|yw|, in nats per token: each chosen response counts alike, whatever its length."""
    return -per_token(pairs.chosen, pairs.chosen_length)


def divergence_score(log_ratio: Float[Array, "*pairs"], kind: str, alpha: float) -> Float[Array, "*pairs"]:
    """f'(u) up to a constant, at u = pi/ref, for the divergence f that keeps the policy near the reference.

    Wang et al., "Beyond Reverse KL", arXiv 2309.16240; names and constants are TRL's (`f_divergence_type`).

    Args:
      log_ratio: log u.
      kind: reverse_kl: log u. forward_kl: 1 - 1/u. js_divergence: log(2u / (1 + u)). alpha_divergence:
        (u^(alpha - 1) - 1) / (alpha - 1), which is log u at alpha 1.
      alpha: of the last one.
    """
    if kind not in DIVERGENCES:
        raise UserError(f"f_divergence_type {kind!r} is unknown{nearest(kind, DIVERGENCES)}")
    if kind == "forward_kl":
        return 1 - bounded_exp(-log_ratio)
    if kind == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(log_ratio)
    if kind == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return (bounded_exp((alpha - 1) * log_ratio) - 1) / (alpha - 1)
    return log_ratio


def with_divergence(pairs: Pairs, kind: str, alpha: float) -> Pairs:
    """The pairs with f' in place of the log-ratios, which is all that an objective of their difference sees."""
    if kind == "reverse_kl":
        return pairs
    chosen, rejected = (divergence_score(x, kind, alpha) for x in log_ratios(pairs))
    zeros = jnp.zeros_like(chosen)
    return pairs._replace(chosen=chosen, rejected=rejected, reference_chosen=zeros, reference_rejected=zeros)


def check_ranges(fn: str, hyper: Mapping[str, Any]) -> None:
    for name, (low, high, low_allowed, high_allowed) in RANGES.items():
        if name not in hyper:
            continue
        value = hyper[name]
        above = value >= low if low_allowed else value > low
        below = value <= high if high_allowed else value < high
        if not (above and below):
            interval = f"{'[' if low_allowed else '('}{low}, {high}{']' if high_allowed else ')'}"
            raise UserError(f"{fn}: {name} is {value}; it must be in {interval}")


def with_options(fn: Callable, defaults: Mapping[str, Any]) -> Callable:
    """`fn` with the options named in `defaults` applied, and `defaults` for the hyper-parameters that are not given.

    Options: `f_divergence_type` and `f_alpha_divergence_coef` (see `divergence_score`), and `rpo_alpha`, the weight of
    the SFT term, which is added to the loss of each pair (Pang et al., "Iterative Reasoning Preference Optimization",
    arXiv 2404.19733).

    Raises:
      UserError: of the returned function, at an unknown hyper-parameter or a value outside of its range.
    """

    @functools.wraps(fn)
    def objective(examples: Any, *batch: Any, **given: Any) -> Any:
        for name in given:
            if name not in defaults:
                raise UserError(f"{fn.__name__} has no hyper-parameter {name!r}{nearest(name, defaults)}")
        hyper = {**defaults, **given}
        check_ranges(fn.__name__, hyper)
        rpo_alpha, measured = hyper.pop("rpo_alpha", None), examples
        if "f_divergence_type" in hyper:
            kind, alpha = hyper.pop("f_divergence_type"), hyper.pop("f_alpha_divergence_coef")
            measured = with_divergence(examples, kind, alpha)
        losses, *rest = fn(measured, *batch, **hyper)
        if rpo_alpha:
            losses = losses + rpo_alpha * sft_term(examples)
        return losses, *rest

    return objective
