"""Sampling behind any number of prompts: batches of few shapes, and results in the order of the prompts."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdjax import sharding
from vdjax.data import packing
from vdjax.errors import UserError
from vdjax.models.functional import Model
from vdjax.models.products import FEW_ROWS, few_rows_options, jit
from vdjax.sampling.decode import Knobs, Prompts, Samples, decode

ROWS = 32  # of a batch, for each of the batch's shards; on CPU FEW_ROWS, the most that its fast product takes
STATIC = ("max_new_tokens", "stop_ids", "filtered")  # arguments of `decode` that a program is compiled for


class Sampling(NamedTuple):
    """How to sample. Only another number of tokens, or a first use of top-p or top-k, compiles another program."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | Sequence[tuple[int, ...]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    mesh: jax.sharding.Mesh,
    *,
    rows: int = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda batches, total: batches,
) -> Samples:
    """Samples a response to every prompt; call it under `jax.set_mesh(mesh)`.

    What a row samples depends on the parameters, its prompt, its seed and `sampling` alone, not on the other rows,
    their order, how they are batched or on how many devices: up to the rounding of logits, which can decide between
    two tokens with a probability of about 1e-6.

    Args:
      params: in the shardings of `functional.shardings`.
      prompts: token ids.
      seeds: for each prompt one number, or a tuple of numbers (such as seed, step, example) of one length for all;
        each at least 0 and below 2^32.
      stop_ids: tokens that end a response; they are part of it. Those in a prompt do not count.
      rows: prompts a batch; 0 takes 32 for each batch shard, on CPU 64. Prompts of like length share a batch.
      progress: wraps the loop over batches; is told their number.

    Returns:
      NumPy arrays, in the order of the prompts.

    Raises:
      UserError: an empty prompt, a token or seed out of range, or a wrong value in `sampling`.
    """
    check(sampling)
    numbers = np.array([seed if isinstance(seed, Sequence) else (seed,) for seed in seeds], np.int64)
    check_rows(prompts, numbers, stop_ids, model.cfg.vocab_size)
    shards = sharding.batch_shards(mesh)
    out = Samples(
        np.zeros((len(prompts), sampling.max_new_tokens), np.int32),
        np.zeros(len(prompts), np.int32),
        np.zeros((len(prompts), sampling.max_new_tokens), np.float32),
        np.zeros(len(prompts), bool),
    )
    rows = rows or shards * (FEW_ROWS if jax.default_backend() == "cpu" else ROWS)
    batches = list(batches_of([len(prompt) for prompt in prompts], rows, shards))
    for places, shape in progress(batches, len(batches)):
        batch = put(layout([prompts[i] for i in places], numbers[places], shape, shards), mesh)
        samples = run(model, params, batch, sampling, stop_ids)
        for whole, part in zip(out, samples, strict=True):
            whole[places] = sharding.fetch(part)[: len(places)]
    return out


def run(model: Model, params: Any, batch: Prompts, sampling: Sampling, stop_ids: Sequence[int]) -> Samples:
    """One batch, compiled once for its shape. Results are global arrays."""
    return _run(model.graphdef, params, batch, knobs(sampling), **_statics(sampling, stop_ids))


def trace(model: Model, params: Any, batch: Prompts, sampling: Sampling, stop_ids: Sequence[int]) -> jax.stages.Traced:
    """What `run` compiles, of shapes in place of parameters and batch."""
    shapes = jax.eval_shape(lambda: knobs(sampling))
    return _traced.trace(model.graphdef, params, batch, shapes, **_statics(sampling, stop_ids))


def _statics(sampling: Sampling, stop_ids: Sequence[int]) -> dict[str, Any]:
    how = {"max_new_tokens": sampling.max_new_tokens, "filtered": filtered(sampling)}
    return how | {"stop_ids": tuple(stop_ids)}


_run = jit(decode, few_rows_options, static_argnums=0, static_argnames=STATIC)
_traced = jax.jit(decode, static_argnums=0, static_argnames=STATIC)  # for any platform


def knobs(sampling: Sampling) -> Knobs:
    return Knobs(jnp.float32(sampling.temperature), jnp.float32(sampling.top_p), jnp.int32(sampling.top_k))


