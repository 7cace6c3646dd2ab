"""Figures of a study as PNG files in memory: heat map of drift, trajectories by algorithm, value plane, value gap.

Every figure is of one readout, model and SFT data. Colours, line styles and markers say the same, and the ends of the
heat map's colours differ in lightness, so that all can be read in grey.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vdjax.drift import gaps
from vdjax.drift.figures import SETTINGS, chunks, plain, png
from vdjax.drift.metrics import STANCES
from vdjax.drift.scores import POOLED
from vdjax.studies.merge import AXES, Merged, curves_over_seeds, ends_over_seeds, gap_points, over_seeds, topics_of
from vdjax.studies.tables import mark

# Dark blue is darker than orange, so that a fall and a rise of the same size differ in grey too.
DIVERGING = LinearSegmentedColormap.from_list("drift", ["#08306b", "#4292c6", "#ffffff", "#fdb863", "#e08214"])
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FILLS = ("full", "none", "left", "bottom", "right", "top")
SFT: dict[str, Any] = {"color": "#000000", "linestyle": "-"}
MAX_PANELS = 6


class Drawing(NamedTuple):
    kind: str  # heatmap, trajectories, plane or gap
    title: str  # what it shows, also for who cannot see it
    png: bytes


def draw(merged: Merged) -> dict[str, Drawing]:
    """All figures by file stem."""
    means, ends, curves = over_seeds(merged.drift), ends_over_seeds(merged.stances), curves_over_seeds(merged.stances)
    points = gap_points(merged)
    out: dict[str, Drawing] = {}
    with matplotlib.rc_context(SETTINGS):
        for key, group in means.groupby(["readout", "model", "sft"], sort=False):
            name = ", ".join(filter(None, key))

            def of(table: pd.DataFrame, key: tuple = key) -> pd.DataFrame:
                return table[(table[["readout", "model", "sft"]] == list(key)).all(axis=1)] if len(table) else table

            def add(kind: str, what: str, figure: Figure, name: str = name) -> None:
                out[_stem(f"{kind} {name}", out)] = Drawing(kind, f"{what}: {name}", png(figure))

            add("heatmap", "Drift by stage and topic", heat_map(group))
            if (group["preference"] != "").any():
                for topic in dict.fromkeys([POOLED, most_moved(group)]):
                    figure = trajectories(of(curves), topic)
                    add("trajectories", f"Trajectories by algorithm, {_topic(topic)}", figure)
            parts = chunks(topics_of(group), MAX_PANELS)
            for i, topics in enumerate(parts, start=1):
                what = f"Values before and after ({i} of {len(parts)})" if len(parts) > 1 else "Values before and after"
                add("plane", what, value_plane(of(ends), topics))
            if len(of(points)):
                add("gap", "Value gap against drift", gap_against_drift(of(points)))
    return out


def label(row: Any) -> str:
    """A cell in a few words: its algorithm and what it learned from."""
    return f"{row.objective} {row.preference}".strip()


def most_moved(means: pd.DataFrame) -> str:
    topics = means[(means["topic"] != POOLED) & means["stance"].isin(STANCES)]
    return str(topics.groupby("topic")["magnitude"].apply(lambda m: m.abs().mean()).idxmax())


def heat_map(means: pd.DataFrame) -> Figure:
    """Drift magnitude: a panel a stance, a row a cell, a column a topic; the numbers stand in the fields."""
    topics = topics_of(means)
    rows = list(dict.fromkeys(label(row) for row in means.itertuples()))
    texts = means.assign(label=[label(row) for row in means.itertuples()])
    # + 0.0: no "-0.00"
    texts["text"] = [f"{round(row['magnitude'], 2) + 0.0:+.2f}{mark(row)}" for row in means.to_dict("records")]
    moved = means[means["stance"].isin(STANCES)]["magnitude"]
    limit = max(float(moved.abs().max()), 1e-3)
    size = (2.0 + 0.72 * len(topics), 0.9 + len(STANCES) * (0.3 + 0.24 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(STANCES), 1, sharex=True, squeeze=False)[:, 0]
    for axes, stance in zip(panels, STANCES, strict=True):
        chosen = texts[texts["stance"] == stance]
        grid = chosen.pivot(index="label", columns="topic", values="magnitude").reindex(index=rows, columns=topics)
        said = chosen.pivot(index="label", columns="topic", values="text").reindex(index=rows, columns=topics)
        image = axes.imshow(grid.to_numpy(float), cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
        for i, j in ((i, j) for i in range(len(rows)) for j in range(len(topics))):
            if isinstance(said.iloc[i, j], str):
                dark = _lightness(DIVERGING(0.5 + grid.iloc[i, j] / (2 * limit))) < 0.45
                axes.text(j, i, said.iloc[i, j], ha="center", va="center", fontsize=7, color="w" if dark else "k")
        axes.set_title(f"p({stance})", loc="left", weight="bold")
        axes.set_yticks(range(len(rows)), [plain(row, 24) for row in rows])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if POOLED in topics and len(topics) > 1:
            axes.axvline(0.5, color="k", linewidth=0.8)
    panels[-1].set_xticks(range(len(topics)), [plain(_topic(topic), 11) for topic in topics])
    bar = figure.colorbar(image, ax=panels, shrink=0.6, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("drift magnitude", fontsize=8)
    return figure


def trajectories(curves: pd.DataFrame, topic: str) -> Figure:
    """Values through SFT, then along each algorithm: a row a stance, a column a preference dataset.

    Bands go from the least to the greatest of the seeds; with one seed they are its 95% intervals.
    """
    curves = curves[curves["topic"] == topic]
    preferences = [name for name in curves["preference"].unique() if name]
    styles = _styles(curves)
    figure = Figure(figsize=(1.4 + 2.0 * len(preferences), 1.0 + 1.35 * len(STANCES)), layout="constrained")
    grid = figure.subplots(len(STANCES), len(preferences), sharex=True, sharey="row", squeeze=False)
    for row, stance in zip(grid, STANCES, strict=True):
        lines = curves[curves["stance"] == stance]
        for axes, preference in zip(row, preferences, strict=True):
            _curve(axes, lines[lines["preference"] == ""], 0, SFT)
            for objective, style in styles.items():
                own = lines[(lines["preference"] == preference) & (lines["objective"] == objective)]
                _curve(axes, own, 1, style)
            axes.axvline(1, color="0.4", linewidth=1.2, zorder=0)
            axes.grid(axis="y", color="0.9", linewidth=0.5)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlim(0, 2)
            axes.set_xticks([0, 1, 2], ["start", "SFT's end", "end"])
        row[0].set_ylabel(f"p({stance})")
    for top, bottom, preference in zip(grid[0], grid[-1], preferences, strict=True):
        top.set_title(plain(f"on {preference}", 24))
        for text, side in zip(bottom.get_xticklabels(), ("left", "center", "right"), strict=True):
            text.set_horizontalalignment(side)  # else the end of one column runs into the start of the next
    handles = [Line2D([], [], **SFT, label="SFT")]
    handles += [Line2D([], [], **style, markersize=3, label=objective) for objective, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _curve(axes: Axes, line: pd.DataFrame, offset: int, style: dict[str, Any]) -> None:
    line = line.sort_values("share")
    x = line["share"] + offset
    axes.fill_between(x, line["low"], line["high"], color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(x, line["value"], **style, markersize=3, linewidth=1.2, clip_on=False)


def value_plane(ends: pd.DataFrame, topics: Sequence[str]) -> Figure:
    """p(support) against p(oppose): an arrow a cell, from where it started to where it ended; a panel a topic.

    What is left to the dashed line, where the two sum to one, is neutral or no stance.
    """
    columns = min(3, len(topics))
    lines = -(-len(topics) // columns)
    figure = Figure(figsize=(0.8 + 2.3 * columns, 1.0 + 2.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    styles = _styles(ends)
    marks = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(n for n in ends["preference"].unique() if n)}
    for axes, topic in zip(panels, topics, strict=False):
        own = ends[(ends["topic"] == topic) & ends["stance"].isin(("support", "oppose"))]
        both = own.pivot(index=AXES, columns="stance", values=["before", "after"]).reset_index()
        for row in both.to_dict("records"):
            objective, preference = row["objective", ""], row["preference", ""]
            style = styles.get(objective, SFT)
            start, end = ((row[when, "support"], row[when, "oppose"]) for when in ("before", "after"))
            arrow = {"arrowstyle": "->", "color": style["color"], "linestyle": style["linestyle"], "shrinkA": 0}
            axes.annotate("", end, start, arrowprops=arrow | {"shrinkB": 3, "linewidth": 1.2})
            axes.plot(*end, color=style["color"], marker=marks.get(preference, "."), markersize=5, linestyle="")
        _square(axes, own)
        axes.set_title(plain(_topic(topic), 28), weight="bold")
    for axes in panels[len(topics) :]:
        axes.set_visible(False)
    figure.supxlabel("p(support)", fontsize=8)
    figure.supylabel("p(oppose)", fontsize=8)
    handles = [Line2D([], [], **(style | {"marker": ""}), label=name) for name, style in styles.items()]
    if (ends["preference"] != "").any():
        handles.insert(0, Line2D([], [], **SFT, label="SFT"))
    handles += [Line2D([], [], color="0.3", marker=m, linestyle="", label=f"on {name}") for name, m in marks.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 1 + 2 * columns))
    return figure


def _square(axes: Axes, own: pd.DataFrame) -> None:
    """Both axes cover the same length, around what is drawn."""
    values = {s: own.loc[own["stance"] == s, ["before", "after"]].to_numpy(float) for s in ("support", "oppose")}
    length = max(0.05, *(v.max() - v.min() for v in values.values())) * 1.25
    centers = {s: (v.max() + v.min()) / 2 for s, v in values.items()}
    axes.set_xlim(centers["support"] - length / 2, centers["support"] + length / 2)
    axes.set_ylim(centers["oppose"] - length / 2, centers["oppose"] + length / 2)
    axes.set_aspect("equal")
    axes.plot([0, 1], [1, 0], color="0.5", linestyle="--", linewidth=0.8, scalex=False, scaley=False, zorder=0)
    axes.grid(color="0.92", linewidth=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def gap_against_drift(points: pd.DataFrame) -> Figure:
    """A point a cell and topic; on the dotted lines nothing is predicted, or nothing moved.

    Lines: the 95% intervals of the gap and of the drift (as in `over_seeds`). Large points are certain.
    """
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    styles = _styles(points)
    marks = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(points["preference"].unique())}
    fills: dict[str, Any] = {name: FILLS[i % len(FILLS)] for i, name in enumerate(styles)}
    for row in points.to_dict("records"):
        color = styles[row["objective"]]["color"]
        axes.plot([row["gap_low"], row["gap_high"]], [row["drift"]] * 2, color=color, linewidth=0.7, alpha=0.5)
        axes.plot([row["gap"]] * 2, [row["ci_low"], row["ci_high"]], color=color, linewidth=0.7, alpha=0.5)
        axes.plot(
            row["gap"],
            row["drift"],
            color=color,
            marker=marks[row["preference"]],
            fillstyle=fills[row["objective"]],
            markersize=6 if row["certain"] else 3,
            linestyle="",
        )
    for line in (axes.axhline, axes.axvline):
        line(0, color="0.5", linestyle=":", linewidth=0.8, zorder=0)
    axes.set_title(plain(gaps.sentence(gaps.agreement(points)), 52), loc="left")
    axes.set_xlabel("value gap of the data: graded stance of what is preferred - of what is not")
    axes.set_ylabel("drift of the graded stance")
    handles = [
        Line2D([], [], color=style["color"], marker="o", fillstyle=fills[name], linestyle="", label=name)
        for name, style in styles.items()
    ]
    handles += [Line2D([], [], color="0.3", marker=m, linestyle="", label=f"on {name}") for name, m in marks.items()]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _styles(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of every algorithm (of every stage, where there are no preference data)."""
    branches = frame if (frame["preference"] == "").all() else frame[frame["preference"] != ""]
    return {
        name: {"color": COLORS[i % 6], "linestyle": LINES[i % 6], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(branches["objective"].unique())
    }


def _topic(topic: str) -> str:
    return "all topics" if topic == POOLED else topic


def _lightness(color: Sequence[float]) -> float:
    return 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]


def _stem(text: str, taken: dict[str, Any]) -> str:
    stem = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
    again = sum(other == stem or re.fullmatch(rf"{stem}-\d+", other) is not None for other in taken)
    return f"{stem}-{again + 1}" if again else stem
