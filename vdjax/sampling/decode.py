"""Sampling with a key-value cache: the prompts of a batch in one pass, then a token of every row at a time.

Prompts are packed for their pass, equal ones once. In the caches all end at one slot, as if padded on the left, so that
all rows write a token's keys and values into the same slot.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int32, UInt32

from vdjax.models.attention import cached_attention, rope_tables
from vdjax.models.elementwise import rms_norm
from vdjax.models.products import matmul_by_rows
from vdjax.models.transformer import Layer, Params, Transformer
from vdjax.sampling.choose import choose
from vdjax.sharding import constrain

SLOTS = 16  # with a number that no vector divides, attention of few rows over a cache takes a third longer on CPU


class Samples(NamedTuple):
    """What was sampled behind each prompt; 0 behind a row's end. Arrays of JAX, or of NumPy from `generate`."""

    tokens: Int32[Any, "rows new"]
    lengths: Int32[Any, "rows"]  # sampled tokens, stop token included
    log_probs: Float[Any, "rows new"]  # of the tokens under the model itself: temperature 1, no filter; nats
    stopped: Bool[Any, "rows"]  # ended with a stop token, not for want of room


class Prompts(NamedTuple):
    """A batch of prompts (`vdjax.sampling.generate.layout`), in one group for each of the batch's shards.

    A row of length 0 is no row: nothing is sampled behind it.
    """

    tokens: Int32[Any, "groups packed width"]
    positions: Int32[Any, "groups packed width"]
    segments: Int32[Any, "groups packed width"]  # 0 is padding
    places: Int32[Any, "groups each width"]  # of a row's tokens among its group's; they end at the right
    lengths: Int32[Any, "rows"]
    seeds: UInt32[Any, "rows parts"]  # of each row's own random numbers


class Knobs(NamedTuple):
    """How tokens are chosen (`vdjax.sampling.choose.choose`)."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int32[Array, ""]


class State(NamedTuple):
    """A decode between two tokens."""

    step: Int32[Array, ""]  # tokens sampled
    last: Int32[Array, "rows"]
    running: Bool[Array, "rows"]
    samples: Samples
    cache: list[tuple[Array, Array]]  # each layer's keys [rows, kv_heads, dim, slots], values [.., slots, dim]


def unstacked(graphdef: nnx.GraphDef, params: Params) -> list[Params]:
    """One tree of parameters a layer, matrices in the compute dtype; all share those that are of no layer.

    Out of a stack, the token loop would copy each layer's weights at every token. Layers' kernels are [out, in]
    (`matmul_by_rows`).
    """
    dtype = nnx.merge(graphdef, params).compute_dtype

    def cast(leaf: Array) -> Array:
        return leaf.astype(dtype) if leaf.ndim > 1 else leaf

    def of_layer(i: int) -> Params:
        leaves = {name: cast(leaf[i]) for name, leaf in params["layers"].items()}
        return {name: leaf.T if name.endswith("_proj") else leaf for name, leaf in leaves.items()}

    shared = jax.tree.map(cast, {name: leaf for name, leaf in params.items() if name != "layers"})
    return [shared | {"layers": of_layer(i)} for i in range(len(params["layers"]["attention_norm"]))]


def layer_of(graphdef: nnx.GraphDef, params: Params) -> Layer:
    """The layer of one tree of `unstacked`."""
    layer = nnx.merge(graphdef, params).layers
    layer.product = matmul_by_rows
    return layer


def row_keys(seeds: UInt32[Array, "rows parts"]) -> Array:
    """A random key a row, of the row's own numbers alone."""

    def one(parts: Array) -> Array:
        return functools.reduce(jax.random.fold_in, parts[1:], jax.random.key(parts[0], impl="threefry2x32"))

    return jax.vmap(one)(seeds)


