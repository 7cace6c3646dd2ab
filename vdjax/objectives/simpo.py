"""Simple preference optimization."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdjax.objectives.pairs import Pairs


def simpo(
    pairs: Pairs, *, beta: float, gamma: float
) -> tuple[Float[Array, "*pairs"], dict[str, Float[Array, "*pairs"]]]:
    """Loss of each pair: -log sigmoid(beta/|yw| log pi(yw) - beta/|yl| log pi(yl) - gamma).

    Meng et al., "SimPO", arXiv 2405.14734, equation 6. No reference model.

    Args:
      pairs: lengths are used; an absent sequence (length 0) counts as length 1.
      beta: scale of the length-normalised reward (the paper tunes 2.0 to 10).
      gamma: target margin between the two rewards, in the reward's own units (not the ratio gamma/beta).

    Returns:
      losses, and the rewards beta/|y| log pi(y).
    """
    chosen_reward = beta * pairs.chosen / jnp.maximum(pairs.chosen_length, 1)
    rejected_reward = beta * pairs.rejected / jnp.maximum(pairs.rejected_length, 1)
    losses = -jax.nn.log_sigmoid(chosen_reward - rejected_reward - gamma)
    return losses, {"reward_chosen": chosen_reward, "reward_rejected": rejected_reward}
