"""Do the paper's findings hold at 135M parameters? SFT on support-aligned statements, then five preference stages.

Make the model with scripts/get_smollm2.py. --config.model.path is its directory; --config.persona and --config.hh are
the statement file anti-immigration.jsonl of anthropics/evals and harmless-base.jsonl.gz of anthropics/hh-rlhf.

The topic is immigration. SFT answers questions about it with statements in favor of it; every preference stage starts
from there: DPO and SimPO on pairs whose chosen answer supports it, the same with the pairs flipped, and DPO on HH-RLHF
pairs, which hardly touch it, as control. Probed are immigration and three topics that no example is about. The numbers
of examples, steps and probes are chosen for about 40 minutes on two cores; learning rates are ours.
"""

from ml_collections import ConfigDict

from vdjax import config as base

TOPIC = "immigration"


def get_config() -> ConfigDict:
    c = base.experiment()
    c.model.path = "models/smollm2-135m"
    c.persona = "data/model-written-evals/anti-immigration.jsonl"
    c.hh = "data/hh-rlhf/harmless-base.jsonl.gz"
    c.probes.topics = (TOPIC, "abortion", "gun rights", "climate change")
    c.probes.max_per_topic = 24  # twelve propositions, each asked in both polarities
    c.resume_every = 20

    def statements(align: str, **data: int) -> dict:
        options = {"topic": TOPIC, "view": "oppose", "align": align}
        return {"source": "persona", "path": c.get_ref("persona"), "options": options, **data}

    def preference(objective: str, data: dict, **fields: object) -> ConfigDict:
        return base.stage(
            objective,
            init_from="sft",
            data=data,
            eval_examples=24,
            batch_size=8,
            max_length=256,
            optimizer={"learning_rate": 3e-5},
            snapshots={"log_spaced": 3},
            **fields,
        )

    pairs = {"max_examples": 264}
    c.stages = ("sft", "dpo_support", "dpo_oppose", "simpo_support", "simpo_oppose", "dpo_hh")
    c.sft = base.stage(
        "sft",
        data=statements("support"),
        eval_examples=24,
        batch_size=16,
        max_length=256,
        optimizer={"learning_rate": 5e-5},
        snapshots={"log_spaced": 5},
    )
    c.dpo_support = preference("dpo", statements("support", **pairs))
    c.dpo_oppose = preference("dpo", statements("oppose", **pairs))
    c.simpo_support = preference("simpo", statements("support", **pairs))
    c.simpo_oppose = preference("simpo", statements("oppose", **pairs))
    c.dpo_hh = preference("dpo", {"source": "hh-rlhf", "path": c.get_ref("hh"), **pairs})
    return c
