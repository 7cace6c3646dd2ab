"""Reward models from pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def bradley_terry(
    chosen: Float[Array, "*pairs"],
    rejected: Float[Array, "*pairs"],
    margin: Float[Array, "*pairs"],
    *,
    margin_scale: float,
    center_rewards_coefficient: float,
) -> tuple[Float[Array, "*pairs"], dict[str, Float[Array, "*pairs"]]]:
    """Loss of each pair: -log sigmoid(r(x, yw) - r(x, yl) - s m) + c (r(x, yw) + r(x, yl))^2.

    Ouyang et al., arXiv 2203.02155, equation 1; the margin m of Touvron et al., "Llama 2", arXiv 2307.09288, equation
    2; the last term, which keeps rewards around 0, of Eisenstein et al., arXiv 2312.09244, section 2.

    Args:
      chosen: scores of the responses that were preferred.
      rejected: scores of the others.
      margin: by how much the preferred one is better, where the data say so (a column `margin`); else 0.
      margin_scale: s; 0 leaves the margins out.
      center_rewards_coefficient: c, under TRL's name; 0.01 there where it is used.

    Returns:
      losses, and the two scores as rewards.
    """
    losses = -jax.nn.log_sigmoid(chosen - rejected - margin_scale * margin)
    losses += center_rewards_coefficient * jnp.square(chosen + rejected)
    return losses, {"reward_chosen": chosen, "reward_rejected": rejected}
