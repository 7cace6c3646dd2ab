"""One stage, from its data to its last snapshot, in the order in which things happen."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vdjax import sharding, snapshots
from vdjax.data import pipeline
from vdjax.data.packing import Shape
from vdjax.data.pipeline import Dataset
from vdjax.errors import UserError
from vdjax.models.config import ModelConfig
from vdjax.models.functional import Model, shardings
from vdjax.objectives import OBJECTIVES
from vdjax.train.flops import peak_flops, train_flops
from vdjax.train.log import MetricsLog, progress_over, say, stop_signals
from vdjax.train.optimizer import make_optimizer, schedule
from vdjax.train.step import LossSpec, TrainState, make_eval_step, make_score_step, make_train_step

PACKED = ("tokens", "positions", "segment_ids", "loss_mask", "sequence_ids", "reference_log_probs")


class Interrupted(Exception):
    """A signal asked to stop; a resume point has been written."""


class StagePlan(NamedTuple):
    """What a stage will do, known before it starts."""

    train: Dataset
    held_out: Dataset | None
    steps: Any  # example indices of each step (grain.MapDataset)
    total_steps: int
    shape: Shape
    microbatch_rows: int
    snapshot_steps: list[int]


def plan_stage(stage: ConfigDict, data: Dataset, shards: int, seed: int, where: str) -> StagePlan:
    """Splits off the held-out examples and lays out the batches.

    Raises:
      UserError: no step would be trained, or rows that the mesh cannot share out.
    """
    train_size = len(data) - stage.eval_examples
    if train_size < 1:
        raise UserError(f"{where}: {len(data)} usable examples, {stage.eval_examples} held out: nothing to train on")
    train = pipeline.take(data, 0, train_size)
    held_out = pipeline.take(data, train_size, len(data)) if stage.eval_examples else None
    microbatch_rows = stage.microbatch_rows or shards
    if microbatch_rows % shards:
        raise UserError(f"{where}.microbatch_rows={microbatch_rows} is no multiple of the mesh's {shards} batch shards")
    steps = pipeline.order(train_size, stage.batch_size, stage.epochs, seed)
    total = min(len(steps), stage.max_steps or len(steps))
    if total < 1:
        raise UserError(f"{where}: {train_size} examples, {stage.epochs} epochs, max_steps={stage.max_steps}: no step")
    steps = steps[:total]
    shape = pipeline.plan(train, steps, row_length=stage.row_length, row_multiple=microbatch_rows)
    when = snapshots.schedule(total, log_spaced=stage.snapshots.log_spaced, every=stage.snapshots.every)
    return StagePlan(train, held_out, steps, total, shape, microbatch_rows, when)


def device_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The arrays a jitted pass takes, rows spread over the mesh."""
    rows = sharding.rows_sharding(mesh, 3, row_axis=1)
    return {name: sharding.put_global(batch[name], rows) for name in PACKED if name in batch}


def reference(
    model: Model, params: Any, data: Dataset, stage: ConfigDict, rows: int, mesh: Any, cache: Path
) -> np.ndarray:
    """Reference log-probs of a data set: computed once, and kept under a key of all that they depend on."""
    dtype = jax.tree.leaves(params)[0].dtype.name
    shape = hashlib.sha256(repr(model.cfg).encode()).hexdigest()[:8]
    file = cache / f"{data.key}-{shape}-{snapshots.fingerprint(params)}-{dtype}-{model.compute_dtype}.npy"
    if not file.exists():

        def score(shape: Shape) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
            step = jax.jit(make_score_step(loss_spec(model, stage, shape, mesh)))
            return lambda batch: sharding.fetch(step(params, device_batch(batch, mesh)))

        values = pipeline.reference_log_probs(
            data, stage.batch_size, rows, score, lambda x, n: progress_over(x, n, "reference log-probs")
        )
        cache.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            with open(file.with_suffix(".part"), "wb") as out:
                np.save(out, values)
            os.replace(file.with_suffix(".part"), file)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"reference {file.name}")
    return np.load(file, mmap_mode="r")


def loss_spec(model: Model, stage: ConfigDict, shape: Shape, mesh: Any) -> LossSpec:
    groups = sharding.batch_shards(mesh)
    return LossSpec(model.graphdef, stage.objective, stage.hyper.to_dict(), shape.sequences, model.head_chunk, groups)


