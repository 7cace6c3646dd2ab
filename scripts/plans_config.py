"""What docs/plans.md plans: a published shape, one stage; the argument is MODEL,STAGE."""

from ml_collections import ConfigDict

from vdjax import config


def get_config(arg: str) -> ConfigDict:
    model, stage = arg.split(",")
    c = config.experiment()
    c.model.name, c.tokenizer.path = model, "bytes"
    c.model.compute_dtype, c.model.remat, c.model.head_chunk = "bfloat16", "full", 512
    c.stages = (stage,)
    c[stage] = config.stage(stage, max_length=2048, data={"path": "none"})  # no data are read
    return c
