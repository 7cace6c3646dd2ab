"""How good a judge is, measured on labelled exchanges: accuracy, calibration and confusion, as tables and figures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float
from matplotlib.figure import Figure

from vdjax.data.stances import Labelled
from vdjax.errors import UserError, nearest
from vdjax.judges.verdicts import LABELS, Judge, Verdicts
from vdjax.progress import say

BINS = 15
ALL = "all"
SETTINGS: dict[Any, Any] = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}


class Quality(NamedTuple):
    """Of n exchanges. Intervals are Wilson's, of 95%; a share of nothing is NaN."""

    n: int
    accuracy: float  # the most probable label is the right one
    accuracy_low: float
    accuracy_high: float
    macro_f1: float  # mean F1 over the labels that are given or predicted
    directed: int  # exchanges whose label is support or oppose
    direction: float  # of these, how many have more probability on their side than on the other: chance is 1/2
    direction_low: float
    direction_high: float
    ece: float
    brier: float
    confusion: pd.DataFrame  # counts: rows are the labels given, columns those predicted
    reliability: pd.DataFrame  # a row a bin: low, high, count, confidence, accuracy


def quality(found: Verdicts, labels: Sequence[str], bins: int = BINS) -> Quality:
    """A judge's verdicts against the labels of the same exchanges.

    ECE is the expected calibration error of Guo et al. 2017 (arXiv 1706.04599, eq. 3): the mean of |accuracy -
    confidence| over equal-width bins of confidence (the probability of the most probable label; bin m is
    ((m - 1) / M, m / M]), weighted by how many verdicts a bin holds. Brier is that of Brier 1950: the mean
    over exchanges of the squared distance between p and the label's indicator vector, from 0 to 2.

    Raises:
      UserError: no label, an unknown one, or another number of labels than of verdicts.
    """
    for label in labels:
        if label not in LABELS:
            raise UserError(f"quality: label {label!r}{nearest(label, LABELS)}")
    if not labels or len(labels) != len(found.p):
        raise UserError(f"quality: {len(labels)} labels for {len(found.p)} verdicts, expected as many and at least one")
    truth, guess = np.array([LABELS.index(label) for label in labels]), found.p.argmax(axis=1)
    confusion = np.zeros((len(LABELS), len(LABELS)), int)
    np.add.at(confusion, (truth, guess), 1)
    either = confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = 2 * np.diag(confusion)[either > 0] / either[either > 0]
    reliability = reliability_bins(found.p.max(axis=1), truth == guess, bins)
    filled = reliability[reliability["count"] > 0]
    ece = float((filled["count"] * (filled["accuracy"] - filled["confidence"]).abs()).sum() / len(labels))
    support, oppose = LABELS.index("support"), LABELS.index("oppose")
    lead = found.p[:, support] - found.p[:, oppose]
    directed = np.isin(truth, (support, oppose))
    right = directed & (np.where(truth == support, lead, -lead) > 0)
    return Quality(
        len(labels),
        *_share(int(np.trace(confusion)), len(labels)),
        float(f1.mean()),
        int(directed.sum()),
        *_share(int(right.sum()), int(directed.sum())),
        ece,
        float(((found.p - np.eye(len(LABELS))[truth]) ** 2).sum(axis=1).mean()),
        pd.DataFrame(confusion, index=pd.Index(LABELS, name="label"), columns=list(LABELS)),
        reliability,
    )


