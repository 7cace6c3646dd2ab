import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vdjax.errors import UserError
from vdjax.models.config import from_hf, named, num_params, to_hf
from vdjax.models.llama3 import RopeScaling, scale_frequencies

# As published: meta-llama/Llama-3.2-1B, HuggingFaceTB/SmolLM2-135M, Qwen/Qwen3-8B.
LLAMA32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_configs_are_read() -> None:
    assert from_hf(LLAMA32_1B, where="x") == named("llama3.2-1b")
    assert from_hf(QWEN3_8B, where="x") == named("qwen3-8b")
    smol = from_hf(SMOLLM2, where="x")
    assert (smol.head_dim, smol.rope_theta, smol.rope_scaling, smol.qk_norm) == (64, 100000.0, None, False)
    assert num_params(smol) == 134_515_008


# Totals that the publishers give for their checkpoints.
@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_named_shapes_have_the_published_number_of_parameters(name: str, total: int) -> None:
    assert num_params(named(name)) == total


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UserError, match="'qwen3-8b'"):
        named("qwen3-8")


def test_rope_parameters_of_transformers_5_mean_the_same() -> None:
    new = {k: v for k, v in LLAMA32_1B.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {**LLAMA32_1B["rope_scaling"], "rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert from_hf(new, where="x") == named("llama3.2-1b")
    legacy_key = {**LLAMA32_1B["rope_scaling"]}
    legacy_key["type"] = legacy_key.pop("rope_type")
    assert from_hf({**LLAMA32_1B, "rope_scaling": legacy_key}, where="x") == named("llama3.2-1b")
    layers = {"layer_types": ["full_attention"] * 36, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    qwen = {k: v for k, v in QWEN3_8B.items() if k != "rope_theta"}
    assert from_hf({**qwen, **layers}, where="x") == named("qwen3-8b")


def test_defaults_are_those_of_transformers() -> None:
    sizes = ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    llama = from_hf({k: LLAMA32_1B[k] for k in (*sizes, "num_attention_heads")}, where="x")
    assert (llama.num_kv_heads, llama.head_dim, llama.rope_theta, llama.rms_norm_eps) == (32, 64, 10000.0, 1e-6)
    assert not llama.tie_embeddings
    qwen = from_hf({k: QWEN3_8B[k] for k in (*sizes, "num_attention_heads")} | {"num_attention_heads": 16}, where="x")
    assert qwen.head_dim == 128


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA32_1B, {"architectures": ["MistralForCausalLM"]}, "architectures .*LlamaForCausalLM, Qwen3ForCausalLM"),
        (LLAMA32_1B, {"architectures": None}, "architectures"),
        (LLAMA32_1B, {"model_type": "mistral"}, "model_type"),
        (QWEN3_8B, {"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        (QWEN3_8B, {"num_experts": 128}, "num_experts.*mixture-of-experts"),
        (QWEN3_8B, {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN3_8B, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (LLAMA32_1B, {"sliding_window": 4096}, "unknown field 'sliding_window'"),
        (LLAMA32_1B, {"attention_bias": True}, "attention_bias"),
        (LLAMA32_1B, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA32_1B, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA32_1B, {"attention_dropout": 0.1}, "attention_dropout"),
        (LLAMA32_1B, {"pretraining_tp": 2}, "pretraining_tp"),
        (SMOLLM2, {"rope_interleaved": True}, "rope_interleaved"),
        (LLAMA32_1B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA32_1B, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (LLAMA32_1B, {"logit_scale": 0.1}, r"unknown field 'logit_scale'.*ignore_fields=\('logit_scale',\)"),
        (LLAMA32_1B, {"rope_thetta": 1e4}, "did you mean 'rope_theta'"),
        (QWEN3_8B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        (QWEN3_8B, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        (QWEN3_8B, {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "unknown field 'factor'"),
        (QWEN3_8B, {"rope_scaling": {"rope_type": "llama3", "type": "yarn"}}, "two types"),
        (LLAMA32_1B, {"rope_scaling": {**LLAMA32_1B["rope_scaling"], "beta_fast": 32}}, "unknown field 'beta_fast'"),
        (LLAMA32_1B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (LLAMA32_1B, {"rope_scaling": {**LLAMA32_1B["rope_scaling"], "high_freq_factor": 1.0}}, "high_freq_factor"),
        (LLAMA32_1B, {"rope_scaling": {**LLAMA32_1B["rope_scaling"], "rope_theta": 1e4}}, "rope_theta"),
        (LLAMA32_1B, {"rope_parameters": {"rope_theta": 1e4}}, "both rope_scaling and rope_parameters"),
        (LLAMA32_1B, {"rope_scaling": "llama3"}, "rope_scaling must be an object"),
        (LLAMA32_1B, {"num_key_value_heads": 5}, "multiple of num_key_value_heads"),
        (LLAMA32_1B, {"num_key_value_heads": 0}, "num_key_value_heads must be a positive whole number"),
        (LLAMA32_1B, {"hidden_size": -1}, "hidden_size must be"),
        (LLAMA32_1B, {"num_hidden_layers": 2.5}, "num_hidden_layers must be"),
        (LLAMA32_1B, {"vocab_size": True}, "vocab_size must be"),
        (LLAMA32_1B, {"vocab_size": None}, "vocab_size is missing"),
        (LLAMA32_1B, {"head_dim": 63}, "head_dim must be even"),
        (LLAMA32_1B, {"rms_norm_eps": 0}, "rms_norm_eps must be"),
        (LLAMA32_1B, {"rope_theta": "500000"}, "rope_theta must be"),
        (LLAMA32_1B, {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        from_hf({**base, **change}, where="DIR/config.json")
    assert str(error.value).startswith("DIR/config.json")


def test_ignore_fields_excuse_unknown_fields_only() -> None:
    config = {**LLAMA32_1B, "logit_note": "none"}
    assert from_hf(config, where="x", ignore_fields=("logit_note",)) == named("llama3.2-1b")
    for name in ("rope_theta", "attention_bias", "quantization_config"):
        with pytest.raises(UserError, match=name):
            from_hf({**config, name: 1}, where="x", ignore_fields=("logit_note", name))


@pytest.mark.parametrize("name", ["llama3.2-1b", "llama3.1-70b", "qwen3-0.6b", "qwen3-32b"])
def test_to_hf_is_read_back(name: str) -> None:
    config = to_hf(named(name), dtype="bfloat16", bos_token_id=1, eos_token_id=[2, 3])
    assert from_hf(json.loads(json.dumps(config)), where="x") == named(name)


def test_llama3_frequencies() -> None:
    """Fast rotations are kept, slow ones divided by the factor, one between lies between (arXiv 2407.21783)."""
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    turns = np.array([8.0, 4.01, 2.5, 0.99, 0.1])  # full turns within the original context
    frequencies = (turns * 2 * np.pi / 8192).astype(np.float32)
    ratio = scale_frequencies(frequencies, scaling) / frequencies
    np.testing.assert_allclose(ratio, [1, 1, 0.5 / 8 + 0.5, 1 / 8, 1 / 8], rtol=1e-5)


def test_golden_configs_name_no_unknown_field() -> None:
    goldens = Path(__file__).parent.parent / "data" / "goldens"
    for path in goldens.glob("*/config.json"):
        from_hf(json.loads(path.read_text()), where=str(path))
