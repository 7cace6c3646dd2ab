"""The drift report: CSV tables, figures, TensorBoard and one HTML file, all from the scores of a run."""

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from vdjax.drift import figures, summary, tensorboard
from vdjax.drift.metrics import STANCES
from vdjax.drift.scores import StageInfo
from vdjax.drift.statistics import POOLED, Analysis, analyse
from vdjax.drift.summary import summary_table

__all__ = ["StageInfo", "summary_table", "write"]

RESAMPLES = 9999
PERMUTATIONS = 19999
PAGE_PIXELS = 92  # of the page for each inch of a figure
ALTERNATIVES = {
    "trajectories": "Stance values over training",
    "drift": "Drift magnitudes",
    "training": "Training curves",
}


def write(
    workdir: Path,
    scores: pd.DataFrame,
    stages: Sequence[StageInfo],
    training: pd.DataFrame,
    facts: Mapping[str, Any],
) -> Analysis:
    """Write drift/*.csv, figures/*.png, tb/drift and report.html under `workdir`; every file whole or not at all.

    Args:
      scores: one row for each (stage, step, probe): stage, step, probe_id, topic, proposition, polarity (1, -1 or 0
        for unknown), support, neutral, oppose (sum 1), and for the text of the report input and readout.
      stages: in the order they ran.
      training: columns stage, step, metric, value; may be empty. Metrics with the prefix eval_ are held out.
      facts: what was run. Known keys, all optional: title, model, parameters, command, seed (also that of the
        statistics), versions {name: version}, config (text), data [{stage, source, examples, dropped {reason: n}}],
        probes {name, description, directions {topic: what support means}}. Others are shown as they are.

    Raises UserError (see `scores.check_scores`).
    """
    seed = facts.get("seed", 0)
    analysis = analyse(scores, list(stages), seed=int(seed or 0), resamples=RESAMPLES, permutations=PERMUTATIONS)
    pngs = figures.draw(analysis.stances, analysis.drift, stages, training)
    write_atomically(workdir / "drift" / "stances.csv", analysis.stances.to_csv(index=False, float_format="%.6g"))
    write_atomically(workdir / "drift" / "drift.csv", analysis.drift.to_csv(index=False, float_format="%.6g"))
    outcomes = summary.outcomes(training, analysis.drift, stages)
    write_atomically(workdir / "drift" / "stages.csv", outcomes.to_csv(index=False, float_format="%.6g"))
    for name, png in pngs.items():
        write_atomically(workdir / "figures" / f"{name}.png", png)
    for kind in ALTERNATIVES:  # of an earlier report with more topics or stages
        for path in (workdir / "figures").glob(f"{kind}-*.png"):
            if path.stem not in pngs:
                path.unlink()
    last_steps = {s.name: s.total_steps for s in stages}
    tensorboard.write_drift(workdir / "tb" / "drift", analysis.stances, analysis.drift, last_steps, pngs)
    write_atomically(workdir / "report.html", render(scores, stages, analysis, outcomes, pngs, facts))
    return analysis


def render(
    scores: pd.DataFrame,
    stages: Sequence[StageInfo],
    analysis: Analysis,
    outcomes: pd.DataFrame,
    pngs: Mapping[str, bytes],
    facts: Mapping[str, Any],
) -> str:
    """report.html as text. It needs no other file and no network; all text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vdjax.drift"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "signed": lambda value: summary.signed(value).replace("-", "−"),
        "probability": summary.probability,
        "percent": summary.percent,
        "flat": _flat,
        "number": lambda value: "–" if value is None else f"{value:.4g}".replace("-", "−"),
    }
    environment.globals["interval"] = lambda low, high: summary.interval(low, high).replace("-", "−")
    drift = summary.by_importance(analysis.drift)
    rows = summary.stage_rows(analysis, stages)
    probed = [row for row in rows if row["snapshots"]]
    known = ("title", "config", "data", "probes", "command")
    return environment.get_template("report.html").render(
        title=facts.get("title") or "Value drift",
        command=facts.get("command"),
        config=facts.get("config"),
        data=facts.get("data") or [],
        probes=facts.get("probes") or {},
        particulars={key: value for key, value in facts.items() if key not in known},
        stages=rows,
        outcomes=outcomes.astype(object).where(outcomes.notna(), None).to_dict("records"),
        columns=[name for name in summary.OUTCOMES if outcomes[name].notna().any()],
        significant=drift[drift["significant"].astype(bool)].to_dict("records"),
        comparisons=len(drift),
        full=pd.concat([analysis.drift[analysis.drift["topic"] == POOLED], drift]).to_dict("records"),
        figures={kind: _inlined(pngs, kind) for kind in ALTERNATIVES},
        moved={row["name"]: summary.moved_probes(scores, row["name"]) for row in probed if row["snapshots"] > 1},
        n_probes=scores["probe_id"].nunique(),
        n_topics=scores["topic"].nunique(),
        caveats=summary.caveats(scores, analysis, PERMUTATIONS),
        stances=STANCES,
        resamples=RESAMPLES,
        permutations=PERMUTATIONS,
    )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file next to its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def _inlined(pngs: Mapping[str, bytes], kind: str) -> list[tuple[str, int, str]]:
    """(alternative text, width on the page in pixels, base64 of the PNG) for each figure of a kind."""
    chosen = [png for name, png in pngs.items() if name.rsplit("-", 1)[0] == kind]
    out = []
    for i, png in enumerate(chosen, start=1):
        part = f" ({i} of {len(chosen)})" if len(chosen) > 1 else ""
        width = round(tensorboard.png_size(png)[0] * PAGE_PIXELS / figures.DPI)
        out.append((ALTERNATIVES[kind] + part, width, base64.b64encode(png).decode()))
    return out


def _flat(value: Any) -> str:
    """A fact as one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_flat(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 9999 else str(value)
