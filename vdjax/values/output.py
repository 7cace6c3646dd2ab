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
from vdjax.judges import LABELS

STYLES: dict[str, dict[str, Any]] = {
    "chosen": {"color": "#0072B2", "marker": "o", "markerfacecolor": "#0072B2"},
    "rejected": {"color": "#D55E00", "marker": "s", "markerfacecolor": "white"},
    "sft": {"color": "#000000", "marker": "D", "markerfacecolor": "#000000"},
    "desirable": {"color": "#0072B2", "marker": "^", "markerfacecolor": "#0072B2"},
    "undesirable": {"color": "#D55E00", "marker": "v", "markerfacecolor": "white"},
}
SHOWN = 1500  # characters of a text among the examples
NAMES = {"sft": "SFT responses"}


def write(folder: Path, tables: dict[str, pd.DataFrame], against: pd.DataFrame | None) -> None:
    """The tables (by file name: values.csv and gaps.csv and others) and figures of a folder, each whole or not at all.

    Args:
      against: as `drift.gaps.against_drift` makes it, where there is a run.
    """
    content: dict[str, bytes] = {}
    if len(tables["values.csv"]):
        content["value_gaps.png"] = value_gaps(tables["values.csv"], tables["gaps.csv"])
    if len(tables["hits.parquet"]):
        content["examples.md"] = examples(tables["hits.parquet"]).encode()
    if against is not None:
        content |= gap_files.files(against)
    for name, table in tables.items():
        content[name] = (
            table.to_parquet(index=False) if name.endswith(".parquet") else table.to_csv(index=False).encode()
        )
    for name, data in content.items():
        write_whole(folder / name, data)


def examples(hits: pd.DataFrame, each: int = 2) -> str:
    """Markdown: of each data set and topic the responses that support it most, and those that oppose it most.

    Each stands with its question and, of a pair, with the other answer. Text of the data is indented, so that nothing
    in it is read as Markdown, and without control characters, so that it is safe to print.
    """
    out = ["# Examples of the data", ""]
    out += [f"The responses that the judge found most sure to support or to oppose a topic; {each} of each.", ""]
    for (data, topic), rows in hits.groupby(["data", "topic"], sort=False):
        for label in ("support", "oppose"):
            out += [f"## {readable(f'{data}, {topic}: most sure to {label}')}", ""]
            for best in rows.sort_values(label, ascending=False, kind="stable").head(each).to_dict("records"):
                about = f"{best['id']} (found by {best['route']}), toward: {best['proposition']}"
                out += [*quoted(about), "", "Question", "", *quoted(best["prompt"]), ""]
                for row in rows[rows["answer"] == best["answer"]].to_dict("records"):
                    said = max(LABELS, key=row.__getitem__)
                    out += [f"{row['side']}: {said} {row[said]:.2f}", "", *quoted(row["response"]), ""]
    return "\n".join(out)


def quoted(said: str) -> list[str]:
    """The lines of a text as Markdown shows them unchanged; the end of a long one is left out, and that is said."""
    cut = f"{said[:SHOWN]} [... {len(said) - SHOWN} more characters]" if len(said) > SHOWN else said
    return ["    " + readable(line) for line in cut.split("\n")]


def readable(said: str) -> str:
    """A line without characters that a terminal or browser would act on."""
    return "".join(c if c.isprintable() else " " for c in said)


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
