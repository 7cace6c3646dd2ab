"""Attention over packed rows by the splash kernels of JAX (Pallas, TPU): no [length, length] array in memory.

The kernels mask by equal segment ids alone. Where responses share a prompt and are blind to each other, a token's keys
are two sets of equal ids: those of its own sequence, and those of the prompt of its segment. So the kernels run once
for each set, and the two results are joined by their log-sum-exps (Dao et al., arXiv 2205.14135, section 3.1); going
backward the kernels take the joined one, with which the gradients of the two sets add up.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from vdjax.sharding import partition_spec

Ids = kernels.SegmentIds
HEADS = ("batch", "heads_act", None, None)  # axes of the kernels' arrays, [batch, heads, length, dim]
BLOCKS = (512, 256, 128)  # tokens a tile of the kernels; the first that divides a row's length


def fits(length: int) -> bool:
    return any(length % block == 0 for block in BLOCKS)


@jax.custom_vjp
def attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads dim"],
    segment_ids: Int[Array, "batch length"],
    sequence_ids: Int[Array, "batch length"] | None,
) -> Float[Array, "batch length heads dim"]:
    """What `vdjax.models.attention.attention` computes, by the kernels, forward and backward."""
    return forward(q, k, v, segment_ids, sequence_ids)[0]


def _keep(*arrays: Any) -> tuple[Array, tuple[Any, ...]]:
    out, lse = forward(*arrays)
    return out, (*arrays, out, lse)


def _pull_back(saved: tuple[Any, ...], cotangent: Array) -> tuple[Array | None, ...]:
    q, k, v, segment_ids, sequence_ids, out, lse = saved
    return *backward(q, k, v, segment_ids, sequence_ids, out, lse, cotangent), None, None


attention.defvjp(_keep, _pull_back)


def forward(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads dim"],
    segment_ids: Int[Array, "batch length"],
    sequence_ids: Int[Array, "batch length"] | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "batch length heads dim"], Float[Array, "batch heads length"]]:
    """What `vdjax.models.attention.attention` gives, and the log-sum-exp of each query's scores.

    Padding (segment 0) sees padding here, and nothing there; its outputs mean nothing in either.
    """

    def run(q: Array, k: Array, v: Array, ids: list[Ids]) -> tuple[Array, Array]:
        kernel = _kernel(q.shape[2], q.shape[1], interpret)
        return jax.vmap(functools.partial(_joined, kernel))(q, k, v, ids)

    out, lse = _mapped(run, (*_heads_first(q, k, v), _ids(segment_ids, sequence_ids)), outputs=(HEADS, HEADS[:3]))
    return out.swapaxes(1, 2), lse


def backward(
    q: Array, k: Array, v: Array, segment_ids: Array, sequence_ids: Array | None, out: Array, lse: Array,
    cotangent: Array, *, interpret: bool = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of queries, keys and values."""

    def run(q: Array, k: Array, v: Array, ids: list[Ids], out: Array, lse: Array, g: Array) -> tuple[Array, ...]:
        kernel = _kernel(q.shape[2], q.shape[1], interpret)
        return jax.vmap(functools.partial(_gradients, kernel))(q, k, v, ids, out, lse, g)

    ids, found = _ids(segment_ids, sequence_ids), (out.swapaxes(1, 2), lse, cotangent.swapaxes(1, 2))
    grads = _mapped(run, (*_heads_first(q, k, v), ids, *found), outputs=(HEADS, HEADS, HEADS))
    dq, dk, dv = (x.swapaxes(1, 2) for x in grads)
    return dq * q.shape[-1] ** -0.5, dk, dv


def _heads_first(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
    """[batch, heads, length, dim], as the kernels take them, and queries scaled, as the kernels do not."""
    return tuple(x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))


def _ids(segment_ids: Array, sequence_ids: Array | None) -> list[Ids]:
    """Of each pass of the kernels: a query sees the keys before it that have its id."""
    if sequence_ids is None:
        return [Ids(segment_ids, segment_ids)]
    prompt = sequence_ids == 0
    own = segment_ids * (1 + jnp.max(sequence_ids, axis=1, keepdims=True)) + sequence_ids
    return [Ids(own, own), Ids(jnp.where(prompt, -1, segment_ids), jnp.where(prompt, segment_ids, -2))]


def _mapped(run: Callable, arrays: tuple[Any, ...], outputs: tuple[tuple[str | None, ...], ...]) -> Any:
    """Runs the kernels on each device's rows and heads: the partitioner cannot look into them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(*arrays)
    q, k = arrays[:2]
    spec = functools.partial(partition_spec, mesh_shape=mesh.shape)
    whole = spec(HEADS, q.shape)[1] != spec(HEADS, k.shape)[1]  # key/value heads that cannot be shared out

    def of(axes: tuple[str | None, ...]) -> PartitionSpec:
        rows, heads = spec(HEADS[:2], q.shape[:2])
        return PartitionSpec(*[{"batch": rows, "heads_act": None if whole else heads}.get(axis or "") for axis in axes])

    inputs = jax.tree.map(lambda x: of(("batch",) if x.ndim == 2 else HEADS[: x.ndim]), arrays)
    mapped = jax.shard_map(run, in_specs=inputs, out_specs=tuple(map(of, outputs)), check_vma=False)
    return mapped(*arrays)


def _kernel(length: int, heads: int, interpret: bool) -> Any:
    block = next(block for block in BLOCKS if length % block == 0)
    sizes = kernels.BlockSizes(
        block, block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    return kernels.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)


def _joined(kernel: Any, q: Array, k: Array, v: Array, ids: list[Ids]) -> tuple[Array, Array]:
    """softmax(q k) v of one row, [heads, length, dim], over the keys that any of `ids` lets a query see."""
    how = kernel.kwargs | {"save_residuals": True}
    parts = [kernels._splash_attention_forward(kernel.fwd_mask_info, q, k, v, pair, None, **how) for pair in ids]
    if len(parts) == 1:
        return parts[0][0], parts[0][1][0]
    lse = functools.reduce(jnp.logaddexp, [part for _, (part,) in parts])
    out = sum(out.astype(jnp.float32) * jnp.exp(part - lse)[..., None] for out, (part,) in parts)
    return jnp.asarray(out).astype(q.dtype), lse


def _gradients(
    kernel: Any, q: Array, k: Array, v: Array, ids: list[Ids], out: Array, lse: Array, cotangent: Array
) -> tuple[Array, ...]:
    infos = (kernel.dq_mask_info, kernel.dkv_mask_info)
    parts = [
        kernels._splash_attention_bwd(**kernel.kwargs, res=(q, k, v, pair, None, out, lse, *infos), do=cotangent)[3:6]
        for pair in ids
    ]
    return tuple(functools.reduce(jnp.add, grads) for grads in zip(*parts, strict=True))
