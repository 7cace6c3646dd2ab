"""One stage, from its data to its last snapshot, in the order in which things happen."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from vdjax import sharding, snapshots
from vdjax.data import pipeline
from vdjax.data.packing import Shape
from vdjax.data.pipeline import Dataset
from vdjax.drift import tensorboard
from vdjax.errors import UserError
from vdjax.models.config import ModelConfig
from vdjax.models.functional import Model, shardings
from vdjax.objectives import OBJECTIVES
from vdjax.train.flops import peak_flops, train_flops
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
    file = cache / f"{data.key}-{snapshots.fingerprint(params)}-{dtype}-{model.compute_dtype}.npy"
    if not file.exists():

        def score(shape: Shape) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
            step = jax.jit(make_score_step(loss_spec(model, stage, shape, mesh)))
            return lambda batch: sharding.fetch(step(params, device_batch(batch, mesh)))

        values = pipeline.reference_log_probs(
            data, stage.batch_size, rows, score, lambda x: progress_over(x, "reference log-probs")
        )
        cache.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".part"), "wb") as out:
            np.save(out, values)
        os.replace(file.with_suffix(".part"), file)
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
    plan: StagePlan, model: Model, stage: ConfigDict, mesh: jax.sharding.Mesh, with_reference: Callable
) -> Callable[[Any], dict[str, float]] | None:
    """A function from parameters to the objective's mean loss and metrics on the held-out examples, if any."""
    if not plan.held_out:
        return None
    steps = pipeline.in_order(len(plan.held_out), stage.batch_size)
    shape = pipeline.plan(plan.held_out, steps, row_length=0, row_multiple=plan.microbatch_rows)
    batches = pipeline.batches(plan.held_out, steps, shape, plan.microbatch_rows, with_reference(plan.held_out))
    step = jax.jit(make_eval_step(loss_spec(model, stage, shape, mesh)))

    def evaluate(params: Any) -> dict[str, float]:
        totals: dict[str, float] = {}
        for batch in batches:
            for name, value in jax.device_get(step(params, device_batch(batch, mesh))).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        tokens, pairs = totals.pop("tokens"), totals.pop("pairs", 0.0)
        by_token = ("kl_to_reference",) if pairs else ("loss",)
        return {f"eval_{name}": value / (tokens if name in by_token else pairs) for name, value in totals.items()}

    return evaluate


def begin(
    model: Model, params: Any, optimizer: optax.GradientTransformation, manager: Any, mesh: jax.sharding.Mesh
) -> tuple[TrainState, dict | None, TrainState]:
    """The newest resume point with its data position, or a fresh state and None; and the state's shardings."""
    layout = state_shardings(optimizer, model, mesh)
    init = jax.jit(lambda p: TrainState(jnp.int32(0), p, optimizer.init(p)), out_shardings=layout, donate_argnums=0)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init, model.params), layout
    )
    restored = snapshots.restore_resume(manager, abstract)
    return (*restored, layout) if restored else (init(params), None, layout)


