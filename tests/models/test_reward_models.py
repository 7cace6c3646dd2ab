"""Sequence-classification directories of one label as reward models, both ways."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from flax import nnx

from vdjax import sharding
from vdjax.errors import UserError
from vdjax.models import config as model_config
from vdjax.models import hf
from vdjax.models.functional import Model, make_model, shardings

GOLDENS = Path(__file__).parent.parent / "data" / "goldens"
HEADS = GOLDENS.parent / "head_goldens"
FAMILIES = ("llama", "qwen3")


def load(directory: Path) -> tuple[Model, Any]:
    cfg = model_config.from_hf(hf.read_config(directory), where=str(directory / "config.json"), head="score")
    model = make_model(cfg, tiny.MODEL, head="score")
    layout = shardings(model, sharding.make_mesh(devices=jax.devices()[:1]))
    return model, hf.place(hf.open_reader(directory, cfg, "score"), model.params, layout)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(HEADS / name, tmp_path / name))


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_equal_transformers(family: str) -> None:
    """Of padded rows, at the token that transformers finds to be the last."""
    golden = np.load(HEADS / f"{family}_score" / "golden.npz")
    model, params = load(HEADS / f"{family}_score")
    tokens = golden["tokens"]
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    segment_ids = (positions < golden["lengths"][:, None]).astype(np.int32)
    module = nnx.merge(model.graphdef, params)
    scores = module.scores(module(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segment_ids)))
    rewards = np.asarray(scores)[np.arange(len(tokens)), golden["lengths"] - 1]
    np.testing.assert_allclose(rewards, golden["rewards"], rtol=0, atol=1e-4)
    assert np.abs(golden["rewards"]).max() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_export_is_bit_identical(family: str, tmp_path: Path) -> None:
    source = HEADS / f"{family}_score"
    model, params = load(source)
    config = hf.read_config(source)
    hf.save(params, model.cfg, tmp_path, hf_config=config)
    want, found = (safetensors.numpy.load_file(d / hf.SINGLE_FILE) for d in (source, tmp_path))
    assert found.keys() == want.keys() and found["score.weight"].shape == (1, model.cfg.hidden_size)
    for name, value in want.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name
    # The shape's config.json as a language model has it becomes that of the reward model again.
    language = {k: v for k, v in config.items() if k not in ("id2label", "label2id", "pad_token_id")}
    language |= {"architectures": [config["architectures"][0].replace("SequenceClassification", "CausalLM")]}
    assert model_config.scoring(language | {"num_labels": 2}, 7) == config


def test_a_part_of_the_head_is_read() -> None:
    model, params = load(HEADS / "qwen3_score")
    reader = hf.open_reader(HEADS / "qwen3_score", model.cfg, "score")
    np.testing.assert_array_equal(reader(("score",), (slice(3, 9),)), np.asarray(params["score"])[3:9])


def test_configs_of_the_other_kind_are_refused() -> None:
    score, language = hf.read_config(HEADS / "llama_score"), hf.read_config(GOLDENS / "llama_mha")

    def read(config: dict[str, Any], head: Any) -> model_config.ModelConfig:
        return model_config.from_hf(config, where="x", head=head)

    assert read(score, "score").family == "llama"
    assert read({k: v for k, v in score.items() if k != "id2label"} | {"num_labels": 1}, "score").family == "llama"
    with pytest.raises(UserError, match="x: .*a reward model where a language model is needed; supported: LlamaForC"):
        read(score, "vocab")
    with pytest.raises(UserError, match="x: .*a language model where a reward model is needed; supported: LlamaForS"):
        read(language, "score")
    with pytest.raises(UserError, match="BertForSequenceClassification'.; supported: LlamaForSequenceClassification"):
        read(score | {"architectures": ["BertForSequenceClassification"]}, "score")
    with pytest.raises(UserError, match="1 label, but this model has 3"):
        read(score | {"id2label": {"0": "a", "1": "b", "2": "c"}}, "score")
    with pytest.raises(UserError, match="1 label, but this model has 2"):
        read({k: v for k, v in score.items() if k != "id2label"}, "score")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score.weight": None}, "1 tensors are missing for its config.json: score.weight"),
        ({"score.bias": np.ones(1, np.float32)}, "1 tensors are unexpected for its config.json: score.bias"),
        ({"lm_head.weight": np.ones((53, 12), np.float32)}, "unexpected for its config.json: lm_head.weight"),
        ({"score.weight": np.ones((2, 12), np.float32)}, r"score.weight has shape \(2, 12\).*\(1, 12\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    changes: dict[str, np.ndarray | None], message: str, copy: Callable[[str], Path]
) -> None:
    file = copy("llama_score") / hf.SINGLE_FILE
    tensors = safetensors.numpy.load_file(file) | changes
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if v is not None}, file)
    with pytest.raises(UserError, match=message):
        load(file.parent)


def test_a_tied_checkpoint_of_both_kinds_is_refused(copy: Callable[[str], Path]) -> None:
    file = copy("qwen3_score") / hf.SINGLE_FILE
    assert json.loads((file.parent / "config.json").read_text())["tie_word_embeddings"]
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    with pytest.raises(UserError, match="unexpected for its config.json: lm_head.weight"):
        load(file.parent)
