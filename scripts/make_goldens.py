"""Makes tests/data/goldens: small Hugging Face models with the float32 logits that transformers computes for them.

Needs torch and transformers, which vdjax itself does not:

    python -m venv v && v/bin/pip install torch==2.13.0 transformers==5.23.0
    v/bin/python scripts/make_goldens.py [--smollm2 DIR]

Each case is a directory as published models have it (config.json, model.safetensors) and `golden.npz`: tokens,
segment_ids and positions of one packed row, and the logits of every token when transformers runs its segment apart.
With --smollm2, the directory that scripts/get_smollm2.py makes, `smollm2.npz` holds part of its logits.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

GOLDENS = Path(__file__).parent.parent / "tests" / "data" / "goldens"
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def case(family: str, heads: int, kv_heads: int, head_dim: int, **options: Any) -> dict[str, Any]:
    # transformers wants hidden_size to be a multiple of the heads of a Llama model, even where head_dim is given.
    hidden_size = 3 * heads if family == "llama" else 20
    settings = dict(
        hidden_size=max(hidden_size, 12), num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )
    defaults = dict(layers=2, theta=10000.0, context=None, tied=False, old=False, dtype="bfloat16", start=0)
    return {"family": family, **settings, **defaults, **options}


# context: original context of rope type llama3 (None: type default). old: rope_theta and rope_scaling at the top of
# config.json instead of rope_parameters. start: position of the first token of the last segment.
CASES = {
    "llama_mha": case("llama", 4, 4, 32, old=True, dtype="float32"),
    "llama_odd_heads": case("llama", 9, 3, 32, tied=True, theta=100000.0, old=True),
    "llama_gqa2": case("llama", 6, 3, 64, tied=True),
    "llama_gqa8": case("llama", 8, 1, 64, dtype="float16"),
    "llama_rope3": case("llama", 8, 2, 64, theta=500000.0, context=32, old=True),
    "llama_rope3_tied": case("llama", 5, 1, 128, theta=500000.0, context=16, tied=True),
    "llama_rope3_far": case("llama", 3, 3, 64, theta=500000.0, context=8192, start=9000, old=True),
    "llama_derived_head_dim": case("llama", 3, 1, None, hidden_size=96, layers=1, tied=True, old=True),
    "llama_beyond_context": case("llama", 7, 1, 48, max_positions=24),
    "qwen3_mha": case("qwen3", 3, 3, 32, theta=1000000.0, old=True, dtype="float32"),
    "qwen3_gqa2": case("qwen3", 4, 2, 128, theta=1000000.0, tied=True),
    "qwen3_gqa4": case("qwen3", 4, 1, 96, theta=1000000.0, old=True),
    "qwen3_gqa5": case("qwen3", 5, 1, 64, tied=True, dtype="float16"),
    "qwen3_gqa8": case("qwen3", 8, 1, 64, theta=5000000.0, layers=3),
    "qwen3_rope3": case("qwen3", 6, 2, 32, theta=1000000.0, context=32, tied=True),
    "qwen3_beyond_context": case("qwen3", 9, 3, 40, max_positions=24, start=300),
}
LENGTHS = (48, 1, 9, 14)  # of the segments


def make_config(spec: dict[str, Any]) -> transformers.PreTrainedConfig:
    rope: dict[str, Any] = {"rope_type": "default"}
    if spec["context"]:
        rope = {**LLAMA3_ROPE, "original_max_position_embeddings": spec["context"]}
    kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[spec["family"]]
    head_dim = {"head_dim": spec["head_dim"]} if spec["head_dim"] else {}
    return kind(
        vocab_size=53,
        hidden_size=spec["hidden_size"],
        intermediate_size=37,
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["num_attention_heads"],
        num_key_value_heads=spec["num_key_value_heads"],
        rope_parameters={**rope, "rope_theta": spec["theta"]},
        max_position_embeddings=spec.get("max_positions", 8 * (spec["context"] or 1024)),
        rms_norm_eps=1e-5,
        tie_word_embeddings=spec["tied"],
        **head_dim,
    )


def randomise(model: torch.nn.Module) -> None:
    """Weights that make every part count: attention that is not uniform, norms that are not 1."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.copy_(1 + 0.3 * torch.randn_like(value))
            else:
                value.normal_(std=(3.0 if "embed" in name else 1.4) * value.shape[1] ** -0.5)


def rewrite_old(path: Path) -> None:
    """config.json as transformers 4 wrote it."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_case(name: str, spec: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    out = GOLDENS / name
    kind = {"llama": transformers.LlamaForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}[spec["family"]]
    model = kind(make_config(spec))
    randomise(model)
    model.to(getattr(torch, spec["dtype"])).save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    if spec["old"]:
        rewrite_old(out / "config.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    model.set_attn_implementation("eager")
    tokens, segments, positions, logits = [], [], [], []
    for segment, length in enumerate(LENGTHS, 1):
        start = spec["start"] if segment == len(LENGTHS) else 0
        ids, place = torch.randint(0, 53, (1, length)), torch.arange(start, start + length)[None]
        with torch.no_grad():
            logits.append(model(input_ids=ids, position_ids=place).logits[0].numpy())
        tokens.append(ids[0].numpy())
        positions.append(place[0].numpy())
        segments.append(np.full(length, segment))
    np.savez_compressed(
        out / "golden.npz",
        tokens=np.concatenate(tokens).astype(np.int32),
        segment_ids=np.concatenate(segments).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        logits=np.concatenate(logits).astype(np.float32),
    )
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{name}: {size / 1e3:.0f} kB, largest |logit| {np.abs(np.concatenate(logits)).max():.1f}")


def make_smollm2(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = (GOLDENS / "text.txt").read_text(encoding="utf-8")
    tokens = np.asarray(tokenizer(text)["input_ids"], np.int32)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    columns = np.random.default_rng(0).choice(logits.shape[1], 512, replace=False)
    np.savez_compressed(
        GOLDENS / "smollm2.npz",
        weights_sha256=hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
        tokens=tokens,
        columns=columns,
        logits=logits[:, columns],
        logsumexp=torch.logsumexp(torch.from_numpy(logits), -1).numpy(),
    )
    print(f"smollm2: {len(tokens)} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    arguments = parser.parse_args()
    for seed, (name, spec) in enumerate(CASES.items()):
        make_case(name, spec, seed)
    if arguments.smollm2:
        make_smollm2(arguments.smollm2)


if __name__ == "__main__":
    main()
