"""Losses of policy-gradient methods: PPO, RLOO, GRPO and their relatives differ in what they feed these."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vdjax.errors import UserError, nearest

KL_ESTIMATORS = ("k1", "k2", "k3")
TOKEN_WEIGHTS = ("sequence_mean", "token_mean", "constant")
MAX_LOG_RATIO = 20.0


def kl_estimate(
    log_probs: Float[Array, "*tokens"], reference: Float[Array, "*tokens"], kind: str
) -> Float[Array, "*tokens"]:
    """Estimate of KL(policy || reference), in nats, from each token that the policy sampled.

    Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html. With d = log_probs - reference:

    - "k1": d. Unbiased, of either sign. TRL's choice in the rewards of RLOO and (its default) PPO.
    - "k2": d^2 / 2. Never negative, biased; right to second order in d.
    - "k3": exp(-d) - 1 + d. Unbiased and never negative. TRL's choice in the loss of GRPO (arXiv 2402.03300's
      equation 4). Its variance is small while the two are near. It grows exponentially where the reference finds a
      token likelier than the policy does, and is infinite in float32 at d < -88.

    As a term of the loss on the policy's own samples, the estimators have other gradients than values: in
    expectation k2 has the gradient of KL(policy || reference), k3 that of KL(reference || policy), k1 none at all.

    Args:
      log_probs: of the sampled tokens under the policy, in nats.
      reference: of the same tokens under the reference model.
      kind: "k1", "k2" or "k3".

    Raises:
      UserError: another kind.
    """
    difference = log_probs - reference
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        return jnp.expm1(-difference) + difference
    raise UserError(f"KL estimator {kind!r} is unknown{nearest(kind, KL_ESTIMATORS)}")


def clipped_policy_loss(
    log_probs: Float[Array, "*tokens"],
    old_log_probs: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "*tokens"], dict[str, Float[Array, "*tokens"]]]:
    """Loss of each token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi(y_t) / pi_old(y_t).

    Schulman et al., "Proximal Policy Optimization", arXiv 1707.06347, equation 7; with different sides Yu et al.,
    "DAPO", arXiv 2503.14476, equation 8. GRPO and Dr. GRPO use it unchanged. At log_probs equal to old_log_probs the
    ratio is exactly 1 and the gradient exactly -A, that of REINFORCE.

    RLOO weighs whole responses: TRL's RLOOTrainer takes the ratio of a sequence, clips that, and averages over
    sequences. Sum the log-probs over each response's tokens and give arrays of shape [sequences] for it.

    A ratio above e^20 goes on linearly in the log-ratio from there, so that no loss overflows and no gradient is NaN
    (sequence ratios get there); its slope stays e^20.

    Args:
      log_probs: of the sampled tokens (or responses) under the policy, in nats.
      old_log_probs: of the same under the policy that sampled them.
      advantages: of the same; constants.
      clip_low: how far below 1 the ratio may push where A < 0. 0.2 in PPO, TRL's GRPO, RLOO and DAPO.
      clip_high: how far above 1 the ratio may push where A > 0. 0.2 likewise; 0.28 in DAPO.

    Returns:
      losses, and "ratio" and "clipped" (1 where the clip took the gradient away, else 0).
    """
    log_ratio = log_probs - old_log_probs
    bounded = jnp.minimum(log_ratio, MAX_LOG_RATIO)
    ratio = jnp.exp(bounded) * (1 + (log_ratio - bounded))
    # The minimum written out: ties at the bound of a minimum would share the gradient between its two sides.
    too_high = (advantages > 0) & (ratio > 1 + clip_high)
    too_low = (advantages < 0) & (ratio < 1 - clip_low)
    used = jnp.where(too_high, 1 + clip_high, jnp.where(too_low, 1 - clip_low, ratio))
    return -advantages * used, {"ratio": ratio, "clipped": (too_high | too_low).astype(ratio.dtype)}


def clipped_value_loss(
    values: Float[Array, "*tokens"],
    old_values: Float[Array, "*tokens"],
    returns: Float[Array, "*tokens"],
    *,
    clip: float,
) -> Float[Array, "*tokens"]:
    """Loss of the value head at each token: max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2.

    As in OpenAI's PPO code and TRL's PPO trainer (`cliprange_value`, 0.2). A value that left the range towards its
    return gets no gradient.

    Args:
      values: V of the value head being trained.
      old_values: V when the tokens were sampled.
      returns: targets, from `gae`.
      clip: in units of value; 0 does not clip.
    """
    reach = jnp.where(clip == 0, jnp.inf, clip)
    clipped = jnp.clip(values, old_values - reach, old_values + reach)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


def token_weights(
    lengths: Int[np.ndarray, "sequences"], how: str, *, max_new_tokens: int
) -> Float[np.ndarray, "sequences"]:
    """Weight that each token of a sequence has in a batch's loss: loss = sum over tokens of weight * token loss.

    - "sequence_mean": 1 / (N |y|), every response weighs the same: GRPO, arXiv 2402.03300, equation 3.
    - "token_mean": 1 / sum |y|, every token weighs the same: DAPO, arXiv 2503.14476, equation 8, and PPO.
    - "constant": 1 / (N max_new_tokens), independent of lengths: Dr. GRPO, arXiv 2503.20783, as in TRL's "dr_grpo".

    Args:
      lengths: scored tokens of the N responses of the whole batch (all microbatches, all devices). A response of
        length 0 has weight 0 and still counts in N.
      how: one of the three.
      max_new_tokens: limit of a response's tokens; only "constant" uses it.

    Returns:
      float64 weights; zeros if the batch has no token.

    Raises:
      UserError: another name.
    """
    lengths = np.asarray(lengths)
    if how == "sequence_mean":
        denominators = len(lengths) * np.maximum(lengths, 1)
    elif how == "token_mean":
        denominators = np.full(lengths.shape, max(lengths.sum(), 1))
    elif how == "constant":
        denominators = np.full(lengths.shape, len(lengths) * max_new_tokens)
    else:
        raise UserError(f"token weights {how!r} are unknown{nearest(how, TOKEN_WEIGHTS)}")
    return np.where(lengths > 0, 1 / denominators, 0.0)
