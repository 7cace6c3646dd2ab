"""Trains and probes a tiny model under layouts of eight simulated devices and under one, and applies the vocabulary
head and the splash kernels by themselves; prints JSON.

Run by test_eight_devices.py in a process of its own, since the number of devices is fixed when JAX starts.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from vdjax import config as configs
from vdjax import sharding, snapshots
from vdjax.data import pipeline
from vdjax.data.packing import Shape
from vdjax.models import head, splash
from vdjax.models.attention import attention
from vdjax.models.functional import Model, shardings
from vdjax.probes import evaluator
from vdjax.probes.readouts import Item
from vdjax.train import optimizer as optimizers
from vdjax.train import supervised
from vdjax.train.loop import placed
from vdjax.train.optimizer import make_optimizer
from vdjax.train.stage import device_batch, fresh_state, state_shardings
from vdjax.train.step import make_train_step

DATA = tiny.dataset(tiny.preference_examples(7, 20))
DOCUMENTS = tiny.dataset(tiny.sft_examples(8, 20))
REFERENCE = np.random.default_rng(0).normal(-5, 1, len(DATA.tokens)).astype(np.float32) * DATA.loss_mask

LAYOUTS: list[dict[str, Any]] = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 4},
    {"fsdp": 2, "context": 2, "tensor": 2},
]
SFT_LAYOUTS = [LAYOUTS[2], LAYOUTS[4]]
HEAD_LAYOUTS = [*LAYOUTS[1:5], {"tensor": 8}, {"context": 8}, {"snapshot": 2, "context": 2, "tensor": 2}]
STEPS, SFT_STEPS = 10, 4
SHAPE = Shape(8, 40, 16)


def name_of(sizes: dict[str, Any]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def train(made: Model, start: Any, mesh: jax.sharding.Mesh, microbatch_rows: int) -> dict[str, Any]:
    """Ten DPO steps, as `loop.train_stage` makes them."""
    stage = configs.stage("dpo", optimizer={"learning_rate": 1e-3})
    steps = pipeline.order(len(DATA), 8, 4, seed=0)
    batches = pipeline.batches(DATA, steps, SHAPE, microbatch_rows, {"reference_log_probs": REFERENCE})
    state, metrics, losses, fingerprint = run(made, start, mesh, stage, [batches[i] for i in range(STEPS)])
    kernel = state.params["layers"]["gate_proj"]
    moments = state.opt_state[1][0].mu["layers"]["gate_proj"]
    return {
        "losses": losses,
        "grad_norm": float(metrics["grad_norm"]),
        "fingerprint": fingerprint,
        "kernel_part": list(kernel.addressable_shards[0].data.shape),
        "moment_part": list(moments.addressable_shards[0].data.shape),
    }


def run(made: Model, start: Any, mesh: jax.sharding.Mesh, stage: Any, batches: list[Any]) -> tuple[Any, ...]:
    """State and metrics after the last batch, the losses of all, and the fingerprint of the first parameters."""
    optimizer = make_optimizer(stage.optimizer, len(batches))
    layout = state_shardings(optimizer, made.params, shardings(made, mesh), mesh)
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x, s: sharding.put_global(np.asarray(x), s), start, shardings(made, mesh))
        fingerprint = snapshots.fingerprint(params)
        state = jax.jit(lambda p: fresh_state(p, optimizer, {}), out_shardings=layout)(params)
        step = make_train_step(supervised.loss_spec(made, stage, SHAPE), optimizer)
        compiled = None
        losses = []
        for batch in batches:
            placed_batch = device_batch(batch, mesh)
            if compiled is None:
                jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
                compiled = jitted.lower(state, {}, placed_batch).compile()
            state, metrics = compiled(state, {}, placed_batch)
            losses.append(float(metrics["loss"]))
    return state, metrics, losses, fingerprint


def sft(made: Model, start: Any, mesh: jax.sharding.Mesh, microbatch_rows: int) -> tuple[dict[str, Any], Any]:
    """Four SFT steps with Adafactor, and the state after them."""
    stage = configs.stage("sft", optimizer={"name": "adafactor", "learning_rate": 1e-3})
    batches = pipeline.batches(DOCUMENTS, pipeline.order(len(DOCUMENTS), 8, 4, seed=0), SHAPE, microbatch_rows)
    state, _, losses, _ = run(made, start, mesh, stage, [batches[i] for i in range(SFT_STEPS)])
    kept = state.opt_state[1][0][0]
    parts = {
        name: list(getattr(kept, name)["layers"]["gate_proj"].addressable_shards[0].data.shape)
        for name in ("v_row", "v_col", "v")
    }
    return {"sft_losses": losses, "kept_parts": parts}, state


def same_after_restoring(made: Model, state: Any, mesh: jax.sharding.Mesh) -> bool:
    """Whether a resume point written under one layout is the same state when it is read under another."""
    stage = configs.stage("sft", optimizer={"name": "adafactor", "learning_rate": 1e-3})
    optimizer = make_optimizer(stage.optimizer, SFT_STEPS)
    layout = state_shardings(optimizer, made.params, shardings(made, mesh), mesh)
    abstract = jax.eval_shape(lambda params: fresh_state(params, optimizer, {}), made.params)
    with tempfile.TemporaryDirectory() as folder:
        manager = snapshots.resume_manager(Path(folder) / "resume")
        snapshots.save_resume(manager, SFT_STEPS, state, {})
        manager.wait_until_finished()
        found = snapshots.restore_resume(manager, placed(abstract, layout))
        manager.close()
    assert found
    return all(
        np.array_equal(x, y) and x.sharding == s
        for x, y, s in zip(*map(jax.tree.leaves, (found[0], state, layout)), strict=True)
    )


def scored(sizes: dict[str, Any]) -> list[float]:
    """Largest differences of the head's log-probs and gradients from those of a whole softmax."""
    rng = np.random.default_rng(0)
    hidden, table, slopes = (rng.normal(size=s).astype(np.float32) for s in ((8, 24, 16), (32, 16), (8, 24)))
    source, target, mask = rng.integers(0, 24, (8, 24)), rng.integers(0, 32, (8, 24)), rng.random((8, 24)) < 0.5

    def whole(hidden: Any, table: Any) -> jax.Array:
        logits = jnp.take_along_axis(hidden, source[..., None], axis=1) @ table.T / 0.7
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=2)[..., 0]
        return jnp.where(mask, log_probs, 0)

    def by_head(hidden: Any, table: Any) -> jax.Array:
        return head.scored_log_probs(head.Head(5, 0.7), hidden, table, *map(jnp.asarray, (source, target, mask)))

    def both(score: Any) -> Any:
        def values(hidden: Any, table: Any) -> tuple[Any, ...]:
            out, pull = jax.vjp(score, hidden, table)
            return out, *pull(jnp.asarray(slopes))

        return jax.jit(values)

    mesh = sharding.make_mesh(**sizes)
    with jax.set_mesh(mesh):
        axes = (("batch", "length", "embed_act"), ("vocab", "embed"))
        laid = [
            sharding.put_global(x, jax.NamedSharding(mesh, sharding.partition_spec(a, x.shape, mesh.shape)))
            for x, a in zip((hidden, table), axes, strict=True)
        ]
        found = both(by_head)(*laid)
    return [float(np.abs(np.asarray(x) - y).max()) for x, y in zip(found, both(whole)(hidden, table), strict=True)]


