"""Trains a small model under every kind of layout of eight simulated devices, and writes what differs from one device.

    python scripts/make_layouts.py --out docs/layouts.md

Ten DPO steps of the smoke config's model on random pairs; losses, and the collectives of one compiled train step.
"""

import argparse
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pandas as pd

from vdjax import config as configs
from vdjax import sharding
from vdjax.data import pipeline
from vdjax.data.chat import Rendered
from vdjax.models import config as model_config
from vdjax.models import transformer
from vdjax.models.functional import Model, make_model, shardings
from vdjax.planning import hlo
from vdjax.studies.tables import to_markdown
from vdjax.train import supervised
from vdjax.train.optimizer import make_optimizer
from vdjax.train.stage import device_batch, fresh_state, state_shardings
from vdjax.train.step import make_train_step

STEPS = 10
LAYOUTS: list[dict[str, int]] = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 4},
    {"fsdp": 4, "context": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"data": 2, "context": 2, "tensor": 2},
]


def pairs(count: int, vocab: int) -> pipeline.Dataset:
    """Prompts of 8 to 40 tokens with two responses of 4 to 40."""
    rng, examples = np.random.default_rng(0), []
    for _ in range(count):
        sizes = [rng.integers(8, 41), *rng.integers(4, 41, 2)]
        branches = np.repeat(np.arange(3, dtype=np.int8), sizes)
        tokens = rng.integers(0, vocab, len(branches)).astype(np.int32)
        examples.append(Rendered(tokens, branches > 0, branches))
    return pipeline.of_rendered(examples)


def train(model: Model, start: Any, data: pipeline.Dataset, mesh: jax.sharding.Mesh) -> tuple[list[float], str]:
    """The losses of the steps, and the text of the compiled train step."""
    stage = configs.stage("dpo", batch_size=16, optimizer={"learning_rate": 1e-3})
    steps = pipeline.in_order(len(data), stage.batch_size)
    shape = pipeline.plan(data, steps, row_length=128, row_multiple=8)
    reference = np.random.default_rng(1).normal(-5, 1, len(data.tokens)).astype(np.float32) * data.loss_mask
    batches = pipeline.batches(data, steps, shape, 8, {"reference_log_probs": reference})
    optimizer = make_optimizer(stage.optimizer, STEPS)
    lie = shardings(model, mesh)
    layout = state_shardings(optimizer, model.params, lie, mesh)
    losses, text = [], ""
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x, s: sharding.put_global(np.asarray(x), s), start, lie)
        state = jax.jit(lambda p: fresh_state(p, optimizer, {}), out_shardings=layout)(params)
        step = make_train_step(supervised.loss_spec(model, stage, shape), optimizer)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
        for i in range(STEPS):
            batch = device_batch(batches[i], mesh)
            if not text:
                compiled = jitted.lower(state, {}, batch).compile()
                text = compiled.as_text()
            state, metrics = compiled(state, {}, batch)
            losses.append(float(metrics["loss"]))
    return losses, text


def collectives(text: str, mesh: jax.sharding.Mesh) -> str:
    """Of each kind how often, and what a device sends, one step."""
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for each in hlo.read(text, mesh.shape).collectives:
        name = f"{each.kind} over {'+'.join(each.over)}"
        found[name] = [found[name][0] + each.times, found[name][1] + each.sent]
    return "; ".join(f"{times:.0f} {name} ({sent / 1e6:.2f} MB)" for name, (times, sent) in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    smoke = configs.load("configs/smoke.py", [])
    fields = {"vocab_size": 512, **smoke.model.shape.to_dict()} | {"num_attention_heads": 8, "num_key_value_heads": 8}
    cfg = model_config.from_hf(fields, where="the smoke config")
    model, data = make_model(cfg, smoke.model), pairs(STEPS * 16, cfg.vocab_size)
    start = jax.device_get(transformer.init_params(cfg, seed=0))
    one = sharding.make_mesh(devices=jax.devices()[:1])
    expected, _ = train(model, start, data, one)
    lines = []
    for sizes in LAYOUTS:
        mesh = sharding.make_mesh(**sizes)
        losses, text = train(model, start, data, mesh)
        name = ", ".join(f"{axis}={n}" for axis, n in sizes.items())
        difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        kernel = model.params["layers"]["gate_proj"].shape
        held = np.prod(shardings(model, mesh)["layers"]["gate_proj"].shard_shape(kernel)) / np.prod(kernel)
        lines.append(
            {
                "layout": name,
                "largest difference of a loss": f"{difference:.1e}",
                "part of a kernel on a device": f"1/{1 / held:.0f}",
                "collectives a step (sent by a device)": collectives(text, mesh),
            }
        )
    page = Path(__file__).with_name("layouts.md.in").read_text()
    losses = f"{expected[0]:.4f} to {expected[-1]:.4f}"
    flags.out.write_text(page.replace("{table}", to_markdown(pd.DataFrame(lines)).rstrip()).replace("{losses}", losses))


if __name__ == "__main__":
    main()