def reliability_bins(confidence: Float[np.ndarray, " n"], correct: np.ndarray, bins: int = BINS) -> pd.DataFrame:
    """Count, mean confidence and accuracy of equal-width bins (low, high]; NaN where a bin is empty."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    held = np.maximum(count, 1)
    mean = [np.bincount(place, values, bins) / held for values in (confidence, correct.astype(float))]
    edges = np.arange(bins + 1) / bins
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "count": count,
            "confidence": np.where(count > 0, mean[0], np.nan),
            "accuracy": np.where(count > 0, mean[1], np.nan),
        }
    )


def _share(successes: int, trials: int) -> tuple[float, float, float]:
    if not trials:
        return math.nan, math.nan, math.nan
    interval = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return successes / trials, float(interval.low), float(interval.high)


def measure(judge: Judge, items: Sequence[Labelled], folder: Path) -> None:
    """Has the judge judge labelled exchanges, writes `folder` (see `write`) and prints the summary.

    Exchanges that it has no verdict on are counted, and left out.

    Raises:
      UserError: it has a verdict on none.
    """
    found = judge.judge([item.exchange for item in items], 0)
    known = ~np.isnan(found.p).any(axis=1)
    if not known.any():
        raise UserError(f"judge {judge.name}: has a verdict on none of {len(items)} labelled exchanges")
    if not known.all():
        say(f"judge {judge.name}: has no verdict on {(~known).sum()} of {len(items)}, which are left out")
        items = [item for item, one in zip(items, known, strict=True) if one]
        found = Verdicts(found.p[known], found.graded[known])
    if jax.process_index() == 0:
        print(summary(write(judge, items, found, folder)))


def write(judge: Judge, items: Sequence[Labelled], found: Verdicts, folder: Path) -> Quality:
    """quality.csv (a row for all, for what propositions speak for, and for each topic), quality.json, reliability.csv,
    confusion.csv, verdicts.csv (every exchange), reliability.png and confusion.png.

    Returns:
      the quality over all topics.
    """
    labels = [item.label for item in items]
    whole = quality(found, labels)
    # A judge that reads the response alone is right on one kind of proposition and wrong on the other.
    sides = [item.speaks and f"propositions {item.speaks} their topic" for item in items]
    parts = {ALL: whole}
    topics = [item.topic for item in items]
    for names, known in ((sides, filter(None, sides)), (topics, topics)):
        for name in dict.fromkeys(known):
            at = [i for i, each in enumerate(names) if each == name]
            parts[name] = quality(Verdicts(found.p[at], found.graded[at]), [labels[i] for i in at])
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"topic": topic, **numbers(part)} for topic, part in parts.items()]
    about = {"judge": judge.name, "judge_hash": judge.hash, "bins": BINS, "topics": rows}
    # JSON has no NaN.
    clean = json.loads(json.dumps(about), parse_constant=lambda _: None)
    (folder / "quality.json").write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")
    pd.DataFrame(rows).to_csv(folder / "quality.csv", index=False)
    whole.reliability.to_csv(folder / "reliability.csv", index=False)
    whole.confusion.to_csv(folder / "confusion.csv")
    every = pd.DataFrame([{**item.exchange._asdict(), "topic": item.topic, "label": item.label} for item in items])
    every[list(LABELS)], every["graded"] = found.p, found.graded
    every.to_csv(folder / "verdicts.csv", index=False)
    with matplotlib.rc_context(SETTINGS):
        reliability_figure(whole, judge.name).savefig(folder / "reliability.png", dpi=150)
        confusion_figure(whole, judge.name).savefig(folder / "confusion.png", dpi=150)
    return whole


def numbers(found: Quality) -> dict[str, float]:
    """The fields of a quality that are one number."""
    return {key: value for key, value in found._asdict().items() if not isinstance(value, pd.DataFrame)}


def summary(found: Quality) -> str:
    """Lines for people."""

    def share(value: float, low: float, high: float) -> str:
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"

    return "\n".join(
        [
            f"{found.n} exchanges",
            f"accuracy {share(found.accuracy, found.accuracy_low, found.accuracy_high)}  macro F1 {found.macro_f1:.3f}",
            f"direction {share(found.direction, found.direction_low, found.direction_high)} "
            f"of {found.directed} that support or oppose",
            f"ECE {found.ece:.3f}  Brier {found.brier:.3f}",
            "given \\ predicted",
            found.confusion.to_string(index_names=False),
        ]
    )


def reliability_figure(found: Quality, name: str) -> Figure:
    """Accuracy against confidence a bin, above how many verdicts each bin holds."""
    figure = Figure(figsize=(3.4, 3.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = found.reliability
    width = bins["high"] - bins["low"]
    bars: dict[str, Any] = {"align": "edge", "edgecolor": "white"}
    above.bar(bins["low"], bins["accuracy"].fillna(0), width, color="#0072B2", label="accuracy", **bars)
    above.plot(bins["confidence"], bins["accuracy"], "o", color="black", markersize=3, label="at mean confidence")
    above.plot([0, 1], [0, 1], "--", color="black", linewidth=0.8, label="calibrated")
    above.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1))
    above.set_title(f"{name}: ECE {found.ece:.3f}, n = {found.n}", parse_math=False)
    above.legend(frameon=False, loc="upper left")
    below.bar(bins["low"], bins["count"], width, color="#999999", **bars)
    for low, size, count in zip(bins["low"], width, bins["count"], strict=True):
        if count:
            below.annotate(str(count), (low + size / 2, count), ha="center", va="bottom", fontsize=6)
    below.set(xlabel="confidence", ylabel="verdicts")
    below.margins(y=0.25)
    return figure


def confusion_figure(found: Quality, name: str) -> Figure:
    """Counts, shaded by their share of the row: dark is many."""
    figure = Figure(figsize=(3.8, 3.4), layout="constrained")
    axes = figure.subplots()
    counts = found.confusion.to_numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Greys", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color)
    ticks = [label.replace("_", " ") for label in LABELS]
    axes.set_xticks(range(len(LABELS)), ticks, rotation=30)
    axes.set_yticks(range(len(LABELS)), ticks)
    axes.set(xlabel="predicted", ylabel="label")
    axes.set_title(f"{name}: accuracy {found.accuracy:.3f}, n = {found.n}", parse_math=False)
    axes.spines[:].set_visible(False)
    return figure