def state_shardings(optimizer: optax.GradientTransformation, model: Model, mesh: jax.sharding.Mesh) -> Any:
    """Shardings, as a TrainState, of a train state: the optimizer's moments lie as their parameters do."""
    whole, params = sharding.replicated(mesh), shardings(model, mesh)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, s: s,
        jax.eval_shape(optimizer.init, model.params),
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(cast(Any, whole), params, moments)


def held_out_evaluation(
    plan: StagePlan, model: Model, stage: ConfigDict, mesh: jax.sharding.Mesh, references: dict[str, np.ndarray]
) -> Callable[[Any], dict[str, float]] | None:
    """A function from parameters to the objective's mean loss and metrics on the held-out examples, if any."""
    if not plan.held_out:
        return None
    steps = pipeline.in_order(len(plan.held_out), stage.batch_size)
    shape = pipeline.plan(plan.held_out, steps, row_length=0, row_multiple=plan.microbatch_rows)
    reference = references.get(plan.held_out.key)
    batches = pipeline.batches(plan.held_out, steps, shape, plan.microbatch_rows, reference)
    step = jax.jit(make_eval_step(loss_spec(model, stage, shape, mesh)))

    def evaluate(params: Any) -> dict[str, float]:
        totals: dict[str, float] = {}
        for batch in pipeline.iterate(batches):
            for name, value in jax.device_get(step(params, device_batch(batch, mesh))).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        tokens, pairs = totals.pop("tokens"), totals.pop("pairs", 0.0)
        by_token = ("kl_to_reference",) if pairs else ("loss",)
        return {f"eval_{name}": value / (tokens if name in by_token else pairs) for name, value in totals.items()}

    return evaluate


def begin(
    model: Model, initial: Callable[[], Any], optimizer: optax.GradientTransformation, manager: Any, mesh: Any
) -> tuple[TrainState, dict | None, Any]:
    """The newest resume point with its position, or a fresh state and None; and the state's shardings."""
    layout = state_shardings(optimizer, model, mesh)
    init = jax.jit(lambda p: TrainState(jnp.int32(0), p, optimizer.init(p)), out_shardings=layout, donate_argnums=0)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init, model.params), layout
    )
    restored = snapshots.restore_resume(manager, abstract)
    return (*restored, layout) if restored else (init(initial()), None, layout)


