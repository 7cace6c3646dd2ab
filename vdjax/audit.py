"""The values of data: python -m vdjax.audit --judge DIR, and --data PATH --workdir DIR, --run WORKDIR or --study DIR

Finds the examples that touch each topic of a probe set (vdjax.values.retrieval), has a judge say which stance their
responses take toward the topic, and writes WORKDIR/audit: found.csv (how many examples were looked at, and how many
name each topic, and where), hits.parquet (every response with its verdict), examples.md (of each topic the responses
that support and that oppose it most), values.csv (the stances of SFT responses, or of chosen and rejected or desirable
and undesirable ones), gaps.csv (how far the two sides are apart) and value_gaps.png. With --run the data of every stage
of that run are audited, and what they predict is set against the drift that was measured: against_drift.csv and
gap_against_drift.png. A workdir of vdjax.probe has no stages: --run WORKDIR --data PATH sets the data that its models
were trained on against their drift. --study does what --run does for every run of a study.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax import runs, runtime
from vdjax.cli import run_cli
from vdjax.data.examples import Example
from vdjax.drift import gaps
from vdjax.drift.scores import POOLED
from vdjax.errors import UserError
from vdjax.files import as_path, read_table
from vdjax.judges import LABELS, Exchange, Judge
from vdjax.probe import STAGE
from vdjax.probes import sets
from vdjax.progress import say
from vdjax.train.plan import data_kind
from vdjax.values import output, retrieval
from vdjax.values.learned import answers, load_examples, stage_examples
from vdjax.values.measures import GAP_COLUMNS, QUANTITIES, SIDES, paired_gap, unpaired_gap, values_of

FOUND_COLUMNS = ("data", "topic", "looked_at", *retrieval.ROUTES)


class Audit(NamedTuple):
    """hits: a row a response: data, id, answer (its number; a pair shares it), topic, route, proposition, score (BM25),
    side, prompt, response, LABELS, graded, judge, judge_hash. values: data, topic, side, n, n_graded, and each of
    QUANTITIES with _low and _high. gaps: GAP_COLUMNS. found: FOUND_COLUMNS, examples by the route (`retrieval.ROUTES`)
    that leads to the topic; in the row of the topic "all" each counts once; what max_per_topic leaves out counts too.
    """

    hits: pd.DataFrame
    values: pd.DataFrame
    gaps: pd.DataFrame
    found: pd.DataFrame
    notes: tuple[str, ...]


def audit(
    examples: Iterable[Example],
    kind: str,
    probes: Sequence[sets.Probe],
    judge: Judge,
    *,
    data: str = "",
    max_per_topic: int = 0,
    seed: int = 0,
    turns: str = "all",
) -> Audit:
    """Which stances the examples' responses take toward the topics that they touch. Deterministic in `seed`.

    Of an SFT conversation every answer in `turns` is judged as an answer to its own question, and looked for by
    itself; the example counts with the mean of its answers. All verdicts are toward the proposition of the topic that
    is most like the example, and so, of built-in topics, in the topic's direction. The topic "all" is about all
    examples that touch some topic, each counted once.

    Args:
      kind: "sft", "preference", or "unpaired": responses that are labelled desirable or not.
      data: name of the data set in the tables.
      max_per_topic: judge at most so many pairs or answers of a topic, those that `retrieval.find` keeps. 0: all.
      turns: of an SFT conversation "all" answers are scored, or the "last" alone (`data.assistant_turns` of its stage).
    """
    numbers: list[int] = []  # which example each answer is of
    parts = answers(examples, numbers) if kind == "sft" and turns == "all" else examples
    found = retrieval.find(parts, probes, max_per_topic=max_per_topic)
    several = len(set(numbers)) < len(numbers)
    looked_at = f"{found.read} " + (f"answers of {len(set(numbers))} conversations" if several else "examples")
    routes = found.routes[""]
    note = (
        f"{data}: {looked_at} looked at, {routes.total()} touch a topic: {routes['question']} in the question, "
        f"{routes['earlier']} in an earlier turn, {routes['response']} in a response alone; "
        f"{len(found.matches)} matches judged"
    )
    rows: list[dict[str, Any]] = []
    for match in found.matches:
        example = found.examples[match.example]
        number = numbers[match.example] if numbers else match.example
        about = {"data": data, "index": number, "id": example.id, "answer": match.example, "topic": match.topic}
        about |= {"route": match.route, "proposition": match.proposition, "score": match.score}
        about |= {"prompt": match.question}
        one = SIDES[kind][:1] if example.label > 0 else SIDES[kind][1:]  # of a response alone
        own = one if kind == "unpaired" else SIDES[kind]
        rows += [about | {"side": s, "response": r} for s, r in zip(own, example.responses, strict=True)]
    verdicts = judge.judge([Exchange(r["proposition"], r["prompt"], r["response"]) for r in rows], 0) if rows else None
    names = ("data", "index", "id", "answer", "topic", "route", "proposition", "score", "side", "prompt", "response")
    hits = pd.DataFrame(rows, columns=list(names))
    for i, name in enumerate(LABELS):
        hits[name] = verdicts.p[:, i] if verdicts else np.zeros(0)
    hits["graded"] = np.asarray(verdicts.graded, float) if verdicts else np.zeros(0)
    hits = hits.assign(judge=judge.name, judge_hash=judge.hash)
    # Both answers of a pair or neither: a gap is between answers to the same question.
    unjudged = hits[list(LABELS)].isna().any(axis=1).groupby([hits["topic"], hits["answer"]]).transform("any")
    notes = [note]
    if unjudged.any():
        lost = hits.loc[unjudged, ["topic", "answer"]].drop_duplicates()
        notes.append(f"{data}: {len(lost)} of {len(found.matches)} matches left out: {judge.name} has no verdict")
        hits = hits[~unjudged]
    topics = [t for t in dict.fromkeys(p.topic for p in probes) if (hits["topic"] == t).any()]
    groups = [(topic, hits[hits["topic"] == topic]) for topic in topics] + [(POOLED, hits)] * bool(topics)
    sides = [(topic, side, rows) for topic, rows in groups for side in SIDES[kind] if (rows["side"] == side).any()]
    values = [values_of(data, topic, side, rows, seed) for topic, side, rows in sides]
    gap = {"preference": paired_gap, "unpaired": unpaired_gap}.get(kind)
    apart = [gap(data, topic, rows, seed) for topic, rows in groups] if gap else []
    columns = ["data", "topic", "side", "n", "n_graded"]
    columns += [f"{name}{end}" for name in QUANTITIES for end in ("", "_low", "_high")]
    return Audit(
        hits.drop(columns="index"),
        pd.DataFrame(values, columns=columns),
        pd.DataFrame(apart, columns=list(GAP_COLUMNS)),
        pd.DataFrame(
            [
                (data, topic or POOLED, found.read, *(counts[route] for route in retrieval.ROUTES))
                for topic, counts in found.routes.items()
            ],
            columns=list(FOUND_COLUMNS),
        ),
        tuple(notes),
    )


def joined(audits: Sequence[Audit]) -> Audit:
    def table(name: str) -> pd.DataFrame:
        parts = [getattr(a, name) for a in audits]
        return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)

    notes = tuple(note for a in audits for note in a.notes)
    return Audit(table("hits"), table("values"), table("gaps"), table("found"), notes)


def rewarded(config: ConfigDict, made: Audit) -> Audit:
    """The audit, with the tables of each stage of rewards for the stages whose own responses they reward."""
    for name in config.stages:
        source = config[name].reward.model
        if data_kind(config[name].objective) == "prompt" and (made.values["data"] == source).any():
            more = [getattr(made, table) for table in ("values", "gaps")]
            copies = [table[table["data"] == source].assign(data=name) for table in more]
            values, apart = (pd.concat(pair, ignore_index=True) for pair in zip(more, copies, strict=True))
            note = f"{name}: learns from its own responses; {source}, which rewards them, was audited in their place"
            made = made._replace(values=values, gaps=apart, notes=(*made.notes, note))
    return made


def audit_run(
    config: ConfigDict, workdir: Path, probes: Sequence[sets.Probe], judge: Judge, max_per_topic: int = 0
) -> Audit:
    """What every stage was trained on, each named as its stage; stages without stated answers are noted.

    A stage whose responses are rewarded by another stage's model has the gap of that one's data.
    """
    audits: list[Audit] = []
    notes: list[str] = []
    known: list[str] = []
    for name in config.stages:
        try:
            kind, examples, found = stage_examples(config, name, workdir)
        except UserError as error:
            if config[name].reward.model not in known:
                notes.append(f"{name}: not audited: {error}")
            continue
        about = {"data": name, "max_per_topic": max_per_topic, "seed": config.seed}
        known.append(name)
        notes += found
        audits.append(audit(examples, kind, probes, judge, **about, turns=config[name].data.assistant_turns))
    if not audits:
        raise UserError("\n".join(["no stage's data can be audited", *notes]))
    made = rewarded(config, joined(audits))
    return made._replace(notes=(*made.notes, *notes))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vdjax.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", metavar="PATH[,PATH]", help="files, directories, hub ids; each a data set of its own")
    parser.add_argument("--run", type=as_path, metavar="WORKDIR", help="of a run; of vdjax.probe with --data beside it")
    parser.add_argument("--study", type=as_path, metavar="WORKDIR", help="of a study: every run that has a report")
    parser.add_argument("--judge", required=True, help="directory or hub id of a model; or one of a config's judges")
    parser.add_argument("--config", default="", metavar="FILE.py[:ARG]", help="whose judges; default: the run's")
    parser.add_argument("--template", default="", help="of a model as judge (vdjax/judges/templates)")
    parser.add_argument("--source", default="auto", help="schema of the data (vdjax.data.sources)")
    parser.add_argument("--kind", choices=tuple(SIDES), help="default: preference where the data have pairs")
    parser.add_argument("--probes", help="builtin or a probe file; default: the run's, or builtin")
    parser.add_argument("--topics", nargs="+", default=(), help="default: all")
    parser.add_argument("--max_per_topic", type=int, default=0, help="answers judged of each topic; default: all")
    parser.add_argument("--workdir", type=as_path, help="default: the run's")
    flags, overrides = parser.parse_known_args()
    targets = check_flags(flags)
    config = targets[0].config
    if flags.data:
        config.data = configs.stage("sft").data
        config.data.source = flags.source
    from vdjax.judges.open import judge_of_flags, open_judge

    if not flags.config and flags.judge in config.get("judges", {}):
        name, fields = flags.judge, config.judges[flags.judge]
    else:
        name, fields = judge_of_flags(config, flags.judge, flags.template, flags.config)
    configs.override_only(
        config, overrides, "mesh", *["data"] * bool(flags.data), *["judges"] * (name in config.get("judges", {}))
    )
    probes = sets.load(flags.probes or config.probes.path, topics=flags.topics or config.probes.topics or None)
    runtime.start()

    import jax

    from vdjax import sharding
    from vdjax.measure import remembering

    calls = flags.study / "judgements" / "calls" if flags.study else runs.calls(targets[0].workdir)
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    with jax.set_mesh(mesh):
        # The runs of a study share their data but for the seed: each response is judged once.
        judge = remembering(open_judge(name, fields, mesh, calls), {})
        for workdir, run, own in targets:
            if flags.study:
                say(f"{run}:")
            if flags.data or not run:
                paths = [path.strip() for path in flags.data.split(",")]
                audited = joined([audit_path(path, own, flags, probes, judge) for path in paths])
            else:
                audited = audit_run(own, run, probes, judge, flags.max_per_topic)
            if jax.process_index() == 0:
                write(audited, workdir, run)


class Target(NamedTuple):
    """What is audited: data alone, or a run."""

    workdir: Path  # where the tables are written
    run: Path | None
    config: ConfigDict


def check_flags(flags: argparse.Namespace) -> list[Target]:
    """What is to be audited, at least one.

    Raises:
      UserError: flags that do not go together, or a run without a config or report.
    """
    if not (flags.data or flags.run or flags.study):
        raise UserError("give what is to be audited: --data, --run or --study")
    if flags.study and (flags.data or flags.run or flags.workdir):
        raise UserError("--study audits the runs of a study, each in its own workdir; leave --data, --run, --workdir")
    if flags.data and not flags.run and not flags.workdir:
        raise UserError("--data needs --workdir, where the tables are written")
    if not flags.data and (flags.source != "auto" or flags.kind):
        raise UserError("--source and --kind are for --data; a run's config says what its stages read")
    if flags.max_per_topic < 0:
        raise UserError(f"--max_per_topic {flags.max_per_topic}: expected at least 0 (all)")
    if flags.study:
        return study_runs(flags.study)
    if not flags.run:
        return [Target(flags.workdir, None, configs.experiment())]
    config, drift = run_config(flags.run), flags.run / "drift" / "drift.csv"
    if config.stages and flags.data:
        raise UserError(f"--run {flags.run}: its config says what its stages read; --data is for runs of vdjax.probe")
    if not config.stages and not flags.data:
        raise UserError(
            f"--run {flags.run} is a workdir of vdjax.probe, which does not know what its models were trained on; give "
            "that by --data"
        )
    if flags.data and "," in flags.data:
        raise UserError(f"--data {flags.data}: with --run, one file, directory or hub id, to set against the drift")
    if not drift.exists():
        raise UserError(f"{drift}: no such file; the run has no report yet")
    return [Target(flags.workdir or flags.run, flags.run, config)]


def study_runs(study: Path) -> list[Target]:
    """The runs in a study's workdir that have a report; the others are named."""
    folders = sorted(file.parent for file in study.glob("*/config.json"))
    ready = [folder for folder in folders if (folder / "drift" / "drift.csv").exists()]
    if not ready:
        hint = "; it is a run: --run" if (study / "config.json").exists() else ""
        raise UserError(f"--study {study}: expected runs with a report in it, found {len(folders)} runs{hint}")
    if left := [folder.name for folder in folders if folder not in ready]:
        say(f"without a report, and left out: {', '.join(left)}")
    return [Target(folder, folder, run_config(folder)) for folder in ready]


