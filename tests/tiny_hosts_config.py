"""The tests' experiment with sampled responses, tiny_hosts_config.py:FOLDER,SNAPSHOT; the snapshot judges them."""

import tiny_config
from ml_collections import ConfigDict

from vdjax import config as base


def get_config(arg: str) -> ConfigDict:
    folder, snapshot = arg.split(",")
    c = tiny_config.get_config(folder)
    c.judges.tiny = base.judge("local", path=snapshot, template="trained-v1")
    c.probes.readouts, c.probes.judges = ("statement", "open_ended"), ("tiny",)
    c.probes.samples, c.probes.max_new_tokens = 1, 6
    return c