def cache_slots(width: int, max_new_tokens: int) -> int:
    """Of a row: for its prompt and all that is sampled but the last token, up to a multiple of `SLOTS`."""
    return -(-(width + max_new_tokens - 1) // SLOTS) * SLOTS


def prefill(
    graphdef: nnx.GraphDef, layers: list[Params], prompts: Prompts, max_new_tokens: int
) -> tuple[State, Float[Array, "rows width"]]:
    """Caches that hold the prompts, and the hidden states that predict the first tokens."""
    groups, each, width = prompts.places.shape
    rows = groups * each
    model = nnx.merge(graphdef, layers[0])
    tokens, positions, segments = (x.reshape(-1, width) for x in prompts[:3])
    cos, sin = rope_tables(model.cfg, positions)
    x = model.embedded(tokens)

    def unpacked(packed: Array, places: Array) -> Array:
        flat = packed.reshape(groups, -1, *packed.shape[2:])
        return jax.vmap(lambda values, at: values[at])(flat, places).reshape(rows, *places.shape[2:], *flat.shape[2:])

    no_room, room = (0, 0), (0, cache_slots(width, max_new_tokens) - width)
    cache = []
    for params in layers:
        layer = layer_of(graphdef, params)
        q, k, v = layer.attention_inputs(x, cos, sin)
        mixed = layer.attention(q, k, v, segments)
        x = layer.after_attention(x, mixed)
        keys = jnp.pad(unpacked(k, prompts.places).transpose(0, 2, 3, 1), (no_room, no_room, no_room, room))
        values = jnp.pad(unpacked(v, prompts.places).transpose(0, 2, 1, 3), (no_room, no_room, room, no_room))
        cache.append(_pinned(keys, values))
    grid = jnp.zeros((rows, max_new_tokens))
    none = jnp.zeros(rows, jnp.int32)
    last = unpacked(x, prompts.places[..., -1])
    samples = Samples(grid.astype(jnp.int32), none, grid, none > 0)
    return State(jnp.int32(0), none, prompts.lengths > 0, samples, cache), _last_norm(model, last)


def forward(
    graphdef: nnx.GraphDef, layers: list[Params], prompts: Prompts, state: State
) -> tuple[State, Float[Array, "rows width"]]:
    """Puts the last tokens into the caches and gives the hidden states that predict the next ones."""
    width = prompts.places.shape[2]
    model = nnx.merge(graphdef, layers[0])
    slot = width + state.step - 1
    cos, sin = rope_tables(model.cfg, (prompts.lengths + state.step - 1)[:, None])
    slots = jnp.arange(state.cache[0][1].shape[2])
    seen = (slots >= width - prompts.lengths[:, None]) & (slots <= slot)
    x = model.embedded(state.last[:, None])
    cache = []
    for params, (keys, values) in zip(layers, state.cache, strict=True):
        layer = layer_of(graphdef, params)
        q, k, v = layer.attention_inputs(x, cos, sin)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k.transpose(0, 2, 3, 1), slot, axis=3)
        values = jax.lax.dynamic_update_slice_in_dim(values, v.transpose(0, 2, 1, 3), slot, axis=2)
        x = layer.after_attention(x, cached_attention(q, keys, values, seen))
        cache.append(_pinned(keys, values))
    return state._replace(cache=cache), _last_norm(model, x[:, 0])


def start(
    graphdef: nnx.GraphDef, layers: list[Params], prompts: Prompts, knobs: Knobs, *, max_new_tokens: int, **how: Any
) -> State:
    """The state with every row's first token. `how` is that of `sample`."""
    state, hidden = prefill(graphdef, layers, prompts, max_new_tokens)
    return sample(nnx.merge(graphdef, layers[0]), prompts, state, hidden, knobs, **how)


def advance(
    graphdef: nnx.GraphDef, layers: list[Params], prompts: Prompts, knobs: Knobs, state: State, **how: Any
) -> State:
    """The state with one more token of every running row."""
    state, hidden = forward(graphdef, layers, prompts, state)
    return sample(nnx.merge(graphdef, layers[0]), prompts, state, hidden, knobs, **how)


def sample(
    model: Transformer,
    prompts: Prompts,
    state: State,
    hidden: Float[Array, "rows width"],
    knobs: Knobs,
    *,
    stop_ids: tuple[int, ...],
    filtered: bool,
) -> State:
    """Samples one token of every running row, from hidden states."""
    logits = constrain(model.project(hidden), ("batch", None))
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys(prompts.seeds), state.step)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    tokens = jnp.where(state.running, choose(logits, uniforms, *knobs, filtered=filtered), 0)
    log_probs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
    stops = state.running & jnp.isin(tokens, jnp.array(stop_ids, jnp.int32))

    def put(grid: Array, column: Array) -> Array:
        column = jnp.where(state.running, column, 0)
        return jax.lax.dynamic_update_slice_in_dim(grid, column[:, None], state.step, axis=1)

    old = state.samples
    samples = Samples(
        put(old.tokens, tokens), old.lengths + state.running, put(old.log_probs, log_probs), old.stopped | stops
    )
    return State(state.step + 1, tokens, state.running & ~stops, samples, state.cache)


def decode(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: Prompts,
    knobs: Knobs,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    filtered: bool,
) -> Samples:
    """Samples behind every prompt until a stop token or `max_new_tokens`. Pure; may be jitted and vmapped over params.

    Args:
      graphdef: of the model; its parameters are `params`.
      stop_ids: tokens that end a row; those in a prompt do not count.
      filtered: whether `knobs` has top-k or top-p on; without them they cost nothing.
    """
    layers = unstacked(graphdef, params)
    how: dict[str, Any] = {"stop_ids": stop_ids, "filtered": filtered}
    return jax.lax.while_loop(
        lambda state: (state.step < max_new_tokens) & _any(state.running),
        lambda state: advance(graphdef, layers, prompts, knobs, state, **how),
        start(graphdef, layers, prompts, knobs, max_new_tokens=max_new_tokens, **how),
    ).samples


@custom_vmap
def _any(running: Array) -> Array:
    return running.any()


@_any.def_vmap
def _any_of_all(axis_size: int, in_batched: list[bool], running: Array) -> tuple[Array, bool]:
    # One condition for all snapshots: with one each, the loop would copy the caches at every token to keep those of
    # snapshots that are done. Going on changes nothing for these.
    return running.any(), False


def _last_norm(model: Transformer, x: Array) -> Array:
    return rms_norm(x, model.final_norm[...], model.cfg.rms_norm_eps)


def _pinned(keys: Array, values: Array) -> tuple[Array, Array]:
    axes = ("batch", "kv_heads_act", None, None)
    return constrain(keys, axes), constrain(values, axes)
