"""Greedy tokens are those of transformers' generate (scripts/make_generate_goldens.py)."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from vdjax import sharding
from vdjax.models import config, hf
from vdjax.models.functional import make_model, shardings
from vdjax.sampling import Sampling, generate

GOLDENS = Path(__file__).parent / "goldens"
MODELS = Path(__file__).parents[1] / "data" / "goldens"
# A real model's directory and its file of goldens, such as SmolLM2-135M with 64 prompts and 64 tokens each.
REAL = os.environ.get("VDJAX_GENERATE_MODEL"), os.environ.get("VDJAX_GENERATE_GOLDENS")
TIE = 1e-4  # logits as close as this may come in another order in another implementation


def check(directory: Path, file: Path) -> None:
    golden = json.loads(file.read_text())
    cfg = config.from_hf(hf.read_config(directory), where=str(directory))
    made, mesh = make_model(cfg, tiny.MODEL), sharding.make_mesh(devices=jax.devices()[:1])
    params = hf.place(hf.open_reader(directory, cfg), made.params, shardings(made, mesh))
    how, seeds = Sampling(golden["new_tokens"], temperature=0), [0] * len(golden["prompts"])
    with jax.set_mesh(mesh):
        got = generate(made, params, golden["prompts"], seeds, how, golden["stop_ids"], mesh)
    ties = 0
    for row, (tokens, gaps) in enumerate(zip(golden["tokens"], golden["gaps"], strict=True)):
        differ = np.flatnonzero(got.tokens[row, : len(tokens)] != tokens)
        ties += len(differ) > 0
        assert not len(differ) or gaps[differ[0]] < TIE
        assert len(differ) or got.lengths[row] == len(tokens)
    total = sum(map(len, golden["tokens"]))
    print(f"{len(golden['prompts'])} prompts, {total} tokens, {ties} rows that differ from a tie on")


@pytest.mark.parametrize("name", ["llama_gqa2", "qwen3_gqa2", "llama_rope3_tied"])
def test_tiny_models(name: str) -> None:
    assert min(min(gaps) for gaps in json.loads((GOLDENS / f"{name}.json").read_text())["gaps"]) > TIE
    check(MODELS / name, GOLDENS / f"{name}.json")


@pytest.mark.skipif(None in REAL, reason="needs VDJAX_GENERATE_MODEL and VDJAX_GENERATE_GOLDENS")
def test_a_real_model() -> None:
    check(Path(str(REAL[0])), Path(str(REAL[1])))
