"""What a workdir shows: from what was trained, asked and judged to the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax import measure, runs
from vdjax.drift.evidence import Evidence
from vdjax.drift.scores import StageInfo
from vdjax.drift.summary import summary_table
from vdjax.files import as_path, kept_lines, read_kept, read_table
from vdjax.judges import Judge
from vdjax.judges.prompts import read_template
from vdjax.models import config as model_config
from vdjax.probes import score_table, sets
from vdjax.progress import say
from vdjax.setup import Setup

NO_TRAINING = pd.DataFrame(columns=["stage", "step", "metric", "value"])
AUDIT_TABLES = ("values", "gaps")


def write(
    config: ConfigDict,
    made: Setup,
    asked: measure.Questions,
    judges: Sequence[Judge],
    workdir: Path,
    command: str,
    overlap: Mapping[str, int],
) -> None:
    """Drift tables, figures, TensorBoard and report.html from what is in the workdir.

    overlap: of each stage, how many training examples ask a question of the probes word for word.
    """
    if jax.process_index():
        return
    probed = runs.probed(config)
    if not probed:
        return say("no stage has snapshots.probe: there is nothing to report on")
    stages = [
        StageInfo(
            name, config[name].objective, runs.done(workdir, name)["total_steps"], runs.parent(config, name) or None
        )
        for name in config.stages
    ]
    facts = {
        "command": command,
        "model": config.model.path or config.model.name or "from scratch",
        "parameters": model_config.num_params(made.model.cfg),
        "seed": config.seed,
        "versions": runs.versions(),
        "probes": probe_facts(config.probes.path, asked.probes),
        "readouts": ", ".join(config.probes.readouts),
        "data": [data_facts(name, config[name], runs.done(workdir, name), overlap[name]) for name in config.stages],
        "config": configs.to_json(config),
    }
    finish(config, asked, probed, judges, workdir, stages, training_table(config, workdir), facts)


def finish(
    config: ConfigDict,
    asked: measure.Questions,
    probed: Sequence[str],
    judges: Sequence[Judge],
    workdir: Path,
    stages: list[StageInfo],
    training: pd.DataFrame,
    facts: dict[str, Any],
) -> None:
    """Writes the report and prints the drift table."""
    from vdjax.drift import report  # draws: not needed before there is something to show

    found = measure.read(config, asked, probed, workdir)
    beside = evidence(config, asked, found, judges, workdir)
    analysis = report.write(workdir, found.scores, stages, training, facts, beside)
    print(summary_table(analysis.drift))
    print(f"report: {workdir / 'report.html'}")


def evidence(
    config: ConfigDict,
    asked: measure.Questions,
    found: measure.Measured,
    judges: Sequence[Judge],
    workdir: Path,
) -> Evidence:
    """What the report shows beside the scores."""
    files = {name: workdir / "audit" / f"{name}.csv" for name in AUDIT_TABLES}
    audit = {name: read_table(file) for name, file in files.items() if file.exists()}
    if (hits := workdir / "audit" / "hits.parquet").exists():
        audit["hits"] = read_table(hits)
    file = workdir / "drift" / "reseeded.csv"
    reseeded = read_table(file) if file.exists() else None
    always: dict[str, Any] = {"reseeded": reseeded, "variants": asked.variants, "audit": audit}
    if found.responses.empty:
        return Evidence(**always)
    first = found.judgements[found.judgements["repeat"] == 0].drop(columns="judged_hash")
    joined = found.responses.merge(first, on=score_table.RESPONSE, how="left")
    shown = tuple(judge_facts(config, judge) for judge in judges)
    return Evidence(joined, found.judgements, shown, **always)


def judge_facts(config: ConfigDict, judge: Judge) -> dict[str, Any]:
    fields = config.judges[judge.name]
    shown = {name: fields[name] for name in ("kind", "path", "template", "model") if fields.get(name)}
    quality = read_kept(as_path(fields.quality), "judge_hash") if fields.quality else None
    if quality and quality["judge_hash"] != judge.hash:
        say(f"{judge.name}: {fields.quality} is about another judge, so it is not shown")
        quality = None
    known = {"name": judge.name, "hash": judge.hash, "quality": quality, **shown}
    if fields.kind == "local" and not read_template(fields.template).letters:
        known["noiseless"] = True  # always the same verdict, and no options that a repeat could reorder
    return known


def data_facts(name: str, stage: ConfigDict, summary: dict[str, Any], overlap: int) -> dict[str, Any]:
    counts = summary["data_counts"]
    examples = f"{summary['train_examples']} trained on, {summary['held_out_examples']} held out"
    reasons = counts["dropped"] | counts["noted"]
    source = stage.data.path or ", ".join(part["path"] for part in stage.data.parts)
    reasons |= {"asks_a_probe_word_for_word": overlap} if overlap else {}
    return {"stage": name, "source": source, "examples": examples, "dropped": reasons, "overlap": overlap}


def probe_facts(path: str, probes: list[sets.Probe]) -> dict[str, Any]:
    counts = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in sets.describe(probes).items())
    topics = {probe.topic for probe in probes}
    directions = {topic: text for topic, text in sets.TOPICS.items() if topic in topics} if path == "builtin" else {}
    return {"name": path, "description": counts, "directions": directions}


def training_table(config: ConfigDict, workdir: Path) -> pd.DataFrame:
    """All logged metrics in long form: stage, step, metric, value."""
    rows = [
        (name, row["step"], metric, value)
        for name in config.stages
        for row in kept_lines(workdir / name / "metrics.jsonl", "step")
        for metric, value in row.items()
        if metric != "step"
    ]
    return pd.DataFrame(rows, columns=["stage", "step", "metric", "value"])
