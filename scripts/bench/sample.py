"""Times vdjax's sampler on given prompts, and prints one JSON line that can be held beside another sampler's.

    python scripts/bench/sample.py --model DIR --rows ROWS.jsonl --batch 16 --new_tokens 64 --temperature 0.7

A row has prompt_ids (and may have more); the first `batch` of the file are sampled behind in one batch. No token stops
a row, so that every call makes batch * new_tokens tokens. `--steps` calls are timed, after two that are not.
`work_digest` is the SHA-256 of the prompts. --config.model and --config.mesh flags are those of an experiment.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import work

from vdjax import config as configs
from vdjax import sharding
from vdjax.models import config as model_config
from vdjax.models import hf
from vdjax.models.functional import make_model, shardings
from vdjax.models.products import few_rows_options
from vdjax.sampling import Sampling, generate
from vdjax.train.flops import peak_flops


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    flags, overrides = parser.parse_known_args()
    config = configs.experiment()
    for flag in overrides:
        configs.override(config, flag)

    rows = [json.loads(line)["prompt_ids"] for line in flags.rows.read_text().splitlines()][: flags.batch]
    if len(rows) < flags.batch:
        parser.error(f"{flags.rows}: {flags.batch} rows needed, {len(rows)} there")
    cfg = model_config.from_hf(hf.read_config(flags.model), where=str(flags.model))
    model, mesh = make_model(cfg, config.model), sharding.make_mesh(**config.mesh.to_dict())
    params = hf.place(hf.open_reader(flags.model, cfg), model.params, shardings(model, mesh))
    peak = peak_flops()

    def how(new_tokens: int, temperature: float = flags.temperature) -> Sampling:
        return Sampling(new_tokens, temperature, flags.top_p, flags.top_k)

    def sample(*to: Any) -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        out = generate(model, params, rows, list(range(len(rows))), how(*to), (), mesh, rows=flags.batch)
        return time.perf_counter() - start, out.tokens.tolist()

    with jax.set_mesh(mesh):
        compiling = [sample(n)[0] for n in (flags.new_tokens, flags.new_tokens, 1)]
        cpu, wall = cpu_seconds(), time.perf_counter()
        full = [sample(flags.new_tokens)[0] for _ in range(flags.steps)]
        cores = (cpu_seconds() - cpu) / (time.perf_counter() - wall)
        first = [sample(1)[0] for _ in range(flags.steps)]
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # before what is counted is compiled
        greedy = sample(flags.new_tokens, 0.0)[1]
    made, seconds, first_seconds = flags.batch * flags.new_tokens, statistics.median(full), statistics.median(first)
    later = flags.new_tokens - 1
    counted = work.sampled(model, rows, how(flags.new_tokens), flags.batch, mesh, few_rows_options)
    profile = work.profile(*counted, seconds, peak)
    print(
        json.dumps(
            {
                "bench": "generate",
                "trainer": "vdjax",
                "dtype": config.model.compute_dtype,
                "batch": flags.batch,
                "new_tokens": flags.new_tokens,
                "temperature": flags.temperature,
                "top_p": flags.top_p,
                "top_k": flags.top_k,
                "prompt_tokens": sum(map(len, rows)),
                "calls_s": [round(s, 3) for s in full],
                "first_token_s": [round(s, 3) for s in first],
                "compile_s": round(compiling[0] - seconds, 1),
                "new_tokens_per_s": round(made / seconds, 2),
                "new_tokens_per_s_min_max": [round(made / max(full), 2), round(made / min(full), 2)],
                "decode_tokens_per_s": round(flags.batch * later / (seconds - first_seconds), 2),
                "ms_per_decode_step": round(1000 * (seconds - first_seconds) / later, 2),
                "peak_rss_mb": peak_rss // 1024,
                "cpu_cores_used": round(cores, 2),
                "greedy_first_8": [row[:8] for row in greedy],
                "work_digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
                **profile,
                "load_avg": [round(x, 2) for x in os.getloadavg()],
            }
        )
    )


if __name__ == "__main__":
    main()