def train_stage(
    name: str,
    stage: ConfigDict,
    plan: StagePlan,
    model: Model,
    initial: Callable[[], Any],
    mesh: jax.sharding.Mesh,
    workdir: Path,
    *,
    resume_every: int,
    log_every: int,
) -> None:
    """Trains a stage to its end, or goes on from its newest resume point.

    Leaves WORKDIR/NAME/snapshots/STEP, WORKDIR/NAME/metrics.jsonl and, at the end, WORKDIR/NAME/done.json.

    Args:
      initial: makes the parameters that the stage starts from, when they are needed and not before.

    Raises:
      Interrupted: on SIGINT or SIGTERM, after a resume point was written.
      UserError: the loss or gradient is not finite (names the step and its examples), or the data are not those that
        the resume point was trained on.
    """
    folder = workdir / name
    spec = loss_spec(model, stage, plan.shape, mesh)

    # Data, with reference log-probs under the parameters that the stage starts from.
    references: dict[str, np.ndarray] = {}
    if OBJECTIVES[stage.objective].needs_reference:
        params, cache = initial(), workdir / "data" / "reference"
        for data in filter(None, (plan.train, plan.held_out)):
            references[data.key] = reference(model, params, data, stage, plan.microbatch_rows, mesh, cache)
        del params
    train_reference = references.get(plan.train.key)
    batches = pipeline.batches(plan.train, plan.steps, plan.shape, plan.microbatch_rows, train_reference)
    evaluate = held_out_evaluation(plan, model, stage, mesh, references)

    # State: fresh, or the newest resume point.
    optimizer = make_optimizer(stage.optimizer, plan.total_steps)
    learning_rate = schedule(stage.optimizer, plan.total_steps)
    manager = snapshots.resume_manager(folder / "resume")
    state, position, layout = begin(model, initial, optimizer, manager, mesh)
    iterator = pipeline.iterate(batches)
    if position is not None:
        if position["data"] != plan.train.key:
            raise UserError(
                f"{name}: the data changed since {folder / 'resume'} was written, so training cannot go on from there; "
                f"bring back what {stage.data.path} was, or remove {folder} to begin the stage anew"
            )
        iterator.set_state(position["iterator"])
    step = int(state.step)

    # The one compilation.
    if step < plan.total_steps:
        start = time.perf_counter()
        train_step = jax.jit(make_train_step(spec, optimizer), donate_argnums=0, out_shardings=(layout, None))
        compiled = train_step.lower(state, device_batch(batches[step], mesh)).compile()
        say(f"{name}: train step compiled in {time.perf_counter() - start:.1f} s")

    log = MetricsLog(folder / "metrics.jsonl", workdir / "tb" / name, name, step, plan.total_steps, log_every)
    checkpointer, peak = snapshots.saver(), peak_flops()
    pending: list[tuple] = []
    last = time.perf_counter()

    def flush() -> None:
        """Logs the steps not yet looked at; the host stays one step behind the device."""
        nonlocal last
        while pending:
            at, batch, metrics = pending.pop(0)
            values = {k: float(v) for k, v in jax.device_get(metrics).items()}
            if not values.pop("finite"):
                names = [plan.train.ids[i] for i in batch["indices"]]
                raise UserError(
                    f"{name}: step {at}: loss {values['loss']}, gradient norm {values['grad_norm']}; nothing of it was "
                    f"kept. Its examples: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}. "
                    f"The last good state is in {folder / 'resume'}; lower the learning rate, or look at them."
                )
            seconds, last = time.perf_counter() - last, time.perf_counter()
            log.step(at, values | rates(model.cfg, batch, seconds, peak, learning_rate(at - 1)))

    def milestone() -> None:
        if step in plan.snapshot_steps:
            snapshots.save(checkpointer, folder / "snapshots", step, state.params)
        ends = step in (0, plan.total_steps)
        if evaluate and (ends or (stage.eval_every and step % stage.eval_every == 0)) and step not in log.evaluated:
            log.evaluation(step, evaluate(state.params))

    if step == 0:
        milestone()
    with stop_signals() as stop_requested:
        last = time.perf_counter()
        while step < plan.total_steps:
            batch = next(iterator)
            state, metrics = compiled(state, device_batch(batch, mesh))
            step += 1
            flush()
            pending.append((step, batch, metrics))
            stopping = stop_requested()  # asked once, so that whoever stops here has written a resume point
            due = step % resume_every == 0 or stopping or step == plan.total_steps
            if due or step in plan.snapshot_steps or (stage.eval_every and step % stage.eval_every == 0):
                flush()
                milestone()
                if due:
                    checkpointer.wait_until_finished()
                    position = {"iterator": iterator.get_state(), "data": plan.train.key}
                    snapshots.save_resume(manager, step, state, position)
                last = time.perf_counter()
            if stopping and step < plan.total_steps:
                manager.wait_until_finished()
                raise Interrupted(f"{name}: stopped at step {step} of {plan.total_steps}; a resume point was written")
    milestone()
    checkpointer.wait_until_finished()
    manager.wait_until_finished()
    manager.close()
    checkpointer.close()
    log.close()
    summary = {
        "total_steps": plan.total_steps,
        "train_examples": len(plan.train),
        "held_out_examples": len(plan.held_out) if plan.held_out else 0,
        "shape": plan.shape._asdict(),
        "data_counts": plan.train.counts,
    }
    if jax.process_index() == 0:
        (folder / "done.json.part").write_text(json.dumps(summary, indent=1))
        os.replace(folder / "done.json.part", folder / "done.json")
        shutil.rmtree(folder / "resume")
    if stop_requested():
        raise Interrupted(f"{name}: stopped after its last step; the stage is finished")


def rates(cfg: ModelConfig, batch: dict[str, np.ndarray], seconds: float, peak: float, rate: Any) -> dict[str, float]:
    """Speed of one step: real tokens and examples a second, and model-FLOPs utilisation."""
    real = batch["segment_ids"] > 0
    tokens, attended = int(real.sum()), int((batch["positions"][real] + 1).sum())
    flops = train_flops(cfg, tokens, int(batch["loss_mask"].sum()), attended)
    return {
        "learning_rate": float(rate),
        "tokens_per_s": tokens / seconds,
        "examples_per_s": len(batch["indices"]) / seconds,
        "mfu": flops / seconds / peak,
        "seconds": seconds,
    }
