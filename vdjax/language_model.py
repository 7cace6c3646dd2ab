"""A language model ready to be used, from wherever its parameters lie."""

import hashlib
from typing import Any, NamedTuple

import jax

from vdjax import config as configs
from vdjax import runs, snapshots
from vdjax.data import chat
from vdjax.errors import UserError
from vdjax.files import absolute, as_path
from vdjax.models.functional import Model
from vdjax.setup import initial_params, setup


class LanguageModel(NamedTuple):
    """What samples, and what judges."""

    model: Model
    params: Any
    tokenizer: Any
    template: chat.Template
    mesh: jax.sharding.Mesh


def identity(opened: LanguageModel) -> dict[str, Any]:
    """All that what it says depends on, but for how it is asked; call it under `jax.set_mesh(opened.mesh)`."""
    return {
        "shape": str(opened.model.cfg),
        "weights": snapshots.fingerprint(opened.params),
        "tokenizer": hashlib.sha256(opened.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "chat_template": (chat.template_hash(opened.template), opened.template.stop_ids, opened.template.bos_ids),
        "compute": opened.model.compute_dtype,
    }


def open_model(name: str, chat_template: str, overrides: list[str]) -> LanguageModel:
    """A Hugging Face directory or hub id, or one of our snapshots.

    Args:
      overrides: --config.model, --config.tokenizer and --config.mesh flags; of a snapshot's, the mesh and
        the options of its template alone can be chosen.

    Raises:
      UserError: neither, a reward model, or a wrong override.
    """
    config = configs.experiment()
    for flag in overrides:
        configs.override(config, flag)
    if absolute(as_path(name)).parent.name == "snapshots":
        free = ("--config.mesh.", "--config.tokenizer.template_options.")
        if other := [flag for flag in overrides if not flag.startswith(free)]:
            raise UserError(f"{other[0]}: a snapshot has its own config; only --config.mesh can be chosen")
        found = runs.open_snapshot(as_path(name), config.mesh.to_dict())
        if runs.stage_head(found.config, found.stage) != "vocab":
            raise UserError(f"--model {name}: the stage {found.stage} trains a reward model, which says nothing")
        made, model, params = found.made, found.model, found.params
    else:
        config.model.path = name
        made = setup(config)
        model, params = made.model, initial_params(config, made)
    chosen = config.tokenizer.chat_template if chat_template == "auto" else chat_template
    template = chat.pick_template(made.tokenizer, chosen, config.tokenizer.template_options.to_dict())
    return LanguageModel(model, params, made.tokenizer, template, made.mesh)
