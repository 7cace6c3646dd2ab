"""How time and memory grow with length, batch, snapshots and probes; prints one JSON line.

    JAX_PLATFORMS=cpu python scripts/bench/growth.py

A random Llama of 11 million parameters, float32. Of a DPO step, one row of a prompt and two responses at a time: the
time of the step. Of the evaluator, a prompt and two answers a probe: the time of reading all snapshots and scoring them
at once. Times are the least of three; memory is that of the compiled program, arguments and temporaries.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vdjax import config as configs
from vdjax import runtime, sharding
from vdjax.data.chat import Rendered
from vdjax.data.packing import Shape, pack
from vdjax.models import config as model_config
from vdjax.models import hf
from vdjax.models.functional import Model, make_model
from vdjax.models.products import compiler_options
from vdjax.models.transformer import init_params
from vdjax.probes import evaluator
from vdjax.probes.readouts import Item
from vdjax.train import supervised
from vdjax.train.optimizer import make_optimizer
from vdjax.train.stage import device_batch, fresh_state
from vdjax.train.step import make_train_step

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SIZES = {
    "tokens a row": (128, 256, 512, 1024, 2048, 4096),
    "rows a step": (1, 2, 4, 8, 16, 32),
    "snapshots": (1, 2, 4, 8, 16, 32, 64),
    "probes": (8, 16, 32, 64, 128, 256),
}
EVERYTHING = 1e12  # bytes: all snapshots at once


def pair(length: int) -> Rendered:
    """A prompt and two responses of a third each."""
    branches = np.minimum(np.arange(length) * 3 // length, 2).astype(np.int8)
    return Rendered(np.random.default_rng(0).integers(0, 4096, length).astype(np.int32), branches > 0, branches)


def least_seconds(run: Callable[[], Any]) -> float:
    run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def memory(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, int]:
    """The compiled program, and the bytes it needs."""
    compiled = lowered.compile(compiler_options())
    sizes = compiled.memory_analysis()
    return compiled, sizes.argument_size_in_bytes + sizes.temp_size_in_bytes


def train_step(model: Model, params: Any, rows: int, length: int) -> tuple[float, int]:
    stage = configs.stage("dpo", batch_size=rows)
    optimizer = make_optimizer(stage.optimizer, 100)
    shape = Shape(rows, length, 2)
    packed = pack([pair(length)] * rows, [[i] for i in range(rows)], shape)
    batch = {name: value.reshape(rows, 1, *value.shape[1:]) for name, value in packed.items()}
    batch["reference_log_probs"] = np.zeros(batch["tokens"].shape, np.float32)
    arrays = device_batch(batch, sharding.make_mesh())
    state = fresh_state(jax.tree.map(lambda p: p.copy(), params), optimizer, {})
    step = jax.jit(make_train_step(supervised.loss_spec(model, stage, shape), optimizer), donate_argnums=0)
    compiled, size = memory(step.lower(state, {}, arrays))

    def run() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, {}, arrays))

    return least_seconds(run), size


def evaluation(model: Model, folder: Path, snapshots: int, probes: int) -> tuple[float, int]:
    items = [Item(i, 0, "statement", "", ("",) * 2, ("a", "b"), pair(96)) for i in range(probes)]
    readers = [hf.open_reader(folder, model.cfg) for _ in range(snapshots)]
    mesh = evaluator.evaluator_mesh(sharding.make_mesh(), snapshots)
    plan = evaluator.layout(items, 4)
    with jax.set_mesh(mesh):
        score = jax.jit(evaluator.score, static_argnums=0, static_argnames=("sequences", "chunk"))
        how = {"sequences": plan.shape.sequences, "chunk": model.head_chunk}
        loaded = evaluator.load(readers, model, mesh)
        _, size = memory(score.lower(model.graphdef, loaded, {}, plan.batches[0], **how))
        del loaded
    return least_seconds(lambda: evaluator.evaluate(model, readers, items, mesh, memory_bytes=EVERYTHING)), size


def measured() -> Iterator[dict[str, Any]]:
    cfg = model_config.from_hf(SHAPE, where="growth.py")
    model, params = make_model(cfg, configs.experiment().model), init_params(cfg, seed=0)
    with tempfile.TemporaryDirectory() as name, jax.set_mesh(sharding.make_mesh()):
        folder = Path(name) / "model"
        hf.save(params, cfg, folder, hf_config=SHAPE)
        runs: dict[str, Callable[[int], tuple[float, int]]] = {
            "tokens a row": lambda size: train_step(model, params, 1, size),
            "rows a step": lambda size: train_step(model, params, size, 256),
            "snapshots": lambda size: evaluation(model, folder, size, 16),
            "probes": lambda size: evaluation(model, folder, 4, size),
        }
        for what, sizes in SIZES.items():
            for size in sizes:
                seconds, needed = runs[what](size)
                yield {"what": what, "size": size, "s": round(seconds, 4), "MB": round(needed / 1e6, 1)}


def main() -> None:
    runtime.start()
    print(json.dumps({"bench": "growth", "points": list(measured())}))


if __name__ == "__main__":
    main()
