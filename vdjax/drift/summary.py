"""What a run shows, in few words: movers of each stage, the terminal table, moved probes, caveats."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from vdjax.drift.evidence import OPEN_ENDED, changes, ends
from vdjax.drift.metrics import LABELS, STANCES, quantities
from vdjax.drift.scores import POOLED, StageInfo, measured
from vdjax.drift.significance import smallest_p_value
from vdjax.drift.statistics import Analysis

TERMINAL_LINES = 18
NAME_WIDTH = 24
REAL, WITHIN, UNCONFIRMED, NONE = "real", "within noise", "significant", "not significant"


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
    """A share, such as a drift time."""
    return "–" if math.isnan(value) else f"{100 * value:.0f}%"


def verdict(row: Mapping[str, Any]) -> str:
    """Of a drift row: REAL beyond the noise floor, WITHIN it, UNCONFIRMED where no floor was measured, or NONE."""
    if not row["significant"]:
        return NONE
    if math.isnan(row["floor"]):
        return UNCONFIRMED
    return REAL if row["real"] else WITHIN


def of_readout(frame: pd.DataFrame, readout: str | None = None) -> pd.DataFrame:
    """Rows of one readout; of the primary one, which comes first, where none is named."""
    if frame.empty:
        return frame
    return frame[frame["readout"] == (frame["readout"].iloc[0] if readout is None else readout)]


def by_importance(drift: pd.DataFrame) -> pd.DataFrame:
    """Drift rows of the topics, not the pooled ones: the real first, then the significant, then the larger.

    The graded stance counts half, as it goes from -1 to 1.
    """
    return _ordered(drift[drift["topic"] != POOLED])


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    size = rows["magnitude"].astype(float).abs() * rows["stance"].eq("graded").map({True: 0.5, False: 1.0})
    beyond = rows["significant"].astype(bool) & (rows["real"].astype(bool) | rows["floor"].isna())
    order = rows.assign(beyond=beyond, size=size).sort_values(
        ["beyond", "significant", "size"], ascending=False, kind="stable"
    )
    return order.drop(columns=["beyond", "size"])


def stage_rows(analysis: Analysis, stages: Sequence[StageInfo]) -> list[dict[str, Any]]:
    """For each stage: what it was, how many comparisons of the primary readout moved, and its largest movers.

    A mover is the most important row of its topic; at most three, and before them that of all topics together where it
    is significant.
    """
    rows = []
    all_drift, all_stances = of_readout(analysis.drift), of_readout(analysis.stances)
    for stage in stages:
        drift = by_importance(all_drift[all_drift["stage"] == stage.name])
        steps = all_stances[all_stances["stage"] == stage.name]["step"]
        verdicts = [verdict(row) for row in drift.to_dict("records")]
        pooled = all_drift[(all_drift["stage"] == stage.name) & (all_drift["topic"] == POOLED)]
        pooled = _ordered(pooled[pooled["significant"].astype(bool)]).head(1)
        movers = pd.concat([pooled, drift.drop_duplicates("topic").head(3)]).to_dict("records")
        rows.append(
            {
                **stage._asdict(),
                "snapshots": steps.nunique(),
                "from_step": steps.min(),
                "to_step": steps.max(),
                "compared": len(drift),
                "tested": int(drift["p_value"].notna().sum()),
                "verdicts": {name: verdicts.count(name) for name in (REAL, UNCONFIRMED, WITHIN, NONE)},
                "moved": int(drift["significant"].sum()),
                "mean_magnitude": drift["magnitude"].astype(float).abs().mean(),
                "median_time": drift["drift_time"].astype(float).median(),
                "median_paired": drift["drift_time_paired"].astype(float).median(),
                "movers": [_mover(row, analysis) for row in movers],
            }
        )
    return rows


def _mover(row: dict[str, Any], analysis: Analysis) -> dict[str, Any]:
    """A drift row with its verdict, its values before and after, and the same comparison under the other readouts."""
    same = (analysis.drift[["stage", "topic", "stance"]] == [row["stage"], row["topic"], row["stance"]]).all(axis=1)
    others = analysis.drift[same & (analysis.drift["readout"] != row["readout"])].to_dict("records")
    stances = of_readout(analysis.stances, row["readout"])
    at = stances[(stances[["stage", "topic", "stance"]] == [row["stage"], row["topic"], row["stance"]]).all(axis=1)]
    before, after = (part["value"].iloc[0] for part in ends(at))
    others = [other | {"verdict": verdict(other)} for other in others]
    return row | {"verdict": verdict(row), "before": before, "after": after, "others": others}


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
    """How each stage ended: its metrics, held out where they were measured so, and its primary readout's largest drift.

    Held-out metrics are those of the last evaluation, others the mean of the last five logged steps. `kl` is in nats a
    token of the data or of the policy's responses, `kl_response` in nats a sampled response.
    """
    rows = []
    drift = of_readout(drift)
    for stage in stages:
        logged = training[training["stage"] == stage.name]
        row: dict[str, Any] = {"stage": stage.name, "objective": stage.objective, "steps": stage.total_steps}
        for column, metrics in OUTCOMES.items():
            found = [_at_end(logged, name) for metric in metrics for name in (f"eval_{metric}", metric)]
            row[column] = next((value for value in found if not math.isnan(value)), math.nan)
        moves = drift[(drift["stage"] == stage.name) & (drift["topic"] != POOLED) & (drift["stance"] != "graded")]
        sizes = moves["magnitude"].astype(float).abs()
        largest = moves.loc[sizes.idxmax()] if sizes.notna().any() else None
        for name in ("topic", "stance", "magnitude", "q_value", "real"):
            row[f"largest_{name}"] = None if largest is None else largest[name]
        rows.append(row | {"mean_magnitude": sizes.mean()})
    return pd.DataFrame(rows)


def _at_end(logged: pd.DataFrame, metric: str) -> float:
    values = logged[logged["metric"] == metric].sort_values("step", kind="stable")["value"].astype(float)
    return values.tail(1 if metric.startswith("eval_") else LAST).mean()


def summary_table(drift: pd.DataFrame) -> str:
    """The terminal's table of the primary readout: for each stage how much moved, and its largest movers.

    About 20 lines at most.
    """
    readouts = list(drift["readout"].unique())
    drift = of_readout(drift)
    names = list(dict.fromkeys(drift["stage"]))
    if not names:
        return "no stage has two probed snapshots: no drift to report"
    each = max(1, min(5, TERMINAL_LINES // max(1, len(names))))
    head = ("stage", "moved", "topic", "quantity", "drift", "95% interval", "q", "is", "drift time", "paired")
    lines = [head]
    for name in names[:TERMINAL_LINES]:
        rows = by_importance(drift[drift["stage"] == name])
        beyond = sum(verdict(row) in (REAL, UNCONFIRMED) for row in rows.to_dict("records"))
        moved = f"{beyond}/{len(rows)}"
        for i, row in enumerate(rows.head(each).to_dict("records")):
            first = (_short(name), moved) if i == 0 else ("", "")
            numbers = (signed(row["magnitude"]), interval(row["ci_low"], row["ci_high"]), probability(row["q_value"]))
            times = (percent(row["drift_time"]), percent(row["drift_time_paired"]))
            lines.append((*first, _short(row["topic"]), row["stance"], *numbers, verdict(row), *times))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if len(names) > TERMINAL_LINES:
        text.append(f"... and {len(names) - TERMINAL_LINES} more stages in drift/drift.csv")
    floors = "beyond the noise floor" if drift["floor"].notna().any() else "no noise floor was measured"
    others = f", the first of {len(readouts)}; all in drift/drift.csv" if len(readouts) > 1 else ""
    text.append(f"moved: q < 0.05, {floors}; drift time: share of the stage's steps; readout: {readouts[0]}{others}")
    return "\n".join(text)


def _short(name: str) -> str:
    flat = " ".join(name.split())
    return flat if len(flat) <= NAME_WIDTH else flat[: NAME_WIDTH - 1] + "…"


def moved_probes(scores: pd.DataFrame, stage: str, count: int = 5) -> list[dict[str, Any]]:
    """The probes that changed most from a stage's first to its last snapshot, as asked, by the primary readout.

    Change is the total variation of a probe's mean label shares (see `evidence.changes`).
    """
    rows = of_readout(measured(scores))
    rows = rows[rows["stage"] == stage]
    moved = changes(rows, ["probe_id"])
    labels = [name for name in quantities(rows["readout"].iloc[0]) if name in LABELS] if len(rows) else list(LABELS)
    before, after = (part.groupby("probe_id")[labels].mean() for part in ends(rows))
    probes = rows.drop_duplicates("probe_id").set_index("probe_id")
    return [
        {
            "question": str(probes["input"].get(probe, probe)) if "input" in probes else str(probe),
            "topic": probes["topic"][probe],
            "polarity": {1: "+", -1: "−"}.get(int(probes["polarity"][probe]), "unknown"),
            "before": before.loc[probe].to_dict(),
            "after": after.loc[probe].to_dict(),
            "change": change,
        }
        for probe, change in moved.head(count).items()
        if change > 0
    ]


def caveats(
    scores: pd.DataFrame, analysis: Analysis, permutations: int, data: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """What a reader must know before believing the tables; found in the data where it can be.

    `data`: of each stage, {stage, overlap: training examples that ask a question of the probes word for word}.
    """
    probes = scores.drop_duplicates("probe_id")
    out = list(analysis.notes)
    if overlap := [f"{row['stage']} ({row['overlap']} examples)" for row in data if row.get("overlap")]:
        out.append(
            f"Trained on questions of the probes word for word: {', '.join(overlap)}. There, drift is at least in part "
            "what was learned by heart; that it reaches other questions of the topic is not shown."
        )
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
    tested = of_readout(analysis.drift)
    tested = tested[(tested["topic"] != POOLED) & (tested["n_propositions"] >= 2) & tested["stance"].isin(STANCES)]
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
                f", so among {len(tested)} comparisons of stances q < 0.05 is out of reach for such topics unless at "
                f"least {needed} comparisons move together"
            )
        out.append(text + ".")
    per_proposition = probes.groupby(["topic", "proposition"]).size()
    if per_proposition.nunique() > 1:
        out.append(
            "Propositions have different numbers of probes. Each proposition weighs the same here, each probe in the "
            "paper's mean."
        )
    readouts = scores["readout"].unique()
    forced = [readout for readout in readouts if not readout.startswith(OPEN_ENDED)]
    if forced:
        out.append(
            f"A forced choice ({', '.join(forced)}) is the likelihood of short stance answers. It says what the model "
            "would pick, not what it writes when it answers freely, and small models can be swayed by the wording."
        )
    if len(forced) < len(readouts):
        out.append(
            "The stance of a free response is what a judge says it is. An error that the judge makes alike at every "
            "snapshot hides in no interval and no noise floor here; its held-out accuracy and other judges show it."
        )
    if not (analysis.floors["source"] == "training").any():
        out.append(
            "The intervals cover the choice of propositions. They do not cover a second training run with another seed "
            "or other data order: one run a stage was made."
        )
    out.append("Drift times are no finer than the snapshots: each is the step of a snapshot.")
    return out
