"""AdamW or Adafactor, what they keep from step to step and in which dtype, and the learning-rate schedule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vdjax.errors import UserError, nearest

FACTORED_FROM = 128  # the smaller side of the smallest matrix whose second moments are factored


class Mastered(NamedTuple):
    """State of an optimizer of parameters that are kept in less than float32."""

    inner: Any
    master: Any  # the parameters in float32, in which updates add up


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
    """Global-norm clipping, then AdamW or Adafactor with the learning rate and a decoupled weight decay.

    Adafactor (Shazeer and Stern, arXiv 1804.04235, algorithm 4) is without momentum and relative step sizes: as in
    transformers, `learning_rate` is the size of a step. A stack of layers counts as one matrix a layer in its factors,
    and as a whole in its clipping (of the root mean square of updates, at 1).

    Arithmetic in float32, whatever parameters are kept in. Of bfloat16 parameters `config.master` keeps a float32 copy;
    without it a step rounds them once, and what is less than 1/512 of a parameter is lost.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "adafactor":
        factored = optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED_FROM)
        scale = optax.chain(factored, optax.clip_by_block_rms(1.0))
    else:
        scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
        scale = in_bfloat16(scale) if config.moment_dtype == "bfloat16" else scale
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    rate = optax.scale_by_learning_rate(schedule(config, total_steps))
    chain = optax.chain(clip, optax.chain(scale, decay, rate))

    def init(params: Any) -> Any:
        wide, state = to_float32(params), chain.init(to_float32(params))
        low = any(p.dtype != jnp.float32 for p in jax.tree.leaves(params))
        return Mastered(state, wide) if low and config.master else state

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        if not isinstance(state, Mastered):
            return chain.update(grads, state, to_float32(params))
        updates, inner = chain.update(grads, state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        return jax.tree.map(lambda m, p: m - p, master, params), Mastered(inner, master)

    return optax.GradientTransformation(init, update)


def to_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moments are kept in bfloat16, and are float32 while it computes."""

    def init(params: Any) -> Any:
        state = adam.init(params)
        return state._replace(mu=rounded(state.mu), nu=rounded(state.nu))

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = adam.update(grads, state._replace(mu=to_float32(state.mu), nu=to_float32(state.nu)), params)
        nu = jax.tree.map(lambda x: rounded_in_turn(x, state.count), state.nu)
        return updates, state._replace(mu=rounded(state.mu), nu=nu)

    return optax.GradientTransformation(init, update)


def rounded(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def rounded_in_turn(x: Float[Array, "*shape"], step: Int[Array, ""]) -> Float[Array, "*shape"]:
    """x >= 0 in bfloat16, rounded up in as many of the steps as x is near the number above, and down in the others.

    A step with b2 = 0.999 changes a second moment by a quarter of what bfloat16 tells apart: rounded to the nearest, it
    would stand still from step 256 or so on. The turns are the golden ratio's multiples, the same for all numbers.
    """
    turn = (step.astype(jnp.uint32) * jnp.uint32(2654435769)) >> 16
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + turn
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
