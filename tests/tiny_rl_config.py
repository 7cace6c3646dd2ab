"""The tests' experiments on sampled responses, tiny_rl_config.py:FOLDER,NAME.

NAME "ppo" is SFT, a reward model, and PPO with it; another is an objective with a reward of `tiny_rewards`.
"""

from typing import Any

import tiny
from ml_collections import ConfigDict

from vdjax import config as base


def get_config(arg: str) -> ConfigDict:
    folder, name = arg.split(",")
    c = base.experiment()
    c.model.shape = ConfigDict(tiny.SHAPES["qwen"])
    c.tokenizer.path = "bytes"
    c.probes.path = f"{folder}/probes.jsonl"
    c.resume_every = 2
    pairs = {"path": f"{folder}/preferences.jsonl"}
    shared: dict[str, Any] = {"batch_size": 3, "eval_examples": 2, "max_length": 96}
    shared |= {"optimizer": {"learning_rate": 3e-3}, "snapshots": {"log_spaced": 1, "probe": False}}
    if name != "ppo":
        c.stages = ("rl",)
        reward = {"function": f"{tiny.HERE / 'tiny_rewards.py'}:letters"}
        c.rl = base.stage(name, data=pairs, rollout={"max_new_tokens": 8}, reward=reward, **shared)
        return c
    c.stages = ("sft", "reward", "ppo")
    c.sft = base.stage("sft", data={"path": f"{folder}/sft.jsonl"}, **shared)
    c.reward = base.stage("reward_model", data=pairs, epochs=2, **shared)
    c.ppo = base.stage(
        "ppo",
        data=pairs,
        epochs=2,
        hyper={"kl_target": 0.1, "kl_horizon": 100.0, "whiten_rewards": True},
        rollout={"max_new_tokens": 10, "epochs": 2, "minibatches": 2},
        reward={"model": "reward", "missing_eos_penalty": 0.5},
        **shared,
    )
    return c
