"""What an experiment's stages share: shape, mesh, tokenizer, chat template; and the parameters it begins with."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdjax import sharding
from vdjax.data import chat, packing, tokenizer
from vdjax.errors import UserError
from vdjax.models import config as model_config
from vdjax.models import hf, transformer
from vdjax.models.config import ModelConfig
from vdjax.models.functional import Model, make_model, shardings


class Setup(NamedTuple):
    """What all stages share."""

    model: Model
    mesh: jax.sharding.Mesh
    tokenizer: Any
    template: chat.Template
    hf_config: dict[str, Any]  # of exported models
    directory: Path | None  # of the pretrained model; None from scratch


def reading(config: ConfigDict) -> tuple[Any, chat.Template, Path | None]:
    """Tokenizer, chat template, and the directory of the pretrained model, if there is one.

    Raises:
      UserError: a model directory, tokenizer or template that cannot be had.
    """
    directory = hf.resolve(config.model.path, config.model.revision or None) if config.model.path else None
    source = config.tokenizer.path or directory
    if not source:
        raise UserError("config.tokenizer.path is empty; a model from scratch needs a directory, hub id or 'bytes'")
    tok = tokenizer.byte_level() if source == "bytes" else tokenizer.load(source)
    options = config.tokenizer.get("template_options", chat.NO_THOUGHTS)  # runs made before there were any have none
    return tok, chat.pick_template(tok, config.tokenizer.chat_template, dict(options)), directory


def setup(config: ConfigDict) -> Setup:
    """Model shape, mesh, tokenizer and chat template; no parameters yet.

    Raises:
      UserError: a model, tokenizer, template or mesh that cannot be had or do not fit together.
    """
    tok, template, directory = reading(config)
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
    if (last := tokenizer.last_id(tok)) >= cfg.vocab_size:
        text = tok.convert_ids_to_tokens(last)
        raise UserError(
            f"{config.tokenizer.path or directory}: the tokenizer has {len(tok)} tokens, the last {text!r} with the id "
            f"{last}, but {directory or 'config.model'} a vocabulary of {cfg.vocab_size}: vocab_size must be at least "
            f"{last + 1}, or the tokenizer is that of another model"
        )
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    check_tensor(cfg, mesh)
    check_context(config, mesh.shape["context"])
    return Setup(make_model(cfg, config.model), mesh, tok, template, hf_config, directory)


def check_tensor(cfg: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """UserError where the mesh's axis `tensor` cannot share out the model's width."""
    for field in ("num_heads", "intermediate_size"):
        if getattr(cfg, field) % mesh.shape["tensor"]:
            raise UserError(f"config.mesh.tensor={mesh.shape['tensor']} does not divide {field}={getattr(cfg, field)}")


def check_context(config: ConfigDict, context: int) -> None:
    """UserError where the mesh's axis `context` cannot share out the length of rows."""
    if packing.LENGTH_MULTIPLE % context:
        raise UserError(
            f"config.mesh.context={context} does not divide {packing.LENGTH_MULTIPLE}: rows have a multiple of "
            f"{packing.LENGTH_MULTIPLE} tokens, and the context axis spreads them evenly"
        )
    for name in config.stages:
        if config[name].row_length % context:
            raise UserError(
                f"config.{name}.row_length={config[name].row_length} is no multiple of config.mesh.context={context}"
            )


def initial_params(config: ConfigDict, made: Setup) -> Any:
    """Pretrained parameters, or seeded ones, in their shardings."""
    layout = shardings(made.model, made.mesh)
    if config.model.path:
        directory = hf.resolve(config.model.path, config.model.revision or None)
        return hf.place(hf.open_reader(directory, made.model.cfg), made.model.params, layout)
    dtype = jnp.dtype(config.model.param_dtype)
    return transformer.init_params(made.model.cfg, seed=config.seed, param_dtype=dtype, shardings=layout)
