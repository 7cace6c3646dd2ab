"""The one place where the parts meet: an experiment's stages in order, then probes, drift and report."""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pandas as pd
from ml_collections import ConfigDict

from vdjax import __version__, sharding, snapshots
from vdjax import config as configs
from vdjax.data import chat, pipeline, tokenizer
from vdjax.drift import report
from vdjax.errors import UserError
from vdjax.models import config as model_config
from vdjax.models import hf, lora, transformer
from vdjax.models.functional import Model, frozen_part, make_model, shardings
from vdjax.objectives import OBJECTIVES
from vdjax.probes import evaluator, readouts, sets
from vdjax.train import loop, rewards, rollouts, supervised
from vdjax.train.log import progress_over, say
from vdjax.train.plan import StagePlan, data_kind, plan_stage
from vdjax.train.stage import Stage

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "tensorstore", "numpy", "scipy")

# What may differ between two runs in one workdir: how the work is laid out and shown, and what snapshots are asked.
FREE_FIELDS = ("mesh.", "log_every", "resume_every", "probes.", "model.unroll", "model.remat")


class Setup(NamedTuple):
    """What all stages share."""

    model: Model
    mesh: jax.sharding.Mesh
    tokenizer: Any
    template: chat.Template
    hf_config: dict[str, Any]  # of exported models
    directory: Path | None  # of the pretrained model; None from scratch


