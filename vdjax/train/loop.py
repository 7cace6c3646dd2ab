"""One stage, from its first step to its last snapshot, in the order in which things happen."""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdjax import hosts, snapshots
from vdjax.errors import UserError
from vdjax.files import AGAIN, kept_lines, remove_tree, write_whole
from vdjax.models import functional
from vdjax.models.config import ModelConfig
from vdjax.models.functional import Model, shardings
from vdjax.models.transformer import INIT_STDDEV
from vdjax.objectives import OBJECTIVES
from vdjax.progress import say
from vdjax.train.flops import peak_flops, train_flops
from vdjax.train.log import MetricsLog, stop_signals
from vdjax.train.optimizer import make_optimizer, schedule
from vdjax.train.stage import Facts, Stage, Trainer, Update, fresh_state, shares_trunk, state_shardings
from vdjax.train.step import TrainState

LONG_STEP = 5.0  # seconds: from here on none waits behind a step, since a stop would wait for both of them


class Interrupted(Exception):
    """A signal asked to stop; a resume point has been written."""


def train_stage(stage: Stage, prepare: Callable[[Stage], Callable[[Update, TrainState], Trainer]]) -> None:
    """Trains a stage to its end, or goes on from its newest resume point.

    Leaves WORKDIR/NAME/snapshots/STEP, WORKDIR/NAME/metrics.jsonl and, at the end, WORKDIR/NAME/done.json.

    Args:
      prepare: of the stage's kind (`supervised.prepare`, `rollouts.prepare`).

    Raises:
      Interrupted: on SIGINT or SIGTERM, after a resume point was written.
      UserError: the loss or gradient is not finite (names the step and its examples), or the data are not those that
        the resume point was trained on.
    """
    make_trainer = prepare(stage)
    manager = snapshots.resume_manager(stage.workdir / stage.name / "resume")
    update, state = begin(stage, manager)
    stopped = run(stage, make_trainer(update, state), manager, state)
    finish(stage)
    if stopped:
        raise Interrupted(f"{stage.name}: stopped after its last step; the stage is finished")


# The trained parameters: of the model, and of the value model under "value"


def trained_layout(stage: Stage) -> tuple[Any, Any]:
    """Shapes and shardings of the parameters that are trained."""
    trees = [
        functional.trained_part(stage.model, tree)
        for tree in (stage.model.params, shardings(stage.model, stage.mesh))
    ]
    if stage.values:
        for tree, whole in zip(trees, (stage.values.params, shardings(stage.values, stage.mesh)), strict=True):
            part = functional.trained_part(stage.values, whole)
            tree["value"] = {"score": part["score"]} if shares_trunk(stage) else part
    return trees[0], trees[1]


def abstract_frozen(stage: Stage) -> Any:
    """Shapes, dtypes and shardings of what adapters lie beside; nothing where all parameters are trained."""
    if not stage.model.lora:
        return {}
    plain = placed(stage.plain.params, shardings(stage.plain, stage.mesh))
    frozen = functional.frozen_part(stage.model, plain)
    if stage.values and not shares_trunk(stage):
        frozen["value"] = functional.frozen_part(stage.values, plain)
    return frozen


def first_params(stage: Stage) -> tuple[Any, Any]:
    """What a stage begins with, each model loaded once: what adapters lie beside, and the trained parameters."""

    def of(model: Model, start: Callable[[], Any], seed: int, stddev: float) -> tuple[Any, Any]:
        whole = functional.with_head(model, start(), seed=seed, stddev=stddev)
        if not model.lora:
            return {}, whole
        layout = functional.trained_part(model, shardings(model, stage.mesh))
        adapters = functional.init_adapters(model, seed=seed, shardings=layout)
        head = {name: whole[name] for name in ("score",) if name in whole}
        return functional.frozen_part(model, whole), adapters | head

    # A reward model's head begins as transformers makes it.
    frozen, trained = of(stage.model, stage.start, stage.seed, INIT_STDDEV)
    if stage.values and shares_trunk(stage):
        trained["value"] = {"score": jnp.zeros(stage.model.cfg.hidden_size, stage.values.params["score"].dtype)}
    elif stage.values:
        beside, trained["value"] = of(stage.values, stage.start_values, stage.seed + 1, 0.0)
        frozen |= {"value": beside} if beside else {}
    return frozen, trained


