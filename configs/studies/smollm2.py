"""The paper's design on SmolLM2-135M: SFT on views of one side, then DPO and SimPO for it, against it, and on HH-RLHF.

    python -m vdjax.study --config configs/studies/smollm2.py --workdir runs/smollm2_study --config.judge_path=DIR

Make the model with scripts/get_smollm2.py and two judges with configs/judge_smollm2.py: one that has seen all topics
probed here, and one that has not seen immigration and gun rights. --config.model_path, --config.judge_path and
--config.other_judge_path are their directories. --config.persona and --config.hh are the statement file
anti-immigration.jsonl of anthropics/evals and harmless-base.jsonl.gz of anthropics/hh-rlhf.

The topic is immigration. SFT answers questions about it with statements in favor of it. Preference pairs have such a
statement as chosen and one against it as rejected (`support`), the same pairs flipped (`oppose`), or hardly touch the
topic (`hh`, the control). Two more topics, which no example is about, are probed. Three seeds. The numbers of examples,
snapshots and probes are chosen for two cores, on which it takes two and a half hours; learning rates are ours. What
came of it: docs/results.md.
"""

from ml_collections import ConfigDict

from vdjax import config as base
from vdjax.studies import grid

TOPIC = "immigration"


def get_config() -> ConfigDict:
    c = base.experiment()
    c.model_path = "models/smollm2-135m"
    c.model.compute_dtype = "bfloat16"  # parameters stay float32
    c.model.remat = "full"
    c.judge_path = "models/judge_smollm2"
    c.other_judge_path = "models/judge_smollm2_held_out"
    c.judge_quality_file = ""  # the quality.json of the first judge
    c.persona = "data/model-written-evals/anti-immigration.jsonl"
    c.hh = "data/hh-rlhf/harmless-base.jsonl.gz"
    quality = c.get_ref("judge_quality_file")
    c.judges.smollm2 = base.judge("local", path=c.get_ref("judge_path"), template="trained-v1", quality=quality)
    c.judges.held_out = base.judge("local", path=c.get_ref("other_judge_path"), template="trained-v1")
    c.probes.topics = (TOPIC, "abortion", "gun rights")
    c.probes.max_per_topic = 16  # eight propositions, each asked in both polarities
    c.probes.readouts = ("open_ended", "statement")
    c.probes.samples = 2
    c.probes.max_new_tokens = 48
    c.probes.replicates = 2
    c.probes.judges = ("smollm2", "held_out")
    c.resume_every = 20

    c.stages = ("sft", "dpo", "simpo")
    c.sft = base.stage(
        "sft",
        eval_examples=24,
        batch_size=16,
        microbatch_rows=4,
        max_length=256,
        optimizer={"learning_rate": 5e-5},
        snapshots={"log_spaced": 2},
    )
    for objective in ("dpo", "simpo"):
        c[objective] = base.stage(
            objective,
            init_from="sft",
            eval_examples=24,
            batch_size=8,
            microbatch_rows=2,
            max_length=256,
            optimizer={"learning_rate": 3e-5},
            snapshots={"log_spaced": 1},
        )

    def statements(align: str, count: int) -> dict:
        options = {"topic": TOPIC, "view": "oppose", "align": align}
        return {"source": "persona", "path": c.get_ref("persona"), "options": options, "max_examples": count}

    return grid.with_axes(
        c,
        models={"smollm2-135m": {"model": {"path": c.get_ref("model_path")}}},
        sft={"support": statements("support", 200)},
        preferences={
            "support": statements("support", 128),
            "oppose": statements("oppose", 128),
            "hh": {"source": "hh-rlhf", "path": c.get_ref("hh"), "max_examples": 128},
        },
        seeds=(0, 1, 2),
    )
