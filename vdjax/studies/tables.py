"""The tables of a study: drift magnitude and drift time by topic, stance, data and algorithm; CSV, Markdown, LaTeX."""

import math
import re
from collections.abc import Callable, Sequence

import pandas as pd

from vdjax.drift.metrics import STANCES
from vdjax.drift.scores import POOLED
from vdjax.studies.merge import AXES, Merged, gap_points, over_seeds

Cell = Callable[[dict], str]  # a row of `over_seeds` as text
RATES = ("refusal", "off_topic", "degenerate")
HEADS = {"sft": "SFT data", "objective": "algorithm", "preference": "preference data"}
LEGEND = (
    "Mean over the seeds with a 95% interval: with one seed the bootstrap interval of its experiment, for other "
    "propositions; with several the t interval of the mean, for other seeds and these very propositions (standard "
    "deviation pooled over the topics of a cell). "
    "After it, with several seeds: in how many of them q < 0.05 in the direction of the mean. *: in all of them; "
    "**: and real, beyond every noise floor that was measured (with several seeds that of training; those of sampling "
    "and the judge in each experiment)."
)
TIME_LEGEND = (
    "Drift time, and beside it the paired drift time, which tells early from late where propositions differ much: "
    "shares of the stage's steps, means over the seeds in which the drift is significant. In brackets: with one seed "
    "the 95% interval, with several the least and the greatest."
)


def all_tables(merged: Merged) -> dict[str, pd.DataFrame]:
    """The formatted tables by name; those without rows are left out."""
    means = over_seeds(merged.drift)
    tables = {
        "summary": summary(merged, means),
        "magnitude": wide(means, (*STANCES, "graded"), magnitude_cell),
        "time": wide(means, STANCES, time_cell, paired_time_cell),
        "rates": wide(means[means["stance"].isin(RATES)], RATES, magnitude_cell),
        "gaps": gaps(gap_points(merged)),
    }
    return {name: table for name, table in tables.items() if len(table)}


def wide(means: pd.DataFrame, quantities: Sequence[str], cell: Cell, paired: Cell | None = None) -> pd.DataFrame:
    """A row for each readout, cell and topic, a column for each quantity that was measured; two where `paired` is."""
    if means.empty:
        return means
    present = [quantity for quantity in quantities if means["stance"].eq(quantity).any()]
    keys = ["readout", *AXES, "topic"]
    rows = means[keys + ["seeds"]].drop_duplicates(keys)
    for quantity in present:
        chosen = means[means["stance"] == quantity]
        texts = {quantity: cell} | ({f"{quantity}, paired": paired} if paired else {})
        columns = {name: [text(row) for row in chosen.to_dict("records")] for name, text in texts.items()}
        rows = rows.merge(chosen[keys].assign(**columns), on=keys, how="left")
    return titled(rows.fillna("–"))


def summary(merged: Merged, means: pd.DataFrame) -> pd.DataFrame:
    """A row for each readout and cell: how much moved, by how much, when, and where the pooled stances went."""
    distances = merged.distances.groupby(["readout", *AXES, "topic"])["js"].mean()
    rows = []
    for key, group in means.groupby(["readout", *AXES], sort=False):
        topics = group[(group["topic"] != POOLED) & group["stance"].isin(STANCES)]
        pooled = group[group["topic"] == POOLED].set_index("stance")
        row = dict(zip(["readout", *AXES], key, strict=True)) | {"seeds": group["seeds"].max()}
        every = (topics["significant"] == topics["seeds"]).sum()
        row |= {"moved": f"{every} of {len(topics)}", "real": f"{topics['real'].sum()} of {len(topics)}"}
        row["mean |drift|"] = f"{topics['magnitude'].abs().mean():.3f}"
        row["JS distance"] = f"{distances.get((*key, POOLED), math.nan):.3f}"
        row["median time"] = percent(topics["drift_time"].median())
        row["median paired time"] = percent(topics["drift_time_paired"].median())
        for stance in STANCES:
            measured = stance in pooled.index
            row[f"{stance}, all topics"] = magnitude_cell(pooled.loc[stance].to_dict()) if measured else "–"
        rows.append(row)
    return titled(pd.DataFrame(rows))


def gaps(points: pd.DataFrame) -> pd.DataFrame:
    """A row for each readout, cell and topic whose data were audited: value gap, and drift of the graded stance."""
    if points.empty:
        return points
    rows = points.rename(columns={"drift": "magnitude"}).to_dict("records")
    table = points[["readout", *AXES, "topic", "seeds"]].copy()
    table["value gap"] = [signed(r["gap"]) + interval(r["gap_low"], r["gap_high"]) for r in rows]
    table["drift"] = [magnitude_cell(row) for row in rows]
    for name in ("agrees", "certain"):
        table[name] = points[name].map({True: "yes", False: "no"})
    return titled(table)


def titled(table: pd.DataFrame) -> pd.DataFrame:
    """Without the columns that say nothing (the only model of a study), under the names that people read."""
    idle = [name for name in AXES if (table[name] == "").all()] + [c for c in ("readout", "model", "sft") if c in table]
    once = [name for name in idle if table[name].nunique() <= 1 and name != "readout"]
    filled = table.replace({"preference": {"": "–"}})
    return filled.drop(columns=list(dict.fromkeys(once))).rename(columns=HEADS)


def magnitude_cell(row: dict) -> str:
    if math.isnan(row["magnitude"]):
        return "–"
    text = signed(row["magnitude"]) + mark(row) + interval(row["ci_low"], row["ci_high"])
    return text if row["seeds"] < 2 else f"{text} {row['significant']}/{row['seeds']}"


def time_cell(row: dict, name: str = "drift_time") -> str:
    """The mean drift time, its interval, and in how many of the seeds it is defined where not in all."""
    text, low, high = (percent(row[name + end]) for end in ("", "_low", "_high"))
    if row["timed"] and not math.isnan(row[f"{name}_low"]):
        text += f" [{low}, {high}]"
    return text if row["timed"] in (0, row["seeds"]) else f"{text} ({row['timed']} of {row['seeds']} seeds)"


def paired_time_cell(row: dict) -> str:
    return time_cell(row, "drift_time_paired")


def mark(row: dict) -> str:
    if row["significant"] < row["seeds"]:
        return ""
    return "**" if row["real"] else "*"


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no "-0.000"


def interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" [{signed(low)}, {signed(high)}]"


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f}%"


def to_markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    escaped = [[cell.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |\n" for line in escaped)


def to_latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """A booktabs longtable: the preamble needs booktabs and longtable."""
    flat = table.rename(columns=_escaped).astype(str).map(lambda cell: _escaped(" ".join(cell.split())))
    columns = "l" * table.shape[1]
    text = flat.to_latex(
        index=False, escape=False, longtable=True, caption=_escaped(caption), label=label, column_format=columns
    )
    return re.sub(r"(?<=[\s\[])([+-])(?=\d)", r"$\1$", text)


# Not pandas' own escaping: it leaves < > and |, which the fonts of LaTeX's default encoding lack.
SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "–": "--",
}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(character, character) for character in text)
