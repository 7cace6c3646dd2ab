"""What the data of a run predict against what was measured: the value gaps of `vdjax.audit` beside the drift.

The join is made of the stored gaps and the drift at hand whenever a report is written: it is never older than either.
"""

import json
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import scipy
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vdjax.drift.figures import SETTINGS, plain, png
from vdjax.drift.scores import POOLED
from vdjax.errors import UserError

COLUMNS = (
    ("stage", "topic", "side", "n", "gap", "gap_low", "gap_high", "predicted", "drift", "drift_low", "drift_high")
    + ("agrees", "certain", "readout")
)  # fmt: skip
STAGES = (("o", "#0072B2"), ("s", "white"), ("^", "#D55E00"), ("D", "white"), ("v", "#009E73"), ("P", "white"))


def against_drift(values: pd.DataFrame, gaps: pd.DataFrame, drift: pd.DataFrame) -> pd.DataFrame:
    """What each stage's data predict for each topic, and what was measured: COLUMNS.

    gap: of preference data the signed gap; of SFT data the mean graded stance of the responses, which says where the
    policy is led but not where it starts from. predicted: the gap's sign. drift: the change of `graded`, toward the
    topic, by the first readout of `drift` (the table of drift.csv). agrees: predicted and drift have the same sign.
    certain: both signs are known, as the gap's 95% interval leaves out 0 and the drift is significant; other pairs
    agree or not as a coin falls.

    Args:
      values, gaps: tables of `vdjax.audit`, whose `data` are stages.

    Raises:
      UserError: a drift table without the quantity graded.
    """
    drift = drift[drift["stance"] == "graded"]
    if drift.empty:
        raise UserError("drift.csv holds no rows of the stance 'graded'; write the run's report anew")
    readout = drift["readout"].iloc[0]
    drift = drift[(drift["readout"] == readout) & (drift["topic"] != POOLED)].set_index(["stage", "topic"])
    unpaired = set(values.loc[values["side"].isin(("desirable", "undesirable")), "data"])
    known = {
        (g.data, g.topic): (
            "desirable - undesirable" if g.data in unpaired else "chosen - rejected",
            *(g.n, g.signed, g.signed_low, g.signed_high),
        )
        for g in gaps.itertuples()
    }
    sft = values[values["side"] == "sft"]
    known |= {(v.data, v.topic): ("sft", v.n, v.graded, v.graded_low, v.graded_high) for v in sft.itertuples()}
    rows = []
    for (stage, topic), (side, n, gap, low, high) in known.items():
        if (stage, topic) in drift.index:
            moved = drift.loc[(stage, topic)]
            measured = moved["magnitude"]
            agrees = None if np.isnan(gap) or np.isnan(measured) else bool(np.sign(gap) == np.sign(measured))
            certain = bool(agrees is not None and low * high > 0 and moved["significant"])
            predicted = (stage, topic, side, n, gap, low, high, np.sign(gap))
            rows.append((*predicted, measured, moved["ci_low"], moved["ci_high"], agrees, certain, readout))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def agreement(against: pd.DataFrame) -> dict[str, Any]:
    """n pairs with a gap and a drift, how many agree in sign; of the `certain` ones, `certain_agree`; Spearman's rho.

    `spearman` and its p-value `p` are of all pairs, NaN below three.
    """
    both = against.dropna(subset=["gap", "drift"])
    agrees, certain = (both[name].astype(bool) for name in ("agrees", "certain"))
    rho = p = float("nan")
    if len(both) > 2 and both["gap"].nunique() > 1 and both["drift"].nunique() > 1:
        rho, p = map(float, scipy.stats.spearmanr(both["gap"], both["drift"]))
    counts = {"n": len(both), "agree": int(agrees.sum()), "certain": int(certain.sum())}
    return counts | {"certain_agree": int((agrees & certain).sum()), "spearman": rho, "p": p}


def sentence(found: dict[str, Any]) -> str:
    """`agreement` in words."""
    p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
    rho = f"; Spearman {found['spearman']:.2f} ({p})" if np.isfinite(found["spearman"]) else ""
    return (
        f"{found['certain_agree']} of {found['certain']} drifts have the sign that the data predict where both are "
        f"certain, {found['agree']} of {found['n']} in all{rho}"
    )


def files(against: pd.DataFrame) -> dict[str, bytes]:
    """{name in WORKDIR/audit: content} of the join; no figure where it has no point."""
    found = agreement(against)
    clean = {name: value if np.isfinite(value) else None for name, value in found.items()}  # JSON has no NaN
    content = {
        "against_drift.csv": against.to_csv(index=False).encode(),
        "against_drift.json": json.dumps(clean, indent=1).encode(),
    }
    return content | ({"gap_against_drift.png": figure(against, found)} if found["n"] else {})


def figure(against: pd.DataFrame, found: dict[str, Any]) -> bytes:
    """One point a stage and topic: the gap of its data, and the measured drift, with 95% intervals.

    Large points are certain; the others agree half of the time where nothing is to be seen.
    """
    rows = against.dropna(subset=["gap", "drift"])
    topics = list(dict.fromkeys(rows["topic"]))
    with matplotlib.rc_context(SETTINGS):
        drawn = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = drawn.subplots()
        axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
        for i, stage in enumerate(dict.fromkeys(rows["stage"])):
            part = rows[rows["stage"] == stage]
            marker, fill = STAGES[i % len(STAGES)]
            edge = "#000000" if fill == "white" else fill
            for vertical in (True, False):
                value, low, high = ("drift", "drift_low", "drift_high") if vertical else ("gap", "gap_low", "gap_high")
                lines = axes.vlines if vertical else axes.hlines
                other = part["gap" if vertical else "drift"]
                lines(other, part[low].fillna(part[value]), part[high].fillna(part[value]), color="0.7", linewidth=0.8)
            label = plain(f"{stage}: {part['side'].iloc[0]}", 48)
            style: dict[str, Any] = {"color": edge, "markerfacecolor": fill, "linestyle": "none", "marker": marker}
            for certain, size in ((True, 6), (False, 3)):
                points = part[part["certain"] == certain]
                axes.plot(points["gap"], points["drift"], **style, markersize=size, alpha=1 if certain else 0.6)
            axes.plot([], [], **style, markersize=6, label=label)
            for row in part.itertuples():
                number = str(topics.index(row.topic) + 1)
                axes.annotate(number, (row.gap, row.drift), fontsize=7, xytext=(3, 3), textcoords="offset points")
        keys = [
            Line2D([], [], linestyle="none", label=f"{i}  {plain(t, 48)}") for i, t in enumerate(topics, 1)
        ]
        drawn.legend(handles=keys, loc="outside right upper", handlelength=0, handletextpad=0)
        axes.set_xlabel("value gap of the data (toward the topic)")
        axes.set_ylabel("measured drift (graded, toward the topic)")
        axes.set_title(plain(sentence(found), 80), loc="left")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        return png(drawn)
