"""Every objective on the same data: 20 steps each of SmolLM2-135M on HH-RLHF, from one SFT stage, into one table.

Make the model with scripts/get_smollm2.py; --config.model.path is its directory, --config.hh a file of
anthropics/hh-rlhf such as harmless-base.jsonl.gz. The argument chooses among the objectives, by name or by kind:

    configs/smollm2_objectives.py                    all of them
    configs/smollm2_objectives.py:dpo,simpo,kto      these
    configs/smollm2_objectives.py:preference         pairs; also unpaired, and rollout with its reward model

Adapters of rank 16 are trained (--config.NAME.lora.rank=0 trains all parameters), which keeps snapshots small. Twenty
steps at one learning rate show that everything runs, not which objective is best: each would have a rate of its own.
"""

from ml_collections import ConfigDict

from vdjax import config as base
from vdjax.errors import UserError, nearest
from vdjax.objectives import OBJECTIVES

KINDS = ("preference", "unpaired", "rollout")


def get_config(chosen: str = "preference,unpaired,rollout") -> ConfigDict:
    words = [word.strip() for word in chosen.split(",")]
    names = [name for name, objective in OBJECTIVES.items() if objective.kind in KINDS]
    for word in words:
        if word not in (*KINDS, *names):
            raise UserError(f"config argument {word!r} is unknown{nearest(word, (*KINDS, *names))}")
    names = [name for name in names if name in words or OBJECTIVES[name].kind in words]

    c = base.experiment()
    c.model.path = "models/smollm2-135m"
    c.hh = "data/hh-rlhf/harmless-base.jsonl.gz"
    c.probes.topics = ("immigration",)
    c.probes.max_per_topic = 24  # twelve propositions, each asked in both polarities
    shared = {
        "max_length": 96,
        "epochs": 3,
        "max_steps": 20,
        "snapshots": {"log_spaced": 0},
        "optimizer": {"learning_rate": 3e-4},
        "lora": {"rank": 16, "alpha": 32.0},
    }
    hh = {"source": "hh-rlhf", "path": c.get_ref("hh")}

    c.sft = base.stage("sft", data={**hh, "max_examples": 160}, batch_size=4, eval_examples=16, **shared)
    stages = ["sft"]
    if any(OBJECTIVES[name].kind == "rollout" for name in names):
        stages.append("reward")
        pairs = {**hh, "skip_examples": 460, "max_examples": 400}
        c.reward = base.stage("reward_model", data=pairs, batch_size=8, eval_examples=32, **shared)
    for name in names:
        kind = OBJECTIVES[name].kind
        data = {**hh, "skip_examples": 160, "max_examples": 300}
        c[name] = base.stage(name, init_from="sft", data=data, batch_size=2, **shared)
        if kind == "preference":
            c[name].update({"eval_examples": 8, "log_kl": True})
        if kind == "unpaired":
            c[name].update({"eval_examples": 16, "batch_size": 4})  # as many responses as in the pairs
        if kind == "rollout":
            c[name].rollout.samples = min(4, c[name].rollout.samples)
            c[name].batch_size = 4 // c[name].rollout.samples  # four responses a step
            c[name].rollout.max_new_tokens = 24
            c[name].eval_examples = 4
            c[name].reward.update({"model": "reward", "missing_eos_penalty": 1.0})
        stages.append(name)
    c.stages = tuple(stages)
    return c
