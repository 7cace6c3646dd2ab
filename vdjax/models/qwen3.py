"""What Qwen-3 adds to the shared decoder: q/k norm, a free head_dim, its fields of config.json, published shapes."""

from typing import Any

FAMILY = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
SCORE_ARCHITECTURE = "Qwen3ForSequenceClassification"
DEFAULT_MAX_POSITIONS = 32768

# Fields that only a Qwen-3 config.json has, each with the one value that leaves the numbers as vdjax computes them.
ONLY_VALUES: dict[str, Any] = {"use_sliding_window": False}
# Read by the reference only where a sliding window is in use, which `use_sliding_window` and `layer_types` refuse.
NEUTRAL_FIELDS = frozenset({"sliding_window", "max_window_layers"})


def default_head_dim(hidden_size: int, num_heads: int) -> int:
    """head_dim of a config.json that gives none: Qwen-3 does not derive it."""
    return 128


def _shape(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, *, tie_embeddings: bool
) -> dict[str, Any]:
    return dict(
        family=FAMILY,
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling=None,
        max_position_embeddings=40960,
        tie_embeddings=tie_embeddings,
        qk_norm=True,
    )


# Published shapes: fields of ModelConfig, from the config.json files of Qwen. The -Base models differ only in
# max_position_embeddings (32768), which changes no number.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _shape(1024, 3072, 28, 16, tie_embeddings=True),
    "qwen3-1.7b": _shape(2048, 6144, 28, 16, tie_embeddings=True),
    "qwen3-4b": _shape(2560, 9728, 36, 32, tie_embeddings=True),
    "qwen3-8b": _shape(4096, 12288, 36, 32, tie_embeddings=False),
    "qwen3-14b": _shape(5120, 17408, 40, 40, tie_embeddings=False),
    "qwen3-32b": _shape(5120, 25600, 64, 64, tie_embeddings=False),
}
