"""Logits equal those of transformers: small models of both families, and SmolLM2-135M where its directory is given."""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vdjax import models

GOLDENS = Path(__file__).parent.parent / "data" / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))
TOLERANCE = 1e-4


def rows_of(golden: Any) -> dict[str, np.ndarray]:
    """The packed row with some padding after it, and then each segment in a row of its own."""
    segment_ids, width = golden["segment_ids"], len(golden["tokens"]) + 5
    picks = [np.arange(len(segment_ids))] + [np.flatnonzero(segment_ids == i) for i in np.unique(segment_ids)]
    rows = {name: np.zeros((len(picks), width), np.int32) for name in ("tokens", "segment_ids", "positions")}
    rows["index"] = np.full((len(picks), width), -1)
    for row, pick in enumerate(picks):
        rows["index"][row, : len(pick)] = pick
        for name in ("tokens", "segment_ids", "positions"):
            rows[name][row, : len(pick)] = golden[name][pick]
    return rows


@functools.partial(jax.jit, static_argnums=0)
def as_in_training(graphdef: nnx.GraphDef, params: Any, *batch: jax.Array) -> jax.Array:
    """Logits by the calls that training makes; `Transformer.logits` rounds less."""
    model = nnx.merge(graphdef, params)
    return model.project(model(*batch))


def test_goldens_cover_what_the_project_promises() -> None:
    configs = [json.loads((GOLDENS / name / "config.json").read_text()) for name in CASES]
    ropes = [c.get("rope_parameters") or c.get("rope_scaling") or {"rope_type": "default"} for c in configs]
    ratios = {c["num_attention_heads"] // c["num_key_value_heads"] for c in configs}
    head_dims = {models.from_hf(c, where=name).head_dim for c, name in zip(configs, CASES, strict=True)}
    assert len(CASES) >= 12
    assert {c["architectures"][0] for c in configs} == {"LlamaForCausalLM", "Qwen3ForCausalLM"}
    assert min(ratios) == 1 and max(ratios) == 8 and min(head_dims) == 32 and max(head_dims) == 128
    assert {c["tie_word_embeddings"] for c in configs} == {True, False}
    assert {rope["rope_type"] for rope in ropes} == {"default", "llama3"}
    assert {"rope_theta" in c for c in configs} == {True, False}
    assert any(c["num_attention_heads"] % 2 for c in configs)
    for name, config, rope in zip(CASES, configs, ropes, strict=True):
        if "beyond" in name or "rope3" in name:
            context = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
            assert np.load(GOLDENS / name / "golden.npz")["positions"].max() > context


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_packed_and_apart(name: str) -> None:
    golden = np.load(GOLDENS / name / "golden.npz")
    rows = rows_of(golden)
    model = models.load_pretrained(GOLDENS / name)
    logits = np.asarray(model.logits(rows["tokens"], rows["positions"], rows["segment_ids"]))
    assert logits.dtype == np.float32 and np.isfinite(logits).all()
    scored = rows["index"] >= 0
    expected = golden["logits"][rows["index"][scored]]
    np.testing.assert_allclose(logits[scored], expected, rtol=0, atol=TOLERANCE)
    graphdef, params = models.split(model)
    as_trained = as_in_training(graphdef, params, rows["tokens"], rows["positions"], rows["segment_ids"])
    np.testing.assert_allclose(np.asarray(as_trained)[scored], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama_odd_heads", "qwen3_rope3"])
def test_query_chunks_remat_and_unrolling_change_no_logit(name: str) -> None:
    golden = np.load(GOLDENS / name / "golden.npz")
    model = models.load_pretrained(GOLDENS / name, query_chunk=32, remat="dots", unroll=True)
    logits = model.logits(golden["tokens"][None], golden["positions"][None], golden["segment_ids"][None])
    np.testing.assert_allclose(logits[0], golden["logits"], rtol=0, atol=TOLERANCE)


def test_positions_by_default_restart_in_every_segment() -> None:
    golden = np.load(GOLDENS / "llama_mha" / "golden.npz")
    model = models.load_pretrained(GOLDENS / "llama_mha")
    logits = model.logits(golden["tokens"][None], segment_ids=golden["segment_ids"][None])
    np.testing.assert_allclose(logits[0], golden["logits"], rtol=0, atol=TOLERANCE)
    first = golden["segment_ids"] == 1
    np.testing.assert_allclose(
        model.logits(golden["tokens"][first][None])[0], golden["logits"][first], rtol=0, atol=TOLERANCE
    )


def test_bfloat16_compute_stays_near_float32() -> None:
    golden = np.load(GOLDENS / "qwen3_gqa2" / "golden.npz")
    model = models.load_pretrained(GOLDENS / "qwen3_gqa2", param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    assert model.embed[...].dtype == jnp.bfloat16
    logits = model.logits(golden["tokens"][None], golden["positions"][None], golden["segment_ids"][None])[0]
    assert logits.dtype == jnp.float32
    error = np.abs(logits - golden["logits"])
    assert error.mean() < 0.03 * golden["logits"].std() and error.max() > TOLERANCE


def test_smollm2_equals_transformers() -> None:
    directory = os.environ.get("VDJAX_SMOLLM2")
    if not directory:
        pytest.skip("set VDJAX_SMOLLM2 to the directory that scripts/get_smollm2.py makes")
    golden = np.load(GOLDENS / "smollm2.npz")
    digest = hashlib.sha256((Path(directory) / "model.safetensors").read_bytes()).hexdigest()
    assert digest == str(golden["weights_sha256"]), "other weights than the golden's; run scripts/make_goldens.py"
    logits = np.asarray(models.load_pretrained(directory).logits(golden["tokens"][None])[0], np.float64)
    np.testing.assert_allclose(logits[:, golden["columns"]], golden["logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.log(np.exp(logits).sum(-1)), golden["logsumexp"], rtol=0, atol=TOLERANCE)
