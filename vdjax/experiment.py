"""The one place where the parts meet: an experiment's stages in order, then probes, drift and report."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vdjax import findings, hosts, measure, runs, sharding, snapshots
from vdjax.data import chat, pipeline, tokenizer
from vdjax.errors import UserError
from vdjax.models import config as model_config
from vdjax.models import hf
from vdjax.models.functional import Model, frozen_part, make_model, shardings
from vdjax.objectives import OBJECTIVES
from vdjax.progress import say
from vdjax.setup import Setup, setup
from vdjax.train import loop, rewards, rollouts, supervised
from vdjax.train.plan import StagePlan, data_kind, plan_stage
from vdjax.train.stage import Stage


class RewardModel(NamedTuple):
    """One, with the tokenizer and template that it reads texts with."""

    model: Model
    params: Callable[[], Any]
    tokenizer: Any
    template: chat.Template


def plan(config: ConfigDict, name: str, made: Setup, workdir: Path) -> StagePlan:
    """Renders (or finds rendered) a stage's data and lays out its steps."""
    stage, cache = config[name], workdir / "data"
    kind = data_kind(stage.objective)
    data = pipeline.build(stage, kind, made.tokenizer, made.template, cache, seed=config.seed)
    # One seed for all stages: those that differ in the objective alone meet the same examples in the same order.
    return plan_stage(stage, data, sharding.batch_shards(made.mesh), config.seed, f"config.{name}")


def run(config: ConfigDict, workdir: Path, command: str) -> None:
    """Runs an experiment to its report, or goes on where an earlier run with this workdir stopped.

    Raises:
      UserError: anything that the user can mend.
      loop.Interrupted: after SIGINT or SIGTERM.
    """
    runs.claim(config, workdir, command)
    made = setup(config)
    with jax.set_mesh(made.mesh):
        runs.write_model_files(made, workdir / "model")
        # Whatever is wrong with a later stage's data or with the probes is said before anything is trained.
        asked = measure.questions(config, made)
        measure.check_keys(config, runs.probed(config), workdir)
        plans = {name: plan(config, name, made, workdir) for name in config.stages}
        overlap = {name: pipeline.asking(plans[name].train, [p.input for p in asked.probes]) for name in config.stages}
        rewarders = {name: rewarder_of(config, name, made, workdir) for name in config.stages}
        hosts.agree("the plan", {name: outline(planned) for name, planned in plans.items()})
        stages = {name: stage_of(config, name, plans[name], rewarders[name], made, workdir) for name in config.stages}
        for name in config.stages:
            if overlap[name]:
                say(f"{name} data: {overlap_line(overlap[name], len(plans[name].train))}")
            train(stages[name], rewarders[name], made)
            if config[name].snapshots.probe:
                ask_stage(config, stages[name], made, asked)
        if config.judge_quality.stage:
            measure.judge_quality(config, made, workdir)
        judges = measure.judge(config, made, asked, runs.probed(config), workdir)
    findings.write(config, made, asked, judges, workdir, command, {name: len(ids) for name, ids in overlap.items()})


def outline(planned: StagePlan) -> dict[str, Any]:
    """What all processes must have in common, or their collectives would not fit together."""
    return {
        "data": planned.train.key,
        "steps": planned.total_steps,
        "examples of the last step": np.asarray(planned.steps[planned.total_steps - 1]).tolist(),
        "shape": [*planned.shape, planned.microbatch_rows],
    }


def train(stage: Stage, rewarder: RewardModel | rewards.Reward | None, made: Setup) -> None:
    if hosts.by_first(f"a look for {stage.name}", (stage.workdir / stage.name / "done.json").exists):
        return say(f"{stage.name}: trained already")
    say(f"{stage.name} data: {data_line(stage.plan.train.counts)}")
    if rewarder is None:
        return loop.train_stage(stage, supervised.prepare)
    reward = reward_by(rewarder, made, stage.config) if isinstance(rewarder, RewardModel) else rewarder
    loop.train_stage(stage, lambda s: rollouts.prepare(s, reward, made.tokenizer, made.template))


