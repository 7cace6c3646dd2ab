"""What a preference objective is given."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Pairs(NamedTuple):
    """Sequence log-probs (nats, summed over scored tokens) and lengths (scored tokens) of preference pairs.

    The reference log-probs are zeros where the objective needs no reference.
    """

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]
    chosen_length: Float[Array, "*pairs"]
    rejected_length: Float[Array, "*pairs"]
    reference_chosen: Float[Array, "*pairs"]
    reference_rejected: Float[Array, "*pairs"]
