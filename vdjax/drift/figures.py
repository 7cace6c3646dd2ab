"""Figures of a run as PNG files in memory: trajectories, drift, training curves.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; every stance also has a line style and a
marker of its own, so the figures can be read in grey. Only matplotlib's object-oriented API is used, never pyplot.
"""

import io
import textwrap
from collections.abc import Sequence
from typing import Any, TypeVar

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vdjax.drift.metrics import STANCES
from vdjax.drift.scores import StageInfo
from vdjax.drift.statistics import POOLED

STYLES: dict[str, dict[str, Any]] = {
    "support": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "neutral": {"color": "#000000", "linestyle": ":", "marker": "^"},
    "oppose": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
}
TRAINED: dict[str, Any] = {"color": "#0072B2", "linewidth": 1.0, "label": "training batches"}
HELD_OUT: dict[str, Any] = {
    **{"color": "#D55E00", "linewidth": 1.0, "linestyle": "--"},
    **{"marker": "s", "markersize": 3, "label": "held-out rows"},
}
PANELS = (  # title, metrics drawn in it; the prefix eval_ marks the held-out value
    ("loss", ("loss", "eval_loss")),
    ("reward accuracy", ("reward_accuracy", "eval_reward_accuracy")),
    ("reward margin", ("reward_margin", "eval_reward_margin")),
    ("reward", ("reward", "eval_reward")),
    ("KL to reference", ("kl_to_reference", "eval_kl_to_reference")),
    ("KL of a response", ("kl", "eval_kl")),
    ("response length", ("response_length", "eval_response_length")),
    ("entropy", ("entropy", "eval_entropy")),
    ("clip fraction", ("clip_fraction",)),
    ("value loss", ("value_loss",)),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
)
DPI = 150
MAX_TOPICS = 6
MAX_STAGES = 6
SETTINGS: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in the text of others is a $
}

T = TypeVar("T")


def draw(
    stances: pd.DataFrame, drift: pd.DataFrame, stages: Sequence[StageInfo], training: pd.DataFrame
) -> dict[str, bytes]:
    """{file stem: PNG content} of all figures: `trajectories-N`, `drift-N`, `training-N`.

    `stances` and `drift` are those of `statistics.Analysis`; `training` has columns stage, step, metric, value.
    At most MAX_TOPICS topics and MAX_STAGES stages go in one figure, so that it can be read; N counts from 1.
    """
    shown = [name for _, names in PANELS for name in names]
    training = training[training["metric"].isin(shown)]
    probed, moved, trained = ([s for s in stages if (t["stage"] == s.name).any()] for t in (stances, drift, training))
    topics = sorted(stances["topic"].unique(), key=lambda topic: (topic != POOLED, topic))
    with matplotlib.rc_context(SETTINGS):
        drawn = {
            "trajectories": [
                trajectories(stances, columns, rows)
                for columns in _chunks(probed, MAX_STAGES)
                for rows in _chunks(topics, MAX_TOPICS)
            ],
            "drift": [forest(drift, columns) for columns in _chunks(moved, MAX_STAGES)],
            "training": [training_curves(training, columns) for columns in _chunks(trained, MAX_STAGES)],
        }
        return {f"{name}-{i}": _png(f) for name, figures in drawn.items() for i, f in enumerate(figures, start=1)}


def trajectories(stances: pd.DataFrame, stages: Sequence[StageInfo], topics: Sequence[str]) -> Figure:
    """Stance values over training with 95% bands: a row a topic, a column a stage, one y axis for all.

    The thick line at the left of a stage is the boundary to the stage it goes on from, which its title names. The two
    touch where they are neighbours and the parent has no other children; of several children all stand apart.
    """
    parents = [stage.init_from for stage in stages]
    joined = [i > 0 and p == stages[i - 1].name and parents.count(p) == 1 for i, p in enumerate(parents)]
    width, height = 1.7 + 1.75 * len(stages), 1.15 + 1.15 * len(topics)
    figure = Figure(figsize=(width, height))
    gaps = [0.0 if follows else 0.1 for follows in joined]
    grid = figure.add_gridspec(
        len(topics), 2 * len(stages), wspace=0, hspace=0.12, left=1.4 / width, right=1 - 0.15 / width,
        bottom=0.5 / height, top=1 - 0.65 / height, width_ratios=[w for gap in gaps for w in (gap, 1)],
    )  # fmt: skip
    low = stances[["value", "ci_low"]].min(axis=None)
    high = stances[["value", "ci_high"]].max(axis=None)
    margin = 0.04 * max(high - low, 0.05)
    for column, stage in enumerate(stages):
        for row, topic in enumerate(topics):
            axes = figure.add_subplot(grid[row, 2 * column + 1])
            _trajectory(axes, stances[(stances["stage"] == stage.name) & (stances["topic"] == topic)])
            axes.set_ylim(max(0, low - margin), min(1, high + margin))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            # Pruned, since the last label of one stage would run into the first of the next.
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, prune="upper"))
            axes.tick_params(labelbottom=row == len(topics) - 1, labelleft=column == 0, left=column == 0)
            axes.spines["left"].set_linewidth(0.6 if stage.init_from is None else 1.6)
            axes.grid(axis="y", color="0.9", linewidth=0.5)
            if column == 0:
                axes.set_ylabel(_plain(topic, 16), rotation=0, ha="right", va="center", weight="bold", labelpad=6)
            if row == 0:
                origin = "" if stage.init_from is None else f"from {stage.init_from}"
                axes.set_title(f"{_plain(stage.name, 20)}\n{_plain(origin, 24)}", pad=5, linespacing=1.3)
    figure.supxlabel("training step of the stage", fontsize=8, y=0.1 / height)
    _stance_legend(figure)
    return figure


