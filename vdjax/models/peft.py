"""Adapters as a PEFT directory: what `peft` loads beside the model that they were trained beside."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from vdjax.files import check_no_model
from vdjax.models import hf
from vdjax.models.lora import SIDES, Lora, Params

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_SIDES = dict(zip(SIDES, ("lora_A", "lora_B"), strict=True))


def save(
    adapters: Params,
    lora: Lora,
    out_dir: Path,
    *,
    base: str,
    revision: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors of a language model, in float32.

    All processes must call it; the first one writes.

    Args:
      adapters: from `vdjax.models.lora.adapters_of`.
      base: directory or hub id of the model that they lie beside, for whoever loads them.
      revision: of a hub id.
      metadata: of the safetensors file.

    Raises:
      UserError: `out_dir` already holds a model.
    """
    tensors = {name: hf.fetch(source, np.dtype(np.float32)) for name, source in sources(adapters, lora).items()}
    if jax.process_index():
        return
    check_no_model(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, out_dir / WEIGHTS_FILE, {"format": "pt", **(metadata or {})})
    hf.write_json(out_dir / CONFIG_FILE, adapter_config(lora, base, revision))


def sources(adapters: Params, lora: Lora) -> dict[str, hf.Source]:
    """peft's name of each tensor, with a stacked adapter and its layer; there A is [rank, in] and B [out, rank]."""
    out: dict[str, hf.Source] = {}
    for name in lora.targets:
        module = "base_model.model." + hf.TENSORS["layers", name].removesuffix(".weight")
        for side, peft_side in PEFT_SIDES.items():
            leaf = adapters["layers"][name + side]
            out |= {f"{module.format(i)}.{peft_side}.weight": (leaf, i) for i in range(leaf.shape[0])}
    return out


def adapter_config(lora: Lora, base: str, revision: str | None) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "revision": revision,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