def filtered(sampling: Sampling) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0


def bucket(length: int) -> int:
    """The padded width of prompts of at most `length` tokens, at least 16."""
    return rounded(length, 16)


def rounded(number: int, least: int) -> int:
    """Up to the next of four sizes from one power of two to the next; to multiples of `least` where these are fewer."""
    step = max(least, 2 ** ((number - 1).bit_length() - 3))
    return -(-number // step) * step


def layout(prompts: Sequence[Sequence[int]], seeds: np.ndarray, shape: tuple[int, int], groups: int = 1) -> Prompts:
    """A batch of `shape` [rows, width]: each group's prompts packed into a multiple of an eighth of its rows.

    Equal prompts of a group are packed once. Rows without a prompt have the length 0.
    """
    (rows, width), each = shape, shape[0] // groups
    parts = [[tuple(prompt) for prompt in prompts[start : start + each]] for start in range(0, rows, each)]
    distinct = [list(dict.fromkeys(part)) for part in parts]
    packs = [packing.best_fit([len(prompt) for prompt in part], width) for part in distinct]
    step = max(1, each // 8)
    grid = (groups, -(-max(map(len, packs)) // step) * step, width)
    tokens, positions, segments = (np.zeros(grid, np.int32) for _ in range(3))
    places, lengths = np.zeros((groups, each, width), np.int32), np.zeros(rows, np.int32)
    for g, pack in enumerate(packs):
        starts: dict[tuple[int, ...], int] = {}
        for r, items in enumerate(pack):
            at = 0
            for number, prompt in enumerate((distinct[g][i] for i in items), start=1):
                here = slice(at, at + len(prompt))
                tokens[g, r, here], positions[g, r, here], segments[g, r, here] = prompt, range(len(prompt)), number
                starts[prompt], at = r * width + at, here.stop
        for row, prompt in enumerate(parts[g]):
            places[g, row, width - len(prompt) :] = starts[prompt] + np.arange(len(prompt))
            lengths[g * each + row] = len(prompt)
    numbers = np.zeros((rows, seeds.shape[1]), np.uint32)
    numbers[: len(seeds)] = seeds
    return Prompts(tokens, positions, segments, places, lengths, numbers)


def put(batch: Prompts, mesh: jax.sharding.Mesh) -> Prompts:
    return Prompts(*(sharding.put_global(x, sharding.rows_sharding(mesh, x.ndim)) for x in batch))


def batches_of(lengths: Sequence[int], rows: int, shards: int) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Indices of each batch and its shape [rows, width], longest prompts first: what lacks memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = math.ceil(len(order) / rows)
    size = math.ceil(len(order) / max(count, 1) / shards)
    size = min(rounded(max(size, 1), 1), math.ceil(rows / shards)) * shards
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield places, (size, bucket(lengths[places[0]]))


def check(sampling: Sampling) -> None:
    """UserError for values that no sampling can have."""
    wants = {
        "max_new_tokens": (sampling.max_new_tokens >= 1, "at least 1"),
        "temperature": (0 <= sampling.temperature < math.inf, "at least 0, where 0 takes the most likely token"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1, where 1 is off"),
        "top_k": (sampling.top_k >= 0, "at least 0, where 0 is off"),
    }
    for name, (good, wanted) in wants.items():
        if not good:
            raise UserError(f"{name} is {getattr(sampling, name)}; expected {wanted}")


def check_rows(prompts: Sequence[Sequence[int]], seeds: np.ndarray, stop_ids: Sequence[int], vocab_size: int) -> None:
    if len(prompts) != len(seeds):
        raise UserError(f"{len(prompts)} prompts, but {len(seeds)} seeds")
    if seeds.size and (seeds.min() < 0 or seeds.max() >= 2**32):
        raise UserError("seeds must be at least 0 and below 2^32")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} has no token, and nothing can be sampled behind nothing")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(f"prompt {i}: token ids must be in [0, {vocab_size})")
    if any(not 0 <= token < vocab_size for token in stop_ids):
        raise UserError(f"stop ids {tuple(stop_ids)} must be in [0, {vocab_size})")
