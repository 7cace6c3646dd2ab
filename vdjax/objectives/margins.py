"""Other losses of DPO's margin, the difference of two log-ratios w(y) = log pi(y)/ref(y)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdjax.errors import UserError
from vdjax.objectives.options import bounded_exp
from vdjax.objectives.pairs import Pairs, Rewards, log_ratios, logistic, per_token, rewards_of

Result = tuple[Float[Array, "*pairs"], Rewards]


def hinge(pairs: Pairs, *, beta: float) -> Result:
    """max(0, 1 - beta (w(yw) - w(yl))).

    The rank loss of Zhao et al., "SLiC-HF", arXiv 2305.10425 (which has no reference), on DPO's margin:
    Liu et al., "Statistical Rejection Sampling Improves Preference Optimization" (RSO), arXiv 2309.06657.

    Args:
      pairs: with reference log-probs.
      beta: 1/beta nats are the margin from which a pair is left alone. TRL's default is 0.1.
    """
    chosen, rejected = (beta * w for w in log_ratios(pairs))
    return jax.nn.relu(1 - (chosen - rejected)), rewards_of(chosen, rejected)


def ipo(pairs: Pairs, *, beta: float) -> Result:
    """(w(yw)/|yw| - w(yl)/|yl| - 1/(2 beta))^2.

    Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv 2310.12036,
    equation 17, with log-ratios per token: so TRL has it, after asking the authors.

    Args:
      pairs: with reference log-probs.
      beta: the paper's tau. The target margin is 1/(2 beta) nats per token: 5 at TRL's default of 0.1.

    Returns:
      losses, and beta w(y)/|y|.
    """
    chosen_w, rejected_w = log_ratios(pairs)
    chosen, rejected = per_token(chosen_w, pairs.chosen_length), per_token(rejected_w, pairs.rejected_length)
    return (chosen - rejected - 1 / (2 * beta)) ** 2, rewards_of(beta * chosen, beta * rejected)


def exo_pair(pairs: Pairs, *, beta: float, label_smoothing: float) -> Result:
    """KL(q || p) of two coins: q = sigmoid(beta (w(yw) - w(yl))), p = 1 - e.

    q log(q / (1 - e)) + (1 - q) log((1 - q) / e). Ji et al., "Towards Efficient Exact Optimization of Language Model
    Alignment" (EXO), arXiv 2402.00856, equation 16. DPO's loss is the other way round, KL(p || q).

    Args:
      pairs: with reference log-probs.
      beta: as of `dpo`.
      label_smoothing: e, in (0, 0.5); the paper's is 1e-3. The loss is least, 0, at the margin log((1 - e)/e).
    """
    if not label_smoothing > 0:
        raise UserError("exo_pair: label_smoothing is 0, where the loss is infinite; the paper's is 0.001")
    chosen, rejected = (beta * w for w in log_ratios(pairs))
    log_q, log_other = jax.nn.log_sigmoid(chosen - rejected), jax.nn.log_sigmoid(rejected - chosen)
    losses = jnp.exp(log_q) * (log_q - math.log1p(-label_smoothing))
    losses = losses + jnp.exp(log_other) * (log_other - math.log(label_smoothing))
    return losses, rewards_of(chosen, rejected)


def discopop(pairs: Pairs, *, beta: float, tau: float) -> Result:
    """(1 - g) (-log sigmoid(m)) + g exp(-m), with m = beta (w(yw) - w(yl)) and g = sigmoid(m / tau).

    Lu et al., "Discovering Preference Optimization Algorithms with and for Large Language Models" (DiscoPOP, the loss
    "LRML"), arXiv 2406.08414, equation 5. It is not convex: at tau 0.05 its slope has the wrong sign
    between m = -0.12, a local minimum, and m = 0.07. Training starts at 0.

    Args:
      pairs: with reference log-probs.
      beta: as of `dpo`.
      tau: how sharply it goes from the logistic loss (negative margins) to the exponential one; 0.05 in the paper and
        TRL (`discopop_tau`).
    """
    chosen, rejected = (beta * w for w in log_ratios(pairs))
    margin = chosen - rejected
    # g exp(-m) as one exponential: at m = -100 its factors are 0 and infinity.
    exponential = bounded_exp(jax.nn.log_sigmoid(margin / tau) - margin)
    return jax.nn.sigmoid(-margin / tau) * logistic(margin) + exponential, rewards_of(chosen, rejected)
