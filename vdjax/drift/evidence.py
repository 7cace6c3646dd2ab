"""What lies behind the numbers of a report: responses side by side, the judges, the data's own values."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from vdjax.drift.metrics import LABELS, polarity_corrected
from vdjax.drift.scores import measured
from vdjax.judges import verdicts

OPEN_ENDED = "open_ended"
PAIRS = 3  # shown of a proposition


class Evidence(NamedTuple):
    """What a run has beside its scores; nothing of it is needed."""

    responses: pd.DataFrame | None = None  # joined with their judgements of repeat 0: one row a response x judge
    judgements: pd.DataFrame | None = None
    judges: tuple[Mapping[str, Any], ...] = ()  # {name, kind, path, template, hash, quality: mapping or None},
    # and noiseless: True where a judge has no noise by construction
    reseeded: pd.DataFrame | None = None  # drift of the same experiment trained with other seeds (noise.RESEEDED)
    variants: Sequence[tuple[str, str]] = ()  # system prompt and template of each variant
    audit: Mapping[str, pd.DataFrame] = {}  # tables of the data's own values: values, gaps, hits


def ends(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the first and of the last snapshot."""
    return frame[frame["step"] == frame["step"].min()], frame[frame["step"] == frame["step"].max()]


def changes(scores: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """How far each group of one stage's rows moved, first to last snapshot, toward the topic; the largest first.

    In total variation: half the sum of the absolute differences of the six labels' shares.
    """
    labels = list(LABELS)
    toward = polarity_corrected(scores[labels].to_numpy(float), scores["polarity"].to_numpy(), labels)
    corrected = scores.assign(**dict(zip(labels, toward.T, strict=True)))
    before, after = (part.groupby(list(keys))[labels].mean() for part in ends(corrected))
    return ((after - before).abs().sum(axis=1) / 2).sort_values(ascending=False, kind="stable")


def generations(
    scores: pd.DataFrame, responses: pd.DataFrame | None, stage: str, topics: Sequence[str], each: int = 2
) -> list[dict[str, Any]]:
    """The most moved propositions of `topics` in a stage, each with its responses at the first and the last snapshot.

    Moved by the open-ended readouts, all judges alike. Pairs have the same seed; those whose verdicts differ most come
    first. Empty where nothing was sampled, or at one snapshot only.
    """
    if responses is None:
        return []
    said = responses[(responses["stage"] == stage) & (responses["replicate"] == 0)]
    rows = measured(scores)
    rows = rows[(rows["stage"] == stage) & rows["readout"].str.startswith(OPEN_ENDED)]
    if said["step"].nunique() < 2 or rows.empty:
        return []
    moved = changes(rows, ("topic", "proposition"))
    out = []
    for topic in topics:
        if topic not in moved.index.get_level_values(0):
            continue
        for proposition, change in moved[topic].head(each).items():
            asked = rows[(rows["topic"] == topic) & (rows["proposition"] == proposition)]
            pairs = _pairs(said[said["probe_id"].isin(asked["probe_id"])])
            out.append(
                {
                    "topic": topic,
                    "proposition": proposition,
                    "change": change,
                    "pairs": [_shown(*pair) for pair in pairs[:PAIRS]],
                    "count": len(pairs),
                    "from_step": said["step"].min(),
                    "to_step": said["step"].max(),
                }
            )
    return out


def _pairs(said: pd.DataFrame) -> list[tuple[float, pd.DataFrame, pd.DataFrame]]:
    """Change, rows at the first and rows at the last snapshot of responses with the same seed; the most changed first.

    Change is the total variation of the judges' mean label shares; a degenerate response has a label of its own.
    """
    keys = ["probe_id", "variant", "sample"]
    parts = [part.sort_values(keys, kind="stable") for part in ends(said)]
    shares = [
        part.assign(degenerate=(part["degenerate"] != "").astype(float)).groupby(keys)[list(LABELS)].mean().fillna(0.0)
        for part in parts
    ]
    change = ((shares[1] - shares[0]).abs().sum(axis=1, min_count=1) / 2).dropna()
    before, after = (part.set_index(keys, drop=False) for part in parts)
    order = change.sort_values(ascending=False, kind="stable")
    return [(float(size), before.loc[[key]], after.loc[[key]]) for key, size in order.items()]


def _shown(change: float, before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Any]:
    row = before.iloc[0]
    asked = {name: row[name] for name in ("probe_id", "sample", "question", "system_prompt", "seed")}
    return {**asked, "before": _response(before), "after": _response(after), "change": change}


def _response(rows: pd.DataFrame) -> dict[str, Any]:
    """One response with the verdict of each judge: its likeliest label."""
    first = rows.iloc[0]
    judged = rows[rows["judge"].notna()].to_dict("records")
    likeliest = [(row["judge"], max(verdicts.LABELS, key=row.__getitem__), row) for row in judged]
    return {
        "text": first["response"],
        "degenerate": first["degenerate"],
        "cut": first["finish_reason"] == "length",
        "verdicts": [(judge, label, row[label]) for judge, label, row in likeliest],
    }


def rates(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """For each open-ended readout and stage: the mean shares of all labels at the first and at the last snapshot."""
    rows = measured(scores)
    sampled = rows[rows["readout"].str.startswith(OPEN_ENDED)]
    out = []
    for (readout, stage), frame in sampled.groupby(["readout", "stage"], sort=False):
        first, last = (part.groupby("probe_id")[list(LABELS)].mean().mean() for part in ends(frame))
        out.append({"readout": readout, "stage": stage, "before": first.to_dict(), "after": last.to_dict()})
    return out
