"""What a run shows, in few words: movers of each stage, the terminal table, moved probes, caveats."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from vdjax.drift.metrics import STANCES
from vdjax.drift.scores import StageInfo
from vdjax.drift.statistics import POOLED, Analysis, smallest_p_value

TERMINAL_LINES = 18
NAME_WIDTH = 28


def signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.3f}"


def interval(low: float, high: float) -> str:
    return "no interval" if math.isnan(low) or math.isnan(high) else f"[{low:+.3f}, {high:+.3f}]"


def probability(value: float) -> str:
    """A p- or q-value."""
    if math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def percent(value: float) -> str:
    """A drift time."""
    return "undefined" if math.isnan(value) else f"{100 * value:.0f}%"


def by_importance(drift: pd.DataFrame) -> pd.DataFrame:
    """Drift rows of the topics, not the pooled ones: the significant first, then the larger first."""
    rows = drift[drift["topic"] != POOLED]
    order = rows.assign(size=rows["magnitude"].abs()).sort_values(
        ["significant", "size"], ascending=False, kind="stable"
    )
    return order.drop(columns="size")


def stage_rows(analysis: Analysis, stages: Sequence[StageInfo]) -> list[dict[str, Any]]:
    """For each stage: what it was, how many of its topic x stance comparisons moved, and its largest movers."""
    rows = []
    for stage in stages:
        drift = by_importance(analysis.drift[analysis.drift["stage"] == stage.name])
        steps = analysis.stances[analysis.stances["stage"] == stage.name]["step"]
        rows.append(
            {
                **stage._asdict(),
                "snapshots": steps.nunique(),
                "from_step": steps.min(),
                "to_step": steps.max(),
                "compared": len(drift),
                "tested": int(drift["p_value"].notna().sum()),
                "moved": int(drift["significant"].sum()),
                "mean_magnitude": drift["magnitude"].astype(float).abs().mean(),
                "median_time": drift["drift_time"].astype(float).median(),
                "median_paired": drift["drift_time_paired"].astype(float).median(),
                "movers": drift.head(3).to_dict("records"),
            }
        )
    return rows


OUTCOMES = {  # column: metrics that may fill it, the first that a stage has
    "loss": ("loss",),
    "reward_margin": ("reward_margin",),
    "reward_accuracy": ("reward_accuracy",),
    "reward": ("reward",),
    "kl": ("kl_to_reference",),
    "kl_response": ("kl",),
}
LAST = 5  # logged steps that a training metric is averaged over


def outcomes(training: pd.DataFrame, drift: pd.DataFrame, stages: Sequence[StageInfo]) -> pd.DataFrame:
    """How each stage ended: its metrics, held out where they were measured so, and its largest drift.

    Held-out metrics are those of the last evaluation, others the mean of the last five logged steps. `kl` is in nats a
    token of the data or of the policy's responses, `kl_response` in nats a sampled response.
    """
    rows = []
    for stage in stages:
        logged = training[training["stage"] == stage.name]
        row: dict[str, Any] = {"stage": stage.name, "objective": stage.objective, "steps": stage.total_steps}
        for column, metrics in OUTCOMES.items():
            found = [_at_end(logged, name) for metric in metrics for name in (f"eval_{metric}", metric)]
            row[column] = next((value for value in found if not math.isnan(value)), math.nan)
        moves = drift[(drift["stage"] == stage.name) & (drift["topic"] != POOLED)]
        sizes = moves["magnitude"].astype(float).abs()
        largest = moves.loc[sizes.idxmax()] if sizes.notna().any() else None
        for name in ("topic", "stance", "magnitude", "q_value"):
            row[f"largest_{name}"] = None if largest is None else largest[name]
        rows.append(row | {"mean_magnitude": sizes.mean()})
    return pd.DataFrame(rows)


def _at_end(logged: pd.DataFrame, metric: str) -> float:
    values = logged[logged["metric"] == metric].sort_values("step", kind="stable")["value"].astype(float)
    return values.tail(1 if metric.startswith("eval_") else LAST).mean()


def summary_table(drift: pd.DataFrame) -> str:
    """The terminal's table: for each stage how much moved, and its largest movers. About 20 lines at most."""
    names = list(dict.fromkeys(drift["stage"]))
    each = max(1, min(5, TERMINAL_LINES // max(1, len(names))))
    head = ("stage", "moved", "topic", "stance", "drift", "95% interval", "q", "drift time", "paired")
    lines = [head]
    for name in names[:TERMINAL_LINES]:
        rows = by_importance(drift[drift["stage"] == name])
        moved = f"{int(rows['significant'].sum())}/{len(rows)}"
        for i, row in enumerate(rows.head(each).to_dict("records")):
            first = (_short(name), moved) if i == 0 else ("", "")
            numbers = (signed(row["magnitude"]), interval(row["ci_low"], row["ci_high"]), probability(row["q_value"]))
            times = (percent(row["drift_time"]), percent(row["drift_time_paired"]))
            lines.append((*first, _short(row["topic"]), row["stance"], *numbers, *times))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if not names:
        return "no stage has two probed snapshots: no drift to report"
    if len(names) > TERMINAL_LINES:
        text.append(f"... and {len(names) - TERMINAL_LINES} more stages in drift/drift.csv")
    text.append("moved: topic x stance comparisons with q < 0.05; drift time: share of the stage's steps")
    return "\n".join(text)


def _short(name: str) -> str:
    flat = " ".join(name.split())
    return flat if len(flat) <= NAME_WIDTH else flat[: NAME_WIDTH - 1] + "…"


def moved_probes(scores: pd.DataFrame, stage: str, count: int = 5) -> list[dict[str, Any]]:
    """The probes whose stance distribution changed most from a stage's first to its last snapshot, as asked.

    Change is total variation: half the sum of the absolute differences of support, neutral and oppose.
    """
    frame = scores[scores["stage"] == stage].sort_values("probe_id", kind="stable")
    first, last = (frame[frame["step"] == step] for step in (frame["step"].min(), frame["step"].max()))
    before, after = (snapshot[list(STANCES)].to_numpy(float) for snapshot in (first, last))
    change = abs(after - before).sum(axis=1) / 2
    largest = (-change).argsort(kind="stable")[:count]
    return [
        {
            "question": str(first["input"].iloc[i]) if "input" in first else str(first["probe_id"].iloc[i]),
            "topic": first["topic"].iloc[i],
            "polarity": {1: "+", -1: "−"}.get(int(first["polarity"].iloc[i]), "unknown"),
            "before": dict(zip(STANCES, before[i].tolist(), strict=True)),
            "after": dict(zip(STANCES, after[i].tolist(), strict=True)),
            "change": change[i],
        }
        for i in largest
        if change[i] > 0
    ]


def caveats(scores: pd.DataFrame, analysis: Analysis, permutations: int) -> list[str]:
    """What a reader must know before believing the tables; found in the data where it can be."""
    probes = scores.drop_duplicates("probe_id")
    out = list(analysis.notes)
    unknown = int((probes["polarity"] == 0).sum())
    if unknown:
        out.append(
            f"{unknown} of {len(probes)} probes have unknown polarity. They count as asked, in the corrected numbers "
            "too: there, support means agreeing with the question, whichever way it points."
        )
    directions = probes[probes["polarity"] != 0].groupby("topic")["polarity"].nunique()
    one_sided = sorted(directions[directions < 2].index)
    if one_sided:
        out.append(
            f"Asked in one direction only: {', '.join(one_sided)}. There, a model that learns to agree with any "
            "question looks like one that learns a value."
        )
    tested = analysis.drift[(analysis.drift["topic"] != POOLED) & (analysis.drift["n_propositions"] >= 2)]
    if len(tested):
        fewest, most = int(tested["n_propositions"].min()), int(tested["n_propositions"].max())
        smallest = smallest_p_value(fewest, permutations)
        text = (
            f"A topic has {fewest} to {most} propositions. With {fewest}, the smallest p-value the test can give is "
            f"{smallest:.2g}"
        )
        if smallest * len(tested) >= 0.05:
            needed = math.ceil(smallest * len(tested) / 0.05)
            text += (
                f", so among {len(tested)} comparisons q < 0.05 is out of reach for such topics unless at least "
                f"{needed} comparisons move together"
            )
        out.append(text + ".")
    per_proposition = probes.groupby(["topic", "proposition"]).size()
    if per_proposition.nunique() > 1:
        out.append(
            "Propositions have different numbers of probes. Each proposition weighs the same here, each probe in the "
            "paper's mean."
        )
    if "readout" in scores and (scores["readout"] == "forced_choice").any():
        out.append(
            "The readout is a forced choice: the likelihood of short stance answers. It says what the model would "
            "pick, not what it writes when it answers freely, and small models can be swayed by the wording."
        )
    out.append(
        "The intervals cover the choice of propositions. They do not cover a second training run with another seed or "
        "other data order: one run a stage was made."
    )
    out.append("Drift times are no finer than the snapshots: each is the step of a snapshot.")
    return out