def placed(tree: Any, layout: Any) -> Any:
    """Shapes and dtypes with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)


def first_carry(stage: Stage) -> dict[str, float]:
    """The objective's running values before the first step; one that is also a hyper-parameter starts as that says."""
    carry = OBJECTIVES[stage.config.objective].carry
    return {name: stage.config.hyper.get(name, value) for name, value in carry.items()}


def abstract_update(stage: Stage) -> tuple[Update, TrainState]:
    """What `begin` returns, with shapes, dtypes and shardings in place of arrays."""
    carry = first_carry(stage)
    optimizer = make_optimizer(stage.config.optimizer, stage.plan.total_steps * stage.plan.updates)
    params, layout = trained_layout(stage)
    layout = state_shardings(optimizer, params, layout, stage.mesh, carry)
    state = jax.eval_shape(lambda params: fresh_state(params, optimizer, carry), params)
    return Update(abstract_frozen(stage), optimizer, layout), placed(state, layout)


def begin(stage: Stage, manager: Any) -> tuple[Update, TrainState]:
    """How the state is changed, and the state: the newest resume point, or a fresh one.

    Raises:
      UserError: the data are not those that the resume point was trained on, or resume points or the log are lost.
    """
    update, abstract = abstract_update(stage)
    restored = snapshots.restore_resume(manager, abstract)
    if restored is None:
        check_nothing_is_lost(stage)
    frozen, trained = first_params(stage) if restored is None or stage.model.lora else ({}, None)
    update = update._replace(frozen=frozen)
    if restored is None:
        carry = first_carry(stage)
        init = jax.jit(
            lambda params: fresh_state(params, update.optimizer, carry), out_shardings=update.layout, donate_argnums=0
        )
        return update, init(trained)
    state, position = restored
    if position["data"] != stage.plan.train.key:
        folder = stage.workdir / stage.name
        raise UserError(
            f"{stage.name}: the data changed since {folder / 'resume'} was written, so training cannot go on from "
            f"there; bring back what {stage.config.data.path} was, or remove {folder} to begin the stage anew"
        )
    check_log(stage, position["logged"])
    return update, state


def check_log(stage: Stage, rows: int) -> None:
    """UserError where metrics.jsonl has fewer rows than it had when the resume point was written."""
    log = stage.workdir / stage.name / "metrics.jsonl"
    found = hosts.by_first(f"a look at the log of {stage.name}", lambda: len(kept_lines(log, "step")))
    if found < rows:
        raise UserError(f"{log}: {found} rows are left of the {rows} that were written; {AGAIN}")


def check_nothing_is_lost(stage: Stage) -> None:
    """UserError where a stage that would begin at step 0 has been so far before that it left resume points; where it
    may have left none, it is said."""
    folder = stage.workdir / stage.name

    def reached() -> int:
        log = folder / "metrics.jsonl"
        logged = [row["step"] for row in kept_lines(log, "step")] if log.exists() else []
        return max([0, *snapshots.kept(folder / "snapshots"), *logged])

    step = hosts.by_first(f"a look at what {stage.name} left", reached)
    if step > 2 * stage.resume_every:  # the point before the last is whole by then
        raise UserError(
            f"{folder}: training got to step {step} of {stage.plan.total_steps}, but neither done.json nor a point in "
            f"resume/ is there to go on from; put them back, or remove {folder} to train the stage again, to the same "
            "values"
        )
    if step > 0:
        say(f"{stage.name}: got to step {step} before, and left no whole resume point; it is trained anew")


