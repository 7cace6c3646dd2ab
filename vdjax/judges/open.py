"""Judges by what a config says of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vdjax import chat_api, hosts
from vdjax import config as configs
from vdjax.errors import UserError, nearest
from vdjax.files import as_path
from vdjax.judges import LABELS, Exchange, Judge, Verdicts, api, human, local


def judge_of_flags(config: ConfigDict, judge: str, template: str, spec: str) -> tuple[str, ConfigDict]:
    """Name and fields of the judge that a command was given: `--judge NAME --config FILE.py`, or a model.

    Args:
      config: the command's; the judges of FILE.py are put into it, so that --config.judges.NAME.* can set their fields.
      template: of a model as judge; "": stance-v1.
      spec: of --config; "": `judge` is a directory, hub id or snapshot.

    Raises:
      UserError: no such file or no such judge in it; a template beside a config, which has its own.
    """
    if not spec:
        return Path(judge).name, configs.judge("local", path=judge, template=template or "stance-v1")
    config.judges = configs.read(spec).judges
    if judge not in config.judges:
        raise UserError(f"--judge {judge}: is no judge in {spec}{nearest(judge, config.judges)}")
    if template:
        raise UserError(f"--template: is for a model as judge; {spec} says how {judge} is asked")
    return judge, config.judges[judge]


def check_judge(name: str, fields: ConfigDict) -> None:
    """Refuses a judge that cannot be opened, without loading its weights.

    Raises:
      UserError: no model, file or template.
    """
    if fields.quality and not as_path(fields.quality).is_file():
        raise UserError(f"config.judges.{name}.quality: no such file: {fields.quality}")
    if fields.kind == "local":
        local.check_local(name, fields)
    elif fields.kind == "api":
        api.check_api(name, fields)
    else:
        human.open_human(name, fields)


def check_key(name: str, fields: ConfigDict) -> None:
    """UserError where a judge needs a key that the environment has not."""
    if fields.kind == "api":
        endpoint, _ = api.check_api(name, fields)
        try:
            chat_api.key_of(endpoint)
        except UserError as error:
            raise UserError(f"config.judges.{name}.key_env: {error}") from None


def open_judge(name: str, fields: ConfigDict, mesh: jax.sharding.Mesh, cache: Path) -> Judge:
    """A judge made by `config.judge`; a local one has its weights loaded, and all processes judge.

    Others are asked by the first process alone, so that an answer is paid for once.

    Args:
      cache: folder for what an API has answered.

    Raises:
      UserError: a model, file or endpoint that cannot be used.
    """
    if fields.kind == "local":
        return local.open_local(name, fields, mesh)
    asked = api.open_api(name, fields, cache) if fields.kind == "api" else human.open_human(name, fields)

    def judge(exchanges: Sequence[Exchange], repeat: int) -> Verdicts:
        def ask() -> list[Any]:
            return [array.tolist() for array in asked.judge(exchanges, repeat)]

        p, graded = hosts.by_first(f"the verdicts of {name}", ask)
        return Verdicts(np.array(p, float).reshape(-1, len(LABELS)), np.array(graded, float))

    return asked._replace(judge=judge) if hosts.count() > 1 else asked