def setup(config: ConfigDict) -> Setup:
    """Model shape, mesh, tokenizer and chat template; no parameters yet.

    Raises:
      UserError: a model, tokenizer, template or mesh that cannot be had or do not fit together.
    """
    directory = hf.resolve(config.model.path, config.model.revision or None) if config.model.path else None
    source = config.tokenizer.path or directory
    if not source:
        raise UserError("config.tokenizer.path is empty; a model from scratch needs a directory, hub id or 'bytes'")
    tok = tokenizer.byte_level() if source == "bytes" else tokenizer.load(source)
    if directory:
        hf_config = hf.read_config(directory)
        where = str(directory / "config.json")
        cfg = model_config.from_hf(hf_config, where=where, ignore_fields=config.model.ignore_fields)
    else:
        shape = {"vocab_size": len(tok), **config.model.shape.to_dict()}
        named = config.model.name
        cfg = model_config.named(named) if named else model_config.from_hf(shape, where="config.model.shape")
        ids = {name: getattr(tok, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        hf_config = model_config.to_hf(cfg, dtype=config.model.param_dtype, **ids)
    if len(tok) > cfg.vocab_size:
        raise UserError(f"the tokenizer has {len(tok)} tokens, the model a vocabulary of {cfg.vocab_size}")
    template = chat.pick_template(tok, config.tokenizer.chat_template)
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    for field in ("num_heads", "intermediate_size"):
        if getattr(cfg, field) % mesh.shape["tensor"]:
            raise UserError(f"config.mesh.tensor={mesh.shape['tensor']} does not divide {field}={getattr(cfg, field)}")
    return Setup(make_model(cfg, config.model), mesh, tok, template, hf_config, directory)


def initial_params(config: ConfigDict, made: Setup) -> Any:
    """Pretrained parameters, or seeded ones, in their shardings."""
    layout = shardings(made.model, made.mesh)
    if config.model.path:
        directory = hf.resolve(config.model.path, config.model.revision or None)
        return hf.place(hf.open_reader(directory, made.model.cfg), made.model.params, layout)
    dtype = jnp.dtype(config.model.param_dtype)
    return transformer.init_params(made.model.cfg, seed=config.seed, param_dtype=dtype, shardings=layout)


def parent(config: ConfigDict, name: str) -> str:
    """The stage that a stage starts from; empty for the model itself. A reward model is no start for what follows."""
    if config[name].init_from:
        return config[name].init_from
    before = config.stages[: config.stages.index(name)]
    return next((s for s in reversed(before) if OBJECTIVES[config[s].objective].kind != "reward"), "")


def stage_model(config: ConfigDict, name: str, made: Setup) -> Model:
    """The model of a stage: with its adapters, and with a score head where it is a reward model."""
    adapters = lora.from_config(config[name].lora, f"config.{name}.lora")
    return make_model(made.model.cfg, config.model, lora=adapters, head=stage_head(config, name))


def stage_head(config: ConfigDict, name: str) -> Literal["vocab", "score"]:
    return "score" if OBJECTIVES[config[name].objective].kind == "reward" else "vocab"


def start_params(config: ConfigDict, name: str, made: Setup, workdir: Path) -> Any:
    """What a stage starts from: the model's parameters, or those of its parent's last snapshot."""
    source = parent(config, name)
    if not source:
        return initial_params(config, made)
    return snapshot_params(config, source, done(workdir, source)["total_steps"], made, workdir)


def snapshot_params(config: ConfigDict, name: str, step: int, made: Setup, workdir: Path) -> Any:
    """All parameters of a snapshot, in their shardings, adapters merged into what they were trained beside."""
    model = stage_model(config, name, made)
    reader, layout = snapshots.open_reader(workdir / name / "snapshots" / str(step)), shardings(model, made.mesh)
    if not model.lora:
        return hf.place(reader, model.params, layout)
    adapters = hf.place(reader, lora.adapters_of(model.params), lora.adapters_of(layout))
    merged = partial(lora.merge, lora=model.lora)
    base = frozen_part(model, start_params(config, name, made, workdir))
    return jax.jit(merged)(lora.join(base, adapters))


class Opened(NamedTuple):
    """A snapshot ready to be used."""

    config: ConfigDict
    stage: str
    made: Setup
    model: Model  # without adapters: they are merged
    params: Any


def open_snapshot(snapshot: Path, mesh: Mapping[str, int] = MappingProxyType({"fsdp": -1})) -> Opened:
    """Model, tokenizer, template and parameters of WORKDIR/STAGE/snapshots/STEP.

    Raises:
      UserError: not a snapshot of a vdjax workdir.
    """
    snapshot = snapshot.resolve()
    workdir, name = snapshot.parents[2], snapshot.parents[1].name
    if snapshot.parent.name != "snapshots" or not (workdir / "config.json").exists():
        raise UserError(f"{snapshot}: expected WORKDIR/STAGE/snapshots/STEP")
    snapshots.open_reader(snapshot)
    config = ConfigDict(json.loads((workdir / "config.json").read_text())["config"])
    config.mesh = ConfigDict(dict(mesh))
    # The workdir's own copy of tokenizer and template: the base model is needed only where adapters lie beside it.
    own = config.copy_and_resolve_references()
    own.model.path, own.tokenizer.path, own.tokenizer.chat_template = str(workdir / "model"), "", "auto"
    made = setup(own)
    with jax.set_mesh(made.mesh):
        params = snapshot_params(config, name, int(snapshot.name), made, workdir)
    merged = make_model(made.model.cfg, config.model, head=stage_head(config, name))
    return Opened(config, name, made, merged, params)


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
    claim(config, workdir, command)
    made = setup(config)
    with jax.set_mesh(made.mesh):
        write_model_files(made, workdir / "model")
        # Whatever is wrong with a later stage's data or with the probes is said before anything is trained.
        probes = load_probes(config)
        prompts = render_probes(config, made, probes)
        plans = {name: plan(config, name, made, workdir) for name in config.stages}
        for name in config.stages:
            train(config, name, plans[name], made, workdir)
            if config[name].snapshots.probe:
                probe_stage(config, name, made, probes, prompts, workdir)
    write_report(config, made, probes, workdir, command)


def load_probes(config: ConfigDict) -> list[sets.Probe]:
    limit = config.probes.max_per_topic or None
    return sets.load(config.probes.path, topics=config.probes.topics or None, max_per_topic=limit)


def render_probes(config: ConfigDict, made: Setup, probes: list[sets.Probe]) -> list[readouts.Item]:
    return readouts.items(probes, config.probes.readouts, made.tokenizer, made.template, config.probes.max_length)


def train(config: ConfigDict, name: str, planned: StagePlan, made: Setup, workdir: Path) -> None:
    if (workdir / name / "done.json").exists():
        return say(f"{name}: trained already")
    say(f"{name} data: {data_line(planned.train.counts)}")
    stage, wanted = stage_of(config, name, planned, made, workdir), config[name].reward
    if OBJECTIVES[config[name].objective].kind != "rollout":
        return loop.train_stage(stage, supervised.prepare)
    if wanted.function:
        reward = rewards.from_function(wanted.function)
    else:
        reward = reward_of(reward_model(config, name, made, workdir), made, config[name])
    loop.train_stage(stage, lambda s: rollouts.prepare(s, reward, made.tokenizer, made.template))


def stage_of(config: ConfigDict, name: str, planned: StagePlan, made: Setup, workdir: Path) -> Stage:
    """What a stage works with; nothing is loaded yet. Values start from the reward model where its shape agrees."""
    start: Callable[[], Any] = partial(start_params, config, name, made, workdir)
    values, start_values = None, start
    if config[name].hyper.get("advantage") == "gae":
        adapters = lora.from_config(config[name].lora, f"config.{name}.lora")
        values = make_model(made.model.cfg, config.model, lora=adapters, head="score")
        judge = reward_model(config, name, made, workdir) if config[name].reward.model else None
        start_values = judge.params if judge and judge.model.cfg == made.model.cfg else start
    return Stage(
        name,
        config[name],
        planned,
        stage_model(config, name, made),
        made.model,
        values,
        start,
        start_values,
        made.mesh,
        workdir,
        config.seed,
        config.resume_every,
        config.log_every,
    )


class Judge(NamedTuple):
    """A reward model, with the tokenizer and template that it reads texts with."""

    model: Model
    params: Callable[[], Any]
    tokenizer: Any
    template: chat.Template


def reward_model(config: ConfigDict, name: str, made: Setup, workdir: Path) -> Judge:
    """The reward model of a stage: an earlier stage, or a sequence-classification directory.

    Raises:
      UserError: a model that cannot be read, or is no reward model.
    """
    wanted = config[name].reward
    if wanted.model in config.stages:
        last = partial(done, workdir, wanted.model)
        model = make_model(made.model.cfg, config.model, head="score")
        load = lambda: snapshot_params(config, wanted.model, last()["total_steps"], made, workdir)  # noqa: E731
        return Judge(model, load, made.tokenizer, made.template)
    directory = hf.resolve(wanted.model, wanted.revision or None)
    where = str(directory / "config.json")
    cfg = model_config.from_hf(hf.read_config(directory), where=where, head="score")
    model = make_model(cfg, config.model, head="score")
    tok = tokenizer.load(directory)
    reader = hf.open_reader(directory, cfg, head="score")
    load = lambda: hf.place(reader, model.params, shardings(model, made.mesh))  # noqa: E731
    return Judge(model, load, tok, chat.pick_template(tok))


def reward_of(judge: Judge, made: Setup, stage: ConfigDict) -> rewards.Reward:
    """Rewards by a model: on the policy's own tokens where it has the same tokenizer and template, else on the text."""
    same = judge.tokenizer.backend_tokenizer.to_str() == made.tokenizer.backend_tokenizer.to_str()
    if same and judge.template.text == made.template.text:
        return rewards.from_model(judge.model, judge.params(), made.mesh)
    return rewards.from_text(
        judge.model, judge.params(), made.mesh, judge.tokenizer, judge.template, 2 * stage.max_length
    )


def data_line(counts: dict[str, Any]) -> str:
    """Rows read, and every reason for which some were dropped or changed, with the first of each."""
    parts = [f"{counts['rows']} rows read"]
    for what in ("dropped", "noted"):
        parts += [f"{what} {n} x {reason} (first: {counts['first'][reason]})" for reason, n in counts[what].items()]
    return "; ".join(parts)


def done(workdir: Path, name: str) -> dict[str, Any]:
    return json.loads((workdir / name / "done.json").read_text())


def probe_stage(
    config: ConfigDict,
    name: str,
    made: Setup,
    probes: list[sets.Probe],
    prompts: list[readouts.Item],
    workdir: Path,
) -> None:
    """Asks every snapshot of a stage every probe: probes/NAME.parquet. Answers to other probes are replaced."""
    file = workdir / "probes" / f"{name}.parquet"
    asked = readouts.asked_hash(probes, config.probes.readouts, made.template)
    if file.exists():
        if pd.read_parquet(file, columns=["asked_hash"])["asked_hash"].eq(asked).all():
            return say(f"{name}: probed already")
        say(f"{name}: the probes, readouts or chat template changed; asking again")
    steps = snapshots.kept(workdir / name / "snapshots")
    readers = [snapshots.open_reader(workdir / name / "snapshots" / str(step)) for step in steps]
    model = stage_model(config, name, made)
    base = frozen_part(model, start_params(config, name, made, workdir)) if model.lora else None
    raw = ask(config, made._replace(model=model), probes, prompts, readers, steps, name, base)
    if jax.process_index() == 0:
        file.parent.mkdir(exist_ok=True)
        raw.to_parquet(file.with_suffix(".part"), index=False)
        os.replace(file.with_suffix(".part"), file)


def ask(
    config: ConfigDict,
    made: Setup,
    probes: list[sets.Probe],
    prompts: list[readouts.Item],
    readers: list[hf.Reader],
    steps: list[int],
    stage: str,
    base: Any = None,
) -> pd.DataFrame:
    """Every answer's log-prob under every snapshot, one row each; `base` is what snapshots of adapters lie beside."""
    say(f"{stage}: {len(probes)} probes, {len(prompts)} prompts, {len(readers)} snapshots")
    sums, counts = evaluator.evaluate(
        made.model,
        readers,
        prompts,
        made.mesh,
        base=base,
        rows=config.probes.rows,
        memory_bytes=config.probes.memory_gb * 1e9,
        progress=lambda batches, total: progress_over(batches, total, f"{stage} probes"),
    )
    tables = [readouts.raw_table(sums[i], counts, prompts, probes).assign(step=step) for i, step in enumerate(steps)]
    hashes = {
        "template_hash": readouts.wordings_hash(made.template),
        "asked_hash": readouts.asked_hash(probes, config.probes.readouts, made.template),
    }
    return pd.concat(tables, ignore_index=True).assign(stage=stage, seed=config.seed, **hashes)


def write_report(config: ConfigDict, made: Setup, probes: list[sets.Probe], workdir: Path, command: str) -> None:
    """Drift tables, figures, TensorBoard and report.html from what is in the workdir."""
    if jax.process_index():
        return
    probed = [name for name in config.stages if config[name].snapshots.probe]
    if not probed:
        return say("no stage has snapshots.probe: there is nothing to report on")
    raw = pd.concat([pd.read_parquet(workdir / "probes" / f"{name}.parquet") for name in probed], ignore_index=True)
    stages = [
        report.StageInfo(name, config[name].objective, done(workdir, name)["total_steps"], parent(config, name) or None)
        for name in config.stages
    ]
    facts = {
        "command": command,
        "model": config.model.path or config.model.name or "from scratch",
        "parameters": model_config.num_params(made.model.cfg),
        "seed": config.seed,
        "versions": versions(),
        "probes": probe_facts(config.probes.path, probes),
        "readouts": ", ".join(config.probes.readouts),
        "data": [data_facts(name, config[name], done(workdir, name)) for name in config.stages],
        "config": configs.to_json(config),
    }
    finish(workdir, readouts.scores(raw, probes), stages, training_table(config, workdir), facts)


def data_facts(name: str, stage: ConfigDict, summary: dict[str, Any]) -> dict[str, Any]:
    counts = summary["data_counts"]
    examples = f"{summary['train_examples']} trained on, {summary['held_out_examples']} held out"
    reasons = counts["dropped"] | counts["noted"]
    return {"stage": name, "source": stage.data.path, "examples": examples, "dropped": reasons}


def finish(
    workdir: Path, scores: pd.DataFrame, stages: list[report.StageInfo], training: pd.DataFrame, facts: dict[str, Any]
) -> None:
    """Writes the report and prints the drift table."""
    analysis = report.write(workdir, scores, stages, training, facts)
    print(report.summary_table(analysis.drift))
    print(f"report: {workdir / 'report.html'}")


def probe_facts(path: str, probes: list[sets.Probe]) -> dict[str, Any]:
    counts = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in sets.describe(probes).items())
    topics = {probe.topic for probe in probes}
    directions = {topic: text for topic, text in sets.TOPICS.items() if topic in topics} if path == "builtin" else {}
    return {"name": path, "description": counts, "directions": directions}


def training_table(config: ConfigDict, workdir: Path) -> pd.DataFrame:
    """All logged metrics in long form: stage, step, metric, value."""
    rows = [
        (name, row["step"], metric, value)
        for name in config.stages
        for row in map(json.loads, (workdir / name / "metrics.jsonl").read_text().splitlines())
        for metric, value in row.items()
        if metric != "step"
    ]
    return pd.DataFrame(rows, columns=["stage", "step", "metric", "value"])


NO_TRAINING = pd.DataFrame(columns=["stage", "step", "metric", "value"])


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"vdjax": __version__, "python": sys.version.split()[0], **packages}


