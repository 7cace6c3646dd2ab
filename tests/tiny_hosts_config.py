"""The tests' experiment for several processes, tiny_hosts_config.py:FOLDER[,SNAPSHOT]; the snapshot is a judge."""

import tiny_config
from ml_collections import ConfigDict

from vdjax import config as base


def get_config(arg: str) -> ConfigDict:
    folder, _, snapshot = arg.partition(",")
    c = tiny_config.get_config(folder)
    c.sft.snapshots.probe = False
    c.probes.max_per_topic = 3
    c.probes.readouts = ("statement",)
    if snapshot:
        c.judges.tiny = base.judge("local", path=snapshot, template="trained-v1")
        c.probes.readouts, c.probes.judges = ("statement", "open_ended"), ("tiny",)
        c.probes.samples, c.probes.max_new_tokens = 2, 6
    return c