def float_gathers(made: Model, start: Any, sizes: dict[str, Any]) -> list[str]:
    """The arrays, but for ids, that looking embeddings up and its gradient bring together from several devices."""
    mesh, tokens, slopes = sharding.make_mesh(**sizes), np.zeros((8, 40), np.int32), np.ones((8, 40, 32), np.float32)
    axes = ("batch", "length", "embed_act")

    def both(params: Any, tokens: Any, g: Any) -> Any:
        out, pull = jax.vjp(lambda params: nnx.merge(made.graphdef, params).embedded(tokens), params)
        return out, pull(g)[0]["embed"]

    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x, s: sharding.put_global(np.asarray(x), s), start, shardings(made, mesh))
        rows = jax.NamedSharding(mesh, sharding.partition_spec(axes, (8, 40, 32), mesh.shape))
        batch = [sharding.put_global(x, s) for x, s in ((tokens, sharding.rows_sharding(mesh, 2)), (slopes, rows))]
        out_shardings = (rows, params["embed"].sharding)
        text = jax.jit(both, out_shardings=out_shardings).lower(params, *batch).compile().as_text()
    return re.findall(r"= (f32\S+) all-gather", text)


def kernels(sizes: dict[str, Any]) -> list[float]:
    """Largest differences of the splash kernels' outputs and gradients from those of plain attention on one device."""
    rng, length = np.random.default_rng(0), 256
    q, g = rng.normal(size=(2, 2, length, 4, 64)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, 2, 64)).astype(np.float32)
    segments = np.repeat([[1, 2]], [110, 146], axis=1).repeat(2, axis=0)
    sequences = np.zeros((2, length), np.int32)
    sequences[0, 60:90], sequences[0, 90:110], sequences[1, 150:200], sequences[1, 200:] = 1, 2, 1, 2
    ids = (segments, sequences, np.arange(length) < np.full((2, 1), 40))  # the last is a prefix that all see
    out, pull = jax.vjp(lambda *x: attention(*x, *ids), q, k, v)

    @jax.jit
    def run(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        out, lse = splash.forward(q, k, v, ids, interpret=True)
        return out, *splash.backward(q, k, v, ids, out, lse, g, interpret=True)

    with jax.set_mesh(sharding.make_mesh(**sizes)):
        found = run(q, k, v)
    return [float(np.abs(np.asarray(x) - y).max()) for x, y in zip(found, (out, *pull(g)), strict=True)]


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
    optimizers.FACTORED_FROM = 16
    out = {"one": train(made, start, one, 2) | probe(made, start, one) | sft(made, start, one, 2)[0]}
    for sizes in LAYOUTS:
        mesh, found = sharding.make_mesh(**sizes), {}
        found |= train(made, start, mesh, 8)
        if sizes in SFT_LAYOUTS:
            found |= probe(made, start, mesh)
            more, state = sft(made, start, mesh, 8)
            found |= more | {"float_gathers": float_gathers(made, start, sizes)}
            if sizes == LAYOUTS[4]:
                found["restored"] = [same_after_restoring(made, state, m) for m in (mesh, one)]
        out[name_of(sizes)] = found
    head.TILE_BYTES = 32 * 16 * 4 // 3
    out["head"] = {name_of(sizes): scored(sizes) for sizes in HEAD_LAYOUTS}
    out["splash"] = kernels({"data": 2, "context": 2, "tensor": 2})
    print(json.dumps(out))


if __name__ == "__main__":
    main()
