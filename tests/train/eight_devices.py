"""Trains and probes a tiny model under every layout of eight simulated devices and under one; prints JSON.

Run by test_eight_devices.py in a process of its own, since the number of devices is fixed when JAX starts.
"""

import json
from typing import Any

import jax
import numpy as np
import tiny

from vdjax import config as configs
from vdjax import sharding, snapshots
from vdjax.data import pipeline
from vdjax.data.packing import Shape
from vdjax.models.functional import Model, shardings
from vdjax.probes import evaluator
from vdjax.probes.readouts import Item
from vdjax.train import supervised
from vdjax.train.optimizer import make_optimizer
from vdjax.train.stage import device_batch, fresh_state, state_shardings
from vdjax.train.step import make_train_step

LAYOUTS: list[dict[str, Any]] = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]
STEPS = 10
DATA = tiny.dataset(tiny.preference_examples(7, 20))
REFERENCE = np.random.default_rng(0).normal(-5, 1, len(DATA.tokens)).astype(np.float32) * DATA.loss_mask


def train(made: Model, start: Any, mesh: jax.sharding.Mesh, microbatch_rows: int) -> dict[str, Any]:
    """Ten DPO steps, as `loop.train_stage` makes them."""
    stage = configs.stage("dpo", optimizer={"learning_rate": 1e-3})
    steps = pipeline.order(len(DATA), 8, 4, seed=0)
    shape = Shape(8, 40, 16)
    batches = pipeline.batches(DATA, steps, shape, microbatch_rows, {"reference_log_probs": REFERENCE})
    optimizer = make_optimizer(stage.optimizer, STEPS)
    layout = state_shardings(optimizer, made.params, shardings(made, mesh), mesh)
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x, s: sharding.put_global(np.asarray(x), s), start, shardings(made, mesh))
        fingerprint = snapshots.fingerprint(params)
        state = jax.jit(lambda p: fresh_state(p, optimizer, {}), out_shardings=layout)(params)
        step = make_train_step(supervised.loss_spec(made, stage, shape), optimizer)
        compiled = None
        losses = []
        for i in range(STEPS):
            batch = device_batch(batches[i], mesh)
            if compiled is None:
                jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
                compiled = jitted.lower(state, {}, batch).compile()
            state, metrics = compiled(state, {}, batch)
            losses.append(float(metrics["loss"]))
    kernel = state.params["layers"]["gate_proj"]
    moments = state.opt_state[1][0].mu["layers"]["gate_proj"]
    return {
        "losses": losses,
        "grad_norm": float(metrics["grad_norm"]),
        "fingerprint": fingerprint,
        "kernel_part": list(kernel.addressable_shards[0].data.shape),
        "moment_part": list(moments.addressable_shards[0].data.shape),
    }


def probe(made: Model, start: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Four snapshots under one program."""
    rendered = tiny.preference_examples(9, 6)
    items = [Item(0, 0, "statement", "", ("support", "oppose"), ("a", "b"), r) for r in rendered]
    trees = [jax.tree.map(lambda x, k=k: np.asarray(x) * (1 + 0.1 * k), start) for k in range(4)]
    readers = [lambda path, index, tree=tree: leaf(tree, path)[index] for tree in trees]
    with jax.set_mesh(mesh):
        sums, _ = evaluator.evaluate(made, readers, items, mesh)
    return {"sums": sums.tolist(), "snapshot_axis": evaluator.evaluator_mesh(mesh, 4).shape["snapshot"]}


def leaf(tree: Any, path: tuple[str, ...]) -> np.ndarray:
    for name in path:
        tree = tree[name]
    return tree


def main() -> None:
    assert len(jax.devices()) == 8
    made, start = tiny.model("qwen")
    one = sharding.make_mesh(devices=jax.devices()[:1])
    out = {"one": train(made, start, one, 2) | probe(made, start, one)}
    for sizes in LAYOUTS:
        mesh = sharding.make_mesh(**sizes)
        name = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        out[name] = train(made, start, mesh, 8)
        if sizes in (LAYOUTS[1], LAYOUTS[4]):
            out[name] |= probe(made, start, mesh)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
