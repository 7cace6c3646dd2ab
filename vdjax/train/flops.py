"""Model FLOPs of a batch, and the rate of the device they are held against."""

import time

import jax
import jax.numpy as jnp

from vdjax.chips import CHIPS
from vdjax.models.config import ModelConfig


def train_flops(cfg: ModelConfig, tokens: float, scored: float, attended: float) -> float:
    """Matmul FLOPs that a forward and backward pass needs, recomputation not counted.

    Args:
      tokens: tokens without padding.
      scored: tokens the vocabulary head is needed for.
      attended: (query, key) pairs that attention looks at.
    """
    heads = cfg.head_dim * (2 * cfg.num_heads + 2 * cfg.num_kv_heads)
    per_token = cfg.num_layers * cfg.hidden_size * (heads + 3 * cfg.intermediate_size)
    per_pair = 2 * cfg.num_layers * cfg.num_heads * cfg.head_dim
    return 6 * (per_token * tokens + cfg.hidden_size * cfg.vocab_size * scored + per_pair * attended)


def peak_flops() -> float:
    """FLOP/s of all devices together: the chip's published peak, or a matmul measured now where there is none."""
    kind = jax.devices()[0].device_kind
    for chip in CHIPS.values():
        if kind in chip.kinds:
            return chip.flops * jax.device_count()
    size = 2048
    a = jnp.ones((size, size), jnp.float32)
    matmul = jax.jit(jnp.matmul)
    matmul(a, a).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        matmul(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Simulated devices share the host's cores, so its rate is counted once.
    return 2 * size**3 / min(seconds)
