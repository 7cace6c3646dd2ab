"""A model apart from its parameters: what jitted functions close over while parameters stay data."""

from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vdjax import sharding
from vdjax.models import transformer
from vdjax.models.config import ModelConfig


class Model(NamedTuple):
    """`nnx.merge(graphdef, params)` is the module."""

    cfg: ModelConfig
    graphdef: Any
    params: Any  # shapes and dtypes
    axes: Any  # logical axes, a tree like `params`
    compute_dtype: str
    head_chunk: int  # scored tokens per application of the vocabulary head


def make_model(cfg: ModelConfig, config: ConfigDict) -> Model:
    """The model of a shape under an experiment's `config.model`."""
    graphdef, params = transformer.abstract(
        cfg,
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        unroll=config.unroll,
        query_chunk=config.query_chunk,
    )
    return Model(cfg, graphdef, params, transformer.param_axes(cfg), config.compute_dtype, config.head_chunk)


def shardings(model: Model, mesh: jax.sharding.Mesh) -> Any:
    return sharding.param_shardings(model.axes, model.params, mesh)