def _trajectory(axes: Axes, rows: pd.DataFrame) -> None:
    for stance in STANCES:
        line = rows[rows["stance"] == stance].sort_values("step")
        style = STYLES[stance]
        axes.fill_between(line["step"], line["ci_low"], line["ci_high"], color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(line["step"], line["value"], **style, markersize=3, linewidth=1.2, clip_on=False, zorder=3)
    if not rows.empty:
        first, last = rows["step"].min(), rows["step"].max()
        axes.set_xlim((first, last) if last > first else (first - 2, first + 2))


def forest(drift: pd.DataFrame, stages: Sequence[StageInfo]) -> Figure:
    """Drift magnitude with its 95% interval: a column a stage, a row a topic, filled where significant (q < 0.05)."""
    topics = sorted(drift["topic"].unique(), key=lambda topic: (topic != POOLED, topic))
    figure = Figure(figsize=(1.7 + 1.75 * len(stages), 1.2 + 0.42 * len(topics)), layout="constrained")
    grid = figure.subplots(1, len(stages), sharex=True, sharey=True, squeeze=False)[0]
    for axes, stage in zip(grid, stages, strict=True):
        axes.axvline(0, color="0.5", linewidth=0.8, zorder=0)
        for band in range(0, len(topics), 2):
            axes.axhspan(band - 0.5, band + 0.5, color="0.95", zorder=-1, linewidth=0)
        for row in drift[drift["stage"] == stage.name].to_dict("records"):
            style = STYLES[row["stance"]]
            y = topics.index(row["topic"]) + 0.25 * (STANCES.index(row["stance"]) - 1)
            axes.plot([row["ci_low"], row["ci_high"]], [y, y], color=style["color"], linewidth=1.2)
            face = style["color"] if row["significant"] else "white"
            axes.plot(row["magnitude"], y, **{**style, "linestyle": ""}, markerfacecolor=face, markersize=4.5, zorder=3)
        axes.set_title(_plain(stage.name, 22))
        axes.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    grid[0].set_yticks(range(len(topics)), [_plain(topic, 22) for topic in topics], weight="bold")
    grid[0].set_ylim(len(topics) - 0.5, -0.5)
    figure.supxlabel("drift magnitude (filled: q < 0.05)", fontsize=8)
    _stance_legend(figure, outside=True)
    return figure


def training_curves(training: pd.DataFrame, stages: Sequence[StageInfo]) -> Figure:
    """Training metrics: a column a stage, a row a metric that any of the stages has."""
    columns = {s.name: training[training["stage"] == s.name] for s in stages}
    present = {metric for rows in columns.values() for metric in rows["metric"]}
    panels = [(title, names) for title, names in PANELS if present & set(names)]
    figure = Figure(figsize=(1.0 + 1.95 * len(stages), 0.9 + 1.3 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), len(stages), squeeze=False)
    for column, (stage, rows) in enumerate(columns.items()):
        grid[0, column].set_title(_plain(stage, 22))
        for axes, (title, names) in zip(grid[:, column], panels, strict=True):
            if column == 0:
                axes.set_ylabel(title)
            _training_panel(axes, rows, names)
    figure.supxlabel("training step of the stage", fontsize=8)
    handles = [Line2D([], [], **style) for style in (TRAINED, HELD_OUT)]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


def _training_panel(axes: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    if not rows["metric"].isin(names).any():
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", color="0.5", transform=axes.transAxes)
        return
    for name in names:
        line = rows[rows["metric"] == name].sort_values("step")
        axes.plot(line["step"], line["value"], **(HELD_OUT if name.startswith("eval_") else TRAINED))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))


def _stance_legend(figure: Figure, outside: bool = False) -> None:
    handles = [Line2D([], [], **STYLES[stance], markersize=4, linewidth=1.2, label=stance) for stance in STANCES]
    figure.legend(handles=handles, loc="outside upper left" if outside else "upper left", ncols=3)


def _plain(text: str, width: int) -> str:
    """Text of others, wrapped, in at most three lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder=" …"))


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Parts of nearly equal length, none longer than `size`."""
    parts = -(-len(items) // size)
    bounds = [round(i * len(items) / parts) for i in range(parts + 1)] if parts else [0]
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