def stage_of(
    config: ConfigDict,
    name: str,
    planned: StagePlan,
    rewarder: RewardModel | rewards.Reward | None,
    made: Setup,
    workdir: Path,
) -> Stage:
    """What a stage works with; nothing is loaded yet. Values start from the reward model where its shape agrees."""
    start: Callable[[], Any] = partial(runs.start_params, config, name, made, workdir)
    start_values = start
    if isinstance(rewarder, RewardModel) and rewarder.model.cfg == made.model.cfg:
        start_values = rewarder.params
    return Stage(
        name,
        config[name],
        planned,
        runs.stage_model(config, name, made.model.cfg),
        made.model,
        runs.value_model(config, name, made.model.cfg),
        start,
        start_values,
        made.mesh,
        workdir,
        config.seed,
        config.resume_every,
        config.log_every,
    )


def rewarder_of(config: ConfigDict, name: str, made: Setup, workdir: Path) -> RewardModel | rewards.Reward | None:
    """What rewards a stage's responses, if it samples any: a function, or an earlier stage or directory not yet loaded.

    Raises:
      UserError: a function that is not there; a model that cannot be read, or is no reward model.
    """
    wanted = config[name].reward
    if OBJECTIVES[config[name].objective].kind != "rollout":
        return None
    if wanted.function:
        return rewards.from_function(wanted.function)
    if wanted.model in config.stages:
        last = partial(runs.done, workdir, wanted.model)
        model = make_model(made.model.cfg, config.model, head="score")
        load = lambda: runs.snapshot_params(config, wanted.model, last()["total_steps"], made, workdir)  # noqa: E731
        return RewardModel(model, load, made.tokenizer, made.template)
    directory = hf.resolve(wanted.model, wanted.revision or None)
    where = str(directory / "config.json")
    cfg = model_config.from_hf(hf.read_config(directory), where=where, head="score")
    model = make_model(cfg, config.model, head="score")
    tok = tokenizer.load(directory)
    reader = hf.open_reader(directory, cfg, head="score")
    load = lambda: hf.place(reader, model.params, shardings(model, made.mesh))  # noqa: E731
    return RewardModel(model, load, tok, chat.pick_template(tok))


def reward_by(rewarder: RewardModel, made: Setup, stage: ConfigDict) -> rewards.Reward:
    """Rewards by a model: on the policy's own tokens where it has the same tokenizer and template, else on the text."""
    same = rewarder.tokenizer.backend_tokenizer.to_str() == made.tokenizer.backend_tokenizer.to_str()
    if same and rewarder.template.text == made.template.text:
        return rewards.from_model(rewarder.model, rewarder.params(), made.mesh)
    return rewards.from_text(
        rewarder.model, rewarder.params(), made.mesh, rewarder.tokenizer, rewarder.template, 2 * stage.max_length
    )


def data_line(counts: dict[str, Any]) -> str:
    """Rows read, and every reason for which some were dropped or changed, with the first of each."""
    parts = [f"{counts['rows']} rows read"]
    for what in ("dropped", "noted"):
        parts += [f"{what} {n} x {reason} (first: {counts['first'][reason]})" for reason, n in counts[what].items()]
    return "; ".join(parts)


def overlap_line(ids: Sequence[str], total: int) -> str:
    """What is said of training examples (by id) that ask what the probes will ask."""
    return (
        f"{len(ids)} of {total} training examples ask a question of the probes word for word (first: {ids[0]}), so on "
        "these the probes show what was learned by heart, not what it generalises to"
    )


def ask_stage(config: ConfigDict, stage: Stage, made: Setup, asked: measure.Questions) -> None:
    """Asks every snapshot of a stage.

    Raises:
      UserError: one that was taken is not there.
    """
    name, workdir, steps = stage.name, stage.workdir, sorted(stage.plan.snapshot_steps)
    folder = workdir / name / "snapshots"
    there = hosts.by_first(f"the snapshots of {name}", lambda: snapshots.kept(folder))
    if missing := sorted(set(steps) - set(there)):
        raise UserError(
            f"{folder}: {', '.join(map(str, missing))} not there, of {len(steps)} snapshots. "
            f"{snapshots.how_to_mend(folder / str(missing[0]))}"
        )
    readers = [snapshots.open_reader(folder / str(step)) for step in steps]
    model = stage.model
    base = frozen_part(model, runs.start_params(config, name, made, workdir)) if model.lora else None
    series = measure.Series(name, steps, readers, (steps[0], steps[-1]), base)
    parent = runs.parent(config, name)
    # What adapters answered beside their base is not, to the bit, what the model merged from them answers.
    same = parent if parent and not config[parent].lora.rank else ""
    measure.ask(config, made._replace(model=model), asked, series, workdir, parent=same)
