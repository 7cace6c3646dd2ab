"""What no experiment can mean: values and combinations that are refused before any work is done."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from vdjax.data import mixture
from vdjax.errors import UserError, nearest
from vdjax.objectives import OBJECTIVES, check_hyper
from vdjax.objectives.policy_gradient import KL_ESTIMATORS, TOKEN_WEIGHTS
from vdjax.sampling.generate import Sampling, check

CHOICES = {
    "attention": ("auto", "splash", "plain"),
    "remat": ("none", "dots", "full"),
    "param_dtype": ("float32", "bfloat16"),
    "compute_dtype": ("float32", "bfloat16"),
    "moment_dtype": ("float32", "bfloat16"),
    "schedule": ("cosine", "linear", "constant"),
    "truncation": ("response_end", "oldest_turns"),
    "assistant_turns": ("all", "last"),
    "kl_estimator": KL_ESTIMATORS,
    "weights": TOKEN_WEIGHTS,
    "ratio": ("token", "sequence"),
    "order": mixture.ORDERS,
    "advantage": ("gae", "leave_one_out", "group_scaled", "group"),
    "value_model": ("separate", "shared"),
}

OPTIMIZERS = ("adamw", "adafactor")
OF_ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "moment_dtype": "float32"}  # fields and their defaults

OPEN_ENDED = (".options.", ".shape.", ".extra.", ".template_options.")

MINIMUM = {
    "seed": 0,
    **dict.fromkeys(("resume_every", "log_every", "head_chunk", "batch_size", "epochs", "max_length"), 1),
    **dict.fromkeys(("eval_examples", "eval_every", "row_length", "microbatch_rows", "max_steps", "query_chunk"), 0),
    **dict.fromkeys(("log_spaced", "every", "max_examples", "skip_examples", "max_per_topic", "memory_gb", "rows"), 0),
    **dict.fromkeys(("rank", "temperature", "top_k", "missing_eos_penalty"), 0),
    **dict.fromkeys(("samples", "max_new_tokens", "minibatches", "replicates", "repeats"), 1),
    **dict.fromkeys(("learning_rate", "warmup", "final", "weight_decay", "clip_norm"), 0),
}


def open_ended(where: str) -> bool:
    """Whether a group of fields, or one that it lies in, holds whatever it is given."""
    return any(group in f"{where}." for group in OPEN_ENDED)


def check_names(config: ConfigDict, pattern: Mapping[str, Any], where: str, path: str) -> None:
    """UserError for a field that `pattern`, a group with all the fields there are, has not."""
    for name, value in config.items():
        key = f"{where}.{name}"
        if name not in pattern:
            raise UserError(f"{path}: {key} is no field{nearest(name, pattern)}")
        if isinstance(value, ConfigDict) and not open_ended(key):
            if not isinstance(pattern[name], Mapping):
                raise UserError(f"{path}: {key}: expected {type(pattern[name]).__name__}, found a group of fields")
            check_names(value, pattern[name], key, path)


def check_experiment(config: ConfigDict, taken: Collection[str], path: str) -> None:
    """Refuses what no experiment can mean, before any work is done; `taken` are names that no stage may have."""
    if not config.stages:
        raise UserError(f"{path}: config.stages is empty; it lists the names of the stages to run")
    for i, name in enumerate(config.stages):
        if not isinstance(name, str):
            raise UserError(f"{path}: config.stages[{i}]={name!r}, expected the name of a stage")
        if name not in config or not isinstance(config[name], ConfigDict):
            raise UserError(f"{path}: stage {name!r} has no field config.{name} = stage(...)")
        if name in taken:
            raise UserError(f"{path}: a stage may not be called {name!r}, that is a field of the experiment")
        if name in config.stages[:i]:
            raise UserError(f"{path}: stage {name!r} stands twice in config.stages")
        part = config[name]
        if part.init_from and part.init_from not in config.stages[:i]:
            raise UserError(
                f"{path}: config.{name}.init_from={part.init_from!r} is no earlier stage"
                + nearest(part.init_from, config.stages[:i])
            )
        source = part.init_from and OBJECTIVES[config[part.init_from].objective].kind
        if source == "reward" and OBJECTIVES[part.objective].kind != "reward":
            raise UserError(f"{path}: config.{name}.init_from={part.init_from!r} is a reward model, which has no words")
        mixture.check(part.data.to_dict(), f"{path}: config.{name}.data")
        if not part.data.path and not part.data.parts:
            raise UserError(f"{path}: config.{name}.data.path is empty; pass --config.{name}.data.path=FILE_OR_ID")
        check_hyper(part.objective, part.hyper.to_dict())
        _check_optimizer(part.optimizer, f"{path}: config.{name}.optimizer")
        if OBJECTIVES[part.objective].kind == "rollout":
            _check_rollout(config, name, path)
        if OBJECTIVES[part.objective].kind == "reward" and part.snapshots.probe:
            raise UserError(f"{path}: config.{name}.snapshots.probe: a reward model answers no probe; set it to False")
    if not config.model.path and not config.model.name and not config.model.shape:
        raise UserError(f"{path}: no model; pass --config.model.path=DIR_OR_ID (or name, or shape)")

    def walk(node: ConfigDict, where: str) -> None:
        for name, value in node.items():
            if isinstance(value, ConfigDict):
                if not open_ended(f"{where}.{name}"):
                    walk(value, f"{where}.{name}")
            elif isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{path}: {where}.{name}={value!r}, expected a finite number")
            elif name in MINIMUM and value < MINIMUM[name]:
                raise UserError(f"{path}: {where}.{name}={value!r}, expected at least {MINIMUM[name]}")
            elif name in CHOICES and value not in CHOICES[name]:
                raise UserError(f"{path}: {where}.{name}={value!r}{nearest(value, CHOICES[name])}")

    walk(config, "config")
    check_probes(config, path)


def _check_optimizer(optimizer: ConfigDict, where: str) -> None:
    if optimizer.name not in OPTIMIZERS:
        raise UserError(f"{where}.name={optimizer.name!r}{nearest(optimizer.name, OPTIMIZERS)}")
    for field, default in OF_ADAMW.items():
        if optimizer.name != "adamw" and optimizer[field] != default:
            raise UserError(f"{where}.{field}={optimizer[field]!r} is of adamw alone; {optimizer.name} has none")


def check_probes(config: ConfigDict, path: str) -> None:
    probes = config.probes
    check(Sampling(probes.max_new_tokens, probes.temperature, probes.top_p, probes.top_k))
    for name in probes.judges:
        if name not in config.judges:
            raise UserError(f"{path}: config.probes.judges: {name!r} is no judge{nearest(name, config.judges)}")
    if ("open_ended" in probes.readouts) != bool(probes.judges):
        raise UserError(f"{path}: config.probes: the readout open_ended and probes.judges go together; one is missing")
    trained = config.judge_quality.stage
    if trained and trained not in config.stages:
        raise UserError(f"{path}: config.judge_quality.stage={trained!r} is no stage{nearest(trained, config.stages)}")
    for i, seed in enumerate(config.seeds):
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise UserError(f"{path}: config.seeds[{i}]={seed!r}, expected a whole number, at least 0")
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"{path}: config.seeds={config.seeds} holds a seed twice")


def _check_rollout(config: ConfigDict, name: str, path: str) -> None:
    part, where = config[name], f"{path}: config.{name}"
    if bool(part.reward.model) == bool(part.reward.function):
        raise UserError(f"{where}.reward: give either model (a stage, directory or hub id) or function")
    rewards = [s for s in config.stages if OBJECTIVES[config[s].objective].kind == "reward"]
    later = config.stages[config.stages.index(name) :]
    if part.reward.model in config.stages and (part.reward.model not in rewards or part.reward.model in later):
        raise UserError(f"{where}.reward.model={part.reward.model!r} is no earlier reward_model stage")
    check(Sampling(part.rollout.max_new_tokens, part.rollout.temperature, part.rollout.top_p, part.rollout.top_k))
    if not part.rollout.temperature:
        raise UserError(f"{where}.rollout.temperature=0.0: nothing can be learned from responses without a choice")
    values = part.hyper.get("advantage") == "gae"
    if values and "gamma" not in part.hyper:
        raise UserError(f"{where}.hyper.advantage='gae' needs a value model, and so the objective ppo")
    if not values and not 2 <= part.rollout.samples <= 127:
        raise UserError(f"{where}.rollout.samples={part.rollout.samples}: {part.objective} compares 2 to 127 responses")
    if part.rollout.max_new_tokens >= part.max_length:
        raise UserError(
            f"{where}: rollout.max_new_tokens={part.rollout.max_new_tokens} leaves no room for a prompt "
            f"in max_length={part.max_length}"
        )
    if part.objective != "online_dpo":
        return
    inner = part.hyper.loss
    if inner not in OBJECTIVES or OBJECTIVES[inner].kind != "preference" or OBJECTIVES[inner].batch_level:
        good = [n for n, o in OBJECTIVES.items() if o.kind == "preference" and not o.batch_level]
        raise UserError(f"{where}.hyper.loss={inner!r}{nearest(inner, good)}")
    check_hyper(inner, {} if part.hyper.beta is None else {"beta": part.hyper.beta})
