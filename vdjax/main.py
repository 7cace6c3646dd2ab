"""Runs an experiment: python -m vdjax.main --config configs/NAME.py --workdir DIR [--config.key=value ...]"""

import argparse
import shlex
import sys

from vdjax import cluster, hosts, runtime
from vdjax import config as configs
from vdjax.cli import INTERRUPTED, run_cli
from vdjax.errors import UserError
from vdjax.files import as_path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vdjax.main", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="a file with get_config()")
    parser.add_argument("--workdir", type=as_path, help="where everything is written; the same one goes on")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and do not train")
    cluster.add_flags(parser)
    flags, overrides = parser.parse_known_args()
    command = shlex.join(["python", "-m", "vdjax.main", *sys.argv[1:]])
    runtime.start(flags)  # first, so that what is wrong on one host ends the processes of all
    config = configs.load(flags.config, overrides)
    if flags.workdir is None and not flags.dry_run:
        raise UserError("--workdir is missing: a directory for snapshots, probes and the report")
    hosts.agree("the config", configs.facts(config))

    from vdjax import dry_run, experiment, runs, study
    from vdjax.train.loop import Interrupted

    if flags.dry_run:
        dry_run.show(config)
        return 0
    try:
        if config.seeds:
            study.run_seeds(config, flags.workdir, command)
        else:
            with runs.alone(flags.workdir):
                experiment.run(config, flags.workdir, command)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"{stop or 'interrupted'}\nto go on: {command}", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        raise UserError(f"{error}\nthen go on with: {command}") from error
    if hosts.index() == 0:
        print(f"done; the same command shows this again: {command}")
    return 0


if __name__ == "__main__":
    run_cli(main)
