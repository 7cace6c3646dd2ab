"""Times sampling responses from K snapshots at once, loading included; prints one JSON line.

    python scripts/bench/open_ended.py --model DIR --snapshots 4 --probes 8 --samples 2 --new_tokens 32

The snapshots are the same checkpoint read K times: what they hold does not change the work. No token stops a response,
so that every call makes snapshots * probes * samples * new_tokens tokens. One call of each way is not timed; then they
take turns.
"""

import argparse
import json
import os
import time
from pathlib import Path

import jax
import numpy as np

from vdjax import config as configs
from vdjax import runtime
from vdjax.models import hf
from vdjax.probes import evaluator, open_ended, readouts, sets
from vdjax.sampling import Samples, Sampling
from vdjax.setup import setup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--snapshots", type=int, default=4)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--apart", action="store_true", help="sample from the snapshots one at a time as well")
    flags = parser.parse_args()
    runtime.start()

    config = configs.experiment()
    config.model.path = str(flags.model)
    made = setup(config)
    probes = sets.load("builtin")[:: 528 // flags.probes][: flags.probes]
    variants = readouts.variants(config.probes)
    asked = open_ended.prompts(probes, variants, made.tokenizer, made.template, config.probes.max_length)
    prompts = [prompt.tokens for prompt in asked for _ in range(flags.samples)]
    seeds = [(p, s) for p in range(len(asked)) for s in range(flags.samples)]
    reader = hf.open_reader(flags.model, made.model.cfg)
    memory = evaluator.default_memory()
    one = 3 * evaluator.size_in_bytes(made.model.params)  # less than two copies of two snapshots

    def sample(memory_bytes: float) -> Samples:
        readers, sampling = [reader] * flags.snapshots, Sampling(flags.new_tokens, 0.7)
        return open_ended.generate(
            made.model, readers, prompts, seeds, sampling, (), made.mesh, memory_bytes=memory_bytes
        )

    ways = {"together": memory} | ({"apart": float(one)} if flags.apart else {})
    first = {name: sample(size) for name, size in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(flags.repeats):
        for name, size in ways.items():
            start = time.perf_counter()
            sample(size)
            seconds[name].append(round(time.perf_counter() - start, 2))
    count = flags.snapshots * len(prompts) * flags.new_tokens
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "bench": "open_ended",
                "snapshots": flags.snapshots,
                "prompts": len(prompts),
                "new_tokens": flags.new_tokens,
                "seconds": seconds,
                "new_tokens_per_s": {name: round(count / value, 1) for name, value in medians.items()},
                "same_tokens": min(float((first["together"].tokens == x.tokens).mean()) for x in first.values()),
                "devices": len(jax.devices()),
                "load_avg": [round(x, 2) for x in os.getloadavg()],
            }
        )
    )


if __name__ == "__main__":
    main()
