"""Our PEFT and reward-model directories in peft and transformers; for development machines that have them and torch."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from vdjax import models, sharding
from vdjax.models import config as model_config
from vdjax.models import hf, lora, peft
from vdjax.models.functional import make_model, shardings

torch = pytest.importorskip("torch", reason="compares with peft and transformers on torch, which vdjax does not need")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("peft")

GOLDENS = Path(__file__).parent.parent / "data" / "goldens"
BASES = ("llama_mha", "llama_rope3_tied", "qwen3_gqa2", "qwen3_gqa8")


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("targets", [lora.KERNELS, ("k_proj", "down_proj")])
def test_peft_computes_what_we_compute(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    adapters = lora.Lora(5, 7.5, targets)
    graphdef, params = models.split(models.load_pretrained(GOLDENS / name))
    model = make_model(models.load_pretrained(GOLDENS / name).cfg, tiny.MODEL, lora=adapters)
    rng = np.random.default_rng(0)
    own = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.5 * x.shape[1] ** -0.5), jnp.float32),
        lora.adapters_of(model.params),
    )
    peft.save(own, adapters, tmp_path, base=str(GOLDENS / name))
    tokens = rng.integers(0, 53, (2, 30))
    loaded = theirs.AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = loaded(input_ids=torch.from_numpy(tokens)).logits.numpy()
    found = nnx.merge(model.graphdef, lora.join(params, own)).logits(tokens)
    error = np.abs(np.asarray(found) - want).max()
    change = np.abs(np.asarray(nnx.merge(graphdef, params).logits(tokens)) - want).max()
    print(f"{name}: largest error {error:.1e}, largest change by the adapters {change:.1f}")
    assert error < 1e-4 and change > 0.5


@pytest.mark.parametrize("name", BASES)
def test_transformers_rewards_as_we_do(name: str, tmp_path: Path) -> None:
    base = models.load_pretrained(GOLDENS / name)
    model = make_model(base.cfg, tiny.MODEL, head="score")
    rng = np.random.default_rng(1)
    params: dict[str, Any] = {k: v for k, v in models.split(base)[1].items() if k != "lm_head"}
    params["score"] = jnp.asarray(rng.normal(size=base.cfg.hidden_size), jnp.float32)
    hf_config = model_config.scoring(hf.read_config(GOLDENS / name), 3)
    hf.save(params, base.cfg, tmp_path, hf_config=hf_config, dtype="float32")
    loaded, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    lengths = (30, 1, 12, 19)
    tokens = rng.integers(0, 53, (4, 30))
    for row, length in zip(tokens, lengths, strict=True):
        row[length - 1], row[length:] = 11, 3
    with torch.no_grad():
        want = loaded.eval()(input_ids=torch.from_numpy(tokens)).logits[:, 0].numpy()

    cfg = model_config.from_hf(hf.read_config(tmp_path), where="x", head="score")
    layout = shardings(model, sharding.make_mesh(devices=jax.devices()[:1]))
    again = hf.place(hf.open_reader(tmp_path, cfg, "score"), model.params, layout)
    positions = np.tile(np.arange(30), (4, 1))
    module = nnx.merge(model.graphdef, again)
    with jax.default_matmul_precision("highest"):
        scores = module.scores(module(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens)))
    error = np.abs(np.asarray(scores)[np.arange(4), np.asarray(lengths) - 1] - want).max()
    print(f"{name}: largest error {error:.1e}, largest reward {np.abs(want).max():.1f}")
    assert error < 1e-4
