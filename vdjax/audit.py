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
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax import runtime
from vdjax.cli import run_cli
from vdjax.data import mixture, pipeline, sources
from vdjax.data.examples import Counts, Example
from vdjax.drift import gaps
from vdjax.drift.scores import POOLED
from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange, Judge
from vdjax.probe import STAGE
from vdjax.probes import sets
from vdjax.progress import say
from vdjax.setup import reading
from vdjax.train.plan import data_kind
from vdjax.values import output, retrieval
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
        sides = SIDES[kind] if kind != "unpaired" else ("desirable",) if example.label > 0 else ("undesirable",)
        rows += [about | {"side": s, "response": r} for s, r in zip(sides, example.responses, strict=True)]
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


def answers(examples: Iterable[Example], numbers: list[int]) -> Iterator[Example]:
    """Each answer of each conversation as an example of its own, with what came before it as prompt.

    Appends the number of the conversation of each to `numbers` as it goes, as examples are read one at a time.
    """
    for number, example in enumerate(examples):
        if not isinstance(example.prompt, str):
            for i, message in enumerate(example.prompt):
                if message["role"] == "assistant":
                    numbers.append(number)
                    yield example._replace(prompt=example.prompt[:i], responses=(message["content"],))
        numbers.append(number)
        yield example


def joined(audits: Sequence[Audit]) -> Audit:
    def table(name: str) -> pd.DataFrame:
        parts = [getattr(a, name) for a in audits]
        return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)

    tables = [table(name) for name in ("hits", "values", "gaps", "found")]
    return Audit(*tables, tuple(note for a in audits for note in a.notes))


def load_examples(
    specs: Sequence[dict[str, Any]], kinds: Sequence[str], seed: int
) -> tuple[str, list[tuple[Iterable[Example], Counts]]]:
    """Examples of the first of `kinds` that all data sets can give; UserError of the first where there is none."""
    errors = []
    for kind in kinds:
        counts = [Counts() for _ in specs]
        try:
            loaded = [sources.load(s | {"kind": kind}, seed=seed, counts=c) for s, c in zip(specs, counts, strict=True)]
            return kind, list(zip(loaded, counts, strict=True))
        except UserError as error:
            errors.append(error)
    raise errors[0]


def stage_examples(config: ConfigDict, name: str, workdir: Path) -> tuple[str, Iterator[Example], list[str]]:
    """What a stage of a run was trained on, with its texts whole, and notes on it.

    Those examples that could be rendered (found in WORKDIR/data, or rendered again), without the held-out ones and, of
    a stage that ended within its first epoch, without those that it did not come to.

    Raises:
      UserError: data without responses, or those of a stage that learns from the policy's own.
    """
    stage = config[name]
    needed = data_kind(stage.objective)
    if needed in ("text", "prompt"):
        raise UserError(f"the objective {stage.objective} learns from no stated answers")
    # Pairs say more than their responses one by one, also where the objective takes these.
    kinds = ["preference", "unpaired"] if needed == "unpaired" else [needed]
    kind, loaded = load_examples(pipeline.specs(stage, needed), kinds, config.seed)
    tokenizer, template, _ = reading(config)
    data = pipeline.build(stage, needed, tokenizer, template, workdir / "data", seed=config.seed)
    done, notes = workdir / name / "done.json", []
    if done.exists() and json.loads(done.read_text())["data_counts"] != data.counts:
        notes.append(f"{name}: the data changed since it was trained; audited is what they are now")
    ids = trained_ids(stage, data, config.seed)
    if (needed, kind) == ("unpaired", "preference"):
        ids = {id.removesuffix(":chosen").removesuffix(":rejected") for id in ids}
    return kind, _chosen([examples for examples, _ in loaded], bool(stage.data.get("parts")), ids), notes


def trained_ids(stage: ConfigDict, data: pipeline.Dataset, seed: int) -> set[str]:
    """Ids of the examples that a stage's steps went through (see `train.plan.plan_stage`)."""
    train = pipeline.take(data, 0, len(data) - stage.eval_examples)
    parts = mixture.part_numbers(train.ids) if stage.data.get("order") == "parts" else None
    steps = pipeline.order(len(train), stage.batch_size, stage.epochs, seed, parts)
    if not stage.max_steps or stage.max_steps * stage.batch_size >= len(train):
        return set(train.ids)
    return {train.ids[i] for step in range(stage.max_steps) for i in steps[step]}


