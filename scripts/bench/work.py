"""What a benchmark's work needs, what a program does for it, and the seconds that takes at this machine's rates."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdjax.models.config import ModelConfig
from vdjax.models.functional import Model
from vdjax.models.products import Options, compiler_options
from vdjax.planning import hlo
from vdjax.planning.operations import matmul_flops
from vdjax.sampling.generate import Sampling, batches_of, layout, trace
from vdjax.train.flops import train_flops


def needed_forward(cfg: ModelConfig, sequences: Sequence[Sequence[int]], begin: Sequence[int]) -> float:
    """Matmul FLOPs of scoring the tokens of each sequence from its place `begin` on, whatever sequences share computed
    once: no program needs less."""
    ids: dict[tuple[int, int], int] = {}  # of a beginning, by that of the beginning before it and its last token
    attended, scored = 0, set[tuple[int, int]]()
    for tokens, first in zip(sequences, begin, strict=True):
        at = -1
        for place, token in enumerate(tokens):
            if place >= first:
                scored.add((at, token))
            if place + 1 == len(tokens):
                break
            if (at, token) not in ids:
                attended += place + 1
            at = ids.setdefault((at, token), len(ids))
    return train_flops(cfg, len(ids), len({at for at, _ in scored}), attended) / 3


def copy_rate() -> float:
    """Bytes a second that an elementwise program reads and writes in place, over 512 MB, measured now."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = add(jnp.ones(2**27)).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        x = add(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


def moved(traced: jax.stages.Traced, trips: int = 1, options: Options = compiler_options) -> float:
    """Bytes that the operands and results of a program's instructions have: what memory moves where caches keep none.

    Args:
      trips: of loops whose end depends on data.
    """
    return hlo.read(traced.lower().compile(options()).as_text(), {}, trips).hbm_bytes


def done(traced: jax.stages.Traced, trips: int = 1) -> float:
    """Matmul FLOPs of one run of a program, on what it pads too."""
    return matmul_flops(traced.jaxpr.jaxpr, trips)


def skipped(cfg: ModelConfig, mask: np.ndarray, chunk: int) -> float:
    """FLOPs of the head's product on the chunks of places that hold no scored token, which `done` counts too."""
    chunk = min(chunk, mask.size)
    empty = -(-mask.size // chunk) - -(-int(mask.sum()) // chunk)
    return 2.0 * empty * chunk * cfg.hidden_size * cfg.vocab_size


def sampled(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    rows: int,
    mesh: jax.sharding.Mesh,
    options: Options = compiler_options,
) -> tuple[float, float, float, int]:
    """Of sampling behind prompts on one device: FLOPs needed and done, bytes moved, calls."""
    new = sampling.max_new_tokens
    # No two rows say the same.
    whole = [[*prompt, *range(-new * (i + 1), -new * i)] for i, prompt in enumerate(prompts)]
    needed = needed_forward(model.cfg, whole, [len(prompt) for prompt in prompts])
    did, went, calls = 0.0, 0.0, 0
    with jax.set_mesh(mesh):
        for places, shape in batches_of([len(prompt) for prompt in prompts], rows, 1):
            batch = layout([prompts[i] for i in places], np.zeros((len(places), 1)), shape)
            traced = trace(model, model.params, batch, sampling, ())
            did, went, calls = did + done(traced, new - 1), went + moved(traced, new - 1, options), calls + 1
    return needed, did, went, calls


def profile(needed: float, done: float, moved: float, calls: int, wall: float, peak: float) -> dict[str, Any]:
    """Of what was timed: FLOPs and bytes, the seconds of each at the machine's rates, and those it took.

    Args:
      calls: of compiled programs.
      peak: FLOP/s of a float32 matmul.
    """
    rate = copy_rate()
    return {
        "needed_gflop": round(needed / 1e9, 1),
        "done_gflop": round(done / 1e9, 1),
        "moved_gb": round(moved / 1e9, 1),
        "calls": calls,
        "bound_s": round(needed / peak, 3),
        "done_s": round(done / peak, 3),
        "moved_s": round(moved / rate, 3),
        "wall_s": round(wall, 3),
        "utilisation": round(needed / wall / peak, 4),
        "matmul_gflops": round(peak / 1e9),
        "copy_gb_per_s": round(rate / 1e9, 1),
    }
