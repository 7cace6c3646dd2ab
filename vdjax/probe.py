"""Probes a series of Hugging Face checkpoints: python -m vdjax.probe --models A B C --probes FILE --workdir DIR

--config FILE.py takes `probes` and `judges` of a config, for readouts and judges that flags cannot describe.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

from ml_collections import ConfigDict

from vdjax import check_config, cluster, hosts, runtime
from vdjax import config as configs
from vdjax.cli import run_cli
from vdjax.errors import UserError
from vdjax.files import as_path, write_whole

STAGE = "models"


def identity(directory: Path) -> str:
    """What changes when a model is another: its place, and the sizes and times of its files, which may be large."""
    files = sorted(f for pattern in ("config.json", "*.safetensors") for f in directory.glob(pattern))
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return repr((str(directory.resolve()), facts))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vdjax.probe", description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", required=True, help="directories or hub ids, in the order of training")
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="a config whose probes and judges are used")
    parser.add_argument("--probes", help="a probe file; default: the config's, or the built-in set")
    parser.add_argument("--workdir", type=as_path, required=True)
    cluster.add_flags(parser)
    flags, overrides = parser.parse_known_args()
    runtime.start(flags)  # first, so that what is wrong on one host ends the processes of all
    config = configs.experiment()
    if flags.config:
        given = configs.read(flags.config)
        config.probes, config.judges, config.seed = given.probes, given.judges, given.seed
    config.model.path = flags.models[0]
    config.probes.path = flags.probes or config.probes.path
    for override in overrides:
        configs.override(config, override)
    check_config.check_probes(config, flags.config or "vdjax.probe")
    hosts.agree("what is asked", configs.facts(config) | {"--models": flags.models})
    hosts.check_shared(flags.workdir)

    from vdjax import runs

    with runs.alone(flags.workdir):
        probe(config, flags)


def probe(config: ConfigDict, flags: argparse.Namespace) -> None:
    import jax

    from vdjax import findings, measure, runs
    from vdjax.data import chat, tokenizer
    from vdjax.drift import report
    from vdjax.models import config as model_config
    from vdjax.models import hf
    from vdjax.setup import setup

    def comparable(cfg: model_config.ModelConfig) -> model_config.ModelConfig:
        return dataclasses.replace(cfg, max_position_embeddings=1)  # changes no number

    made = setup(config)
    readers, identities = [], []
    for path in flags.models:
        directory = hf.resolve(path)
        identities.append(identity(directory))
        where = str(directory / "config.json")
        cfg = model_config.from_hf(hf.read_config(directory), where=where, ignore_fields=config.model.ignore_fields)
        if comparable(cfg) != comparable(made.model.cfg):
            raise UserError(f"{path} has another shape than {flags.models[0]}: {cfg} against {made.model.cfg}")
        own = tokenizer.load(config.tokenizer.path or directory)
        if own.backend_tokenizer.to_str() != made.tokenizer.backend_tokenizer.to_str():
            raise UserError(
                f"{path} has another tokenizer than {flags.models[0]}; choose one by --config.tokenizer.path"
            )
        if chat.pick_template(own, config.tokenizer.chat_template).text != made.template.text:
            raise UserError(
                f"{path} has another chat template than {flags.models[0]}, so that answers could not be compared; "
                "choose one by --config.tokenizer.chat_template"
            )
        readers.append(hf.open_reader(directory, cfg))
    asked = measure.questions(config, made)
    measure.check_keys(config, [STAGE], flags.workdir)
    steps = list(range(len(readers)))
    with jax.set_mesh(made.mesh):
        series = measure.Series(STAGE, steps, readers, (0, steps[-1]))
        measure.ask(config, made, asked, series, flags.workdir, models="\n".join(identities))
        judges = measure.judge(config, made, asked, [STAGE], flags.workdir)
    if jax.process_index():
        return
    written = {"config": json.loads(configs.to_json(config)), "versions": runs.versions()}
    write_whole(flags.workdir / "config.json", json.dumps(written, indent=1))
    facts = {
        "command": shlex.join(["python", "-m", "vdjax.probe", *sys.argv[1:]]),
        "models": "\n".join(f"{i}: {path}" for i, path in enumerate(flags.models)),
        "parameters": model_config.num_params(made.model.cfg),
        "probes": findings.probe_facts(config.probes.path, asked.probes),
        "readouts": ", ".join(config.probes.readouts),
        "versions": runs.versions(),
    }
    stages = [report.StageInfo(STAGE, "given checkpoints", len(readers) - 1, None)]
    findings.finish(config, asked, [STAGE], judges, flags.workdir, stages, findings.NO_TRAINING, facts)


if __name__ == "__main__":
    run_cli(main)
