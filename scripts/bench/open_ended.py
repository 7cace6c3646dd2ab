"""Times sampling responses from K snapshots at once, loading included; prints one JSON line.

    python scripts/bench/open_ended.py --model DIR --rows ROWS.jsonl --snapshots 4 --new_tokens 64

A response is sampled behind the prompt_ids of each row, from each snapshot. The snapshots are the same checkpoint read
K times: what they hold does not change the work. No token stops a response, so that every call makes snapshots * rows *
new_tokens tokens. One call of each way is not timed; then they take turns. `work_digest` is the SHA-256 of the prompts.
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import jax
import numpy as np
import work

from vdjax import config as configs
from vdjax import runtime
from vdjax.models import hf
from vdjax.probes import evaluator, open_ended
from vdjax.sampling import Samples, Sampling
from vdjax.setup import setup
from vdjax.train.flops import peak_flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--snapshots", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--apart", action="store_true", help="sample from the snapshots one at a time as well")
    flags = parser.parse_args()
    runtime.start()

    config = configs.experiment()
    config.model.path = str(flags.model)
    made = setup(config)
    prompts = [json.loads(line)["prompt_ids"] for line in flags.rows.read_text().splitlines()]
    seeds = [(i,) for i in range(len(prompts))]
    reader = hf.open_reader(flags.model, made.model.cfg)
    one = 3 * evaluator.size_in_bytes(made.model.params)  # less than two copies of two snapshots

    sampling = Sampling(flags.new_tokens, 0.7)

    def sample(memory_bytes: float) -> Samples:
        readers = [reader] * flags.snapshots
        return open_ended.generate(
            made.model, readers, prompts, seeds, sampling, (), made.mesh, memory_bytes=memory_bytes
        )

    ways = {"together": 0.0} | ({"apart": float(one)} if flags.apart else {})
    first = {name: sample(size) for name, size in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(flags.repeats):
        for name, size in ways.items():
            start = time.perf_counter()
            sample(size)
            seconds[name].append(round(time.perf_counter() - start, 2))
    count = flags.snapshots * len(prompts) * flags.new_tokens
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    counted = work.sampled(made.model, prompts, sampling, open_ended.ROWS_ON_CPU, made.mesh)
    profile = work.profile(*(flags.snapshots * x for x in counted), medians["together"], peak_flops())
    print(
        json.dumps(
            {
                "bench": "open_ended",
                "snapshots": flags.snapshots,
                "prompts": len(prompts),
                "prompt_tokens": sum(map(len, prompts)),
                "new_tokens": flags.new_tokens,
                "work_digest": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
                "seconds": seconds,
                **profile,
                "new_tokens_per_s": {name: round(count / value, 1) for name, value in medians.items()},
                "same_tokens": min(float((first["together"].tokens == x.tokens).mean()) for x in first.values()),
                "devices": len(jax.devices()),
                "load_avg": [round(x, 2) for x in os.getloadavg()],
            }
        )
    )


if __name__ == "__main__":
    main()
