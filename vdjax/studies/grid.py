"""A study as a grid: model x SFT data x objective x preference data x seed, laid out as experiments.

A study's config is that of an experiment with axes. Its stages up to the last of kind `sft` are the trunk; each later
one is an objective, run once with every preference dataset, always from the end of the trunk. So one experiment holds
all cells with the same model, SFT data and seed, and they share SFT, rendered data and reference log-probs. A
reward_model stage that an objective names is run once with every preference dataset too.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax.errors import UserError, nearest
from vdjax.objectives import OBJECTIVES

AXES = ("models", "sft", "preferences")
BY_GRID = "given by config.grid"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # a part of a directory's name and of a flag


class Cell(NamedTuple):
    """One measured stage of a study. SFT itself, before any preferences, is the cell whose `preference` is empty."""

    model: str
    sft: str
    objective: str  # the stage's name in the study's config
    preference: str
    seed: int
    trunk: str  # the experiment that holds it: a directory of the study's
    stage: str  # its stage there


def with_axes(
    config: ConfigDict,
    *,
    models: Mapping[str, Any],
    sft: Mapping[str, Any],
    preferences: Mapping[str, Any],
    seeds: tuple[int, ...],
) -> ConfigDict:
    """`config` with the axes of a study: config.grid.{models,sft,preferences}.NAME, and config.seeds.

    Args:
      config: an experiment; see the module's docstring.
      models: by name, the fields that make an experiment that model's: {"model": {"path": ...}, "tokenizer": ...}.
      sft, preferences: by name, the fields of a stage's `data`. What they leave out is the stage's own.
    """
    config.grid = ConfigDict({"models": models, "sft": sft, "preferences": preferences})
    config.seeds = seeds
    first = next(iter(models), "")
    for key, value in configs.flat(config.grid.models.get(first, ConfigDict()).to_dict()).items():
        _set(config, key, value)
    trunk, objectives = split(config)
    for name in (trunk[-1], *objectives):  # `configs.load` wants a path; every experiment of the study has its own
        config[name].data.path = config[name].data.path or BY_GRID
    return config


def split(study: ConfigDict) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the stages of the trunk, which ends with SFT, and of those after it.

    Raises:
      UserError: no stage of kind sft, or none after it.
    """
    kinds = [OBJECTIVES[study[name].objective].kind for name in study.stages]
    if "sft" not in kinds:
        raise UserError("config.stages: a study needs a stage with the objective sft, from which the others start")
    end = len(kinds) - kinds[::-1].index("sft")
    if end == len(kinds):
        raise UserError(f"config.stages: a study needs a stage after {study.stages[-1]!r} for each of its objectives")
    return tuple(study.stages[:end]), tuple(study.stages[end:])


def check(study: ConfigDict) -> None:
    """Refuses what is no study.

    Raises:
      UserError: no axes, an empty one, a name that is no directory's, two cells of one name, seeds that are no numbers.
    """
    if "grid" not in study:
        raise UserError("this config has no config.grid, so it is no study; run it with python -m vdjax.main")
    for axis in AXES:
        if not study.grid[axis]:
            raise UserError(f"config.grid.{axis} is empty")
        for name in study.grid[axis]:
            if not NAME.fullmatch(name):
                raise UserError(f"config.grid.{axis}: {name!r} is no name; use letters, digits, _ and -")
    for axis in AXES[1:]:
        for name, data in study.grid[axis].items():
            if not data.get("path") and not data.get("parts"):
                raise UserError(f"config.grid.{axis}.{name}.path is empty; pass --config.grid.{axis}.{name}.path=FILE")
    check_seeds(study.seeds)
    names = [(cell.trunk, cell.stage) for cell in cells(study)]
    for trunk, stage in names:
        if names.count((trunk, stage)) > 1:
            raise UserError(f"config.grid: two cells of {trunk!r} are called {stage!r}; rename a stage or a dataset")


def check_seeds(seeds: tuple[int, ...]) -> None:
    if any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"config.seeds={seeds!r}: expected different whole numbers, such as (0, 1, 2)")


def trunks(study: ConfigDict) -> list[tuple[str, str, str, int]]:
    """(name, model, SFT data, seed) of every experiment. Seeds come last, so that the first seed is whole first."""
    return [
        (f"{model}-{sft}-seed-{seed}", model, sft, seed)
        for seed in study.seeds or (study.seed,)
        for model in study.grid.models
        for sft in study.grid.sft
    ]


def cells(study: ConfigDict) -> list[Cell]:
    """Every measured stage of a study, in the order in which they run."""
    before, after = split(study)
    objectives = [name for name in after if OBJECTIVES[study[name].objective].kind != "reward"]
    out = []
    for trunk, model, sft, seed in trunks(study):
        out.append(Cell(model, sft, before[-1], "", seed, trunk, before[-1]))
        for preference in study.grid.preferences:
            out += [Cell(model, sft, o, preference, seed, trunk, f"{o}_{preference}") for o in objectives]
    return out


def experiments(study: ConfigDict) -> dict[str, ConfigDict]:
    """The experiments of a study by the name of their trunk.

    Raises:
      UserError: a field of an axis that no config has.
    """
    check(study)
    return {name: experiment(study, model, sft, seed) for name, model, sft, seed in trunks(study)}


def experiment(study: ConfigDict, model: str, sft: str, seed: int) -> ConfigDict:
    """The trunk of a model, SFT data and seed with all its cells."""
    before, after = split(study)
    c = study.copy_and_resolve_references()
    grid = c.grid
    del c.grid
    c.seed, c.seeds = seed, ()
    for key, value in configs.flat(grid.models[model].to_dict()).items():
        _set(c, key, value, f"config.grid.models.{model}")
    _set_data(c, before[-1], grid.sft[sft], f"config.grid.sft.{sft}")
    stages = list(before)
    for preference, data in grid.preferences.items():
        for name in after:
            own = f"{name}_{preference}"
            c[own] = study[name].copy_and_resolve_references()
            start = c[own].init_from
            c[own].init_from = f"{start}_{preference}" if start in after else start or before[-1]
            if c[own].reward.model in after:
                c[own].reward.model = f"{c[own].reward.model}_{preference}"
            _set_data(c, own, data, f"config.grid.preferences.{preference}")
            stages.append(own)
    for name in after:
        del c[name]
    c.stages = tuple(stages)
    return c


def _set_data(config: ConfigDict, name: str, data: ConfigDict, where: str) -> None:
    if config[name].data.path == BY_GRID:
        config[name].data.path = ""
    for key, value in configs.flat(data.to_dict()).items():
        _set(config, f"{name}.data.{key}", value, where)


def _set(config: ConfigDict, key: str, value: Any, where: str = "config.grid") -> None:
    """Sets one field as a flag would, which checks its name and type."""
    if key.partition(".")[0] not in config:
        raise UserError(f"{where}.{key} is no field{nearest(key.partition('.')[0], config)}")
    configs.override(config, f"--config.{key}={value if isinstance(value, str) else repr(value)}")


def of_seeds(config: ConfigDict) -> tuple[dict[str, ConfigDict], list[Cell]]:
    """An ordinary experiment once with each of config.seeds, and its probed stages as cells."""
    check_seeds(config.seeds)
    out, found = {}, []
    for seed in config.seeds:
        c = config.copy_and_resolve_references()
        c.seed, c.seeds = seed, ()
        out[f"seed-{seed}"] = c
        probed = [name for name in c.stages if c[name].snapshots.probe]
        found += [Cell("", "", name, "", seed, f"seed-{seed}", name) for name in probed]
    return out, found
