"""AdamW and its learning-rate schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vdjax.errors import UserError, nearest


def schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `learning_rate`, then cosine, linear or constant to the last step."""
    warmup = round(config.warmup * total_steps)
    rest, peak, final = max(total_steps - warmup, 1), config.learning_rate, config.learning_rate * config.final
    decays = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final),
        "linear": optax.linear_schedule(peak, final, rest),
        "constant": optax.constant_schedule(peak),
    }
    if config.schedule not in decays:
        raise UserError(f"optimizer.schedule={config.schedule!r}{nearest(config.schedule, decays)}")
    # The first step already moves: its rate is peak / warmup, not 0.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decays[config.schedule]], [warmup])


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: matrices, not norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)


def make_optimizer(config: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW (Loshchilov and Hutter, arXiv 1711.05101); moments and arithmetic in float32."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        schedule(config, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    chain = optax.chain(clip, adamw)

    def in_float32(params: Any) -> Any:
        return jax.tree.map(lambda p: p.astype(jnp.float32) if hasattr(p, "astype") else p, params)

    return optax.GradientTransformation(
        lambda params: chain.init(in_float32(params)),
        lambda grads, state, params: chain.update(grads, state, in_float32(params)),
    )
