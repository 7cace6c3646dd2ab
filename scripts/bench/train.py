"""Times vdjax's train step on given rows, and prints one JSON line that can be held beside another trainer's.

    python scripts/bench/train.py --model DIR --rows ROWS.jsonl --objective dpo --batch 4 --steps 6 --warmup 2

A row is {prompt_ids, chosen_ids, rejected_ids}; SFT uses the first two. Rows are taken in file order, `batch` a step.
`real_tokens_per_s` counts the tokens that a program without shared prompts would process (for DPO the prompt twice),
so that the figure means the same everywhere; `work_digest` is the SHA-256 of those sequences, warm-up included.
"""

import argparse
import hashlib
import json
import math
import resource
import time
from pathlib import Path

import jax
import numpy as np
import work

from vdjax import config as configs
from vdjax import sharding
from vdjax.data import pipeline
from vdjax.data.chat import Rendered
from vdjax.models import config as model_config
from vdjax.models import hf
from vdjax.models.functional import make_model, shardings
from vdjax.models.products import compiler_options, jit
from vdjax.train import step as train_step
from vdjax.train import supervised
from vdjax.train.flops import peak_flops, train_flops
from vdjax.train.optimizer import make_optimizer
from vdjax.train.stage import device_batch, facts_of, fresh_state
from vdjax.train.step import make_score_step, make_train_step, microbatch_sizes


def dataset(rows: list[dict], objective: str) -> pipeline.Dataset:
    examples = []
    for row in rows:
        parts = [row["prompt_ids"], row["chosen_ids"]] + ([row["rejected_ids"]] if objective != "sft" else [])
        branches = np.repeat(np.arange(len(parts), dtype=np.int8), [len(p) for p in parts])
        mask = branches > 0
        mask[0] = False
        branches = branches if objective != "sft" else np.ones_like(branches)
        examples.append(Rendered(np.concatenate(parts).astype(np.int32), mask, branches))
    return pipeline.of_rendered(examples)


def sequences(rows: list[dict], batch: int, objective: str) -> list[list[int]]:
    """The sequences in the order in which a padded trainer meets them: by batch, chosen before rejected."""
    out = []
    for start in range(0, len(rows), batch):
        for key in ("chosen_ids", "rejected_ids") if objective != "sft" else ("chosen_ids",):
            out += [r["prompt_ids"] + r[key] for r in rows[start : start + batch]]
    return out


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--objective", choices=("sft", "dpo", "simpo"), required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--microbatch_rows", type=int, default=1)
    parser.add_argument("--row_length", type=int, default=0)
    return parser, *parser.parse_known_args()


