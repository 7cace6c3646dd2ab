"""How time and memory grow with length, batch, snapshots and probes: prints a table and draws a figure.

    JAX_PLATFORMS=cpu python scripts/bench/growth.py --figure growth.png

A random Llama of 11 million parameters, float32. Of a train step (DPO) the time and the memory of its temporaries; of
the evaluator the time of reading and scoring, and the parameters it holds. Each time is the least of three. *growth* is
the exponent from one size to the next: 1 is a straight line, 2 a square.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import pandas as pd

from vdjax import config as configs
from vdjax import sharding
from vdjax.data.chat import Rendered
from vdjax.data.packing import Shape, pack
from vdjax.models import config as model_config
from vdjax.models import hf
from vdjax.models.functional import make_model
from vdjax.models.products import compiler_options
from vdjax.models.transformer import init_params
from vdjax.probes import evaluator
from vdjax.probes.readouts import Item
from vdjax.studies.tables import to_markdown
from vdjax.train import supervised
from vdjax.train.optimizer import make_optimizer
from vdjax.train.stage import device_batch, fresh_state
from vdjax.train.step import make_train_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

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
MEMORY = {
    "rows a step": "temporaries",
    "tokens a row": "temporaries",
    "snapshots": "parameters",
    "probes": "parameters",
}


def pair(length: int) -> Rendered:
    """A prompt and two responses of a third each."""
    branches = np.minimum(np.arange(length) * 3 // length, 2).astype(np.int8)
    return Rendered(np.random.default_rng(0).integers(0, 4096, length).astype(np.int32), branches > 0, branches)


def least(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of three runs, after one that compiles."""
    run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def train_step(model: Any, params: Any, rows: int, length: int) -> tuple[float, float]:
    """Seconds, and MB of temporaries, of a DPO step with one row at a time."""
    stage = configs.stage("dpo", batch_size=rows)
    optimizer = make_optimizer(stage.optimizer, 100)
    shape = Shape(rows, length, 2)
    packed = pack([pair(length)] * rows, [[i] for i in range(rows)], shape)
    batch = {name: value.reshape(rows, 1, *value.shape[1:]) for name, value in packed.items()}
    batch["reference_log_probs"] = np.zeros(batch["tokens"].shape, np.float32)
    arrays = device_batch(batch, sharding.make_mesh())
    step = jax.jit(make_train_step(supervised.loss_spec(model, stage, shape), optimizer))
    state = fresh_state(params, optimizer, {})
    compiled = step.lower(state, {}, arrays).compile(compiler_options())
    seconds = least(lambda: jax.block_until_ready(compiled(state, {}, arrays)))
    memory = compiled.memory_analysis()
    return seconds, memory.temp_size_in_bytes / 1e6 if memory else math.nan


def evaluation(model: Any, folder: Path, snapshots: int, probes: int) -> tuple[float, float]:
    """Seconds, and MB of parameters held, of `probes` questions with three answers under `snapshots` at once."""
    items = [Item(i, 0, "statement", "", ("",) * 2, ("a", "b"), pair(96)) for i in range(probes)]

    def run() -> None:
        readers = [hf.open_reader(folder, model.cfg) for _ in range(snapshots)]
        evaluator.evaluate(model, readers, items, sharding.make_mesh())

    return least(run), snapshots * evaluator.size_in_bytes(model.params) / 1e6


def measure() -> Iterator[dict[str, Any]]:
    cfg = model_config.from_hf(SHAPE, where="growth.py")
    model, params = make_model(cfg, configs.experiment().model), init_params(cfg, seed=0)
    with tempfile.TemporaryDirectory() as name, jax.set_mesh(sharding.make_mesh()):
        folder = Path(name) / "model"
        hf.save(params, cfg, folder, hf_config=SHAPE)
        runs: dict[str, Callable[[int], tuple[float, float]]] = {
            "tokens a row": lambda size: train_step(model, params, 1, size),
            "rows a step": lambda size: train_step(model, params, size, 256),
            "snapshots": lambda size: evaluation(model, folder, size, 16),
            "probes": lambda size: evaluation(model, folder, 4, size),
        }
        for what, sizes in SIZES.items():
            for size in sizes:
                seconds, memory = runs[what](size)
                yield {"what": what, "size": size, "s": seconds, "MB": memory}


def with_growth(found: pd.DataFrame) -> pd.DataFrame:
    """The exponents of time and memory by size, from one size of a kind to the next."""
    out = found.copy()
    for name in ("s", "MB"):
        before = found.groupby("what")[name].shift()
        ratio = np.log(found["size"] / found.groupby("what")["size"].shift())
        out[f"growth of {name}"] = np.log(found[name] / before) / ratio
    return out


def draw(found: pd.DataFrame, file: Path) -> None:
    drawn, panels = plt.subplots(2, len(SIZES), figsize=(12, 5), layout="constrained", sharex="col")
    for column, (what, part) in enumerate(found.groupby("what", sort=False)):
        for row, (name, unit) in enumerate({"s": "s", "MB": f"MB of {MEMORY[str(what)]}"}.items()):
            axes = panels[row, column]
            axes.loglog(part["size"], part[name], "o-", color="black", markersize=4)
            axes.loglog(part["size"], part[name].iloc[-1] * part["size"] / part["size"].iloc[-1], ":", color="0.5")
            axes.set_ylabel(unit)
        panels[1, column].set_xlabel(str(what))
    drawn.suptitle("Time and memory by size; dotted: a straight line through the last point")
    drawn.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, required=True)
    flags = parser.parse_args()
    found = with_growth(pd.DataFrame(measure()))
    draw(found, flags.figure)
    shown = found.map(
        lambda x: "" if isinstance(x, float) and math.isnan(x) else f"{x:.3g}" if isinstance(x, float) else x
    )
    print(to_markdown(shown.astype(str)))


if __name__ == "__main__":
    main()
