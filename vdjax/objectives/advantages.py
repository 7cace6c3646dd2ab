"""How much better than expected a sampled response, or each of its tokens, was.

All of these are constants of the policy's loss: computed once for a batch of rollouts, never differentiated.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gae(
    rewards: Float[Array, "sequences tokens"],
    values: Float[Array, "sequences tokens"],
    mask: Bool[Array, "sequences tokens"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "sequences tokens"], Float[Array, "sequences tokens"]]:
    """Generalised advantage estimates: A_t = sum_k (gamma lam)^k delta_t+k, delta_t = r_t + gamma V_t+1 - V_t.

    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", arXiv 1506.02438,
    equation 16. A response ends where its mask ends, and the value after its last token is 0: one cut off at the token
    limit counts as ended there. (TRL's PPO puts the score of a response that ended before the limit one position
    behind its last token, and has a value there.)

    Args:
      rewards: of each response token, as `per_token_rewards` makes them.
      values: V_t, the value before token t was sampled.
      mask: True at response tokens, which stand together; what stands behind a response's end is ignored, even NaN.
      gamma: discount of later rewards. 1 in TRL and usual for text.
      lam: 0 trusts the values (one-step errors), 1 the sampled rewards alone. TRL's default is 0.95.

    Returns:
      advantages, and returns (advantages + values), the targets of the value head; both 0 outside the mask.
    """
    rewards, values = jnp.where(mask, rewards, 0), jnp.where(mask, values, 0)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + gamma * next_values - values

    def step(advantage: Float[Array, "sequences"], delta: Float[Array, "sequences"]) -> tuple[jax.Array, jax.Array]:
        advantage = (delta + gamma * lam * advantage).astype(delta.dtype)
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros(len(deltas), deltas.dtype), deltas.T, reverse=True)
    advantages = jnp.where(mask, advantages.T, 0)
    return advantages, advantages + values


def whiten(
    x: Float[Array, "sequences tokens"], mask: Bool[Array, "sequences tokens"], *, shift_mean: bool = True
) -> Float[Array, "sequences tokens"]:
    """Mean 0 and variance 1 over all positions of the mask together; 0 outside.

    TRL's `masked_whiten` (its PPO trainer): (x - mean) / sqrt(variance + 1e-8), with the unbiased variance. A single
    element, or elements that are all equal, become 0.

    Args:
      x: any shape, the mask's; what stands outside the mask is ignored, even NaN.
      shift_mean: False adds the mean again and so changes the scale alone (TRL whitens rewards this way, advantages
        with True).
    """
    x, count = jnp.where(mask, x, 0), mask.sum()
    mean = x.sum() / jnp.maximum(count, 1)
    # The second pass makes the mean of equal elements exact; rounding would be blown up by 1e4 otherwise.
    mean += jnp.where(mask, x - mean, 0).sum() / jnp.maximum(count, 1)
    centred = jnp.where(mask, x - mean, 0)
    variance = jnp.square(centred).sum() / jnp.maximum(count - 1, 1)
    whitened = centred * jax.lax.rsqrt(variance + 1e-8)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0)


def leave_one_out(rewards: Float[Array, "groups size"]) -> Float[Array, "groups size"]:
    """Advantage of each response: its reward minus the mean reward of the other responses to the same prompt (RLOO).

    Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization", arXiv 2402.14740; R_i -
    sum_{j != i} R_j / (k-1), written as k/(k-1) (R_i - mean R). The baseline does not depend on the response itself,
    which keeps the gradient unbiased. The advantages of a group add up to 0; a group of one has advantage 0, as in
    TRL. RLOO's rewards already hold the KL penalty: score - beta times the sum over tokens of k1 (`kl_estimate`).

    Args:
      rewards: one row a prompt, one column a response.
    """
    size = rewards.shape[1]
    return size / max(size - 1, 1) * _centred(rewards)


def group_relative(rewards: Float[Array, "groups size"], *, scale: bool) -> Float[Array, "groups size"]:
    """Advantage of each response: its reward minus the group's mean, divided by the group's standard deviation.

    Shao et al., "DeepSeekMath" (GRPO), arXiv 2402.03300, section 4.1.2. The deviation is that of TRL's GRPOTrainer:
    unbiased (divided by size - 1), with 1e-4 added to it. A group of equal rewards, or of one response, has
    advantage 0.

    Args:
      rewards: one row a prompt, one column a response.
      scale: False leaves the division out: Dr. GRPO, Liu et al., "Understanding R1-Zero-Like Training: A Critical
        Perspective", arXiv 2503.20783 (TRL: scale_rewards="none"); otherwise prompts whose rewards hardly differ
        weigh as much as the others.
    """
    centred = _centred(rewards)
    if not scale:
        return centred
    variance = jnp.square(centred).sum(axis=1, keepdims=True) / max(rewards.shape[1] - 1, 1)
    return centred / (jnp.sqrt(variance) + 1e-4)


def _centred(rewards: Float[Array, "groups size"]) -> Float[Array, "groups size"]:
    """Rewards minus their group's mean; exactly 0 where all rewards of a group are equal."""
    from_first = rewards - rewards[:, :1]
    return from_first - from_first.mean(axis=1, keepdims=True)


def per_token_rewards(
    scores: Float[Array, "sequences"],
    kl: Float[Array, "sequences tokens"],
    mask: Bool[Array, "sequences tokens"],
    *,
    kl_coef: float | Float[Array, ""],
) -> Float[Array, "sequences tokens"]:
    """Rewards of PPO on text: -kl_coef * kl at every token, plus the score at the last token of each response.

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, equation 2; Ouyang et al.,
    arXiv 2203.02155, equation 2. A response without a token gets nothing.

    Args:
      scores: of whole responses, from a reward model or a function.
      kl: estimates of KL(policy || reference) in nats at the sampled tokens, from `kl_estimate`.
      mask: True at response tokens, which stand together; what stands outside is ignored, even NaN.
      kl_coef: weight of the penalty, in units of score a nat.

    Returns:
      rewards, 0 outside the mask.
    """
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(mask, -kl_coef * kl, 0) + jnp.where(last, scores[:, None], 0)


def adapt_kl_coef(
    coef: Float[Array, ""], kl: Float[Array, ""], *, target: float, horizon: float, episodes: int
) -> Float[Array, ""]:
    """The KL coefficient of the next batch: coef * (1 + e * episodes / horizon), e = kl / target - 1 within +-0.2.

    Ziegler et al., arXiv 1909.08593, section 2.2, where K_beta = 0.1 stands for episodes / horizon; their code
    divides as here. A horizon of 5 batches takes 4% steps.

    Args:
      coef: coefficient used for this batch.
      kl: KL(policy || reference) in nats of whole responses (summed over tokens), mean over this batch.
      target: nats a response; the coefficient rests where kl meets it.
      horizon: episodes over which the error is made up; above 0.2 * episodes, or the coefficient could turn negative.
      episodes: responses in this batch.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return coef * (1 + error * episodes / horizon)
