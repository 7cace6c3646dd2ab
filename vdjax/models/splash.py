"""Attention over packed rows by the splash kernels of JAX (Pallas, TPU): no [length, length] array in memory.

The kernels mask by equal segment ids alone. Where responses share a prompt and are blind to each other, a token's keys
are two sets of equal ids: those of its own sequence, and those of the prompt of its segment; a row's prefix is a third.
So the kernels run once for each set, and the results are joined by their log-sum-exps (Dao et al., arXiv 2205.14135,
section 3.1); going backward the kernels take the joined one, with which the gradients of the sets add up.

Where rows are spread over devices along their length, each device has the queries of its part and all keys and values.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from vdjax.sharding import mesh_axes, partition_spec, parts_of

Ids = kernels.SegmentIds
SeenBy = tuple[Array, Array | None, Array | None]  # segment_ids, sequence_ids, prefix of `attention`
QUERIES = ("batch", "heads_act", "length", None)  # axes of the kernels' arrays, [batch, heads, length, dim] ...
KEYS = ("batch", "heads_act", None, None)  # ... and of keys and values, whole rows of them
BLOCKS = (512, 256, 128)  # tokens a tile of the kernels; the first that divides a device's part of a row


def attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads dim"],
    segment_ids: Int[Array, "batch length"],
    sequence_ids: Int[Array, "batch length"] | None,
    prefix: Bool[Array, "batch length"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "batch length heads dim"]:
    """What `vdjax.models.attention.attention` computes, by the kernels, forward and backward.

    Rows that no tile divides are padded for the kernels.
    """
    length = q.shape[1]
    short = -length % (BLOCKS[-1] * parts_of("length", length))

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, short), *[(0, 0)] * (x.ndim - 2)]) if short else x

    arrays = jax.tree.map(padded, (q, k, v, (segment_ids, sequence_ids, prefix)))
    return _attention(interpret, *arrays)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(interpret: bool, *arrays: Any) -> Array:
    return forward(*arrays, interpret=interpret)[0]


def _keep(interpret: bool, *arrays: Any) -> tuple[Array, tuple[Any, ...]]:
    out, lse = forward(*arrays, interpret=interpret)
    return out, (*arrays, out, lse)


def _pull_back(interpret: bool, saved: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    q, k, v, seen_by, out, lse = saved
    return *backward(q, k, v, seen_by, out, lse, cotangent, interpret=interpret), None


_attention.defvjp(_keep, _pull_back)


def forward(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads dim"],
    seen_by: SeenBy,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "batch length heads dim"], Float[Array, "batch heads length"]]:
    """What `vdjax.models.attention.attention` gives, and the log-sum-exp of each query's scores.

    Padding (segment 0) sees padding here, and nothing there; its outputs mean nothing in either.
    """

    def run(kernel: Any, *arrays: Any, places: tuple[str, ...]) -> tuple[Array, Array]:
        return jax.vmap(functools.partial(_joined, kernel))(*arrays)

    arrays, ids = _heads_first(q, k, v), _ids(*seen_by)
    out, lse = _mapped(run, arrays, ids, outputs=(QUERIES, QUERIES[:3]), interpret=interpret)
    return out.swapaxes(1, 2), lse


def backward(
    q: Array, k: Array, v: Array, seen_by: SeenBy, out: Array, lse: Array, cotangent: Array, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values."""

    def run(kernel: Any, *arrays: Any, places: tuple[str, ...]) -> tuple[Array, ...]:
        dq, *of_keys = jax.vmap(functools.partial(_gradients, kernel))(*arrays)
        if places:
            of_keys = [jax.lax.psum_scatter(x, places, scatter_dimension=2, tiled=True) for x in of_keys]
        return dq, *of_keys

    ids, found = _ids(*seen_by), (out.swapaxes(1, 2), lse, cotangent.swapaxes(1, 2))
    outputs = (QUERIES, QUERIES, QUERIES)
    grads = _mapped(run, _heads_first(q, k, v), ids, *found, outputs=outputs, interpret=interpret)
    dq, dk, dv = (x.swapaxes(1, 2) for x in grads)
    return dq * q.shape[-1] ** -0.5, dk, dv


def _heads_first(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
    """[batch, heads, length, dim], as the kernels take them, and queries scaled, as the kernels do not."""
    return tuple(x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))


def _ids(segment_ids: Array, sequence_ids: Array | None, prefix: Array | None) -> list[Ids]:
    """Of each pass of the kernels: a query sees the keys before it that have its id. No two passes show it one key."""
    out = [Ids(segment_ids, segment_ids)]
    if sequence_ids is not None:
        prompt = sequence_ids == 0
        own = segment_ids * (1 + jnp.max(sequence_ids, axis=1, keepdims=True)) + sequence_ids
        out = [Ids(own, own), Ids(jnp.where(prompt, -1, segment_ids), jnp.where(prompt, segment_ids, -2))]
    if prefix is not None:
        # The prefix is the beginning of the first segment, which sees it without this.
        out.append(Ids(jnp.where(segment_ids > 1, 1, -1), jnp.where(prefix, 1, -2)))
    return out


def _mapped(
    run: Callable,
    arrays: tuple[Array, ...],
    ids: list[Ids],
    *found: Array,
    outputs: tuple[tuple[str | None, ...], ...],
    interpret: bool,
) -> Any:
    """Runs the kernels on each device's rows, heads and queries: the partitioner cannot look into them.

    `run` takes the kernel, the mesh axes that queries are spread over along their rows, and the arrays.
    """
    q, k = arrays[:2]
    mesh = jax.sharding.get_abstract_mesh()
    spec = functools.partial(partition_spec, mesh_shape=mesh.shape)
    rows, heads, places, _ = spec(QUERIES, q.shape)
    if heads != spec(KEYS, k.shape)[1]:  # key/value heads that cannot be shared out
        heads = None
    parts = {"batch": rows, "heads_act": heads, "length": places}
    here = q.shape[1] // math.prod(mesh.shape[name] for name in mesh_axes(heads))
    kernel = _kernel(q.shape[2], here, parts_of("length", q.shape[2]), interpret)
    run = functools.partial(run, places=mesh_axes(places))
    if mesh.empty:
        return run(kernel, *arrays, ids, *found)

    def of(*axes: str | None) -> PartitionSpec:
        return PartitionSpec(*[parts[axis] if axis else None for axis in axes])

    of_ids: tuple[Any, Any] = (of("batch", "length"), of("batch"))
    inputs = (
        kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, places))),
        *(of(*QUERIES), of(*KEYS), of(*KEYS)),
        [Ids(*of_ids)] * len(ids),
        *(of(*QUERIES[: x.ndim]) for x in found),
    )
    mapped = jax.shard_map(run, in_specs=inputs, out_specs=tuple(of(*axes) for axes in outputs), check_vma=False)
    return mapped(kernel, *arrays, ids, *found)


def _kernel(length: int, heads: int, parts: int, interpret: bool) -> Any:
    """Of rows whose queries are spread in `parts` parts over devices: one that `shard_map` takes apart."""
    block = next(block for block in BLOCKS if length // parts % block == 0)
    sizes = kernels.BlockSizes(
        block, block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    return kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=parts, interpret=interpret)


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
