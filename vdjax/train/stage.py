"""What a stage works with, and what each kind of stage gives the loop."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vdjax import sharding
from vdjax.models.functional import Model
from vdjax.models.products import compiler_options
from vdjax.objectives import OBJECTIVES
from vdjax.progress import say
from vdjax.train.losses import LossSpec
from vdjax.train.plan import StagePlan
from vdjax.train.step import TrainState, make_train_step

PACKED = ("tokens", "positions", "segment_ids", "loss_mask", "sequence_ids")
BESIDE = ("source", "indices")  # for the host alone


class Stage(NamedTuple):
    name: str
    config: ConfigDict
    plan: StagePlan
    model: Model  # that is trained: with adapters or a score head, if it has any
    plain: Model  # the experiment's model, without them
    values: Model | None  # of the states that a policy chooses tokens in
    start: Callable[[], Any]  # makes the parameters (of `plain`) that the stage starts from, when they are needed
    start_values: Callable[[], Any]  # likewise of `values`
    mesh: jax.sharding.Mesh
    workdir: Path
    seed: int
    resume_every: int
    log_every: int


class Update(NamedTuple):
    """How parameters are changed: those that are not, the optimizer, and the shardings of the train state."""

    frozen: Any
    optimizer: optax.GradientTransformation
    layout: TrainState


class Facts(NamedTuple):
    """What a step worked on, for its speed and its log."""

    indices: np.ndarray  # examples
    tokens: int
    scored: int
    attended: int  # (query, key) pairs
    measured: dict[str, float]  # on the host


class Trainer(NamedTuple):
    """What a kind of stage does in each turn of the loop."""

    advance: Callable[[TrainState, int], tuple[TrainState, dict[str, Any], Facts]]
    behind: int  # steps by which the log lags, so that the host makes a batch while the device is at the one before
    evaluate: Callable[[TrainState], dict[str, float]] | None


def shares_trunk(stage: Stage) -> bool:
    """Whether values are read from the policy's hidden states, not from a model of their own."""
    return stage.config.hyper.get("value_model") == "shared"


def has_reference(stage: Stage) -> bool:
    objective = OBJECTIVES[stage.config.objective]
    return objective.needs_reference or (stage.config.log_kl and objective.kind == "preference")


def device_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The arrays a jitted pass takes, rows spread over the mesh."""
    rows = sharding.rows_sharding(mesh, 3, row_axis=1)
    return {name: sharding.put_global(value, rows) for name, value in batch.items() if name not in BESIDE}


def abstract_batch(stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the batch that the train step takes."""
    plan, objective = stage.plan, OBJECTIVES[stage.config.objective]
    names = ["reference_log_probs"] if has_reference(stage) else []
    if objective.kind in ("unpaired", "reward"):
        names.append("labels")
    if objective.kind == "rollout" and stage.config.objective != "online_dpo":
        names += ["old_log_probs", "advantages", "weights", "on_policy"]
        names += ["returns", "old_values"] if stage.values else []
    dtypes = {"loss_mask": bool} | dict.fromkeys(names, np.float32)
    shape = (plan.shape.rows // plan.microbatch_rows, plan.microbatch_rows, plan.shape.length)
    rows = sharding.rows_sharding(stage.mesh, 3, row_axis=1)
    return {
        name: jax.ShapeDtypeStruct(
            (*shape[:2], 1) if name == "on_policy" else shape, dtypes.get(name, np.int32), sharding=rows
        )
        for name in (*PACKED, *names)
    }


def facts_of(batches: Sequence[dict[str, np.ndarray]], indices: np.ndarray, **measured: float) -> Facts:
    tokens = scored = attended = 0
    for batch in batches:
        real = batch["segment_ids"] > 0
        tokens += int(real.sum())
        scored += int(batch["loss_mask"].sum())
        attended += int((batch["positions"][real] + 1).sum())
    return Facts(indices, tokens, scored, attended, measured)


def state_shardings(
    optimizer: optax.GradientTransformation,
    params: Any,
    layout: Any,
    mesh: jax.sharding.Mesh,
    carry: Iterable[str] = (),
) -> TrainState:
    """Shardings, as a TrainState, of a train state: what the optimizer keeps of a parameter lies as it does, along
    those axes that are kept (`sharding.of_reduced`).

    Args:
      params: shapes of the trained parameters; `layout` is their shardings.
      carry: names of the objective's running values.
    """
    whole = sharding.replicated(mesh)
    shapes = dict(jax.tree_util.tree_leaves_with_path(params))
    layouts = dict(jax.tree_util.tree_leaves_with_path(layout))

    def lies(path: tuple[Any, ...], leaf: Any) -> jax.sharding.NamedSharding:
        of = next((path[i:] for i in range(len(path)) if path[i:] in shapes), None)  # it ends with the parameter's path
        return whole if of is None else sharding.of_reduced(layouts[of], shapes[of].shape, leaf.shape)

    kept = jax.tree_util.tree_map_with_path(lies, jax.eval_shape(optimizer.init, params))
    return TrainState(cast(Any, whole), layout, kept, cast(Any, dict.fromkeys(carry, whole)))


def trace_step(stage: Stage, spec: LossSpec, update: Update, state: Any) -> jax.stages.Traced:
    """A stage's train step; `state` and `update.frozen` may be shapes."""
    step = jax.jit(make_train_step(spec, update.optimizer), donate_argnums=0, out_shardings=(update.layout, None))
    return step.trace(state, update.frozen, abstract_batch(stage))


def compile_step(stage: Stage, spec: LossSpec, update: Update, state: Any) -> jax.stages.Compiled:
    """The one compilation of a stage's train step (`trace_step`)."""
    start = time.perf_counter()
    compiled = trace_step(stage, spec, update, state).lower().compile(compiler_options=compiler_options())
    say(f"{stage.name}: train step compiled in {time.perf_counter() - start:.1f} s")
    return compiled


def fresh_state(params: Any, optimizer: optax.GradientTransformation, carry: Mapping[str, float]) -> TrainState:
    return TrainState(jnp.int32(0), params, optimizer.init(params), {k: jnp.float32(v) for k, v in carry.items()})
