"""Pairwise losses in which each response also counts by itself, not the margin alone.

w(y) = log pi(y)/ref(y). Batch-level relatives: `bco_pair` in batch_level.py; without pairs: unpaired.py.
"""

import jax
from jaxtyping import Array, Float

from vdjax.objectives.pairs import Pairs, Rewards, log_ratios, logistic, rewards_of

Result = tuple[Float[Array, "*pairs"], Rewards]


def nca_pair(pairs: Pairs, *, beta: float) -> Result:
    """-log sigmoid(r(yw)) - 1/2 log sigmoid(-r(yw)) - 1/2 log sigmoid(-r(yl)), with r = beta w.

    Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv 2402.05369,
    for pairs. It holds the chosen response's probability up: its gradient at a zero margin is raise yw by 1/4, lower
    yl by 1/4, and the chosen reward has a finite best value of log 2.

    Args:
      pairs: with reference log-probs.
      beta: as of `dpo`; TRL's default is 0.1, the paper's 0.01.
    """
    chosen, rejected = (beta * w for w in log_ratios(pairs))
    losses = logistic(chosen) + 0.5 * logistic(-chosen) + 0.5 * logistic(-rejected)
    return losses, rewards_of(chosen, rejected)


def sppo_hard(pairs: Pairs, *, beta: float) -> Result:
    """(w(yw) - 1/(2 beta))^2 + (w(yl) + 1/(2 beta))^2.

    Wu et al., "Self-Play Preference Optimization" (SPPO), arXiv 2405.00675, equation 4.7, with probability 1 of winning
    for the chosen response and 0 for the rejected one.

    Args:
      pairs: with reference log-probs.
      beta: 1/(2 beta) nats are the target of each log-ratio: 5 at TRL's default of 0.1; the paper's beta is 0.001.
    """
    chosen, rejected = log_ratios(pairs)
    losses = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return losses, rewards_of(beta * chosen, beta * rejected)


def apo_zero(pairs: Pairs, *, beta: float) -> Result:
    """1 - sigmoid(beta w(yw)) + sigmoid(beta w(yl)).

    D'Oosterlinck et al., "Anchored Preference Optimization", arXiv 2408.06266, equation 7: raise the chosen response
    and lower the rejected one, for data better than the policy.

    Args:
      pairs: with reference log-probs.
      beta: as of `dpo`.
    """
    chosen, rejected = (beta * w for w in log_ratios(pairs))
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected), rewards_of(chosen, rejected)


def apo_down(pairs: Pairs, *, beta: float) -> Result:
    """sigmoid(beta w(yw)) + 1 - sigmoid(beta (w(yw) - w(yl))).

    D'Oosterlinck et al., arXiv 2408.06266, equation 8: lower both responses, the rejected one more, for a policy better
    than the data.

    Args:
      pairs: with reference log-probs.
      beta: as of `dpo`.
    """
    chosen, rejected = (beta * w for w in log_ratios(pairs))
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen), rewards_of(chosen, rejected)