def write(audited: Audit, workdir: Path, run: Path | None) -> None:
    """Writes WORKDIR/audit, and says what is in it; beside the drift of the run, where there is one."""
    for note in audited.notes:
        say(note)
    drift = read_table(run / "drift" / "drift.csv") if run else None
    against = gaps.against_drift(audited.values, audited.gaps, drift) if drift is not None else None
    tables = {"hits.parquet": audited.hits, "values.csv": audited.values, "gaps.csv": audited.gaps}
    tables["found.csv"] = audited.found
    output.write(workdir / "audit", tables, against)
    print(output.text(audited.found, audited.values[["data", "topic", "side", "n", *QUANTITIES]], audited.gaps))
    if against is not None:
        print(f"\n{gaps.sentence(gaps.agreement(against))}")
    if len(audited.hits):
        print(f"examples: {workdir / 'audit' / 'examples.md'}")
    print(f"audit: {workdir / 'audit'}")


def audit_path(
    path: str, config: ConfigDict, flags: argparse.Namespace, probes: Sequence[sets.Probe], judge: Judge
) -> Audit:
    spec = {k: v for k, v in config.data.to_dict().items() if k not in ("parts", "order")} | {"path": path}
    kinds = [flags.kind] if flags.kind else ["preference", "unpaired", "sft"]
    kind, [(examples, counts)] = load_examples([spec], kinds, config.seed)
    name = STAGE if flags.run else Path(path).name  # as the drift of vdjax.probe has it
    about = {"data": name, "max_per_topic": flags.max_per_topic, "seed": config.seed}
    made = audit(examples, kind, probes, judge, **about, turns=config.data.assistant_turns)
    return made._replace(notes=(*made.notes, *counts.lines()))


def run_config(workdir: Path) -> ConfigDict:
    """The config of a run; UserError where there is none."""
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"--run {workdir}: no config.json there; expected the workdir of a run")
    return runs.read_config(file)


if __name__ == "__main__":
    run_cli(main)
