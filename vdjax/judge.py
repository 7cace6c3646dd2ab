"""Judges responses, or measures a judge: python -m vdjax.judge --judge DIR

with --rows FILE --out FILE, or with --labelled PATH ... --workdir DIR. The judge is a Hugging Face directory or hub id,
or a snapshot WORKDIR/STAGE/snapshots/STEP, of a causal language model; or, of any kind, --judge NAME --config FILE.py:
one of config.judges. Or, for people as judges: --run WORKDIR --sheet FILE.csv makes a sheet to fill in, of responses of
that run; they become `config.judge("human", path="FILE.csv")`.

--rows FILE.jsonl holds objects with `proposition`, `response` and perhaps `question`; --out gets the same objects with
`judge_hash`, `support`, `neutral`, `oppose`, `refusal`, `off_topic` and `graded` (null where no stance was taken; all
six are null where the judge has no verdict).

--labelled takes files with `proposition`, `response`, `label` and perhaps `question` and `topic`, or statement files of
anthropics/evals (persona) or folders of them, of which labelled exchanges are made (vdjax.data.stances); --workdir gets
accuracy, calibration and confusion as tables and figures (vdjax.judges.quality).
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax
import pandas as pd

from vdjax import config as configs
from vdjax import runs, runtime, sharding
from vdjax.cli import run_cli
from vdjax.data import stances
from vdjax.data.examples import Counts
from vdjax.errors import UserError
from vdjax.files import as_path, filling, is_folder, json_objects, read_table, write_whole
from vdjax.judges import LABELS, Exchange, Judge, human
from vdjax.judges.open import judge_of_flags, open_judge
from vdjax.probes import score_table, sets
from vdjax.progress import say

ADDED = ("judge_hash", *LABELS, "graded")  # fields of a row of --out


def read_rows(file: Path) -> tuple[list[dict[str, Any]], list[Exchange]]:
    """The rows of a file and what is to be judged of them.

    Raises:
      UserError: a row that cannot be used, with file and line.
    """
    rows, exchanges = [], []
    for where, row in json_objects(file, "--rows", "proposition and response", ADDED):
        rows.append(row)
        exchanges.append(exchange_of(row, where))
    return rows, exchanges


def exchange_of(row: dict[str, Any], where: str) -> Exchange:
    for key in ("proposition", "response"):
        if key not in row:
            raise UserError(f"{where}: {key!r} is missing; found {', '.join(map(repr, row)) or 'nothing'}")
    texts = [row["proposition"], row.get("question", ""), row["response"]]
    for key, text in zip(Exchange._fields, texts, strict=True):
        if not isinstance(text, str):
            raise UserError(f"{where}: {key} must be text, found {type(text).__name__}")
    if not row["proposition"].strip():
        raise UserError(f"{where}: the proposition is empty")
    return Exchange(*texts)


def judge_rows(judge: Judge, file: Path, out: Path) -> None:
    """Writes the rows of `file` with their verdicts to `out`, whole or not at all."""
    rows, exchanges = read_rows(file)
    found = judge.judge(exchanges, 0)
    if jax.process_index():
        return
    lines = []
    for row, p, graded in zip(rows, found.p.tolist(), found.graded.tolist(), strict=True):
        numbers = dict(zip((*LABELS, "graded"), (*p, graded), strict=True))
        added = {"judge_hash": judge.hash} | {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        lines.append(json.dumps(row | added, ensure_ascii=False) + "\n")
    write_whole(out, "".join(lines))
    say(f"wrote {out}: {len(rows)} verdicts")


def write_run_sheet(workdir: Path, file: Path, n: int, seed: int) -> None:
    """A sheet for people of `n` (0: all) of the responses of a run that can be judged.

    Raises:
      UserError: no run, no responses, or a file that is there already.
    """
    if not (workdir / "config.json").exists():
        raise UserError(f"--run {workdir}: is no workdir: it has no config.json")
    if file.exists():
        raise UserError(f"--sheet {file}: is there already, and may hold labels")
    said = sorted((workdir / "responses").glob("*.parquet"))
    if not said:
        raise UserError(f"--run {workdir}: has no responses; give its config the readout open_ended")
    probes = runs.read_config(workdir / "config.json").probes.path
    table = pd.concat([read_table(one) for one in said], ignore_index=True)
    exchanges, _ = score_table.exchanges(table, sets.load(probes))
    rows = human.write_sheet(exchanges, file, n or len(exchanges), seed)
    say(f"wrote {file}: {rows} responses to label with one of {', '.join(LABELS)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vdjax.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--judge", help="a directory, hub id or snapshot; or a judge of --config")
    parser.add_argument("--config", default="", metavar="FILE.py[:ARG]", help="a config with that judge, of any kind")
    parser.add_argument("--template", default="", help="stance-v1 (default), trained-v1 or a .toml file")
    parser.add_argument("--rows", type=as_path, metavar="FILE.jsonl")
    parser.add_argument("--out", type=as_path, metavar="FILE.jsonl")
    parser.add_argument("--labelled", nargs="+", metavar="PATH")
    parser.add_argument("--topics", nargs="+", default=[], help="of --labelled; default: all")
    parser.add_argument("--max_examples", type=int, default=0, help="of --labelled or --sheet; default 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of exchanges made of statements; of the draw for --sheet")
    parser.add_argument("--workdir", type=as_path, help="of --labelled")
    parser.add_argument("--run", type=as_path, metavar="WORKDIR", help="of --sheet")
    parser.add_argument("--sheet", type=as_path, metavar="FILE.csv")
    flags, overrides = parser.parse_known_args()
    if (flags.rows is None) != (flags.out is None):
        raise UserError("--rows and --out go together")
    if (flags.labelled is None) != (flags.workdir is None):
        raise UserError("--labelled and --workdir go together")
    if (flags.run is None) != (flags.sheet is None):
        raise UserError("--run and --sheet go together")
    if [flags.rows, flags.labelled, flags.sheet].count(None) != 2:
        raise UserError("give either --rows and --out, or --labelled and --workdir, or --run and --sheet")
    if (flags.judge is None) != (flags.sheet is not None):
        raise UserError("--judge is missing" if flags.judge is None else "--sheet is for people: leave out --judge")
    if flags.out and not is_folder(flags.out.parent):
        raise UserError(f"--out {flags.out}: no such directory: {flags.out.parent}")
    if flags.max_examples < 0 or flags.seed < 0:
        raise UserError("--max_examples and --seed: expected at least 0")
    if flags.sheet:
        configs.override_only(configs.experiment(), overrides)
        return write_run_sheet(flags.run, flags.sheet, flags.max_examples, flags.seed)
    config = configs.experiment()
    name, fields = judge_of_flags(config, flags.judge, flags.template, flags.config)
    configs.override_only(config, overrides, "mesh", *["judges"] * bool(flags.config))
    runtime.start()
    # What is wrong with the data is said before the model is loaded.
    items, counts = [], Counts()
    if flags.labelled:
        items = stances.labelled(
            labelled_files(flags.labelled), topics=flags.topics, seed=flags.seed, n=flags.max_examples, counts=counts
        )
        say("\n".join([f"{len(items)} labelled exchanges", *counts.lines()]))
    else:
        read_rows(flags.rows)
    calls = flags.workdir / "calls" if flags.workdir else flags.out.with_name(f"{flags.out.name}.calls")
    judge = open_judge(name, fields, sharding.make_mesh(**config.mesh.to_dict()), calls)
    if flags.rows:
        return judge_rows(judge, flags.rows, flags.out)
    from vdjax.judges import quality

    with filling(flags.workdir, "quality.json") as folder:
        quality.measure(judge, items, folder)
    say(f"wrote {flags.workdir}")


def labelled_files(paths: list[str]) -> list[str] | str:
    """One path as it is (a file, folder or hub id); of several, folders stand for their .jsonl files."""
    if len(paths) == 1:
        return paths[0]
    folders = {path: as_path(path) for path in paths if as_path(path).is_dir()}
    return [str(f) for p in paths for f in (sorted(folders[p].glob("*.jsonl")) if p in folders else [p])]


if __name__ == "__main__":
    run_cli(main)
