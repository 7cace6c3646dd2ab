"""Supervised fine-tuning: negative log-likelihood."""

from jaxtyping import Array, Float


def sft(log_probs: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """Loss of each scored token, in nats: -log pi(y_t | x, y_<t). The mean over the batch's scored tokens is minimised."""
    return -log_probs
