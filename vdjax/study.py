"""Runs a study: python -m vdjax.study --config configs/studies/NAME.py --workdir DIR [--config.key=value ...]

Its experiments run one after the other in DIR/TRUNK, or on several machines: --shard i/n runs every n-th of them from
the i-th on (i from 0 to n - 1). Finished ones are left alone, so the same command goes on after an interruption.
"""

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import pandas as pd
from ml_collections import ConfigDict

from vdjax import cluster, experiment, hosts, runs, runtime
from vdjax import config as configs
from vdjax.cli import INTERRUPTED, run_cli
from vdjax.drift import noise
from vdjax.errors import UserError
from vdjax.files import as_path, in_bucket, parse_json, read_table, write_whole
from vdjax.progress import say
from vdjax.studies import grid, merge
from vdjax.train.loop import Interrupted


def main() -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m vdjax.study", description=summary, epilog=details, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="a study: a file with get_config()")
    parser.add_argument("--workdir", type=as_path, required=True, help="where all is written; the same one goes on")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and the command for each part")
    parser.add_argument("--shard", metavar="i/n", default="0/1", help="only experiments number i, i + n, ... from 0 on")
    parser.add_argument("--report", action="store_true", help="only write the reports again, of what is finished")
    cluster.add_flags(parser)
    flags, overrides = parser.parse_known_args()
    if not flags.list:
        runtime.start(flags)  # first, so that what is wrong on one host ends the processes of all
    study = configs.load(flags.config, overrides)
    todo = grid.experiments(study)
    cells = grid.cells(study)
    alone = shlex.join(
        ["python", "-m", "vdjax.study", "--config", flags.config, "--workdir", str(flags.workdir), *overrides]
    )
    chosen = shard(flags.shard, todo)
    if flags.list:
        print("\n".join(listing(todo, cells, flags.workdir, alone, chosen)))
        return 0
    command = shlex.join(["python", "-m", "vdjax.study", *sys.argv[1:]])
    hosts.agree("the study", configs.facts(study) | {"--shard": flags.shard, "--report": flags.report})
    commands = {name: f"{alone} --shard {i}/{len(todo)}" for i, name in enumerate(todo)}
    try:
        if not flags.report:
            run_all({name: todo[name] for name in chosen}, flags.workdir, commands)
        write_reports(todo, flags.workdir, commands, always=flags.report)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"{stop or 'interrupted'}\nto go on: {command}", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        raise UserError(f"{error}\nthen go on with: {command}") from error
    left = [name for name in todo if not finished(todo[name], flags.workdir / name)]
    if left:
        say(f"{len(todo) - len(left)} of {len(todo)} experiments are finished; not yet: {', '.join(left)}")
    merge.write(flags.workdir, todo, cells, alone, finished)
    return 0


def run_seeds(config: ConfigDict, workdir: Path, command: str) -> None:
    """Runs an experiment once with each of config.seeds, in WORKDIR/seed-N, and writes the merged report.

    Raises:
      UserError: anything that the user can mend.
      Interrupted: after SIGINT or SIGTERM.
    """
    todo, cells = grid.of_seeds(config)
    commands = dict.fromkeys(todo, command)
    run_all(todo, workdir, commands)
    write_reports(todo, workdir, commands, always=False)
    merge.write(workdir, todo, cells, command, finished)


def shard(text: str, todo: Mapping[str, ConfigDict]) -> list[str]:
    """Names of the experiments of shard "i/n": those whose number, from 0 on, leaves i when divided by n.

    Raises:
      UserError: not i/n with 0 <= i < n.
    """
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f"--shard {text}: expected i/n with i from 0 to n - 1, such as 0/4 to 3/4 for four machines")
    chosen = list(todo)[int(i) :: int(n)]
    if int(n) > len(todo):
        note = "" if chosen else ", and none is left for this shard"
        print(f"--shard {text}: there are only {len(todo)} experiments{note}", file=sys.stderr)
    return chosen


def listing(
    todo: Mapping[str, ConfigDict], cells: list[grid.Cell], workdir: Path, alone: str, chosen: list[str]
) -> list[str]:
    """One line an experiment of `chosen`: its state, its cells and the command that runs it alone."""
    lines = []
    for i, (name, config) in enumerate(todo.items()):
        stages = [cell.stage for cell in cells if cell.trunk == name and cell.preference]
        if name in chosen:
            command = f"{alone} --shard {i}/{len(todo)}"
            lines.append("\t".join((name, state(config, workdir / name), ",".join(stages), command)))
    return lines


