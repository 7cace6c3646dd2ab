"""Supervised fine-tuning: negative log-likelihood."""

from jaxtyping import Array, Float


def sft(log_probs: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """Loss of each scored token, in nats: -log pi(y_t | x, y_<t). Minimised is the mean over all scored tokens."""
    return -log_probs
