"""Direct preference optimization."""

import jax
from jaxtyping import Array, Float

from vdjax.objectives.pairs import Pairs


def dpo(pairs: Pairs, *, beta: float) -> tuple[Float[Array, "*pairs"], dict[str, Float[Array, "*pairs"]]]:
    """Loss of each pair: -log sigmoid(beta (log pi(yw)/ref(yw) - log pi(yl)/ref(yl))).

    Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, equation 7.

    Args:
      pairs: with reference log-probs.
      beta: strength of the implied KL penalty; smaller lets the policy move further. TRL's default is 0.1.

    Returns:
      losses, and the implicit rewards beta log pi/ref of the two responses.
    """
    chosen_reward = beta * (pairs.chosen - pairs.reference_chosen)
    rejected_reward = beta * (pairs.rejected - pairs.reference_rejected)
    losses = -jax.nn.log_sigmoid(chosen_reward - rejected_reward)
    return losses, {"reward_chosen": chosen_reward, "reward_rejected": rejected_reward}
