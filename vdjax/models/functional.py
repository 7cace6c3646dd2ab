"""A model apart from its parameters: what jitted functions close over while parameters stay data."""

from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict

from vdjax import sharding
from vdjax.models import transformer
from vdjax.models.config import ModelConfig
from vdjax.models.lora import Lora, adapters_of


class Model(NamedTuple):
    """`nnx.merge(graphdef, params)` is the module."""

    cfg: ModelConfig
    graphdef: Any
    params: Any  # shapes and dtypes
    axes: Any  # logical axes, a tree like `params`
    compute_dtype: str
    head_chunk: int  # scored tokens per application of the vocabulary head
    lora: Lora | None


def make_model(
    cfg: ModelConfig, config: ConfigDict, *, lora: Lora | None = None, head: Literal["vocab", "score"] = "vocab"
) -> Model:
    """The model of a shape under an experiment's `config.model`, with adapters or another head (`Transformer`)."""
    parts: dict[str, Any] = {"lora": lora, "head": head}
    graphdef, params = transformer.abstract(
        cfg,
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        unroll=config.unroll,
        query_chunk=config.query_chunk,
        kernels=uses_kernels(config.get("attention", "auto")),
        **parts,
    )
    axes = transformer.param_axes(cfg, **parts)
    return Model(cfg, graphdef, params, axes, config.compute_dtype, config.head_chunk, lora)


def uses_kernels(attention: str) -> bool:
    """Whether `config.model.attention` means the TPU's kernels."""
    return attention == "splash" or (attention == "auto" and jax.default_backend() == "tpu")


def shardings(model: Model, mesh: jax.sharding.Mesh) -> Any:
    return sharding.param_shardings(model.axes, model.params, mesh)


def init_adapters(model: Model, *, seed: int, shardings: Any) -> Any:
    """Seeded adapters of a model that has some (`lora.adapters_of`), with which it is its base: every B is zero.

    Args:
      shardings: where they are made, a tree like them.
    """
    head: Literal["vocab", "score"] = "score" if "score" in model.params else "vocab"

    def make() -> Any:
        rngs = nnx.Rngs(params=seed)
        whole = transformer.Transformer(
            model.cfg, rngs=rngs, param_dtype=model.params["embed"].dtype, lora=model.lora, head=head
        )
        return adapters_of(transformer.split(whole)[1])  # XLA makes nothing of the rest

    return jax.jit(make, out_shardings=shardings)()


def trained_part(model: Model, tree: Any) -> Any:
    """What is trained of a tree like the model's parameters: all, or adapters (and score head) alone."""
    return adapters_of(tree) if model.lora else dict(tree)


def policy_part(params: Any) -> Any:
    """Parameters without those of the values that lie beside them under "value"."""
    return {name: value for name, value in params.items() if name != "value"}


def frozen_part(model: Model, base: Any) -> Any:
    """What adapters lie beside, from parameters without them; a score model has no vocabulary head."""
    return {name: value for name, value in base.items() if name in model.params and name != "score"}


def with_head(model: Model, base: Any, *, seed: int, stddev: float) -> Any:
    """Parameters of `model` from those of a model that may have another head; a new score head is normal."""
    params = {name: value for name, value in base.items() if name in model.params}
    if "score" in model.params and "score" not in params:
        score = model.params["score"]
        params["score"] = (stddev * jax.random.normal(jax.random.key(seed), score.shape)).astype(score.dtype)
    return params
