"""Preference losses without a reference model: SimPO, AlphaPO, CPO, ORPO.

a(y) = log pi(y)/|y| is a response's log-prob per token.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdjax.errors import UserError
from vdjax.objectives.options import bounded_exp, sft_term
from vdjax.objectives.pairs import Pairs, Rewards, logistic, per_token, rewards_of

Result = tuple[Float[Array, "*pairs"], Rewards]


def target_margin(beta: float, gamma: float | None, gamma_beta_ratio: float | None) -> float:
    """gamma in units of reward, from whichever of the two is given; a ratio of 0.5 where neither is."""
    if gamma is not None and gamma_beta_ratio is not None:
        raise UserError(
            f"both gamma ({gamma}) and gamma_beta_ratio ({gamma_beta_ratio}) are given; set one of them to None "
            f"(gamma = gamma_beta_ratio * beta, here {gamma_beta_ratio * beta:g})"
        )
    return gamma if gamma is not None else beta * (0.5 if gamma_beta_ratio is None else gamma_beta_ratio)


def simpo(
    pairs: Pairs, *, beta: float, gamma: float | None, gamma_beta_ratio: float | None, label_smoothing: float
) -> Result:
    """-log sigmoid(m) with m = beta (a(yw) - a(yl)) - gamma; label smoothing as in `dpo`.

    Meng et al., "SimPO", arXiv 2405.14734, equation 6.

    Args:
      pairs: lengths are used; an absent sequence (length 0) counts as length 1.
      beta: scale of the length-normalised reward (the paper tunes 2.0 to 10).
      gamma: target margin between the two rewards, in the reward's own units; TRL's `simpo_gamma`.
      gamma_beta_ratio: gamma / beta, as the authors' code has it: in nats per token. Exactly one of the two is given;
        where neither is, the ratio is 0.5.
      label_smoothing: probability that a label is flipped, in [0, 0.5).

    Returns:
      losses, and the rewards beta a(y).
    """
    chosen = beta * per_token(pairs.chosen, pairs.chosen_length)
    rejected = beta * per_token(pairs.rejected, pairs.rejected_length)
    margin = chosen - rejected - target_margin(beta, gamma, gamma_beta_ratio)
    return logistic(margin, label_smoothing), rewards_of(chosen, rejected)


def alphapo(
    pairs: Pairs, *, beta: float, gamma: float | None, gamma_beta_ratio: float | None, alpha: float
) -> Result:
    """SimPO on the reward beta (1 - exp(-alpha a(y))) / alpha.

    Gupta et al., "AlphaPO: Reward Shape Matters for LLM Alignment", arXiv 2501.03884.

    Args:
      pairs: lengths are used.
      beta: as of `simpo`.
      gamma: as of `simpo`.
      gamma_beta_ratio: as of `simpo`.
      alpha: the reward's shape. Above 0, improbable responses weigh more; below, less; 0 is SimPO.

    Returns:
      losses, and the two rewards.
    """

    def reward(total: Float[Array, "*pairs"], length: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
        mean = per_token(total, length)
        return beta * (mean if alpha == 0 else (1 - bounded_exp(-alpha * mean)) / alpha)

    chosen = reward(pairs.chosen, pairs.chosen_length)
    rejected = reward(pairs.rejected, pairs.rejected_length)
    return logistic(chosen - rejected - target_margin(beta, gamma, gamma_beta_ratio)), rewards_of(chosen, rejected)


def cpo(pairs: Pairs, *, beta: float, label_smoothing: float, cpo_alpha: float) -> Result:
    """-log sigmoid(beta (log pi(yw) - log pi(yl))) + cpo_alpha (-log pi(yw)/|yw|); label smoothing as in `dpo`.

    Xu et al., "Contrastive Preference Optimization", arXiv 2401.08417. The second term is a mean over the
    response's tokens, then over pairs; TRL takes one mean over the batch's tokens.

    Args:
      pairs: log-probs are not divided by length in the first term.
      beta: TRL's default is 0.1.
      label_smoothing: probability that a label is flipped, in [0, 0.5).
      cpo_alpha: weight of the likelihood of the chosen response; 1 in the paper and TRL.

    Returns:
      losses, and the rewards beta log pi(y).
    """
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    return logistic(chosen - rejected, label_smoothing) + cpo_alpha * sft_term(pairs), rewards_of(chosen, rejected)


def log1mexp(x: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    """log(1 - exp(x)) for x < 0, exact to rounding near 0 and far from it (Maechler 2012)."""
    near = x > -math.log(2)
    # Each branch is fed only its own side, so that the other's derivative is finite too.
    small = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    return jnp.where(near, small, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def orpo(pairs: Pairs, *, beta: float) -> Result:
    """-a(yw) - beta log sigmoid(log odds(yw) - log odds(yl)), with odds = p / (1 - p), p = exp(a(y)).

    Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691,
    equations 6 and 7. The first term is the response's alone, a mean over its tokens, then over pairs; TRL's covers
    the prompt too.

    Args:
      pairs: lengths are used. A mean log-prob nearer to 0 than rounding (an absent response) counts as that.
      beta: the paper's lambda, weight of the odds ratio; 0.1 in TRL and the paper.

    Returns:
      losses, and the rewards beta a(y).
    """
    chosen = per_token(pairs.chosen, pairs.chosen_length)
    rejected = per_token(pairs.rejected, pairs.rejected_length)

    def log_odds(mean: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
        mean = jnp.minimum(mean, -jnp.finfo(mean.dtype).eps)
        return mean - log1mexp(mean)

    losses = sft_term(pairs) - beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))
    return losses, rewards_of(beta * chosen, beta * rejected)
