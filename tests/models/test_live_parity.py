"""Against transformers itself, on random shapes; for development machines that have torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vdjax import models
from vdjax.models import hf

torch = pytest.importorskip("torch", reason="compares with transformers on torch, which vdjax does not need")
transformers = pytest.importorskip("transformers")


def random_model(seed: int) -> Any:
    """Both families in turn; heads, GQA ratio, head_dim, rope and tying drawn by `seed`."""
    rng = np.random.default_rng(seed)
    kv_heads, ratio = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    heads = kv_heads * ratio
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(rng.choice([1e4, 1e5, 5e5, 1e6]))}
    if rng.random() < 0.5:
        rope |= {"rope_type": "llama3", "factor": float(rng.choice([8, 32])), "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": int(rng.choice([16, 32, 64]))}
    family = "Llama" if seed % 2 else "Qwen3"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=int(rng.integers(50, 200)),
        hidden_size=heads * int(rng.integers(2, 9)),
        intermediate_size=int(rng.integers(20, 90)),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(rng.choice([32, 48, 64, 96, 128])),
        max_position_embeddings=int(rng.choice([16, 64])),
        rms_norm_eps=float(rng.choice([1e-5, 1e-6])),
        tie_word_embeddings=bool(rng.random() < 0.5),
        rope_parameters=rope,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(1 + 0.3 * torch.randn_like(value) if "norm" in name else torch.randn_like(value))
            if "norm" not in name:
                value.mul_((2.0 if "embed" in name or "head" in name else 1.2) * value.shape[1] ** -0.5)
    return model


@pytest.mark.parametrize("seed", range(14))
def test_random_shapes_equal_transformers(seed: int, tmp_path: Path) -> None:
    reference = random_model(seed)
    reference.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    model = models.load_pretrained(tmp_path / "a", query_chunk=32 * (seed % 3))
    rng = np.random.default_rng(seed)
    lengths = (90, 1, 20, 33)
    tokens = rng.integers(0, model.cfg.vocab_size, sum(lengths))
    segment_ids = np.repeat(np.arange(1, 5), lengths)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    with torch.no_grad():
        apart = [reference(torch.from_numpy(part)[None]).logits[0].numpy() for part in parts]
    packed = model.logits(tokens[None], segment_ids=segment_ids[None])[0]
    np.testing.assert_allclose(packed, np.concatenate(apart), rtol=0, atol=1e-4)
    np.testing.assert_allclose(model.logits(parts[0][None])[0], apart[0], rtol=0, atol=1e-4)

    hf.save(models.split(model)[1], model.cfg, tmp_path / "b", hf_config=hf.read_config(tmp_path / "a"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), again.parameters(), strict=True))