def claim(config: ConfigDict, workdir: Path, command: str) -> None:
    """Writes WORKDIR/config.json, or checks that the experiment there is this one.

    Raises:
      UserError: the workdir holds another experiment; names the fields that differ.
    """
    file = workdir / "config.json"
    mine = json.loads(configs.to_json(config))
    if file.exists():
        theirs = json.loads(file.read_text())["config"]
        before, now = flat(theirs), flat(mine)
        differ = sorted(
            key
            for key in before.keys() | now.keys()
            if before.get(key) != now.get(key) and not key.startswith(FREE_FIELDS)
        )
        if differ:
            shown = "\n".join(f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differ[:20])
            raise UserError(f"{workdir} holds an experiment with another config; give a new --workdir.\n{shown}")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        content = {"config": mine, "seed": config.seed, "versions": versions(), "command": command}
        (workdir / "config.json.part").write_text(json.dumps(content, indent=1))
        os.replace(workdir / "config.json.part", file)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def write_model_files(made: Setup, folder: Path) -> None:
    """A Hugging Face directory without weights: what an export of a snapshot needs besides parameters."""
    if jax.process_index() or (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    made.tokenizer.chat_template = made.template.text
    made.tokenizer.save_pretrained(folder)
    # The stop ids of the template that the model is trained with, which may end turns otherwise than its base did.
    source = made.directory / "generation_config.json" if made.directory else None
    generation = json.loads(source.read_text()) if source and source.exists() else {}
    generation["eos_token_id"] = list(made.template.stop_ids)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    (folder / "config.json").write_text(json.dumps(made.hf_config, indent=2))
