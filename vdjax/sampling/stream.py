"""Sampling one response token by token, for people who wait for it."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from vdjax import sharding
from vdjax.models.functional import Model
from vdjax.models.products import few_rows_options, jit
from vdjax.sampling.decode import advance, start, unstacked
from vdjax.sampling.generate import Sampling, check, filtered, knobs, layout, put

SHORTEST = 128  # padded width of a prompt; it doubles as a conversation grows, and each doubling compiles


def streamer(
    model: Model, params: Any, sampling: Sampling, stop_ids: Sequence[int], mesh: jax.sharding.Mesh
) -> Callable[[Sequence[int], tuple[int, ...]], Iterator[int]]:
    """`stream(prompt, seed)`: the tokens that `generate` samples, stop token included, each when it is there.

    Call both under `jax.set_mesh(mesh)`.
    """
    check(sampling)
    graphdef, rows = model.graphdef, sharding.batch_shards(mesh)
    how: dict[str, Any] = {"stop_ids": tuple(stop_ids), "filtered": filtered(sampling)}

    @jax.jit
    def parts(params: Any) -> tuple[Any, list[Any]]:
        layers = unstacked(graphdef, params)
        return layers[0], [layer["layers"] for layer in layers]

    shared, each = parts(params)  # a program's results are arrays of their own: of the embeddings, one for every layer
    layers = [shared | {"layers": layer} for layer in each]
    first = jit(functools.partial(start, graphdef, max_new_tokens=sampling.max_new_tokens, **how), few_rows_options)
    following = jit(functools.partial(advance, graphdef, **how), few_rows_options, donate_argnums=3)

    def stream(prompt: Sequence[int], seed: tuple[int, ...]) -> Iterator[int]:
        width = max(SHORTEST, 2 ** (len(prompt) - 1).bit_length())
        batch = put(layout([prompt], np.array([seed]), (rows, width), rows), mesh)
        state = first(layers, batch, knobs(sampling))
        yield int(sharding.fetch(state.last)[0])
        for _ in range(sampling.max_new_tokens - 1):
            if not sharding.fetch(state.running)[0]:
                return
            state = following(layers, batch, knobs(sampling), state)
            yield int(sharding.fetch(state.last)[0])

    return stream