def run(stage: Stage, trainer: Trainer, manager: Any, state: TrainState) -> bool:
    """The loop. Returns whether a signal asked to stop during the last step."""
    plan, config, folder = stage.plan, stage.config, stage.workdir / stage.name
    total, step = plan.total_steps, int(state.step) // plan.updates
    learning_rate = schedule(config.optimizer, total * plan.updates)
    curves = stage.workdir / "tb" / stage.name
    log = MetricsLog(folder / "metrics.jsonl", curves, stage.name, step, total, stage.log_every)
    checkpointer, peak = snapshots.saver(), peak_flops()
    stop_now = hosts.stop_vote(stage.mesh)
    say(f"{stage.name}: {'goes on from' if step else 'begins at'} step {step} of {total}")
    pending: list[tuple[int, Any, Facts]] = []
    begun, last, seconds = step, time.perf_counter(), 0.0

    def flush(behind: int = 0) -> None:
        """Logs the steps not yet looked at, but for the newest `behind`."""
        nonlocal last, seconds
        while len(pending) > behind:
            at, metrics, facts = pending.pop(0)
            values = {k: float(v) for k, v in jax.device_get(metrics).items()}
            if not values.pop("finite"):
                log.sync()
                raise UserError(not_finite(stage, at, values, facts))
            seconds, last = time.perf_counter() - last, time.perf_counter()
            rate = float(learning_rate(at * plan.updates - 1))
            values |= facts.measured | {"learning_rate": rate} | speed(stage.model.cfg, facts, seconds, peak)
            log.step(at, values)

    def milestone(stopping: bool = False) -> None:
        """What is due here; evaluation, which may take minutes, a run that stops leaves to the one that goes on."""
        if step in plan.snapshot_steps:
            snapshots.save(checkpointer, folder / "snapshots", step, functional.policy_part(state.params))
        ends = step in (0, total)
        due = ends or (config.eval_every and step % config.eval_every == 0)
        if trainer.evaluate and due and step not in log.evaluated and not stopping:
            log.evaluation(step, trainer.evaluate(state))

    milestone()
    with stop_signals() as stop_requested:
        last = time.perf_counter()
        while step < total:
            state, metrics, facts = trainer.advance(state, step)
            step += 1
            pending.append((step, metrics, facts))
            long = seconds >= LONG_STEP and step > begun + 3  # the first ones' seconds are those of compilation too
            flush(0 if long else trainer.behind)
            stopping = stop_now(stop_requested())  # once a step, so that whoever stops has written a resume point
            due = step % stage.resume_every == 0 or stopping or step == total
            if due or step in plan.snapshot_steps or (config.eval_every and step % config.eval_every == 0):
                flush()
                milestone(stopping)
                if due:
                    checkpointer.wait_until_finished()
                    log.sync()
                    snapshots.save_resume(manager, step, state, {"data": plan.train.key, "logged": log.rows})
                last = time.perf_counter()
            if stopping and step < total:
                manager.wait_until_finished()
                hosts.barrier(f"the resume point of {stage.name} to be whole")
                raise Interrupted(f"{stage.name}: stopped at step {step} of {total}; a resume point was written")
    milestone()
    for each in (checkpointer, manager):
        each.wait_until_finished()
        each.close()
    log.close()
    return any(hosts.gather(f"the end of {stage.name}", stop_requested()))


def not_finite(stage: Stage, step: int, values: dict[str, float], facts: Facts) -> str:
    names = [stage.plan.train.ids[i] for i in facts.indices]
    return (
        f"{stage.name}: step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; nothing of it was "
        f"kept. Its examples: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}. The last good state is in "
        f"{stage.workdir / stage.name / 'resume'}; lower the learning rate, or look at them."
    )


def speed(cfg: ModelConfig, facts: Facts, seconds: float, peak: float) -> dict[str, float]:
    """Speed of one step: real tokens and examples a second, and model-FLOPs utilisation."""
    return {
        "tokens_per_s": facts.tokens / seconds,
        "examples_per_s": len(facts.indices) / seconds,
        "mfu": train_flops(cfg, facts.tokens, facts.scored, facts.attended) / seconds / peak,
        "seconds": seconds,
    }


def finish(stage: Stage) -> None:
    """Says what was done, and lets go of the resume points."""
    plan, folder = stage.plan, stage.workdir / stage.name
    summary = {
        "total_steps": plan.total_steps,
        "train_examples": len(plan.train),
        "held_out_examples": len(plan.held_out) if plan.held_out else 0,
        "shape": plan.shape._asdict(),
        "data_counts": plan.train.counts,
    }

    def write() -> None:
        write_whole(folder / "done.json", json.dumps(summary, indent=1))
        remove_tree(folder / "resume")

    hosts.by_first(f"{stage.name} to be marked as done", write)
