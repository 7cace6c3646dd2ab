"""The tests' experiment, tiny_config.py:FOLDER: SFT and DPO of a tiny Qwen-3 on the files of `tiny.write_data`."""

from typing import Any

from ml_collections import ConfigDict
from tiny import SHAPES

from vdjax import config as base


def get_config(folder: str) -> ConfigDict:
    c = base.experiment()
    c.model.shape = ConfigDict(SHAPES["qwen"])
    c.tokenizer.path = "bytes"
    c.probes.path = f"{folder}/probes.jsonl"
    c.probes.readouts = ("statement", "options")
    c.probes.rows = 2
    c.resume_every = 2
    c.stages = ("sft", "dpo")
    shared: dict[str, Any] = {"batch_size": 3, "epochs": 2, "eval_examples": 2, "eval_every": 3, "max_length": 96}
    shared |= {"optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1}, "snapshots": {"log_spaced": 1, "every": 2}}
    c.sft = base.stage("sft", data={"path": f"{folder}/sft.jsonl"}, **shared)
    c.dpo = base.stage("dpo", data={"path": f"{folder}/preferences.jsonl"}, **shared)
    return c
