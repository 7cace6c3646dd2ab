"""Rotary position embedding and grouped-query attention over packed rows."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vdjax.models import splash
from vdjax.models.config import ModelConfig
from vdjax.models.llama3 import scale_frequencies
from vdjax.models.products import matmul, transposed_matmul

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
) -> Bool[Array, "batch queries length"]:
    """Which tokens of its row a query token sees.

    Those of its own segment (0 is padding and sees nothing) that do not come after it, and of these the shared
    prompt (sequence id 0) and its own sequence: the responses of a segment are blind to each other.
    """
    before = query_index[:, None] >= jnp.arange(segment_ids.shape[1])
    segment, sequence = query_segments[:, :, None], query_sequences[:, :, None]
    same_segment = (segment == segment_ids[:, None, :]) & (segment != 0)
    same_sequence = (sequence_ids[:, None, :] == 0) | (sequence_ids[:, None, :] == sequence)
    return before & same_segment & same_sequence


def attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads dim"],
    segment_ids: Int[Array, "batch length"],
    sequence_ids: Int[Array, "batch length"] | None = None,
    *,
    query_chunk: int = 0,
    kernels: bool = False,
) -> Float[Array, "batch length heads dim"]:
    """Softmax attention with the visibility rule of `visible`; scores and softmax are float32.

    Query head h attends with key/value head h // (heads / kv_heads). Backward, the weights are made again from the
    log-sum-exp of each query's scores (Dao et al., arXiv 2205.14135, algorithm 4), so that no [length, length] array
    is kept.

    Args:
      sequence_ids: None where no segment has responses that are blind to each other.
      query_chunk: queries a block; a block reads only the keys up to its end, which saves about half of the work. 0 is
        one block.
      kernels: on TPU, the splash kernels instead (`vdjax.models.splash`), where they take rows of this length.
    """
    path = SPLASH if kernels and splash.fits(q.shape[1]) else _plain(query_chunk)
    return _attention(path, q, k, v, segment_ids, sequence_ids)


class Path(NamedTuple):
    """A way to compute attention, forward and backward."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@functools.cache
def _plain(query_chunk: int) -> Path:
    return Path(functools.partial(_plain_forward, query_chunk), functools.partial(_plain_backward, query_chunk))


SPLASH = Path(splash.forward, splash.backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(path: Path, *arrays: Array | None) -> Array:
    return path.forward(*arrays)[0]


def _forward(path: Path, *arrays: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
    out, lse = path.forward(*arrays)
    return out, (*arrays, out, lse)


def _backward(path: Path, saved: tuple[Array | None, ...], cotangent: Array) -> tuple[Array | None, ...]:
    return *path.backward(*saved, cotangent), None, None


_attention.defvjp(_forward, _backward)


def _blocks(
    query_chunk: int, segment_ids: Array, sequence_ids: Array | None
) -> Iterator[tuple[slice, slice, Float[Array, "batch 1 1 queries keys"]]]:
    """Queries, the keys that they may see, and what is added to their scores."""
    length = segment_ids.shape[1]
    sequence_ids = jnp.zeros_like(segment_ids) if sequence_ids is None else sequence_ids
    for start in range(0, length, query_chunk or length):
        queries = slice(start, min(start + (query_chunk or length), length))
        keys = slice(0, queries.stop)
        mask = visible(
            jnp.arange(queries.start, queries.stop),
            segment_ids[:, queries],
            sequence_ids[:, queries],
            segment_ids[:, keys],
            sequence_ids[:, keys],
        )
        yield queries, keys, jnp.where(mask, 0.0, MASKED)[:, None, None]


def _by_kv_head(x: Float[Array, "batch length heads dim"], kv_heads: int) -> Array:
    """[batch, kv_heads, group, length, dim]: the query heads of one key/value head side by side, so that each product
    with keys or values is one matrix product of these without a copy."""
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _scores(q: Array, k: Array, bias: Array) -> Float[Array, "batch kv_heads group queries keys"]:
    scores = matmul(_merged(q), k, jnp.float32) * q.shape[-1] ** -0.5
    return scores.reshape(*q.shape[:-1], -1) + bias


def _merged(x: Array) -> Float[Array, "batch kv_heads queries last"]:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _plain_forward(
    query_chunk: int, q: Array, k: Array, v: Array, segment_ids: Array, sequence_ids: Array | None
) -> tuple[Float[Array, "batch length heads dim"], Float[Array, "batch heads length"]]:
    """The outputs, and the log-sum-exp of each query's scores."""
    kv_heads = k.shape[2]
    rows, k, v = _by_kv_head(q, kv_heads), k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    outs, lses = [], []
    for queries, keys, bias in _blocks(query_chunk, segment_ids, sequence_ids):
        part = rows[..., queries, :]
        scores = _scores(part, k[..., keys], bias)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = matmul(_merged((weights / total).astype(v.dtype)), v[..., keys, :])
        outs.append(mixed.reshape(part.shape))
        lses.append((jnp.log(total) + top)[..., 0])
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return out, jnp.concatenate(lses, axis=3).reshape(q.shape[0], q.shape[2], q.shape[1])


def _plain_backward(
    query_chunk: int,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    sequence_ids: Array | None,
    out: Array,
    lse: Array,
    cotangent: Array,
) -> tuple[Array, Array, Array]:
    kv_heads, dim = k.shape[2:]
    rows, grads = _by_kv_head(q, kv_heads), _by_kv_head(cotangent, kv_heads)
    inner = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)  # of each query
    inner = inner.swapaxes(1, 2).reshape(*rows.shape[:-1], 1)
    lse = lse.reshape(*rows.shape[:-1], 1)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)
    parts = []
    dk, dv = jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32), jnp.zeros(v.swapaxes(2, 3).shape, jnp.float32)
    for queries, keys, bias in _blocks(query_chunk, segment_ids, sequence_ids):
        part, grad = rows[..., queries, :], grads[..., queries, :]
        weights = jnp.exp(_scores(part, k[..., keys], bias) - lse[..., queries, :])
        # Of the scores before their scaling by 1 / sqrt(dim).
        slopes = matmul(_merged(grad), v[..., keys], jnp.float32).reshape(weights.shape) - inner[..., queries, :]
        slopes = _merged((slopes * weights * dim**-0.5).astype(q.dtype))
        parts.append(matmul(slopes, k[..., keys].swapaxes(2, 3)).reshape(part.shape))
        dk = dk.at[:, :, keys].add(transposed_matmul(slopes, _merged(part), jnp.float32))
        dv = dv.at[:, :, keys].add(transposed_matmul(_merged(weights.astype(q.dtype)), _merged(grad), jnp.float32))
    dq = jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return dq, dk.swapaxes(1, 2).astype(q.dtype), dv.swapaxes(1, 2).astype(q.dtype)


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
