"""Probes a series of Hugging Face checkpoints: python -m vdjax.probe --models A B C --probes FILE --workdir DIR"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from vdjax import config as configs
from vdjax import runtime
from vdjax.cli import run_cli
from vdjax.errors import UserError

STAGE = "models"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vdjax.probe", description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", required=True, help="directories or hub ids, in the order of training")
    parser.add_argument("--probes", default="builtin", help="a probe file; default: the built-in set")
    parser.add_argument("--workdir", type=Path, required=True)
    flags, overrides = parser.parse_known_args()
    config = configs.experiment()
    config.model.path = flags.models[0]
    config.probes.path = flags.probes
    for override in overrides:
        configs.override(config, override)
    runtime.start()

    import jax

    from vdjax import experiment
    from vdjax.drift import report
    from vdjax.models import config as model_config
    from vdjax.models import hf
    from vdjax.probes import readouts

    made = experiment.setup(config)
    readers = []
    for path in flags.models:
        directory = hf.resolve(path)
        where = str(directory / "config.json")
        cfg = model_config.from_hf(hf.read_config(directory), where=where, ignore_fields=config.model.ignore_fields)
        if cfg != made.model.cfg:
            raise UserError(f"{path} has another shape than {flags.models[0]}: {cfg} against {made.model.cfg}")
        readers.append(hf.open_reader(directory, cfg))
    probes = experiment.load_probes(config)
    with jax.set_mesh(made.mesh):
        raw = experiment.ask(config, made, probes, readers, list(range(len(readers))), STAGE)
    if jax.process_index():
        return
    file = flags.workdir / "probes" / f"{STAGE}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    raw.to_parquet(file.with_suffix(".part"), index=False)
    os.replace(file.with_suffix(".part"), file)
    facts = {
        "command": shlex.join(["python", "-m", "vdjax.probe", *sys.argv[1:]]),
        "models": "\n".join(f"{i}: {path}" for i, path in enumerate(flags.models)),
        "parameters": model_config.num_params(made.model.cfg),
        "probes": experiment.probe_facts(flags.probes, probes),
        "readouts": ", ".join(config.probes.readouts),
        "versions": experiment.versions(),
    }
    stages = [report.StageInfo(STAGE, "given checkpoints", len(readers) - 1, None)]
    experiment.finish(flags.workdir, readouts.scores(raw, probes), stages, experiment.NO_TRAINING, facts)


if __name__ == "__main__":
    run_cli(main)
