"""Pairwise losses that depend on the whole batch: its order, its statistics, or running values.

Each takes the batch's pairs [n], which of them are valid (the others are padding and change nothing) and the running
values, and returns the losses, the rewards and the new running values. w(y) = log pi(y)/ref(y).
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vdjax.errors import UserError, nearest
from vdjax.objectives.pairs import Carry, Pairs, Rewards, Unpaired, log_ratios, logistic, rewards_of

Result = tuple[Float[Array, " n"], Rewards, Carry]
SHIFTS = ("running", "none")
Examples = TypeVar("Examples", Pairs, Unpaired)


def only_valid(examples: Examples, valid: Bool[Array, " n"]) -> Examples:
    """The examples with zeros for padding, so that whatever stands there has neither value nor gradient."""
    return jax.tree.map(lambda x: jnp.where(valid, x, jnp.zeros_like(x)), examples)


def mean_of(x: Float[Array, " n"], valid: Bool[Array, " n"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(valid, x, 0)) / jnp.maximum(jnp.sum(valid), 1)


def order_of(x: Float[Array, " n"], valid: Bool[Array, " n"]) -> Int[Array, " n"]:
    """Indices that sort the valid entries of x, ascending; the others' come last."""
    return jnp.argsort(jnp.where(valid, jax.lax.stop_gradient(x), jnp.inf))


def running_mean(
    carry: Carry, total: Float[Array, ""], count: Float[Array, ""]
) -> tuple[Float[Array, ""], Carry]:
    """The mean of all values since the first step, now with `count` more whose sum is `total`."""
    counts = carry["count"] + count
    mean = carry["mean"] + (total - count * carry["mean"]) / jnp.maximum(counts, 1)
    return mean, {"mean": mean.astype(carry["mean"].dtype), "count": counts.astype(carry["count"].dtype)}


def aot(pairs: Pairs, valid: Bool[Array, " n"], carry: Carry, *, beta: float, label_smoothing: float) -> Result:
    """DPO's loss on the difference of SORTED margins: the policy's margins against the reference's, k-th to k-th.

    Melnyk et al., "Distributional Preference Alignment of LLMs via Optimal Transport" (AOT), arXiv 2406.05882,
    paired: the distribution of log pi(yw)/pi(yl) over the batch should dominate that of log ref(yw)/ref(yl).

    Args:
      pairs: with reference log-probs.
      valid: which pairs are there.
      carry: empty.
      beta: as of `dpo`.
      label_smoothing: as of `dpo`.

    Returns:
      losses, each at the pair whose policy margin it holds; beta w(y); carry.
    """
    pairs = only_valid(pairs, valid)
    policy, reference = pairs.chosen - pairs.rejected, pairs.reference_chosen - pairs.reference_rejected
    order = order_of(policy, valid)
    delta = policy[order] - reference[order_of(reference, valid)]
    losses = jnp.zeros_like(delta).at[order].set(logistic(beta * delta, label_smoothing))
    chosen, rejected = log_ratios(pairs)
    return losses, rewards_of(beta * chosen, beta * rejected), carry


def aot_unpaired(
    pairs: Pairs, valid: Bool[Array, " n"], carry: Carry, *, beta: float, label_smoothing: float
) -> Result:
    """DPO's loss on sorted log-ratios: the k-th smallest w(yw) against the k-th smallest w(yl) of the batch.

    Melnyk et al., arXiv 2406.05882, unpaired. Who was compared with whom does not matter. Arguments as of `aot`;
    each loss stands at the pair whose chosen response it holds.
    """
    pairs = only_valid(pairs, valid)
    chosen, rejected = log_ratios(pairs)
    order = order_of(chosen, valid)
    delta = chosen[order] - rejected[order_of(rejected, valid)]
    losses = jnp.zeros_like(delta).at[order].set(logistic(beta * delta, label_smoothing))
    return losses, rewards_of(beta * chosen, beta * rejected), carry


