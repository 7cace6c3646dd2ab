"""What Llama-3 adds to the shared decoder: its rope scaling, its fields of config.json and its published shapes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

FAMILY = "llama"
ARCHITECTURE = "LlamaForCausalLM"
SCORE_ARCHITECTURE = "LlamaForSequenceClassification"
DEFAULT_MAX_POSITIONS = 2048

# Fields that only a Llama config.json has, each with the one value that leaves the numbers as vdjax computes them.
ONLY_VALUES: dict[str, Any] = {"mlp_bias": False, "pretraining_tp": 1, "rope_interleaved": False}
NEUTRAL_FIELDS = frozenset({"is_llama_config"})


@dataclass(frozen=True)
class RopeScaling:
    """Rope type `llama3`: slow frequencies are divided by `factor`, fast ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def scale_frequencies(frequencies: Float[np.ndarray, "half"], scaling: RopeScaling) -> Float[np.ndarray, "half"]:
    """Frequencies (radians a position) of rope type `llama3`, in float32 step by step as the reference computes them.

    Source: Llama team, "The Llama 3 Herd of Models", arXiv 2407.21783, section 3.2, and `apply_scaling` of Meta's
    reference code: with wavelength w = 2 pi / f and s = (context / w - low) / (high - low) clipped to [0, 1],
    f becomes (1 - s) f / factor + s f.
    """
    wavelengths = np.float32(2 * np.pi) / frequencies
    context = np.float32(scaling.original_max_position_embeddings)
    low, high, factor = (np.float32(x) for x in (scaling.low_freq_factor, scaling.high_freq_factor, scaling.factor))
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    slow, fast = wavelengths > context / low, wavelengths < context / high
    return np.where(slow, frequencies / factor, np.where(fast, frequencies, between))


def default_head_dim(hidden_size: int, num_heads: int) -> int:
    """head_dim of a config.json that gives none."""
    return hidden_size // num_heads


_LLAMA3 = dict(family=FAMILY, vocab_size=128256, rms_norm_eps=1e-5, rope_theta=500000.0, qk_norm=False)
_LLAMA31 = dict(
    **_LLAMA3, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), max_position_embeddings=131072, tie_embeddings=False
)
_LLAMA32 = dict(
    **_LLAMA3, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), max_position_embeddings=131072, tie_embeddings=True
)

# Published shapes: fields of ModelConfig, from the config.json files of meta-llama.
SHAPES: dict[str, dict[str, Any]] = {
    "llama3.2-1b": dict(
        **_LLAMA32, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64
    ),
    "llama3.2-3b": dict(
        **_LLAMA32, hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24, num_kv_heads=8, head_dim=128
    ),
    "llama3.1-8b": dict(
        **_LLAMA31, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128
    ),
    "llama3.1-70b": dict(
        **_LLAMA31, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128
    ),
}
