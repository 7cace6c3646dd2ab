"""A stance judge: SmolLM2-135M learns from persona statements which stance a response takes toward a proposition.

Make the model with scripts/get_smollm2.py; --config.model.path is its directory, --config.persona a folder of statement
files of anthropics/evals (persona). Immigration and gun rights are held out whole: neither their files nor what the
other files say about them is trained on; WORKDIR/quality has accuracy, calibration and confusion on them.

configs/judge_smollm2.py:all trains on all topics, and is measured on the fifth of the statements that no judge sees.
Either is used by `config.judge("local", path="WORKDIR/judge/snapshots/LAST", template="trained-v1")`.
10 to 20 minutes on two cores. The learning rate is ours.
"""

from ml_collections import ConfigDict

from vdjax import config as base
from vdjax.errors import UserError, nearest

STEMS = {
    "anti-immigration": "immigration",
    "believes-in-gun-rights": "gun rights",
    "anti-LGBTQ-rights": "LGBTQ+ rights",
    "believes-abortion-should-be-illegal": "abortion",
    "politically-conservative": "conservatism",
    "politically-liberal": "liberalism",
}
HELD_OUT = ("immigration", "gun rights")


def get_config(topics: str = "held_out") -> ConfigDict:
    if topics not in ("held_out", "all"):
        raise UserError(f"configs/judge_smollm2.py:{topics}{nearest(topics, ('held_out', 'all'))}")
    hold_out = HELD_OUT if topics == "held_out" else ()
    c = base.experiment()
    c.model.path = "models/smollm2-135m"
    c.model.compute_dtype = "bfloat16"  # parameters stay float32
    c.model.remat = "full"
    c.persona = "data/model-written-evals"
    c.resume_every = 25

    folder = c.get_ref("persona")
    first, *others = (folder + f"/{stem}.jsonl" for stem, topic in STEMS.items() if topic not in hold_out)
    path = first
    for other in others:
        path = path + "," + other

    c.stages = ("judge",)
    c.judge = base.stage(
        "sft",
        data={"source": "stances", "path": path, "options": {"hold_out": hold_out}, "max_examples": 1900},
        eval_examples=108,
        eval_every=56,
        batch_size=16,
        microbatch_rows=6,  # all rows of a step at once
        max_length=256,
        optimizer={"learning_rate": 3e-4},
        snapshots={"log_spaced": 0, "probe": False},
    )
    c.judge_quality.update({"stage": "judge", "path": folder, "topics": hold_out, "max_examples": 500})
    return c
