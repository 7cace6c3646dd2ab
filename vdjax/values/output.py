"""What an audit leaves: tables, a text for the terminal, and a figure of values and gaps.

Sides differ in marker and fill, so the figures can be read in grey and by the colour-blind.
"""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vdjax.drift import gaps as gap_files
from vdjax.drift.figures import SETTINGS, png
from vdjax.files import write_whole

STYLES: dict[str, dict[str, Any]] = {
    "chosen": {"color": "#0072B2", "marker": "o", "markerfacecolor": "#0072B2"},
    "rejected": {"color": "#D55E00", "marker": "s", "markerfacecolor": "white"},
    "sft": {"color": "#000000", "marker": "D", "markerfacecolor": "#000000"},
    "desirable": {"color": "#0072B2", "marker": "^", "markerfacecolor": "#0072B2"},
    "undesirable": {"color": "#D55E00", "marker": "v", "markerfacecolor": "white"},
}
NAMES = {"sft": "SFT responses"}


def write(folder: Path, tables: dict[str, pd.DataFrame], against: pd.DataFrame | None) -> None:
    """The tables (by file name: values.csv and gaps.csv and others) and figures of a folder, each whole or not at all.

    Args:
      against: as `drift.gaps.against_drift` makes it, where there is a run.
    """
    content: dict[str, bytes] = {}
    if len(tables["values.csv"]):
        content["value_gaps.png"] = value_gaps(tables["values.csv"], tables["gaps.csv"])
    if against is not None:
        content |= gap_files.files(against)
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
            shift = {"chosen": 0.12, "rejected": -0.12, "desirable": 0.12, "undesirable": -0.12}.get(side, 0.0)
            at = [places[r.data, r.topic] + shift for r in rows.itertuples()]
            bars(left, rows["graded"], at, rows["graded_low"], rows["graded_high"], STYLES[side], NAMES.get(side, side))
        if len(gaps):
            at = [places[r.data, r.topic] for r in gaps.itertuples()]
            style = {"color": "#000000", "marker": "D", "markerfacecolor": "#000000"}
            bars(right, gaps["signed"], at, gaps["signed_low"], gaps["signed_high"], style, "difference")
        right.set_xlabel("value gap: chosen - rejected (desirable - undesirable)")
        left.set_xlabel("stance (-1 opposes, 1 supports)")
        for axes in panels:
            axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
        left.set_xlim(-1.05, 1.05)
        counts = values.groupby(["data", "topic"], sort=False)["n"].max()
        left.set_yticks(list(places.values()), [plain(g, several) + f" ({counts[g]})" for g in groups])
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
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
