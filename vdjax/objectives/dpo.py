"""DPO, and its variants that keep the logistic loss: -log sigmoid of a margin between two log-ratios.

Throughout, w(y) = log pi(y)/ref(y), the log-ratio of a response; yw is the chosen one and yl the rejected one.
"""

import jax
from jaxtyping import Array, Float

from vdjax.objectives.pairs import Pairs, Rewards, log_ratios, logistic, per_token, rewards_of

Result = tuple[Float[Array, "*pairs"], Rewards]


def dpo(pairs: Pairs, *, beta: float, label_smoothing: float) -> Result:
    """Loss of each pair: -(1 - e) log sigmoid(m) - e log sigmoid(-m), with m = beta (w(yw) - w(yl)).

    Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, equation 7; with smoothing, Mitchell, "A note
    on DPO with noisy preferences" (cDPO), https://ericmitchell.ai/cdpo.pdf.

    Args:
      pairs: with reference log-probs.
      beta: strength of the implied KL penalty; smaller lets the policy move further. TRL's default is 0.1.
      label_smoothing: e, the probability that a label is flipped, in [0, 0.5). Above 0 the loss is least at the
        finite margin log((1 - e)/e) and pulls larger ones back. 0 is DPO.

    Returns:
      losses, and the implicit rewards beta w(y) of the two responses.
    """
    chosen, rejected = (beta * w for w in log_ratios(pairs))
    return logistic(chosen - rejected, label_smoothing), rewards_of(chosen, rejected)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float) -> Result:
    """(-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2e), with m = beta (w(yw) - w(yl)).

    Chowdhury et al., "Provably Robust DPO", arXiv 2403.00409: over labels flipped with probability e its
    mean is DPO's loss on the true ones.

    Args:
      pairs: with reference log-probs.
      beta: as of `dpo`.
      label_smoothing: e in [0, 0.5), the flips' probability. 0.1 is common; 0 is DPO. Unlike cDPO it pushes margins
        up without bound: the loss falls linearly for ever.
    """
    chosen, rejected = (beta * w for w in log_ratios(pairs))
    right, flipped = logistic(chosen - rejected), logistic(rejected - chosen)
    losses = ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return losses, rewards_of(chosen, rejected)


def sigmoid_norm(pairs: Pairs, *, beta: float) -> Result:
    """-log sigmoid(beta (w(yw)/|yw| - w(yl)/|yl|)): length-normalised DPO.

    Lambert et al., "Tulu 3", arXiv 2411.15124.

    Args:
      pairs: with reference log-probs.
      beta: of log-ratios per token, so 10 to 100 times that of `dpo`; Tulu 3 uses 5.
    """
    chosen_w, rejected_w = log_ratios(pairs)
    chosen = beta * per_token(chosen_w, pairs.chosen_length)
    rejected = beta * per_token(rejected_w, pairs.rejected_length)
    return logistic(chosen - rejected), rewards_of(chosen, rejected)


def dpop(pairs: Pairs, *, beta: float, penalty: float) -> Result:
    """-log sigmoid(beta (w(yw) - w(yl) - penalty max(0, -w(yw)))): DPO-Positive.

    Pal et al., "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive", arXiv 2402.13228,
    equation 3.

    Args:
      pairs: with reference log-probs.
      beta: as of `dpo`.
      penalty: the paper's lambda, of the chosen response's log-prob falling below the reference's; the paper uses 50.
        0 is DPO. Where policy and reference are equal its derivative is 0, so the first step is DPO's.

    Returns:
      losses, and beta w(y); the penalty is not in the rewards.
    """
    chosen_w, rejected_w = log_ratios(pairs)
    margin = chosen_w - rejected_w - penalty * jax.nn.relu(-chosen_w)
    return logistic(beta * margin), rewards_of(beta * chosen_w, beta * rejected_w)


def r_dpo(pairs: Pairs, *, beta: float, alpha: float) -> Result:
    """-log sigmoid(beta (w(yw) - w(yl)) + alpha (|yw| - |yl|)): length-regularised DPO.

    Park et al., "Disentangling Length from Quality in Direct Preference Optimization", arXiv 2403.19159: the policy
    that is best for a reward r(y) - alpha |y| has r(y) = beta w(y) + alpha |y| + constant, put into Bradley-Terry. A
    pair won by its longer response counts as partly explained by length and pushes less.

    Args:
      pairs: with reference log-probs and lengths.
      beta: as of `dpo`.
      alpha: price of a token in units of reward. 0.01 here: 100 tokens more are worth as much as a margin of 1. 0 is
        DPO.

    Returns:
      losses, and beta w(y), without the lengths.
    """
    chosen, rejected = (beta * w for w in log_ratios(pairs))
    longer = pairs.chosen_length - pairs.rejected_length
    return logistic(chosen - rejected + alpha * longer), rewards_of(chosen, rejected)


def ld_dpo(pairs: Pairs, *, beta: float, ld_alpha: float) -> Result:
    """DPO on log-probs in which the tokens beyond the shorter response's length count `ld_alpha` times.

    log p(y) = sum_{t <= k} log pi(y_t) + ld_alpha sum_{t > k} log pi(y_t), with k = min(|yw|, |yl|), for policy and
    reference. Liu et al., "Length Desensitization in Direct Preference Optimization" (LD-DPO), arXiv 2409.06411;
    TRL's `ld_alpha`.

    Args:
      pairs: with reference log-probs and all four `_common` sums.
      beta: as of `dpo`.
      ld_alpha: in [0, 1]. 1 is DPO; 0 ignores what the longer response says beyond the shorter one's length.

    Returns:
      losses, and the rewards beta (log p(y) of the policy - of the reference).
    """

    def weighed(total: Float[Array, "*pairs"], common: Float[Array, "*pairs"] | float) -> Float[Array, "*pairs"]:
        return ld_alpha * total + (1 - ld_alpha) * common

    chosen = weighed(pairs.chosen, pairs.chosen_common)
    rejected = weighed(pairs.rejected, pairs.rejected_common)
    chosen = beta * (chosen - weighed(pairs.reference_chosen, pairs.reference_chosen_common))
    rejected = beta * (rejected - weighed(pairs.reference_rejected, pairs.reference_rejected_common))
    return logistic(chosen - rejected), rewards_of(chosen, rejected)