def _chosen(parts: Sequence[Iterable[Example]], labelled: bool, ids: set[str]) -> Iterator[Example]:
    """The examples with these ids, which say the part in a mixture; what comes after the last of them is not read."""
    left = set(ids)
    for number, examples in enumerate(parts):
        mine = {id for id in left if not labelled or id.startswith(mixture.label(number, ""))}
        for example in examples if mine else ():
            id = mixture.label(number, example.id) if labelled else example.id
            if id in mine:
                yield example._replace(id=id)
                mine.remove(id)
            if not mine:
                break


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
    parser.add_argument("--run", type=Path, metavar="WORKDIR", help="of a run; of vdjax.probe with --data beside it")
    parser.add_argument("--study", type=Path, metavar="WORKDIR", help="of a study: every run in it that has a report")
    parser.add_argument("--judge", required=True, help="directory or hub id of a model; or a judge of the run's config")
    parser.add_argument("--template", default="", help="of a model as judge (vdjax/judges/templates)")
    parser.add_argument("--source", default="auto", help="schema of the data (vdjax.data.sources)")
    parser.add_argument("--kind", choices=tuple(SIDES), help="default: preference where the data have pairs")
    parser.add_argument("--probes", help="builtin or a probe file; default: the run's, or builtin")
    parser.add_argument("--topics", nargs="+", default=(), help="default: all")
    parser.add_argument("--max_per_topic", type=int, default=0, help="answers judged of each topic; default: all")
    parser.add_argument("--workdir", type=Path, help="default: the run's")
    flags, overrides = parser.parse_known_args()
    runs = check_flags(flags)
    config = next(iter(runs.values()), None) or configs.experiment()
    if flags.data:
        config.data = configs.stage("sft").data
        config.data.source = flags.source
    configs.override_only(config, overrides, "mesh", *["data"] * bool(flags.data))
    probes = sets.load(flags.probes or config.probes.path, topics=flags.topics or config.probes.topics or None)
    runtime.start()

    import jax

    from vdjax import sharding
    from vdjax.judges.open import open_judge
    from vdjax.measure import remembering

    calls = (flags.study or flags.workdir or flags.run) / "judgements" / "calls"
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    with jax.set_mesh(mesh):
        if flags.judge in config.get("judges", {}):
            fields = config.judges[flags.judge]
        else:
            fields = configs.judge(
                "local", path=flags.judge, **({"template": flags.template} if flags.template else {})
            )
        # The runs of a study share their data but for the seed: each response is judged once.
        judge = remembering(open_judge(Path(flags.judge).name, fields, mesh, calls))
        for run, own in (runs or {None: config}).items():
            if flags.study:
                say(f"{run}:")
            if flags.data:
                paths = [path.strip() for path in flags.data.split(",")]
                audited = joined([audit_path(path, own, flags, probes, judge) for path in paths])
            else:
                audited = audit_run(own, run, probes, judge, flags.max_per_topic)
            if jax.process_index() == 0:
                write(audited, flags.workdir or run, run)


def check_flags(flags: argparse.Namespace) -> dict[Path, ConfigDict]:
    """The runs that are audited, with their configs; none where --data stands alone.

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
        return {}
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
    return {flags.run: config}


def study_runs(study: Path) -> dict[Path, ConfigDict]:
    """The runs in a study's workdir that have a report; the others are named."""
    folders = sorted(file.parent for file in study.glob("*/config.json"))
    ready = [folder for folder in folders if (folder / "drift" / "drift.csv").exists()]
    if not ready:
        hint = "; it is a run: --run" if (study / "config.json").exists() else ""
        raise UserError(f"--study {study}: expected runs with a report in it, found {len(folders)} runs{hint}")
    if left := [folder.name for folder in folders if folder not in ready]:
        say(f"without a report, and left out: {', '.join(left)}")
    return {folder: run_config(folder) for folder in ready}


def write(audited: Audit, workdir: Path, run: Path | None) -> None:
    """Writes WORKDIR/audit, and says what is in it; beside the drift of the run, where there is one."""
    for note in audited.notes:
        say(note)
    drift = pd.read_csv(run / "drift" / "drift.csv") if run else None
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
    return ConfigDict(json.loads(file.read_text())["config"])


if __name__ == "__main__":
    run_cli(main)
