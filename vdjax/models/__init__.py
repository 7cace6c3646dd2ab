"""Llama-3 and Qwen-3 decoders: from a Hugging Face directory or hub id to a Flax NNX module."""

from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from vdjax.models import hf
from vdjax.models.config import ModelConfig, from_hf, named, num_params, to_hf
from vdjax.models.transformer import Remat, Transformer, abstract, init_params, param_axes, split
from vdjax.sharding import make_mesh, param_shardings

__all__ = [
    "ModelConfig",
    "Transformer",
    "abstract",
    "from_hf",
    "init_params",
    "load_pretrained",
    "named",
    "num_params",
    "param_axes",
    "split",
    "to_hf",
]


def load_pretrained(
    path_or_id: str | Path,
    *,
    mesh: Mesh | None = None,
    param_dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike = jnp.float32,
    revision: str | None = None,
    ignore_fields: Collection[str] = (),
    remat: Remat = "none",
    unroll: int | bool = 1,
    query_chunk: int = 0,
) -> Transformer:
    """Loads a `LlamaForCausalLM` or `Qwen3ForCausalLM`; every device reads only its own part of each tensor.

    Args:
      path_or_id: Hugging Face directory (config.json and safetensors) or hub id.
      mesh: from `vdjax.sharding.make_mesh`; None is one device.
      param_dtype: dtype the parameters are kept in.
      compute_dtype: dtype of activations and matrix products.
      revision: of a hub id: branch, tag or commit.
      ignore_fields: unknown fields of config.json that do not change the numbers.
      remat, unroll, query_chunk: see `Transformer`.

    Raises:
      UserError: config.json asks for what vdjax does not compute, or a tensor is missing, unexpected or misshapen.
    """
    directory = hf.resolve(path_or_id, revision)
    cfg = from_hf(hf.read_config(directory), where=str(directory / "config.json"), ignore_fields=ignore_fields)
    graphdef, shapes = abstract(
        cfg,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        remat=remat,
        unroll=unroll,
        query_chunk=query_chunk,
    )
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    params = hf.place(hf.open_reader(directory, cfg), shapes, param_shardings(param_axes(cfg), shapes, mesh))
    return nnx.merge(graphdef, params)
