"""The tests' study, tiny_study.py:FOLDER: DPO and IPO, which share a reference, on two datasets; two seeds."""

from typing import Any

import tiny_config
from ml_collections import ConfigDict

from vdjax import config as base
from vdjax.studies import grid


def get_config(folder: str, objectives: tuple[str, ...] = ("dpo", "ipo")) -> ConfigDict:
    c = tiny_config.get_config(folder)
    c.probes.readouts = ("statement",)
    c.pairs = f"{folder}/preferences.jsonl"
    shared: dict[str, Any] = {"batch_size": 3, "eval_examples": 2, "max_length": 96, "snapshots": {"log_spaced": 0}}
    shared |= {"optimizer": {"learning_rate": 3e-3}}
    c.sft = base.stage("sft", **shared)
    del c["dpo"]
    for name in objectives:
        c[name] = base.stage("reward_model" if name == "reward" else name, **shared)
        if name == "ppo":
            c.ppo.reward.model = "reward"
            c.ppo.rollout.max_new_tokens = 8
    c.stages = ("sft", *objectives)
    pairs = {"path": c.get_ref("pairs")}
    return grid.with_axes(
        c,
        models={"tiny": {"model": {"query_chunk": 0}}},
        sft={"things": {"path": f"{folder}/sft.jsonl"}},
        preferences={"few": pairs | {"max_examples": 8}, "all": pairs},
        seeds=(0, 1),
    )
