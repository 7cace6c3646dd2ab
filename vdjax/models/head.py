"""The vocabulary head where only some tokens are scored: log-probs without a [tokens, vocab] array.

Scored tokens are taken `chunk` at a time, the table a tile of its rows at a time. On several devices each scores its
own tokens: a tile is brought together from the shards of its width, used for all chunks, and its gradient, summed over
the chunks, goes back to the shards, so that a step moves the table three times however many tokens there are. Where the
table's rows are spread over devices as well, each scores its rows and the log-sum-exps are joined. Where rows of tokens
are spread along their length, each device scores the tokens that its hidden states predict, in whatever part they are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from vdjax.models.products import matmul, matmul_by_rows, transposed_matmul
from vdjax.sharding import mesh_axes, partition_spec

TILE_BYTES = 2**28  # of a tile of the table, in float32, where it comes from several devices


class Head(NamedTuple):
    """How a head is applied."""

    chunk: int  # tokens
    temperature: float  # of the softmax


Found = tuple[Array, Array, Array]  # of each token: the largest logit, the sum of exponentials over it, its own logit


class Tokens(NamedTuple):
    """Scored tokens of one device, first those that are there, in chunks."""

    source: Int[Array, "chunks chunk"]  # whose hidden state predicts the token, among the device's tokens
    target: Int[Array, "chunks chunk"]
    scored: Bool[Array, "chunks chunk"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scored_log_probs(
    head: Head,
    hidden: Float[Array, "rows computed width"],
    table: Float[Array, "vocab width"],
    source: Int[Array, "rows length"],
    target: Int[Array, "rows length"],
    scored: Bool[Array, "rows length"],
) -> Float[Array, "rows length"]:
    """log softmax(hidden[source] table' / temperature)[target] in nats where `scored`, 0 elsewhere.

    Inputs in the dtype of `hidden`, sums and softmax in float32.

    Args:
      hidden: of the first places of each row, among which every `source` of a scored token is.
      source: of each token, the place in its row whose hidden state predicts it.
    """
    return _forward(head, hidden, table, source, target, scored)[0]


def _forward(head: Head, *arrays: Array) -> tuple[Array, Any]:
    hidden, table = arrays[:2]
    layout = _layout(hidden, table)
    log_probs, lse = layout.mapped(functools.partial(_score, head, layout), arrays, ("rows", "rows"))
    return log_probs, (*arrays, lse)


def _backward(head: Head, saved: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
    layout = _layout(*saved[:2])
    pull = functools.partial(_pull_back, head, layout)
    return *layout.mapped(pull, (*saved, cotangent), ("hidden", "table")), None, None, None


scored_log_probs.defvjp(_forward, _backward)


class Layout(NamedTuple):
    """Which axes of the mesh the arrays are spread over; all empty on one device."""

    mapped: Callable[[Callable, tuple[Array, ...], tuple[str, ...]], Any]  # a function over each device's part
    rows: tuple[str, ...]  # and their places
    places: tuple[str, ...]
    vocab: tuple[str, ...]
    width: tuple[str, ...]  # of the table


def _layout(hidden: Array, table: Array) -> Layout:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Layout(lambda run, arrays, outputs: run(*arrays), (), (), (), ())
    rows = partition_spec(("batch", "length", None), hidden.shape, mesh.shape)
    of_table = partition_spec(("vocab", "embed"), table.shape, mesh.shape)
    specs = {"rows": PartitionSpec(*rows[:2]), "hidden": rows, "table": of_table}

    def mapped(run: Callable, arrays: tuple[Array, ...], outputs: tuple[str, ...]) -> Any:
        inputs = (rows, of_table, *[specs["rows"]] * (len(arrays) - 2))
        out_specs = tuple(specs[name] for name in outputs)
        return jax.shard_map(run, in_specs=inputs, out_specs=out_specs, check_vma=False)(*arrays)

    return Layout(mapped, *map(mesh_axes, (rows, rows[1], of_table[0], of_table[1])))


def _of_whole_rows(layout: Layout, x: Array) -> Array:
    return jax.lax.all_gather(x, layout.places, axis=1, tiled=True) if layout.places else x


def _chunks(
    head: Head, layout: Layout, length: int, source: Array, target: Array, scored: Array
) -> tuple[Tokens, Int[Array, " tokens"], int]:
    """The scored tokens of the device's rows that are predicted by its part of them, `length` places each; the order
    that brought them to the front, and how many of them make a chunk."""
    source, target, scored = (_of_whole_rows(layout, x) for x in (source, target, scored))
    if layout.places:
        source -= jax.lax.axis_index(layout.places) * length
        scored &= (source >= 0) & (source < length)
        source = jnp.where(scored, source, 0)
    rows = len(scored)
    order = jnp.argsort(~scored.ravel(), stable=True)
    chunk = min(head.chunk, order.size)

    def chunked(x: Array) -> Array:
        return jnp.pad(x.ravel()[order], (0, -order.size % chunk)).reshape(-1, chunk)

    source = source + jnp.arange(rows)[:, None] * length
    return Tokens(*map(chunked, (source, target, scored))), order, chunk


def _tiles(layout: Layout, table: Array) -> tuple[Float[Array, "tiles tile width"], Int[Array, " tiles"]]:
    """The device's part of the table in tiles, and the first token id of each."""
    rows, width = table.shape
    count = 1
    if layout.width:
        wanted = rows * width * jax.lax.axis_size(layout.width) * 4 / TILE_BYTES
        count = next(n for n in range(1, rows + 1) if n >= wanted and rows % n == 0)
    shard = jax.lax.axis_index(layout.vocab) if layout.vocab else 0
    return table.reshape(count, rows // count, width), shard * rows + jnp.arange(count) * (rows // count)


def _whole(layout: Layout, tile: Array, dtype: Any) -> Float[Array, "tile width"]:
    tile = tile.astype(dtype)
    return jax.lax.all_gather(tile, layout.width, axis=1, tiled=True) if layout.width else tile


def _logits(head: Head, states: Array, tile: Array) -> Float[Array, "chunk tile"]:
    return matmul_by_rows(states, tile, jnp.float32) / head.temperature


def _at_target(logits: Array, target: Array, first: Array) -> Bool[Array, "chunk tile"]:
    return jnp.arange(logits.shape[-1]) == (target - first)[:, None]


def _score(
    head: Head, layout: Layout, hidden: Array, table: Array, source: Array, target: Array, scored: Array
) -> tuple[Float[Array, "rows length"], Float[Array, "rows length"]]:
    """Log-probs of scored tokens and the log-sum-exp of their logits."""
    states = hidden.reshape(-1, hidden.shape[-1])
    tokens, order, _ = _chunks(head, layout, hidden.shape[1], source, target, scored)

    def of_tile(found: Found, xs: tuple[Array, Array]) -> tuple[Found, None]:
        tile, first = _whole(layout, xs[0], hidden.dtype), xs[1]

        def of_chunk(_: None, xs: tuple[Tokens, Found]) -> tuple[None, Found]:
            tokens, found = xs

            def run(found: Found) -> Found:
                top, total, hit = found
                logits = _logits(head, states[tokens.source], tile)
                higher = jnp.maximum(top, jnp.max(logits, axis=-1))
                total = total * jnp.exp(top - higher) + jnp.sum(jnp.exp(logits - higher[:, None]), axis=-1)
                hit += jnp.sum(jnp.where(_at_target(logits, tokens.target, first), logits, 0), axis=-1)
                return higher, total, hit

            return None, jax.lax.cond(tokens.scored.any(), run, lambda found: found, found)

        return jax.lax.scan(of_chunk, None, (tokens, found))[1], None

    zeros = jnp.zeros(tokens.source.shape, jnp.float32)
    (top, total, hit), _ = jax.lax.scan(of_tile, (zeros - jnp.inf, zeros, zeros), _tiles(layout, table))
    if layout.vocab:
        highest = jax.lax.pmax(top, layout.vocab)
        total, hit = jax.lax.psum((total * jnp.exp(top - highest), hit), layout.vocab)
        top = highest
    lse = jnp.where(tokens.scored, jnp.log(total) + top, 0)
    places = jnp.argsort(order)

    def in_place(x: Array) -> Array:
        whole = x.ravel()[places].reshape(len(scored), -1)
        if not layout.places:
            return whole
        return jax.lax.psum_scatter(whole, layout.places, scatter_dimension=1, tiled=True)  # one device's is not 0

    return in_place(jnp.where(tokens.scored, hit - lse, 0)), in_place(lse)


def _pull_back(
    head: Head,
    layout: Layout,
    hidden: Array,
    table: Array,
    source: Array,
    target: Array,
    scored: Array,
    lse: Array,
    cotangent: Array,
) -> tuple[Float[Array, "rows length width"], Float[Array, "vocab width"]]:
    """Gradients of this device's hidden states and of its part of the table."""
    states, width = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[-1]
    tokens, order, chunk = _chunks(head, layout, hidden.shape[1], source, target, scored)
    alike = tuple(axis for axis in layout.width if axis not in layout.rows)  # devices that have the same tokens
    repeats = jax.lax.axis_size(alike) if alike else 1
    lse, slopes = (
        jnp.pad(_of_whole_rows(layout, x).ravel()[order], (0, -order.size % chunk)).reshape(-1, chunk)
        for x in (lse, cotangent)
    )

    def of_tile(d_states: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        tile, first = _whole(layout, xs[0], hidden.dtype), xs[1]

        def of_chunk(d_tile: Array, xs: tuple[Tokens, Array, Array, Array]) -> tuple[Array, Array]:
            tokens, lse, slopes, d_chunk = xs

            def run(d_tile: Array, d_chunk: Array) -> tuple[Array, Array]:
                chosen = states[tokens.source]
                logits = _logits(head, chosen, tile)
                d_logits = _at_target(logits, tokens.target, first) - jnp.exp(logits - lse[:, None])
                scale = jnp.where(tokens.scored, slopes, 0) / head.temperature
                d_logits = (d_logits * scale[:, None]).astype(hidden.dtype)
                d_tile += transposed_matmul(d_logits, chosen, jnp.float32)
                return d_tile, d_chunk + matmul(d_logits, tile, jnp.float32)

            return jax.lax.cond(tokens.scored.any(), run, lambda *same: same, d_tile, d_chunk)

        d_tile, d_states = jax.lax.scan(of_chunk, jnp.zeros(tile.shape, jnp.float32), (tokens, lse, slopes, d_states))
        if layout.width:
            d_tile = jax.lax.psum_scatter(d_tile, layout.width, scatter_dimension=1, tiled=True) / repeats
        return d_states, d_tile

    zeros = jnp.zeros((*tokens.source.shape, width), jnp.float32)
    d_states, d_table = jax.lax.scan(of_tile, zeros, _tiles(layout, table))
    if apart := tuple(axis for axis in layout.rows if axis not in layout.width):
        d_table = jax.lax.psum(d_table, apart)
    if layout.vocab:
        d_states = jax.lax.psum(d_states, layout.vocab)
    d_hidden = jnp.zeros(states.shape, jnp.float32).at[tokens.source.ravel()].add(d_states.reshape(-1, width))
    return d_hidden.reshape(hidden.shape).astype(hidden.dtype), d_table.reshape(table.shape).astype(table.dtype)
