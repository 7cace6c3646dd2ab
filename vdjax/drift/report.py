"""The drift report: CSV tables, figures, TensorBoard and one HTML file, all from the scores of a run."""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from vdjax.drift import evidence as behind
from vdjax.drift import figures, gaps, robustness, sections, summary, tensorboard
from vdjax.drift.evidence import Evidence
from vdjax.drift.figures import RATES
from vdjax.drift.metrics import LABELS, quantities
from vdjax.drift.scores import POOLED, StageInfo
from vdjax.drift.statistics import Analysis, analyse
from vdjax.drift.summary import summary_table
from vdjax.files import write_whole
from vdjax.judges.agreement import agreement

__all__ = ["Evidence", "StageInfo", "summary_table", "write"]

RESAMPLES = 9999
PERMUTATIONS = 19999
PAGE_PIXELS = 92  # of the page for each inch of a figure
ALTERNATIVES = {
    "trajectories": "Stance values over training",
    "drift": "Drift magnitudes",
    "readouts": "Drift of the graded stance under each readout",
    "rates": "Shares of refusals, off-topic and degenerate responses over training",
    "training": "Training curves",
    "audit": "Value gap of the data against measured drift",
}


def write(
    workdir: Path,
    scores: pd.DataFrame,
    stages: Sequence[StageInfo],
    training: pd.DataFrame,
    facts: Mapping[str, Any],
    evidence: Evidence = Evidence(),  # noqa: B008  # immutable
) -> Analysis:
    """Write drift/*.csv, figures/*.png, tb/drift and report.html under `workdir`; every file whole or not at all.

    Where the data were audited, what they predict is set against this drift anew, in audit/ too.

    Args:
      scores: the long frame of `drift.scores`; for the text of the report also input. The first readout is primary.
      stages: in the order they ran.
      training: columns stage, step, metric, value; may be empty. Metrics with the prefix eval_ are held out.
      facts: what was run. Known keys, all optional: title, model, parameters, command, seed (also that of the
        statistics), versions {name: version}, config (text), data [{stage, source, examples, dropped {reason: n},
        overlap}], probes {name, description, directions {topic: what support means}}. Others are shown as they are.
      evidence: what lies behind the scores.

    Raises UserError (see `scores.check_scores`).
    """
    seed = int(facts.get("seed", 0) or 0)
    analysis = analyse(
        scores,
        list(stages),
        seed=seed,
        resamples=RESAMPLES,
        permutations=PERMUTATIONS,
        reseeded=evidence.reseeded,
    )
    tables = all_tables(scores, stages, training, analysis, evidence, seed)
    pngs = figures.draw(analysis.stances, analysis.drift, stages, training)
    for name, table in tables.items():
        write_whole(workdir / "drift" / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
    for name, png in pngs.items():
        write_whole(workdir / "figures" / f"{name}.png", png)
    _remove_old(workdir / "drift", "csv", TABLES, tables)
    _remove_old(workdir / "figures", "png", [f"{kind}-*" for kind in ALTERNATIVES], pngs)
    if {"values", "gaps"} <= set(evidence.audit):
        against = gaps.against_drift(evidence.audit["values"], evidence.audit["gaps"], analysis.drift)
        evidence = evidence._replace(audit={**evidence.audit, "against_drift": against})
        for name, content in gaps.files(against).items():
            write_whole(workdir / "audit" / name, content)
            if name.endswith(".png"):
                pngs["audit-1"] = content
    last_steps = {s.name: s.total_steps for s in stages}
    tensorboard.write_drift(workdir / "tb" / "drift", analysis.stances, analysis.drift, last_steps, pngs)
    write_whole(workdir / "report.html", render(scores, stages, analysis, tables, pngs, facts, evidence))
    return analysis


TABLES = (
    ("stances", "drift", "stages", "distances", "floors")
    + ("robustness", "consistency", "readout_correlation", "agreement")
)  # fmt: skip


def all_tables(
    scores: pd.DataFrame,
    stages: Sequence[StageInfo],
    training: pd.DataFrame,
    analysis: Analysis,
    evidence: Evidence,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """{stem of the CSV file: table}, in the order of TABLES; beyond the first three only those that have rows."""
    always = {
        "stances": analysis.stances,
        "drift": analysis.drift,
        "stages": summary.outcomes(training, analysis.drift, stages),
    }
    judgements = evidence.judgements
    several = judgements is not None and judgements["judge"].nunique() > 1
    chance: dict[str, int] = {"seed": seed, "resamples": RESAMPLES // 10}  # of tables beside the main ones
    others = {
        "distances": analysis.distances,
        "floors": analysis.floors,
        "robustness": robustness.by_factor(scores, list(stages), variants=evidence.variants, **chance),
        "consistency": robustness.consistency(scores),
        "readout_correlation": robustness.readout_correlation(scores, **chance),
        "agreement": agreement(judgements, **chance) if several else pd.DataFrame(),
    }
    return always | {name: table for name, table in others.items() if not table.empty}


def render(
    scores: pd.DataFrame,
    stages: Sequence[StageInfo],
    analysis: Analysis,
    tables: Mapping[str, pd.DataFrame],
    pngs: Mapping[str, bytes],
    facts: Mapping[str, Any],
    evidence: Evidence,
) -> str:
    """report.html as text. It needs no other file and no network; all text in it is escaped.

    `tables` are those of `all_tables`.
    """
    readouts = list(analysis.stances["readout"].unique())
    primary_drift = summary.of_readout(analysis.drift, readouts[0])
    important = summary.by_importance(primary_drift)
    significant = important[important["significant"].astype(bool)]
    by_readout = {readout: summary.of_readout(analysis.drift, readout) for readout in readouts}
    outcomes = tables["stages"]
    rows = summary.stage_rows(analysis, stages)
    generations, anchors = _generations(scores, rows, evidence)
    known = ("title", "config", "data", "probes", "command")
    empty = pd.DataFrame()
    template = _environment().get_template("report.html")
    return template.render(
        title=facts.get("title") or "Value drift",
        command=facts.get("command"),
        config=facts.get("config"),
        data=facts.get("data") or [],
        probes=facts.get("probes") or {},
        particulars={key: value for key, value in facts.items() if key not in known},
        stages=rows,
        readouts=readouts,
        primary=readouts[0],
        floored=bool(primary_drift["floor"].notna().any()),
        outcomes=outcomes.astype(object).where(outcomes.notna(), None).to_dict("records"),
        columns=[name for name in summary.OUTCOMES if outcomes[name].notna().any()],
        significant=significant.to_dict("records"),
        beyond=int(significant["real"].astype(bool).sum()),
        comparisons=len(important),
        full={
            readout: pd.concat([drift[drift["topic"] == POOLED], summary.by_importance(drift)]).to_dict("records")
            for readout, drift in by_readout.items()
        },
        figures={
            readout: {kind: _inlined(pngs, kind, readouts, i, readout) for kind in ("trajectories", "drift")}
            for i, readout in enumerate(readouts)
        },
        common={kind: _inlined(pngs, kind) for kind in ("readouts", "rates", "training", "audit")},
        distances=sections.distances(analysis.distances),
        rates=behind.rates(scores),
        rate_names=RATES,
        floors=sections.floors(analysis.floors),
        missing_floors=sections.missing_floors(analysis.floors, readouts, evidence.judges),
        noiseless=sections.noiseless(evidence.judges),
        robustness=sections.robustness(tables),
        judges=sections.judges(evidence.judges),
        agreement=sections.agreement(tables["agreement"]) if "agreement" in tables else None,
        agreed=sections.agreed(tables.get("agreement", empty)),
        confusions=sections.confusions(evidence.judgements),
        generations=generations,
        anchors=anchors,
        audit=sections.audit(evidence.audit),
        examples=sections.examples(evidence.audit.get("hits")),
        gaps=sections.gaps(evidence.audit),
        agree=sections.agree(evidence.audit),
        moved={row["name"]: summary.moved_probes(scores, row["name"]) for row in rows if row["snapshots"] > 1},
        n_probes=scores["probe_id"].nunique(),
        n_topics=scores["topic"].nunique(),
        caveats=summary.caveats(scores, analysis, PERMUTATIONS, facts.get("data") or []),
        shown_labels=[name for name in LABELS if name in quantities(readouts[0])],
        resamples=RESAMPLES,
        permutations=PERMUTATIONS,
    )


def page_environment() -> jinja2.Environment:
    """Of all pages: every text is escaped, and a name that is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vdjax.drift"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _environment() -> jinja2.Environment:
    environment = page_environment()
    filters: dict[str, Callable[[Any], str]] = {
        "signed": lambda value: summary.signed(value).replace("-", "−"),
        "probability": lambda value: "–" if value is None else summary.probability(value),
        "percent": summary.percent,
        "verdict": summary.verdict,
        "label": lambda name: {"off_topic": "off-topic"}.get(name, str(name).replace("_", " ")),
        "text": lambda value: value if isinstance(value, str) else "",
        "flat": _flat,
        "number": _number,
        "cell": _cell,
    }
    environment.filters |= filters
    environment.globals["marks"] = {summary.REAL: "●", summary.UNCONFIRMED: "●", summary.WITHIN: "◐", summary.NONE: "○"}
    environment.globals["interval"] = lambda low, high: summary.interval(low, high).replace("-", "−")
    return environment


def _generations(
    scores: pd.DataFrame, rows: Sequence[Mapping[str, Any]], evidence: Evidence
) -> tuple[list[tuple[str, list[dict[str, Any]]]], dict[tuple[str, str], str]]:
    """The responses to show of each stage, and the place on the page of each (stage, topic) among them."""
    shown = []
    anchors: dict[tuple[str, str], str] = {}
    for number, row in enumerate(rows, start=1):
        topics = [mover["topic"] for mover in row["movers"]]
        items = behind.generations(scores, evidence.responses, row["name"], topics)
        for item in items:
            key = (row["name"], item["topic"])
            item["anchor"] = None if key in anchors else f"responses-{number}-{topics.index(item['topic']) + 1}"
            anchors.setdefault(key, item["anchor"])
        if items:
            shown.append((row["name"], items))
    return shown, anchors


def _remove_old(folder: Path, suffix: str, patterns: Sequence[str], kept: Mapping[str, Any]) -> None:
    """Delete what an earlier report with more topics, stages or readouts left."""
    for path in (path for pattern in patterns for path in folder.glob(f"{pattern}.{suffix}")):
        if path.stem not in kept:
            path.unlink()


def _inlined(
    pngs: Mapping[str, bytes], kind: str, readouts: Sequence[str] = (), i: int = 0, readout: str = ""
) -> list[tuple[str, int, str]]:
    """(alternative text, width on the page in pixels, base64 of the PNG) for each figure of a kind, and readout."""
    stem = re.compile(re.escape(figures.stem(kind, readouts, i)) + r"-\d+")
    chosen = [png for name, png in pngs.items() if stem.fullmatch(name)]
    out = []
    for number, png in enumerate(chosen, start=1):
        by = f" by {readout}" if readout else ""
        part = f" ({number} of {len(chosen)})" if len(chosen) > 1 else ""
        width = round(tensorboard.png_size(png)[0] * PAGE_PIXELS / figures.DPI)
        out.append((ALTERNATIVES[kind] + by + part, width, base64.b64encode(png).decode()))
    return out


def _number(value: float | None) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:.3g}".replace("-", "−")


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return _number(value) if isinstance(value, float) else _flat(value)


def _flat(value: Any) -> str:
    """A fact as one line."""
    if value is None or value is pd.NA:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_flat(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 9999 else str(value)
