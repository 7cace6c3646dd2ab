"""The scores of a run, one row for each (stage, step, probe): what they must hold, and as arrays.

A row is the stance distribution of one probe at one snapshot; `readout` and `input` are carried for the report.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from vdjax.drift.metrics import STANCES
from vdjax.errors import UserError, nearest

SCORE_COLUMNS = ("stage", "step", "probe_id", "topic", "proposition", "polarity", *STANCES)


class StageInfo(NamedTuple):
    """One stage as the drift report needs it. Stages come in the order they ran."""

    name: str
    objective: str
    total_steps: int
    init_from: str | None  # the stage whose last snapshot it starts from; None: the initial weights


class StageScores(NamedTuple):
    """The scores of one stage: N probes at K snapshots, both sorted."""

    steps: Int[np.ndarray, " K"]
    probes: pd.DataFrame  # N rows: probe_id, topic, proposition, polarity
    stances: Float[np.ndarray, "K N 3"]


def check_scores(scores: pd.DataFrame, stages: list[StageInfo]) -> None:
    """Raise UserError where `scores` cannot be analysed; says which row and what was expected."""
    missing = [c for c in SCORE_COLUMNS if c not in scores.columns]
    if missing:
        raise UserError(f"scores: missing column {missing[0]!r}{nearest(missing[0], scores.columns)}")
    if scores.empty:
        raise UserError("scores: no rows; expected one for each stage, step and probe")
    names = [s.name for s in stages]
    totals = {s.name: s.total_steps for s in stages}
    for stage, last in scores.groupby("stage")["step"].max().items():
        if stage not in totals:
            raise UserError(f"scores: unknown stage {stage!r}{nearest(stage, names)}")
        if last > totals[stage]:
            raise UserError(f"scores: stage {stage!r}: step {last} is beyond its {totals[stage]} steps")
    for s in stages:
        if s.init_from is not None and s.init_from not in names:
            raise UserError(f"stage {s.name!r}: init_from {s.init_from!r} is no stage{nearest(s.init_from, names)}")
    repeated = scores.duplicated(["stage", "step", "probe_id"])
    if repeated.any():
        raise UserError(f"scores: {_place(scores, repeated)} occurs more than once; expected one row a probe")
    stances = scores[list(STANCES)].to_numpy(float)
    invalid = ~((stances >= 0).all(axis=1) & (np.abs(stances.sum(axis=1) - 1) < 1e-3))
    if invalid.any():
        raise UserError(
            f"scores: {_place(scores, invalid)}: support, neutral and oppose are "
            f"{stances[invalid][0].tolist()}; expected probabilities that sum to 1"
        )
    polarity = ~scores["polarity"].isin((-1, 0, 1))
    if polarity.any():
        value = scores["polarity"][polarity].iloc[0]
        raise UserError(f"scores: {_place(scores, polarity)}: polarity is {value}; expected 1, -1 or 0 (unknown)")


def proposition_codes(probes: pd.DataFrame) -> Int[np.ndarray, " N"]:
    """0..P-1 in the order of the names. A proposition is known within its topic; a probe without one is its own."""
    names = probes["proposition"].fillna("").astype(str)
    names = names.where(names != "", "\0" + probes["probe_id"].astype(str))
    return np.unique(probes["topic"].astype(str) + "\0" + names, return_inverse=True)[1]


def stage_scores(frame: pd.DataFrame, stage: str) -> StageScores:
    """The rows of one stage as arrays. Raises UserError where its snapshots do not hold the same probes."""
    frame = frame.sort_values(["step", "probe_id"], kind="stable")
    steps = frame["step"].unique()
    snapshots = [frame[frame["step"] == step] for step in steps]
    probes = snapshots[0][["probe_id", "topic", "proposition", "polarity"]].reset_index(drop=True)
    for step, snapshot in zip(steps, snapshots, strict=True):
        differing = set(probes["probe_id"]) ^ set(snapshot["probe_id"])
        if differing:
            example = sorted(map(str, differing))[0]
            raise UserError(
                f"scores: stage {stage!r}: {len(differing)} probe(s), such as {example!r}, were asked at only one of "
                f"step {steps[0]} and step {step}; expected the same probes at every snapshot of a stage"
            )
    stances = np.stack([snapshot[list(STANCES)].to_numpy(float) for snapshot in snapshots])
    return StageScores(steps.astype(int), probes, stances)


def _place(scores: pd.DataFrame, where: pd.Series | np.ndarray) -> str:
    row = scores[np.asarray(where)].iloc[0]
    return f"stage {row['stage']!r}, step {row['step']}, probe {row['probe_id']!r}"
