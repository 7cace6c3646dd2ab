"""PEFT directories: adapters that peft made, computed and written by us."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from flax import nnx

from vdjax import models
from vdjax.errors import UserError
from vdjax.models import lora, peft
from vdjax.models.functional import make_model

GOLDENS = Path(__file__).parent.parent / "data" / "goldens"
HEADS = GOLDENS.parent / "head_goldens"


def of_peft(directory: Path) -> tuple[lora.Lora, lora.Params, dict[str, np.ndarray], dict[str, Any]]:
    """What peft wrote, as ours."""
    config = json.loads((directory / peft.CONFIG_FILE).read_text())
    tensors = safetensors.numpy.load_file(directory / peft.WEIGHTS_FILE)
    targets = tuple(name for name in lora.KERNELS if name in config["target_modules"])
    layers: dict[str, Any] = {}
    for name in targets:
        for side, theirs in (("_lora_a", "lora_A"), ("_lora_b", "lora_B")):
            found = [key for key in sorted(tensors) if f".{name}.{theirs}.weight" in key]
            layers[name + side] = jnp.stack([tensors[key].T for key in found])
    return lora.Lora(config["r"], config["lora_alpha"], targets), {"layers": layers}, tensors, config


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_and_files_equal_those_of_peft(family: str, tmp_path: Path) -> None:
    adapters, params, tensors, config = of_peft(HEADS / f"{family}_peft")
    base = models.load_pretrained(GOLDENS / config["base_model_name_or_path"])
    made = make_model(base.cfg, tiny.MODEL, lora=adapters)
    golden = np.load(HEADS / f"{family}_peft" / "golden.npz")
    whole = lora.join(models.split(base)[1], params)
    for graphdef, values in ((made.graphdef, whole), (models.split(base)[0], lora.merge(whole, adapters))):
        logits = nnx.merge(graphdef, values).logits(golden["tokens"])
        np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)
    assert np.abs(base.logits(golden["tokens"]) - golden["logits"]).max() > 1

    peft.save(params, adapters, tmp_path, base="some/model", revision="abc", metadata={"step": "3"})
    written = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS_FILE)
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        assert written[name].dtype == value.dtype
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    ours = json.loads((tmp_path / peft.CONFIG_FILE).read_text())
    expected = config | {"base_model_name_or_path": "some/model", "revision": "abc", "init_lora_weights": True}
    for name in ours:
        in_order = sorted if name == "target_modules" else (lambda value: value)
        assert in_order(ours[name]) == in_order(expected[name]), name
    assert isinstance(ours["lora_alpha"], int)
    with safetensors.safe_open(tmp_path / peft.WEIGHTS_FILE, "np") as opened:
        assert opened.metadata() == {"format": "pt", "step": "3"}
    with pytest.raises(UserError, match="already holds"):
        peft.save(params, adapters, tmp_path, base="some/model")


def test_adapters_are_written_in_float32(tmp_path: Path) -> None:
    model = make_model(tiny.model_without_params("qwen").cfg, tiny.MODEL, lora=lora.Lora(2, 0.5, ("k_proj",)))
    shapes = lora.adapters_of(model.params)["layers"]
    half = {"layers": {name: jnp.ones(x.shape, jnp.bfloat16) for name, x in shapes.items()}}
    peft.save(half, lora.Lora(2, 0.5, ("k_proj",)), tmp_path, base="x")
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS_FILE)
    assert {t.dtype.name for t in tensors.values()} == {"float32"} and len(tensors) == 4
    assert json.loads((tmp_path / peft.CONFIG_FILE).read_text())["lora_alpha"] == 0.5
    assert tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"].shape == (2, 32)
