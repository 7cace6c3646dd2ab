"""The tiny model of configs/smoke.py through a reward model and PPO with it, in minutes on two cores.

Pretraining and SFT as there; then a reward model on the preference pairs, and PPO on their prompts. The argument may be
another objective that learns from its own responses: configs/smoke_ppo.py:grpo (rloo, dr_grpo, dapo, online_dpo).
"""

from ml_collections import ConfigDict

from configs import smoke
from vdjax import config as base


def get_config(objective: str = "ppo") -> ConfigDict:
    c = smoke.get_config()
    del c["dpo"]
    c.stages = ("pretrain", "sft", "reward", objective)
    pairs = {"path": str(smoke.DATA / "preferences.jsonl")}
    c.reward = base.stage(
        "reward_model",
        data=pairs,
        eval_examples=20,
        batch_size=10,
        epochs=2,
        max_length=256,
        optimizer={"learning_rate": 3e-4},
        snapshots={"log_spaced": 0},
    )
    c[objective] = base.stage(
        objective,
        data=pairs,
        eval_examples=20,
        batch_size=8,
        epochs=2,
        max_steps=20,
        max_length=256,
        rollout={"max_new_tokens": 48, "minibatches": 2},
        reward={"model": "reward", "missing_eos_penalty": 1.0},
        optimizer={"learning_rate": 3e-4},
        snapshots={"log_spaced": 3},
    )
    return c
