"""One token a row from float32 logits: temperature, top-k, top-p, and a draw from what they leave."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

BLOCK = 256  # tokens whose weights are summed before the draw; about the root of a vocabulary is best


def draw(weights: Float[Array, "rows vocab"], uniforms: Float[Array, "rows 2"]) -> Int32[Array, "rows"]:
    """Indices drawn in proportion to `weights`, which are at least 0; one of weight 0 is never drawn.

    The inverse of the cumulative distribution at two uniform numbers in [0, 1): the first chooses a block of 256 tokens
    by its sum, the second a token in it. Nothing is sorted and only the chosen block is summed cumulatively. Sums are
    float32 and the numbers multiples of 2^-23, so that a token's probability is off by less than 1e-6.
    """
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(rows, -1, BLOCK)
    block = _invert(blocks.sum(axis=2), uniforms[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _invert(within, uniforms[:, 1])


def _invert(weights: Float[Array, "rows n"], uniform: Float[Array, "rows"]) -> Int32[Array, "rows"]:
    # Rounding may let the sum step at a weight of 0: such a step is no candidate.
    reached = jnp.where(weights > 0, jnp.cumsum(weights, axis=1), 0)
    return jnp.argmax(reached > (uniform * reached.max(axis=1))[:, None], axis=1).astype(jnp.int32)


def kept(
    weights: Float[Array, "rows vocab"], top_k: Int32[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "rows vocab"]:
    """Weights with 0 for the tokens that top-k (0: off) and then top-p (1: off) leave out, as transformers does.

    Top-k leaves the k largest; top-p the smallest set of largest weights whose share reaches `top_p`, at least one
    token (Holtzman et al., arXiv 1904.09751, equation 2). Tokens equal to the smallest one left are all left.
    """

    def cut(measure: Callable[[Array], Array], wanted: Array) -> Array:
        """Weights below the largest one, at or above which `measure` still adds up to `wanted`, become 0."""
        bits = jax.lax.bitcast_convert_type(weights, jnp.int32)  # in the order of the weights, for these are positive

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = low + (high - low) // 2
            enough = jnp.sum(jnp.where(bits >= middle[:, None], measure(weights), 0), axis=1) >= wanted
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        top = bits.max(axis=1) + 1
        found, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(top), top))
        return jnp.where(bits >= found[:, None], weights, 0)

    weights = jax.lax.cond(top_k > 0, lambda: cut(jnp.ones_like, jnp.float32(top_k)), lambda: weights)
    return jax.lax.cond(top_p < 1, lambda: cut(lambda w: w, top_p * weights.sum(axis=1)), lambda: weights)


def choose(
    logits: Float[Array, "rows vocab"],
    uniforms: Float[Array, "rows 2"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    top_k: Int32[Array, ""],
    *,
    filtered: bool,
) -> Int32[Array, "rows"]:
    """A token a row. Temperature first, then top-k, then top-p; temperature 0 takes the largest logit.

    Args:
      uniforms: two numbers in [0, 1) a row.
      filtered: whether top-p and top-k are asked for; without them they cost nothing.
    """

    def sample() -> Array:
        scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
        weights = jnp.exp(scaled)
        return draw(kept(weights, top_k, top_p) if filtered else weights, uniforms)

    return jax.lax.cond(temperature > 0, sample, lambda: jnp.argmax(logits, axis=1).astype(jnp.int32))
