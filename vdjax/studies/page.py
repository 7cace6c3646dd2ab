"""The files of a study's merged report: one HTML page, its tables and its figures."""

import base64
from collections.abc import Sequence
from typing import Any

import pandas as pd

from vdjax.drift.figures import DPI
from vdjax.drift.report import PAGE_PIXELS, page_environment
from vdjax.drift.scores import POOLED
from vdjax.drift.tensorboard import png_size
from vdjax.runs import versions
from vdjax.studies import figures, tables
from vdjax.studies.grid import Cell
from vdjax.studies.merge import AXES, Merged, over_seeds

KINDS = {
    "heatmap": "Drift by stage and topic",
    "trajectories": "Trajectories by algorithm",
    "plane": "Values before and after",
    "gap": "Value gap against drift",
}
FIGURE_CAPTIONS = {
    "heatmap": "Drift magnitude, a change of p(stance) from the first to the last snapshot of a stage, from -1 to 1: "
    "mean over the seeds. Each field has its number and *, ** as in the tables; a fall is dark, a rise light.",
    "trajectories": "Value p(stance), the mean over propositions and seeds, through SFT and then along each algorithm, "
    "by share of the stage's steps. Bands: with one seed its 95% intervals, with several the least and the greatest.",
    "plane": "p(support) and p(oppose), means over the seeds: an arrow from a stage's first to its last snapshot. What "
    "is left to the dashed line, where the two sum to one, is neutral or no stance.",
    "gap": "A point is a cell and topic: graded stance (-1 to 1) of chosen minus rejected responses in its data, and "
    "the drift of the model's graded stance, means over the seeds. Lines: 95% intervals of both.",
}
CAPTIONS = {
    "summary": "Drift of each cell: comparisons (topic x stance) that moved, their size, their time.",
    "magnitude": "Drift magnitude by algorithm, data, topic and stance. " + tables.LEGEND,
    "time": "Drift time by algorithm, data, topic and stance; – where no drift is sure. " + tables.TIME_LEGEND,
    "gaps": "Value gap of the data (its 95% interval) and drift of the graded stance by cell and topic. Certain: the "
    "interval leaves out 0 and the drift is significant in every seed; other signs agree or not as a coin falls. "
    + tables.LEGEND,
    "rates": "Drift of the rates of refusals, off-topic and degenerate responses. " + tables.LEGEND,
}


def files(merged: Merged, cells: Sequence[Cell], command: str) -> dict[str, str | bytes]:
    """{path below the study's directory: content} of the whole report."""
    formatted = tables.all_tables(merged)
    drawn = figures.draw(merged)
    means = over_seeds(merged.drift)
    out: dict[str, str | bytes] = {"tables/drift.csv": means.to_csv(index=False, float_format="%.6g")}
    for name, table in formatted.items():
        out[f"tables/{name}.csv"] = table.to_csv(index=False)
        out[f"tables/{name}.md"] = f"{CAPTIONS[name]}\n\n{tables.to_markdown(table)}".replace("**:", r"\*\*:")
        out[f"tables/{name}.tex"] = tables.to_latex(table, CAPTIONS[name], f"tab:{name}")
    for stem, drawing in drawn.items():
        out[f"figures/{stem}.png"] = drawing.png
    out["report.html"] = html(merged, cells, command, formatted, drawn)
    return out


def numeric(table: pd.DataFrame) -> list[bool]:
    """Which columns hold numbers, and so are aligned at the right: all but those of names."""
    names = {"readout", "topic", *AXES, *tables.HEADS.values()}
    return [column not in names for column in table]


def sizes(merged: Merged) -> str:
    """The n of all numbers, in words."""
    seeds = over_seeds(merged.drift)["seeds"]
    propositions = merged.drift.loc[merged.drift["topic"] != POOLED, "n_propositions"]
    counts = [f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}" for n in (seeds, propositions)]
    return f"n: {counts[0]} seed(s) a cell, {counts[1]} proposition(s) a topic."


def html(
    merged: Merged,
    cells: Sequence[Cell],
    command: str,
    formatted: dict[str, Any],
    drawn: dict[str, figures.Drawing],
) -> str:
    """report.html as text. It needs no other file and no network; all text in it is escaped."""
    images: dict[str, list[tuple[str, int, str]]] = {kind: [] for kind in KINDS}
    for drawing in drawn.values():
        width = round(png_size(drawing.png)[0] * PAGE_PIXELS / DPI)
        images[drawing.kind].append((drawing.title, width, base64.b64encode(drawing.png).decode()))
    done = [cell for cell in cells if cell.trunk in merged.finished]
    branches = [cell for cell in done if cell.preference] or done  # SFT is where all start, not one of the objectives
    return page_environment().get_template("study.html").render(
        headings=KINDS,
        figure_captions=FIGURE_CAPTIONS,
        sizes=sizes(merged),
        images=images,
        tables={
            name: (CAPTIONS[name], list(table.columns), table.astype(str).to_numpy().tolist(), numeric(table))
            for name, table in formatted.items()
        },
        command=command,
        versions=versions(),
        merged=merged,
        counts={
            what: len({getattr(cell, what) for cell in branches} - {""})
            for what in ("model", "sft", "objective", "preference", "seed")
        },
        seeds=sorted({cell.seed for cell in done}),
        legend=tables.LEGEND,
    )
