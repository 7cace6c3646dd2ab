"""What a workdir holds: the experiment that claims it, its model files, and the parameters of its stages' snapshots."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
from ml_collections import ConfigDict

from vdjax import __version__, hosts, snapshots
from vdjax import config as configs
from vdjax.errors import UserError
from vdjax.files import absolute, filling, in_bucket, read_kept, write_whole
from vdjax.models import lora
from vdjax.models.config import ModelConfig
from vdjax.models.functional import Model, frozen_part, make_model, shardings
from vdjax.objectives import OBJECTIVES
from vdjax.setup import Setup, initial_params, setup

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "tensorstore", "numpy", "scipy")

# What may differ between two runs in one workdir: how the work is laid out and shown, and what snapshots are asked.
FREE_FIELDS = (
    *("mesh.", "log_every", "resume_every", "model.unroll", "model.remat"),
    *("probes.", "judges.", "judge_quality.", "tokenizer.template_options."),
)


def parent(config: ConfigDict, name: str) -> str:
    """The stage that a stage starts from; empty for the model itself. A reward model is no start for what follows."""
    if config[name].init_from:
        return config[name].init_from
    before = config.stages[: config.stages.index(name)]
    return next((s for s in reversed(before) if OBJECTIVES[config[s].objective].kind != "reward"), "")


def probed(config: ConfigDict) -> list[str]:
    """The stages whose snapshots are asked."""
    return [name for name in config.stages if config[name].snapshots.probe]


def stage_model(config: ConfigDict, name: str, cfg: ModelConfig) -> Model:
    """The model of a stage: with its adapters, and with a score head where it is a reward model."""
    adapters = lora.from_config(config[name].lora, f"config.{name}.lora")
    return make_model(cfg, config.model, lora=adapters, head=stage_head(config, name))


def value_model(config: ConfigDict, name: str, cfg: ModelConfig) -> Model | None:
    """The model of the values of the states that a stage's policy chooses tokens in, if it needs them."""
    if config[name].hyper.get("advantage") != "gae":
        return None
    adapters = lora.from_config(config[name].lora, f"config.{name}.lora")
    return make_model(cfg, config.model, lora=adapters, head="score")


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
    model = stage_model(config, name, made.model.cfg)
    reader, layout = snapshots.open_reader(workdir / name / "snapshots" / str(step)), shardings(model, made.mesh)
    if not model.lora:
        return snapshots.place(reader, model.params, layout)
    adapters = snapshots.place(reader, lora.adapters_of(model.params), lora.adapters_of(layout))
    merged = partial(lora.merge, lora=model.lora)
    base = frozen_part(model, start_params(config, name, made, workdir))
    return jax.jit(merged)(lora.join(base, adapters))


def calls(workdir: Path) -> Path:
    """Where replies of APIs are kept and counted: with the study that an experiment belongs to, or in its workdir."""
    of_study = workdir.parent / "judgements" / "calls"
    return of_study if of_study.is_dir() else workdir / "judgements" / "calls"


def done(workdir: Path, name: str) -> dict[str, Any]:
    return read_kept(workdir / name / "done.json", "total_steps")


def read_config(file: Path) -> ConfigDict:
    """The config in WORKDIR/config.json.

    Raises:
      UserError: a file that is missing or damaged.
    """
    return ConfigDict(_config_of(file))


def _config_of(file: Path) -> dict[str, Any]:
    config = read_kept(file, "config")["config"]
    if not isinstance(config, dict):
        raise UserError(f"{file}: cannot be read back: config is {type(config).__name__}, expected an object")
    return config


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
    config, name, workdir = locate(snapshot)
    config.mesh = ConfigDict(dict(mesh))
    # The workdir's own copy of tokenizer and template: the base model is needed only where adapters lie beside it.
    own = config.copy_and_resolve_references()
    own.model.path, own.tokenizer.path, own.tokenizer.chat_template = str(workdir / "model"), "", "auto"
    made = setup(own)
    with jax.set_mesh(made.mesh):
        params = snapshot_params(config, name, int(absolute(snapshot).name), made, workdir)
    merged = make_model(made.model.cfg, config.model, head=stage_head(config, name))
    return Opened(config, name, made, merged, params)