def bco_pair(pairs: Pairs, valid: Bool[Array, " n"], carry: Carry, *, beta: float, reward_shift: str) -> Result:
    """-log sigmoid(r(yw) - delta) - log sigmoid(-(r(yl) - delta)), with r = beta w.

    Jung et al., "Binary Classifier Optimization for Large Language Model Alignment" (BCO), arXiv 2404.04656.

    Args:
      pairs: with reference log-probs.
      valid: which pairs are there.
      carry: `mean` and `count` of all rewards so far.
      beta: as of `dpo`.
      reward_shift: "running": delta is the mean of all rewards so far, this batch's included, without a gradient, as
        in the paper and TRL before its 1.x. "none": delta is 0, TRL 1.16's loss.

    Returns:
      losses, beta w(y) (not shifted), and the new running mean.
    """
    if reward_shift not in SHIFTS:
        raise UserError(f"reward_shift {reward_shift!r} is unknown{nearest(reward_shift, SHIFTS)}")
    pairs = only_valid(pairs, valid)
    chosen, rejected = (beta * w for w in log_ratios(pairs))
    total = jax.lax.stop_gradient(jnp.sum(chosen + rejected))
    delta, carry = running_mean(carry, total, 2 * jnp.sum(valid, dtype=total.dtype))
    if reward_shift == "none":
        delta = jnp.zeros_like(delta)
    return logistic(chosen - delta) + logistic(delta - rejected), rewards_of(chosen, rejected), carry


def beta_dpo(
    pairs: Pairs,
    valid: Bool[Array, " n"],
    carry: Carry,
    *,
    beta: float,
    alpha: float,
    momentum: float,
    filter_ratio: float,
    seed: int,
) -> Result:
    """DPO with a beta of the batch, on the pairs whose margins are not unusual.

    Margins M = w(yw) - w(yl); their moving mean M0 and deviation s are first moved towards this batch's. Of n pairs
    floor((1 - filter_ratio) n) are drawn without replacement, with probabilities proportional to
    exp(-(M - M0)^2 / (2 s^2)). Their mean margin gives beta_batch = max(beta (1 + alpha (mean(M) - M0)), 0.001), and
    -log sigmoid(beta_batch M) is averaged over them.

    Wu et al., "beta-DPO: Direct Preference Optimization with Dynamic beta", arXiv 2407.08639, in the form
    of the authors' code: M is in nats (without beta) and the deviation divides by n - 1.

    Args:
      pairs: with reference log-probs.
      valid: which pairs are there.
      carry: `gap_mean`, `gap_std` and `step`, all 0 at the start.
      beta: beta of a batch with the usual margin.
      alpha: how much beta grows per nat above it; 0.6 in the paper. 0 leaves beta as it is.
      momentum: of M0 and s; 0.9 in the paper.
      filter_ratio: share of the pairs left out; 0.2 in the paper.
      seed: of the draw, together with the step's number: the same run draws the same pairs.

    Returns:
      losses, scaled so that their mean over valid pairs is the mean over the drawn ones (0 for the others); the
      rewards beta w(y), with `beta` of the batch and `kept` (1 or 0); the new moving values.
    """
    pairs = only_valid(pairs, valid)
    chosen, rejected = log_ratios(pairs)
    gap = jax.lax.stop_gradient(chosen - rejected)
    n = jnp.sum(valid)
    mean = mean_of(gap, valid)
    std = jnp.sqrt(jnp.sum(jnp.where(valid, (gap - mean) ** 2, 0)) / jnp.maximum(n - 1, 1))
    gap_mean = momentum * carry["gap_mean"] + (1 - momentum) * mean
    gap_std = momentum * carry["gap_std"] + (1 - momentum) * std

    # Adding Gumbel noise to log-weights and taking the largest is drawing without replacement. The k-th valid pair has
    # the k-th noise, wherever padding stands.
    key = jax.random.fold_in(jax.random.key(seed), carry["step"].astype(jnp.int32))
    noise = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(key, k), dtype=gap.dtype))(jnp.cumsum(valid))
    score = noise - 0.5 * ((gap - gap_mean) / jnp.maximum(gap_std, 1e-6)) ** 2
    rank = jnp.argsort(order_of(-score, valid))
    kept = valid & (rank < jnp.maximum(jnp.floor((1 - filter_ratio) * n + 1e-4), 1))

    beta_batch = jnp.maximum(beta * (1 + alpha * (mean_of(gap, kept) - gap_mean)), 1e-3)
    losses = jnp.where(kept, logistic(beta_batch * (chosen - rejected)), 0) * n / jnp.maximum(jnp.sum(kept), 1)
    new = {"gap_mean": gap_mean, "gap_std": gap_std, "step": carry["step"] + 1}
    extra = {"beta": jnp.full_like(gap, beta_batch), "kept": kept.astype(gap.dtype)}
    carry = {name: value.astype(carry[name].dtype) for name, value in new.items()}
    return losses, rewards_of(beta * chosen, beta * rejected) | extra, carry