def train_stage(
    name: str,
    stage: ConfigDict,
    plan: StagePlan,
    model: Model,
    params: Any,
    mesh: jax.sharding.Mesh,
    workdir: Path,
    *,
    resume_every: int,
    log_every: int,
) -> None:
    """Trains a stage to its end, or goes on from its newest resume point.

    Leaves WORKDIR/NAME/snapshots/STEP, WORKDIR/NAME/metrics.jsonl and, at the end, WORKDIR/NAME/done.json.

    Raises:
      Interrupted: on SIGINT or SIGTERM, after a resume point was written.
      UserError: the loss or gradient is not finite; names the step and its examples.
    """
    folder = workdir / name
    spec = loss_spec(model, stage, plan.shape, mesh)

    # Reference log-probs, while the parameters are still those the stage starts from.
    needs_reference = OBJECTIVES[stage.objective].needs_reference
    cache, rows = workdir / "data" / "reference", plan.microbatch_rows

    def with_reference(data: Dataset) -> np.ndarray | None:
        if not needs_reference:
            return None
        return reference(model, params, data, stage, rows, mesh, cache)

    batches = pipeline.batches(plan.train, plan.steps, plan.shape, rows, with_reference(plan.train))
    evaluate = held_out_evaluation(plan, model, stage, mesh, with_reference)

    # State: fresh, or the newest resume point.
    optimizer = make_optimizer(stage.optimizer, plan.total_steps)
    learning_rate = schedule(stage.optimizer, plan.total_steps)
    manager = snapshots.resume_manager(folder / "resume")
    state, position, layout = begin(model, params, optimizer, manager, mesh)
    del params
    iterator = pipeline.iterate(batches)
    if position is not None:
        iterator.set_state(position)
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
                    snapshots.save_resume(manager, step, state, iterator.get_state())
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


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request that is honoured between two steps; a second one is not held."""
    seen: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        seen.append(number)
        for other, handler in before.items():
            signal.signal(other, handler)
        say("stopping after this step and writing a resume point; once more to stop at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """A line for people, from process 0."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stderr)


def progress_over(items: Any, what: str) -> Iterator:
    """Goes through `items` with a progress bar on a terminal, a line every ten seconds elsewhere."""
    bar = jax.process_index() == 0 and sys.stderr.isatty()
    start = last = time.perf_counter()
    for number, item in enumerate(tqdm(items, desc=what, disable=not bar, file=sys.stderr, leave=False), start=1):
        yield item
        now = time.perf_counter()
        if not bar and now - last > 10:
            last = now
            say(f"{what} {number}/{len(items)}  about {(now - start) / number * (len(items) - number):.0f} s left")
    say(f"{what}: {len(items)} batches in {time.perf_counter() - start:.1f} s")


class MetricsLog:
    """metrics.jsonl, TensorBoard and the progress line of a stage; on a resume, what lies beyond `step` is dropped."""

    def __init__(self, file: Path, tb: Path, name: str, step: int, total: int, log_every: int) -> None:
        self.name, self.total, self.every = name, total, log_every
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() and step else []
        rows = [row for row in rows if row["step"] <= step]
        self.evaluated = {row["step"] for row in rows if "eval_loss" in row}
        self.first = jax.process_index() == 0
        if self.first:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(file, "w", buffering=1)  # noqa: SIM115 - open for as long as the stage runs
            self.file.writelines(json.dumps(row) + "\n" for row in rows)
            self.tb = tensorboard.open_writer(tb, start_step=step + 1 if step else 0)
        self.bar = tqdm(
            total=total,
            initial=step,
            desc=name,
            unit="step",
            disable=not (self.first and sys.stderr.isatty()),
            file=sys.stderr,
        )
        self.last_line = 0.0

    def _write(self, row: dict[str, Any]) -> None:
        if self.first:
            self.file.write(json.dumps(row) + "\n")
            scalars = {f"{self.name}/{k}": v for k, v in row.items() if k != "step"}
            tensorboard.scalars(self.tb, row["step"], scalars)

    def step(self, step: int, values: dict[str, float]) -> None:
        if step % self.every == 0 or step == self.total:
            self._write({"step": step, **values})
        shown = {k: f"{values[k]:.4g}" for k in ("loss", "reward_accuracy", "tokens_per_s") if k in values}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and self.first and (now - self.last_line > 10 or step == self.total):
            self.last_line = now
            left = (self.total - step) * values["seconds"]
            text = "  ".join(f"{k} {v}" for k, v in shown.items())
            say(f"{self.name} {step}/{self.total}  {text}  about {left:.0f} s left")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.evaluated.add(step)
        self._write({"step": step, **values})
        text = "  ".join(
            f"{k} {values[k]:.4f}" for k in ("eval_loss", "eval_reward_accuracy", "eval_reward_margin") if k in values
        )
        say(f"{self.name} {step}/{self.total} held out: {text}")

    def close(self) -> None:
        self.bar.close()
        if self.first:
            self.file.close()
            self.tb.close()