def locate(snapshot: Path) -> tuple[ConfigDict, str, Path]:
    """Config, stage and workdir of a snapshot.

    Raises:
      UserError: not a snapshot of a vdjax workdir.
    """
    snapshot = absolute(snapshot)
    file = snapshot.parent.parent.parent / "config.json"
    if snapshot.parent.name != "snapshots" or not file.exists():
        raise UserError(f"{snapshot}: expected WORKDIR/STAGE/snapshots/STEP")
    snapshots.open_reader(snapshot)
    return read_config(file), snapshot.parents[1].name, file.parent


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Whether this process (of several hosts: the first) holds the experiment's lock, which is freed when it dies.

    A bucket has no locks, nor has every file system: there every process holds it, and the user sees to it that no two
    do the same.

    Raises:
      UserError: no directory can be there.
    """
    files: list[int] = []

    def lock() -> bool:
        if in_bucket(folder):
            return True
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{folder}: a file stands there or in its path; expected a directory") from None
        files.append(os.open(folder / "lock", os.O_RDWR | os.O_CREAT))
        try:
            fcntl.flock(files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    try:
        yield hosts.by_first(f"the lock of {folder.name}", lock)
    finally:
        for file in files:
            os.close(file)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """`held`, or a UserError."""
    with held(folder) as mine:
        if not mine:
            raise UserError(f"{folder}: another process is at work there; wait for it, or stop it")
        yield


def claim(config: ConfigDict, workdir: Path, command: str) -> None:
    """Writes WORKDIR/config.json, or checks that the experiment there is this one.

    Raises:
      UserError: the workdir holds another experiment (names the fields that differ), or is not the same directory on
        all hosts.
    """
    hosts.check_shared(workdir)
    hosts.by_first("the workdir to be claimed", lambda: _claim(config, workdir, command))


def _claim(config: ConfigDict, workdir: Path, command: str) -> None:
    file = workdir / "config.json"
    mine = json.loads(configs.to_json(config))
    left = [name for name in config.stages if (workdir / name / "metrics.jsonl").exists()]
    if left and not file.exists():
        raise UserError(
            f"{file}: is not there, so that nothing says with which config {workdir / left[0]} was trained; put back a "
            "copy of it, or give a new --workdir"
        )
    if file.exists():
        theirs = _config_of(file)
        before, now = configs.flat(theirs), configs.flat(mine)
        fields = configs.experiment()
        differ = sorted(
            key
            for key in before.keys() | now.keys()
            if before.get(key) != now.get(key)
            and not key.startswith(FREE_FIELDS)
            and ("." in key or key in fields)  # a config's own fields matter where others take their values
        )
        if differ:
            shown = "\n".join(f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differ[:20])
            raise UserError(f"{workdir} holds an experiment with another config; give a new --workdir.\n{shown}")
    content = {"config": mine, "seed": config.seed, "versions": versions(), "command": command}
    write_whole(file, json.dumps(content, indent=1))


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"vdjax": __version__, "python": sys.version.split()[0], **packages}


def write_model_files(made: Setup, folder: Path) -> None:
    """A Hugging Face directory without weights: what an export of a snapshot needs besides parameters."""
    hosts.by_first("the model's files to be written", lambda: _write_model_files(made, folder))


def _write_model_files(made: Setup, folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    made.tokenizer.chat_template = made.template.text
    # The stop ids of the template that the model is trained with, which may end turns otherwise than its base did.
    source = made.directory / "generation_config.json" if made.directory else None
    generation = read_kept(source) if source and source.exists() else {}
    generation["eos_token_id"] = list(made.template.stop_ids)
    with filling(folder, "config.json") as out:
        made.tokenizer.save_pretrained(out)
        (out / "generation_config.json").write_text(json.dumps(generation, indent=2))
        (out / "config.json").write_text(json.dumps(made.hf_config, indent=2))
