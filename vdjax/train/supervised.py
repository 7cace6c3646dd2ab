"""Stages that learn from data as they are: batches, reference log-probs, held-out evaluation."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vdjax import hosts, sharding, snapshots
from vdjax.data import pipeline
from vdjax.data.packing import Shape
from vdjax.data.pipeline import Dataset
from vdjax.files import read_array, write_array
from vdjax.models.functional import Model
from vdjax.models.lora import join
from vdjax.models.products import jit
from vdjax.objectives import OBJECTIVES
from vdjax.progress import progress_over
from vdjax.train.losses import COUNTS, LossSpec, count_of
from vdjax.train.stage import Stage, Trainer, Update, compile_step, device_batch, facts_of, has_reference
from vdjax.train.step import TrainState, make_eval_step, make_score_step

PerToken = dict[str, np.ndarray]  # further arrays of a data set's batches: `pipeline.batches`


def prepare(stage: Stage) -> Callable[[Update, TrainState], Trainer]:
    """Brings what the data need before the stage's state takes memory; then call the result."""
    beside = {data.key: per_token(stage, data) for data in (stage.plan.train, stage.plan.held_out) if data}

    def trainer(update: Update, state: TrainState) -> Trainer:
        plan, mesh, start = stage.plan, stage.mesh, int(state.step)
        evaluate = held_out_evaluation(stage, update, beside)
        batches = pipeline.batches(plan.train, plan.steps, plan.shape, plan.microbatch_rows, beside[plan.train.key])
        step = compile_step(stage, loss_spec(stage.model, stage.config, plan.shape), update, state)
        ahead = pipeline.iterate(batches[start:])

        def advance(state: TrainState, _: int) -> tuple[TrainState, Any, Any]:
            batch = next(ahead)
            state, metrics = step(state, update.frozen, device_batch(batch, mesh))
            return state, metrics, facts_of([batch], batch["indices"])

        return Trainer(advance, 1, evaluate)

    return trainer


def loss_spec(model: Model, config: ConfigDict, shape: Shape) -> LossSpec:
    return LossSpec(model.graphdef, config.objective, config.hyper.to_dict(), shape.sequences, model.head_chunk)


def per_token(stage: Stage, data: Dataset) -> PerToken:
    """What the objective needs to know of each token beside the batch: reference log-probs, labels."""
    objective = OBJECTIVES[stage.config.objective]
    out: PerToken = {}
    if has_reference(stage):
        out["reference_log_probs"] = reference(stage, data)
    if objective.kind in ("unpaired", "reward"):
        out["labels"] = np.repeat(data.labels, pipeline.lengths(data))
    return out


def reference(stage: Stage, data: Dataset) -> np.ndarray:
    """Log-probs under what the stage starts from: computed once, kept under a key of all that they depend on."""
    model, params, rows = stage.plain, stage.start(), stage.plan.microbatch_rows
    dtype = jax.tree.leaves(params)[0].dtype.name
    shape = hashlib.sha256(repr(model.cfg).encode()).hexdigest()[:8]
    cache = stage.workdir / "data" / "reference"
    file = cache / f"{data.key}-{shape}-{snapshots.fingerprint(params)}-{dtype}-{model.compute_dtype}.npy"
    if not hosts.by_first("a look for reference log-probs", file.exists):
        steps = pipeline.in_order(len(data), stage.config.batch_size)
        layout = pipeline.plan(data, steps, row_length=0, row_multiple=rows)
        score = jit(make_score_step(loss_spec(model, stage.config, layout)))
        values = pipeline.score(
            data,
            pipeline.batches(data, steps, layout, rows),
            lambda batch: sharding.fetch(score(params, device_batch(batch, stage.mesh))),
            lambda batches, total: progress_over(batches, total, "reference log-probs"),
        )
        hosts.by_first("reference log-probs to be written", lambda: write_array(file, values))
    return read_array(file, "remove it, and it is computed again")


def held_out_evaluation(
    stage: Stage, update: Update, beside: dict[str, PerToken]
) -> Callable[[TrainState], dict[str, float]] | None:
    """A function from the state to the objective's mean loss and metrics on the held-out examples, if any."""
    data, rows = stage.plan.held_out, stage.plan.microbatch_rows
    if not data:
        return None
    steps = pipeline.in_order(len(data), stage.config.batch_size)
    shape = pipeline.plan(data, steps, row_length=0, row_multiple=rows)
    batches = pipeline.batches(data, steps, shape, rows, beside[data.key])
    spec = loss_spec(stage.model, stage.config, shape)
    step = jit(make_eval_step(spec))

    def evaluate(state: TrainState) -> dict[str, float]:
        totals: dict[str, float] = {}
        params = join(update.frozen, state.params)
        for batch in pipeline.iterate(batches):
            for name, value in jax.device_get(step(params, state.carry, device_batch(batch, stage.mesh))).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        sums = [name for name in totals if name not in COUNTS]
        return {f"eval_{name}": totals[name] / max(totals[count_of(spec, name)], 1) for name in sums}

    return evaluate
