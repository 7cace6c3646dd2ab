"""Rotary position embedding and grouped-query attention over packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vdjax.models.config import ModelConfig
from vdjax.models.elementwise import softmax
from vdjax.models.llama3 import scale_frequencies
from vdjax.models.products import matmul
from vdjax.sharding import constrain, parts_of

MASKED = -1e30  # finite, so that padding, which sees nothing, gives finite outputs and gradients


def rope_frequencies(cfg: ModelConfig) -> Float[np.ndarray, "half"]:
    """Radians a position of each pair of head dimensions, theta^(-2i/d); float32 rounding as in transformers.

    Source: Su et al., "RoFormer", arXiv 2104.09864, equation 15.
    """
    exponents = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    powers = np.power(np.float64(np.float32(cfg.rope_theta)), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    return scale_frequencies(frequencies, cfg.rope_scaling) if cfg.rope_scaling else frequencies


def rope_tables(
    cfg: ModelConfig, positions: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length 1 half"], Float[Array, "batch length 1 half"]]:
    """Float32 cosines and sines of the rotation at each position."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(cfg)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "batch length heads dim"],
    cos: Float[Array, "batch length 1 half"],
    sin: Float[Array, "batch length 1 half"],
) -> Float[Array, "batch length heads dim"]:
    """Rotates dimension i with dimension i + dim/2 (the layout of Hugging Face checkpoints), in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def visible(
    query_index: Int[Array, "queries"],
    query_segments: Int[Array, "batch queries"],
    query_sequences: Int[Array, "batch queries"],
    segment_ids: Int[Array, "batch length"],
    sequence_ids: Int[Array, "batch length"],
    prefix: Bool[Array, "batch length"] | None = None,
) -> Bool[Array, "batch queries length"]:
    """Which tokens of its row a query token sees.

    Those of its own segment (0 is padding and sees nothing) that do not come after it, and of these the shared
    prompt (sequence id 0) and its own sequence: the responses of a segment are blind to each other. And those of
    the row's `prefix`, which all its segments begin with.
    """
    before = query_index[:, None] >= jnp.arange(segment_ids.shape[1])
    segment, sequence = query_segments[:, :, None], query_sequences[:, :, None]
    same_sequence = (sequence_ids[:, None, :] == 0) | (sequence_ids[:, None, :] == sequence)
    own = (segment == segment_ids[:, None, :]) & same_sequence
    return before & (segment != 0) & (own if prefix is None else own | prefix[:, None, :])


def attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads dim"],
    segment_ids: Int[Array, "batch length"],
    sequence_ids: Int[Array, "batch length"] | None = None,
    prefix: Bool[Array, "batch length"] | None = None,
    *,
    query_chunk: int = 0,
    kernels: bool = False,
) -> Float[Array, "batch length heads dim"]:
    """Softmax attention with the visibility rule of `visible`; scores and softmax are float32.

    Query head h attends with key/value head h // (heads / kv_heads). Where rows are spread over devices along their
    length, each has the queries of its part and all keys and values.

    Args:
      sequence_ids: None where no segment has responses that are blind to each other.
      prefix: None where no tokens of a row are seen by all its segments.
      query_chunk: queries a block; a block reads only the keys up to its end and is recomputed in the backward pass,
        so that no [length, length] array exists and about half of the work is saved. 0 is one block, kept.
      kernels: on TPU, the splash kernels instead (`vdjax.models.splash`).
    """
    if kernels:
        from vdjax.models import splash  # Pallas, which takes 0.2 s to import and only TPUs need

        return splash.attention(q, k, v, segment_ids, sequence_ids, prefix)
    sequence_ids = jnp.zeros_like(segment_ids) if sequence_ids is None else sequence_ids
    batch, length, heads, dim = q.shape
    kv_heads, parts = k.shape[2], parts_of("length", length)
    each = length // parts  # queries a device
    k, v = (constrain(x, ("batch", None, "kv_heads_act", None)) for x in (k, v))
    # The query heads of one key/value head lie side by side, so that each is one matrix product with no copy of k, v.
    q = q.reshape(batch, parts, each, kv_heads, -1, dim).transpose(0, 3, 1, 4, 2, 5)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)

    def block(q: Array, k: Array, v: Array, bias: Array) -> Array:
        rows = q.reshape(batch, kv_heads, -1, dim)
        scores = matmul(rows, k, jnp.float32) * dim**-0.5
        weights = softmax(scores.reshape(*q.shape[:-1], -1) + bias[:, None, :, None]).astype(v.dtype)
        return matmul(weights.reshape(*rows.shape[:-1], -1), v).reshape(q.shape)

    blocks = []
    for start in range(0, each, query_chunk or each):
        end = min(start + (query_chunk or each), each)
        last = length - each + end  # of the keys that a query of the block may see

        def of_block(x: Array, start: int = start, end: int = end) -> Array:
            return x.reshape(-1, parts, each)[..., start:end].reshape(len(x), -1)

        mask = visible(
            of_block(jnp.arange(length)[None])[0],
            of_block(segment_ids),
            of_block(sequence_ids),
            segment_ids[:, :last],
            sequence_ids[:, :last],
            None if prefix is None else prefix[:, :last],
        )
        bias = jnp.where(mask, 0.0, MASKED).reshape(batch, parts, end - start, -1)
        apply = jax.checkpoint(block) if query_chunk else block
        blocks.append(apply(q[..., start:end, :], k[..., :last], v[..., :last, :], bias))
    out = jnp.concatenate(blocks, axis=4)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(batch, length, heads, dim)


def cached_attention(
    q: Float[Array, "batch 1 heads dim"],
    keys: Float[Array, "batch kv_heads dim slots"],
    values: Float[Array, "batch kv_heads slots dim"],
    seen: Bool[Array, "batch slots"],
) -> Float[Array, "batch 1 heads dim"]:
    """Softmax attention of one query a row with the slots of a cache that it sees; arithmetic as in `attention`."""
    batch, _, heads, dim = q.shape
    rows = q.reshape(batch, keys.shape[1], -1, dim)
    scores = matmul(rows, keys, jnp.float32) * dim**-0.5
    weights = jax.nn.softmax(scores + jnp.where(seen, 0.0, MASKED)[:, None, None], axis=-1).astype(values.dtype)
    return matmul(weights, values).reshape(batch, 1, heads, dim)
