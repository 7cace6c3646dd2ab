"""SmolLM2-135M (real weights, 135M parameters) on HH-RLHF: SFT on chosen answers, then DPO, on a laptop.

Make the model with scripts/get_smollm2.py; --config.model.path is its directory, --config.hh a file of
anthropics/hh-rlhf such as harmless-base.jsonl.gz. About 20 minutes on two cores. Learning rates are ours.
"""

from ml_collections import ConfigDict

from vdjax import config as base


def get_config() -> ConfigDict:
    c = base.experiment()
    c.model.path = "models/smollm2-135m"
    c.hh = "data/hh-rlhf/harmless-base.jsonl.gz"
    c.probes.topics = ("immigration", "climate change", "race and racism", "religion and spirituality")
    c.probes.max_per_topic = 24  # twelve propositions, each asked in both polarities
    c.resume_every = 20

    c.stages = ("sft", "dpo")
    c.sft = base.stage(
        "sft",
        data={"source": "hh-rlhf", "path": c.get_ref("hh"), "max_examples": 320, "assistant_turns": "last"},
        eval_examples=64,
        batch_size=16,
        max_length=256,
        optimizer={"learning_rate": 3e-5},
        snapshots={"log_spaced": 3},
    )
    c.dpo = base.stage(
        "dpo",
        data={"source": "hh-rlhf", "path": c.get_ref("hh"), "skip_examples": 320, "max_examples": 448},
        eval_examples=128,
        batch_size=16,
        max_length=256,
        optimizer={"learning_rate": 1e-5},
        snapshots={"log_spaced": 3},
    )
    return c
