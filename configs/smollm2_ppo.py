"""SmolLM2-135M (real weights) with PPO: a reward model on HH-RLHF pairs, then PPO with it on other prompts, probed.

Make the model with scripts/get_smollm2.py; --config.model.path is its directory, --config.hh a file of
anthropics/hh-rlhf such as harmless-base.jsonl.gz. About 20 minutes on two cores. Learning rates are ours. The policy
starts from the instruct model itself; adapters are trained, and the value model starts from the reward model.
"""

from ml_collections import ConfigDict

from vdjax import config as base


def get_config(objective: str = "ppo") -> ConfigDict:
    c = base.experiment()
    c.model.path = "models/smollm2-135m"
    c.hh = "data/hh-rlhf/harmless-base.jsonl.gz"
    c.probes.topics = ("immigration", "race and racism", "religion and spirituality")
    c.probes.max_per_topic = 24  # twelve propositions, each asked in both polarities
    c.resume_every = 10
    hh = {"source": "hh-rlhf", "path": c.get_ref("hh")}

    c.stages = ("reward", objective)
    c.reward = base.stage(
        "reward_model",
        data={**hh, "max_examples": 700},
        eval_examples=100,
        batch_size=16,
        max_length=160,
        hyper={"center_rewards_coefficient": 0.01},
        optimizer={"learning_rate": 5e-5},
        snapshots={"log_spaced": 0},
    )
    c[objective] = base.stage(
        objective,
        data={**hh, "skip_examples": 700, "max_examples": 700},
        eval_examples=16,
        batch_size=16,
        max_steps=20,
        max_length=160,
        rollout={"max_new_tokens": 48, "minibatches": 2},
        reward={"model": "reward", "missing_eos_penalty": 1.0},
        lora={"rank": 16, "alpha": 32.0},
        optimizer={"learning_rate": 3e-4, "schedule": "constant"},
        snapshots={"log_spaced": 4},
    )
    if c[objective].rollout.samples > 1:
        c[objective].batch_size = 16 // c[objective].rollout.samples  # sixteen responses a step
    return c
