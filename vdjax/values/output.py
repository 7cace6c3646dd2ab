"""What an audit leaves: tables, a text for the terminal, and figures of values and of gaps against drift.

Sides and stages differ in marker and fill, so the figures can be read in grey and by the colour-blind.
"""

import io
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vdjax.drift.figures import DPI, SETTINGS
from vdjax.files import write_whole

STYLES: dict[str, dict[str, Any]] = {
    "chosen": {"color": "#0072B2", "marker": "o", "markerfacecolor": "#0072B2"},
    "rejected": {"color": "#D55E00", "marker": "s", "markerfacecolor": "white"},
    "sft": {"color": "#000000", "marker": "D", "markerfacecolor": "#000000"},
}
STAGES = (("o", "#0072B2"), ("s", "white"), ("^", "#D55E00"), ("D", "white"), ("v", "#009E73"), ("P", "white"))
NAMES = {"sft": "SFT responses"}


def write(folder: Path, tables: dict[str, pd.DataFrame], against: pd.DataFrame | None, found: dict[str, Any]) -> None:
    """The tables (by file name: values.csv and gaps.csv and others) and figures of a folder, each whole or not at all.

    Args:
      against: as `vdjax.audit.against_drift` makes it, and `found` as `vdjax.audit.agreement`, where there is a run.
    """
    content: dict[str, bytes] = {}
    if len(tables["values.csv"]):
        content["value_gaps.png"] = value_gaps(tables["values.csv"], tables["gaps.csv"])
    if against is not None:
        tables = tables | {"against_drift.csv": against}
        clean = {name: value if np.isfinite(value) else None for name, value in found.items()}  # JSON has no NaN
        content["against_drift.json"] = json.dumps(clean, indent=1).encode()
        if found["n"]:
            content["gap_against_drift.png"] = gap_against_drift(against, found)
    for name, table in tables.items():
        content[name] = (
            table.to_parquet(index=False) if name.endswith(".parquet") else table.to_csv(index=False).encode()
        )
    for name, data in content.items():
        write_whole(folder / name, data)


def text(found: pd.DataFrame, values: pd.DataFrame, gaps: pd.DataFrame) -> str:
    """The tables for the terminal."""
    parts = [found.to_string(index=False)]
    parts.append(
        values.to_string(index=False, float_format=lambda x: f"{x:.2f}") if len(values) else "no example matches"
    )
    if len(gaps):
        parts.append(gaps.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    return "\n\n".join(parts)


def value_gaps(values: pd.DataFrame, gaps: pd.DataFrame) -> bytes:
    """Left: mean graded stance of each side a topic; right: the signed gap. Bars are 95% intervals."""
    groups = list(values.groupby(["data", "topic"], sort=False).groups)
    several = values["data"].nunique() > 1
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(6.5, 1.1 + 0.3 * len(groups)), layout="constrained")
        panels = figure.subplots(1, 2 if len(gaps) else 1, sharey=True, squeeze=False)[0]
        left, right = panels[0], panels[-1]
        places = {group: -i for i, group in enumerate(groups)}
        for side in dict.fromkeys(values["side"]):
            rows = values[values["side"] == side]
            shift = {"chosen": 0.12, "rejected": -0.12}.get(side, 0.0)
            at = [places[r.data, r.topic] + shift for r in rows.itertuples()]
            bars(left, rows["graded"], at, rows["graded_low"], rows["graded_high"], STYLES[side], NAMES.get(side, side))
        if len(gaps):
            at = [places[r.data, r.topic] for r in gaps.itertuples()]
            style = {"color": "#000000", "marker": "D", "markerfacecolor": "#000000"}
            bars(right, gaps["signed"], at, gaps["signed_low"], gaps["signed_high"], style, "chosen - rejected")
        right.set_xlabel("value gap: chosen - rejected")
        left.set_xlabel("stance (-1 opposes, 1 supports)")
        for axes in panels:
            axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
        left.set_xlim(-1.05, 1.05)
        counts = values.groupby(["data", "topic"], sort=False)["n"].max()
        left.set_yticks(list(places.values()), [plain(g, several) + f" ({counts[g]})" for g in groups])
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
        return png(figure)


def gap_against_drift(against: pd.DataFrame, found: dict[str, Any]) -> bytes:
    """One point a stage and topic: the gap of its data, and the measured drift, with 95% intervals."""
    rows = against.dropna(subset=["gap", "drift"])
    topics = list(dict.fromkeys(rows["topic"]))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = figure.subplots()
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
            label = plain((stage, part["side"].iloc[0]), True)
            axes.plot(part["gap"], part["drift"], marker, color=edge, markerfacecolor=fill, markersize=5, label=label)
            for row in part.itertuples():
                number = str(topics.index(row.topic) + 1)
                axes.annotate(number, (row.gap, row.drift), fontsize=7, xytext=(3, 3), textcoords="offset points")
        keys = [
            Line2D([], [], linestyle="none", label=f"{i}  {plain(('', t), False)}") for i, t in enumerate(topics, 1)
        ]
        figure.legend(handles=keys, loc="outside right upper", handlelength=0, handletextpad=0)
        axes.set_xlabel("value gap of the data (toward the topic)")
        axes.set_ylabel("measured drift (graded, toward the topic)")
        p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
        rho = f", Spearman {found['spearman']:.2f} ({p})" if np.isfinite(found["spearman"]) else ""
        axes.set_title(f"{found['agree']} of {found['n']} agree in sign{rho}", loc="left")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        return png(figure)


def bars(axes: Any, x: Any, y: Any, low: Any, high: Any, style: dict[str, Any], label: str) -> None:
    """Points with horizontal intervals; without one where it is not known."""
    x, low, high = (np.asarray(v, float) for v in (x, low, high))
    axes.hlines(
        y, np.where(np.isnan(low), x, low), np.where(np.isnan(high), x, high), color=style["color"], linewidth=1
    )
    axes.plot(x, y, linestyle="none", markersize=4.5, label=label, **style)


def plain(group: tuple[str, str], several: bool) -> str:
    text = ": ".join(group) if several else group[1]
    return textwrap.shorten(text, 48, placeholder=" …")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