def main() -> None:
    parser, flags, overrides = arguments()
    config = configs.experiment()
    for flag in overrides:
        configs.override(config, flag)

    count = (flags.steps + flags.warmup) * flags.batch
    rows = [json.loads(line) for line in flags.rows.read_text().splitlines()][:count]
    if len(rows) < count:
        parser.error(f"{flags.rows}: {count} rows needed, {len(rows)} there")
    cfg = model_config.from_hf(hf.read_config(flags.model), where=str(flags.model))
    model, mesh = make_model(cfg, config.model), sharding.make_mesh()
    params = hf.place(hf.open_reader(flags.model, cfg), model.params, shardings(model, mesh))
    rate = {"learning_rate": 2e-5 if flags.objective == "sft" else 1e-6, "schedule": "constant", "warmup": 0.0}
    stage = configs.stage(flags.objective, optimizer=rate, batch_size=flags.batch)
    data = dataset(rows, flags.objective)
    steps = pipeline.in_order(len(data), flags.batch)
    shape = pipeline.plan(data, steps, row_length=flags.row_length, row_multiple=flags.microbatch_rows)
    optimizer = make_optimizer(stage.optimizer, flags.steps + flags.warmup)
    spec = supervised.loss_spec(model, stage, shape)
    peak = peak_flops()
    with jax.set_mesh(mesh):
        beside, reference_seconds = {}, 0.0
        if flags.objective == "dpo":
            beside["reference_log_probs"], reference_seconds = reference_pass(model, params, stage, data, mesh)
        batches = pipeline.batches(data, steps, shape, flags.microbatch_rows, beside)
        state = fresh_state(params, optimizer, {})
        first = device_batch(batches[0], mesh)
        start = time.perf_counter()
        lowered = jax.jit(make_train_step(spec, optimizer), donate_argnums=0).lower(state, {}, first)
        step = lowered.compile(compiler_options())
        compile_seconds = time.perf_counter() - start
        seconds, logs = [], []
        for i in range(len(steps)):
            start = time.perf_counter()
            state, metrics = step(state, {}, device_batch(batches[i], mesh))
            logs.append({k: float(v) for k, v in metrics.items()})
            seconds.append(time.perf_counter() - start)
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # before what is counted is compiled
        measured = [batches[i] for i in range(flags.warmup, len(steps))]
        done, moved = counted(cfg, spec, optimizer, state, measured, mesh)
    wall, timed = sum(seconds[flags.warmup :]), rows[flags.warmup * flags.batch :]
    real = sum(map(len, sequences(timed, flags.batch, flags.objective)))
    shared = int(data.offsets[-1] - data.offsets[flags.warmup * flags.batch])
    share = reference_seconds * len(timed) / len(rows)
    facts = facts_of(measured, np.zeros(0))
    used_rows = sum(int((batch["segment_ids"] > 0).any(-1).sum()) for batch in measured)  # empty ones are skipped
    needed = train_flops(cfg, facts.tokens, facts.scored, facts.attended)
    digest = json.dumps([[int(t) for t in s] for s in sequences(rows, flags.batch, flags.objective)])
    print(
        json.dumps(
            {
                "bench": flags.objective,
                "trainer": "vdjax",
                "dtype": config.model.compute_dtype,
                "batch": flags.batch,
                "row": shape.length,
                "examples_per_s": round(len(timed) / wall, 4),
                "examples_per_s_with_reference": round(len(timed) / (wall + share), 4),
                "real_tokens_per_s": round(real / wall, 2),
                "tokens_processed_per_s": round(shared / wall, 2),
                "padding": round(1 - facts.tokens / (used_rows * shape.length), 4),
                **work.profile(needed, done, moved, len(measured), wall, peak),
                "step_s": [round(s, 3) for s in seconds],
                "compile_s": round(compile_seconds, 1),
                "reference_s": round(reference_seconds, 2),
                "peak_rss_mb": peak_rss // 1024,
                "per_step": {k: [round(log[k], 6) for log in logs] for k in ("loss", "grad_norm")},
                "work_digest": hashlib.sha256(digest.encode()).hexdigest()[:16],
            }
        )
    )


def counted(cfg, spec, optimizer, state, batches, mesh):
    """Matmul FLOPs of the steps of these batches, and bytes that they move, had every microbatch been whole."""
    first = device_batch(batches[0], mesh)
    axis, sizes = microbatch_sizes(state.params, *first["tokens"].shape[1:])
    train_step.LITTLE_WORK = math.inf  # one size: that of the batch

    def trace(batch):
        return jax.jit(make_train_step(spec, optimizer), donate_argnums=0).trace(state, {}, batch)

    def one(size):
        return {name: x[:1, :size] if axis == 0 else x[:1, :, :size] for name, x in first.items()}

    flops = [work.done(trace(one(size))) for size in sizes]
    done = 0.0
    for batch in batches:
        for segments, mask in zip(batch["segment_ids"], batch["loss_mask"], strict=True):
            if mask.any():
                used = np.flatnonzero((segments > 0).any(axis=1 - axis))[-1] + 1
                i = np.searchsorted(sizes, used)
                part = mask[: sizes[i]] if axis == 0 else mask[:, : sizes[i]]
                done += flops[i] - 4 * work.skipped(cfg, part, spec.head_chunk)  # logits twice, two gradients
    return done, len(batches) * work.moved(trace(first))


def reference_pass(model, params, stage, data, mesh):
    """Reference log-probs of all rows, and the seconds they took without compilation."""
    steps = pipeline.in_order(len(data), stage.batch_size)
    shape = pipeline.plan(data, steps, row_length=0, row_multiple=1)
    step = jit(make_score_step(supervised.loss_spec(model, stage, shape)))
    batches = pipeline.batches(data, steps, shape, 1)

    def run(batch):
        return sharding.fetch(step(params, device_batch(batch, mesh)))

    run(batches[0])  # compiles
    start = time.perf_counter()
    return pipeline.score(data, batches, run), time.perf_counter() - start


if __name__ == "__main__":
    main()