def state(config: ConfigDict, folder: Path) -> str:
    """done, todo, or partly with the number of stages that are trained."""
    if finished(config, folder):
        return "done"
    trained = sum((folder / stage / "done.json").exists() for stage in config.stages)
    started = (folder / "config.json").exists()
    return f"partly ({trained} of {len(config.stages)} stages trained)" if started else "todo"


def run_all(todo: Mapping[str, ConfigDict], workdir: Path, commands: Mapping[str, str]) -> None:
    """Runs experiments one after the other, each in WORKDIR/NAME; leaves alone what is done or runs elsewhere."""
    if any(judge.kind == "api" for config in todo.values() for judge in config.judges.values()):
        # One for all: what one experiment has paid for another need not, and a judge's budget is the study's.
        if in_bucket(workdir):
            raise UserError(
                f"{workdir}: judges behind an API share one database of replies and costs in a study, which cannot lie "
                "in a bucket; give a --workdir on a disk, or other judges"
            )
        (workdir / "judgements" / "calls").mkdir(parents=True, exist_ok=True)
    for number, (name, config) in enumerate(todo.items(), start=1):
        folder = workdir / name
        with runs.held(folder) as mine:
            if hosts.by_first(f"a look for {name}", partial(finished, config, folder)):
                say(f"{name}: finished already")
                continue
            if not mine:
                say(f"{name}: left out, another process is at it")
                continue
            say(f"{name}: experiment {number} of {len(todo)}")
            try:
                experiment.run(config, folder, commands[name])
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            mark = json.dumps({"config_hash": config_hash(config)})
            hosts.by_first(f"{name} to be marked as finished", partial(write_whole, folder / "finished.json", mark))
        jax.clear_caches()  # else the programs of all experiments stay in memory


def write_reports(
    todo: Mapping[str, ConfigDict], workdir: Path, commands: Mapping[str, str], *, always: bool
) -> None:
    """Writes the report of each finished experiment again, with the drift of those that differ in the seed alone.

    Args:
      always: also where these seeds were known already, as after an audit.
    """

    def those() -> list[str]:
        return [name for name, config in todo.items() if finished(config, workdir / name)]

    done = {name: todo[name] for name in hosts.by_first("a look for what is finished", those)}
    for name, config in done.items():
        file = workdir / name / "drift" / "reseeded.csv"
        text = hosts.by_first(f"a look at the other seeds of {name}", partial(reseeded, name, done, workdir))
        known = hosts.by_first("a look at those known", partial(read_text, file))
        if text == known and not always:
            continue
        with runs.held(workdir / name) as mine:
            if mine:
                if text:
                    hosts.by_first("the other seeds to be written", partial(write_whole, file, text))
                experiment.run(config, workdir / name, commands[name])


def reseeded(name: str, done: Mapping[str, ConfigDict], workdir: Path) -> str:
    """The drift of the experiments that differ from one in the seed alone, as CSV; empty where there is none."""
    others = [o for o, c in done.items() if o != name and alike(c) == alike(done[name])]
    tables = [read_table(workdir / o / "drift" / "drift.csv").assign(seed=done[o].seed) for o in others]
    return pd.concat(tables)[list(noise.RESEEDED)].to_csv(index=False) if tables else ""


def read_text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def alike(config: ConfigDict) -> str:
    """What experiments share that differ in the seed alone."""
    return configs.to_json(ConfigDict(config.to_dict() | {"seed": 0}))


def finished(config: ConfigDict, folder: Path) -> bool:
    """Whether the experiment in `folder` ran to its report with just this config."""
    try:
        return parse_json((folder / "finished.json").read_text())["config_hash"] == config_hash(config)
    except (OSError, ValueError, LookupError, TypeError):  # damaged is not finished: its command writes it again
        return False


def config_hash(config: ConfigDict) -> str:
    return hashlib.sha256(configs.to_json(config).encode()).hexdigest()[:16]


if __name__ == "__main__":
    run_cli(main)
