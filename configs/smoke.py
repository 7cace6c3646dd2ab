"""A tiny model from scratch, with every part of an experiment, in minutes on two cores and with nothing to download.

configs/smoke.py is a Qwen-3, configs/smoke.py:llama a Llama-3. A short pretraining stage on text that we wrote, SFT,
DPO, probes and report; byte-level tokenizer.
"""

from importlib import resources

from ml_collections import ConfigDict

from vdjax import config as base
from vdjax.errors import UserError, nearest

DATA = resources.files("vdjax.data") / "smoke"

SHAPES = {
    "qwen": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
}


def get_config(family: str = "qwen") -> ConfigDict:
    if family not in SHAPES:
        raise UserError(f"configs/smoke.py:{family}{nearest(family, SHAPES)}")
    c = base.experiment()
    c.model.shape = ConfigDict(
        {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
        | SHAPES[family]
    )
    c.tokenizer.path = "bytes"
    c.probes.path = str(DATA / "probes.jsonl")
    c.probes.readouts = ("statement", "options")
    c.resume_every = 20

    c.stages = ("pretrain", "sft", "dpo")
    c.pretrain = base.stage(
        "pretrain",
        data={"path": str(DATA / "pretrain.txt")},
        batch_size=16,
        epochs=3,
        max_length=256,
        optimizer={"learning_rate": 2e-3},
        snapshots={"log_spaced": 2},
    )
    c.sft = base.stage(
        "sft",
        data={"path": str(DATA / "sft.jsonl")},
        eval_examples=20,
        batch_size=10,
        epochs=3,
        max_length=256,
        optimizer={"learning_rate": 1e-3},
        snapshots={"log_spaced": 4},
    )
    c.dpo = base.stage(
        "dpo",
        data={"path": str(DATA / "preferences.jsonl")},
        eval_examples=20,
        batch_size=10,
        epochs=2,
        max_length=256,
        optimizer={"learning_rate": 3e-4},
        snapshots={"log_spaced": 4},
    )
    return c
