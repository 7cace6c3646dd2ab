"""What preference objectives are given, and the few quantities that many of them share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Rewards = dict[str, Array]  # by name; "reward_chosen" and "reward_rejected" of pairs, "reward" of unpaired examples
Carry = dict[str, Array]  # running values of an objective, kept from step to step


class Pairs(NamedTuple):
    """Sequence log-probs (nats, summed over scored tokens) and lengths (scored tokens) of preference pairs.

    The reference log-probs are zeros where the objective needs no reference. A `_common` sum is over the first
    min(|yw|, |yl|) scored tokens of the response alone; only LD-DPO reads them. Absent pairs have length 0.
    """

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]
    chosen_length: Float[Array, "*pairs"]
    rejected_length: Float[Array, "*pairs"]
    reference_chosen: Float[Array, "*pairs"]
    reference_rejected: Float[Array, "*pairs"]
    chosen_common: Float[Array, "*pairs"] | float = 0.0
    rejected_common: Float[Array, "*pairs"] | float = 0.0
    reference_chosen_common: Float[Array, "*pairs"] | float = 0.0
    reference_rejected_common: Float[Array, "*pairs"] | float = 0.0


class Unpaired(NamedTuple):
    """Log-probs (nats, summed over scored tokens) of single responses, each desirable or not.

    `mismatched` are log-probs of ANOTHER example's response after this prompt, from which KTO estimates the KL
    divergence; the other objectives do not read them.
    """

    response: Float[Array, " n"]
    length: Float[Array, " n"]
    reference: Float[Array, " n"]
    desirable: Bool[Array, " n"]
    mismatched: Float[Array, " n"]
    reference_mismatched: Float[Array, " n"]


def log_ratios(pairs: Pairs) -> tuple[Float[Array, "*pairs"], Float[Array, "*pairs"]]:
    """log pi(y)/ref(y) of the chosen and of the rejected responses, in nats."""
    return pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected


def per_token(x: Float[Array, "*pairs"], length: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    """x / length; an absent sequence counts as one token."""
    return x / jnp.maximum(length, 1)


def rewards_of(chosen: Float[Array, "*pairs"], rejected: Float[Array, "*pairs"]) -> Rewards:
    return {"reward_chosen": chosen, "reward_rejected": rejected}


def logistic(margin: Float[Array, "*pairs"], label_smoothing: float = 0.0) -> Float[Array, "*pairs"]:
    """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin), with e the probability that a label is flipped."""
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
    return losses - label_smoothing * jax.nn.log_sigmoid(-margin) if label_smoothing else losses
