"""Times the evaluator on the checkpoints and questions of a peer, loading included, and prints one JSON line.

    python scripts/bench/probes.py --checkpoints DIR/ck0 DIR/ck1 --questions ITEMS.json

ITEMS.json has `items` of a question and a policy, and `answers` with {policy} in them, each scored by the mean log-prob
of its tokens behind the chat template around the question. As many checkpoints are scored at once as by default, with
--together also all; the first round fills the compile cache and is not timed.
"""

import argparse
import hashlib
import json
import resource
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import work

from vdjax import config as configs
from vdjax import runtime
from vdjax.data.chat import Rendered
from vdjax.models import hf
from vdjax.probes import evaluator
from vdjax.probes.readouts import Item
from vdjax.setup import setup
from vdjax.train.flops import peak_flops


def questions(asked: dict[str, Any], tokenizer: Any) -> tuple[list[Item], list[list[int]]]:
    """Items, and every prompt with each of its answers as a peer processes them."""
    items, sequences = [], []
    for i, row in enumerate(asked["items"]):
        messages = [{"role": "user", "content": row["question"]}]
        head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt, *both = tokenizer(
            [head, *(head + answer.format(policy=row["policy"]) for answer in asked["answers"])],
            add_special_tokens=False,
        )["input_ids"]
        parts = [prompt, *(tokens[len(prompt) :] for tokens in both)]
        branches = np.repeat(np.arange(len(parts), dtype=np.int8), [len(part) for part in parts])
        rendered = Rendered(np.concatenate(parts).astype(np.int32), branches > 0, branches)
        items.append(Item(i, 0, "statement", "", ("",) * len(both), tuple(asked["answers"]), rendered))
        sequences += both
    return items, sequences


def counted(model: Any, items: list[Item], mesh: jax.sharding.Mesh) -> tuple[float, float, int]:
    """Matmul FLOPs of scoring the items under one checkpoint, bytes that it moves, and calls of the program."""
    plan = evaluator.layout(items, 4, 1)
    stacked = evaluator.stacked_shapes(model.params, 1)
    jitted = jax.jit(evaluator.score, static_argnums=0, static_argnames=("sequences", "chunk"))
    how = {"sequences": plan.shape.sequences, "chunk": model.head_chunk}
    with jax.set_mesh(mesh):
        traced = jitted.trace(model.graphdef, stacked, {}, plan.batches[0], **how)
        calls = len(plan.batches)
        empty = sum(work.skipped(model.cfg, batch["loss_mask"], model.head_chunk) for batch in plan.batches)
        return calls * work.done(traced) - empty, calls * work.moved(traced), calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--together", action="store_true", help="score all checkpoints in one program as well")
    parser.add_argument("--scores", type=Path, help="also write every score to this JSON file")
    flags, overrides = parser.parse_known_args()
    runtime.start()
    config = configs.experiment()
    config.model.path = str(flags.checkpoints[0])
    for flag in overrides:
        configs.override(config, flag)
    made = setup(config)
    items, sequences = questions(json.loads(flags.questions.read_text()), made.tokenizer)
    one = evaluator.size_in_bytes(made.model.params)

    def scores(memory_bytes: float) -> np.ndarray:
        readers = [hf.open_reader(folder, made.model.cfg) for folder in flags.checkpoints]
        sums, counts = evaluator.evaluate(made.model, readers, items, made.mesh, memory_bytes=memory_bytes)
        return sums / counts

    ways = {"default": 0.0} | ({"together": one * len(flags.checkpoints)} if flags.together else {})
    first = {name: scores(memory) for name, memory in ways.items()}
    if flags.scores:
        flags.scores.write_text(json.dumps(first["default"].reshape(len(flags.checkpoints), -1).tolist()))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(flags.repeats):
        for name, memory in ways.items():
            start = time.perf_counter()
            scores(memory)
            seconds[name].append(round(time.perf_counter() - start, 2))
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # before what is counted is compiled
    count, wall, peak = len(flags.checkpoints), float(np.median(seconds["default"])), peak_flops()
    prompts = [len(item.rendered.tokens[item.rendered.branches == 0]) for item in items for _ in item.answers]
    needed = count * work.needed_forward(made.model.cfg, sequences, prompts)
    done, moved, calls = (count * x for x in counted(made.model, items, made.mesh))
    print(
        json.dumps(
            {
                "bench": "probe",
                "trainer": "vdjax",
                "checkpoints": count,
                "prompts": len(items),
                **work.profile(needed, done, moved, calls, wall, peak),
                "seconds": seconds,
                "tokens_scored": sum(len(item.rendered.tokens) for item in items),
                "largest_difference": max(float(np.abs(first["default"] - x).max()) for x in first.values()),
                "peak_rss_mb": peak_rss // 1024,
                "work_digest": hashlib.sha256(json.dumps(sequences).encode()).hexdigest()[:16],
            }
        )
    )


if __name__ == "__main__":
    main()
