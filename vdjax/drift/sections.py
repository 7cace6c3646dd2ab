"""The sections of the report that are not about drift alone, as plain data for its templates."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from vdjax.drift import gaps as data_gaps
from vdjax.drift.metrics import QUANTITIES
from vdjax.drift.robustness import factor_summary
from vdjax.drift.scores import POOLED
from vdjax.drift.summary import interval, of_readout, percent
from vdjax.judges import verdicts
from vdjax.judges.agreement import confusion

NOISE = {  # source of noise: what it is, and how to measure it
    "sampling": ("The noise of sampling responses", "probes.replicates = 2"),
    "judge": ("The judge's own noise", "judges.NAME.repeats = 2"),
    "training": ("The noise of training with another seed", "--config.seeds=[0,1,2]"),
}


def table(frame: pd.DataFrame) -> dict[str, Any]:
    """A frame for the template's macro `frame`: its columns, which of them are numbers, and its rows."""
    numeric = [name for name in frame if pd.api.types.is_numeric_dtype(frame[name])]
    return {"columns": list(frame), "numeric": numeric, "rows": frame.to_dict("records")}


def distances(frame: pd.DataFrame) -> dict[str, Any] | None:
    """Topics by stages of the primary readout, and the whole table."""
    if frame.empty:
        return None
    primary = of_readout(frame)
    cells = {(row["topic"], row["stage"]): row for row in primary.to_dict("records")}
    stages = list(dict.fromkeys(primary["stage"]))
    topics = sorted(primary["topic"].unique(), key=lambda topic: (topic != POOLED, topic))
    rows = {topic: [cells.get((topic, stage)) for stage in stages] for topic in topics}
    return {"stages": stages, "rows": rows, "table": table(frame)}


def floors(frame: pd.DataFrame) -> dict[str, Any] | None:
    """Of each readout, stage and source: the largest floor over topics of each quantity; and the whole table."""
    if frame.empty:
        return None
    keys = ["readout", "stage", "source"]
    largest = frame[frame["topic"] != POOLED].pivot_table(index=keys, columns="stance", values="floor", aggfunc="max")
    known = [name for name in QUANTITIES if name in largest]
    repeats = frame.groupby(keys)["n"].max().rename("repeats")
    return {"short": table(largest[known].join(repeats).reset_index()), "table": table(frame)}


def missing_floors(
    frame: pd.DataFrame, readouts: Sequence[str], judges: Sequence[Mapping[str, Any]] = ()
) -> list[tuple[str, str]]:
    """(what was not measured, how to) for every source of noise that the readouts can have.

    Judges that have none by construction (`noiseless`), and people, whose labels are given once, cannot be repeated.
    """
    sampled = any(readout.startswith("open_ended") for readout in readouts)
    repeatable = [judge for judge in judges if not judge.get("noiseless") and judge.get("kind") != "human"]
    can_have = {"sampling": sampled, "judge": sampled and bool(repeatable or not judges), "training": True}
    possible = [source for source in NOISE if can_have[source]]
    return [NOISE[source] for source in possible if source not in set(frame.get("source", ()))]


def noiseless(judges: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of judges whose own noise is 0 by construction."""
    return [judge["name"] for judge in judges if judge.get("noiseless")]


def judges(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each judge with what it is in a line, and its held-out quality (`judges.quality`) where that was measured."""
    out = []
    for judge in found:
        topics = (judge.get("quality") or {}).get("topics") or []
        whole = next((row for row in topics if row["topic"] == POOLED), None)
        named = [(name, judge.get(name)) for name in ("model", "path", "template", "hash")]
        about = [str(judge.get("kind", "")), *(f"{name} {value}" for name, value in named if value)]
        columns = ["topic", "n", "accuracy", "macro_f1", "direction", "ece", "brier"]
        out.append(
            {
                "name": judge["name"],
                "kind": judge.get("kind"),
                "about": ", ".join(part for part in about if part),
                "quality": whole,
                "topics": table(pd.DataFrame(topics)[columns]) if whole else None,
            }
        )
    return out


def agreement(frame: pd.DataFrame) -> dict[str, Any]:
    """One row a pair of judges, its measures side by side."""
    order = list(dict.fromkeys(frame["measure"]))
    counts = frame.groupby(["judge_a", "judge_b"])["n_responses"].max()
    wide = frame.pivot(index=["judge_a", "judge_b"], columns="measure", values="value")[order]
    return table(wide.assign(responses=counts).reset_index())


def agreed(frame: pd.DataFrame) -> str:
    """The agreement of the judges in a few words: of all where there are three or more."""
    if frame.empty:
        return ""
    last = frame[(frame[["judge_a", "judge_b"]] == frame[["judge_a", "judge_b"]].iloc[-1]).all(axis=1)]
    values = dict(zip(last["measure"], last["value"], strict=True))
    kappa = values.get("cohen_kappa", values["fleiss_kappa"])
    return f"they agree on {percent(values['percent'])} of the responses, κ {kappa:.2f}".replace("-", "−")


def confusions(judgements: pd.DataFrame | None) -> list[tuple[str, dict[str, Any]]]:
    """How often each pair of judges gave which labels to the same response."""
    out = []
    if judgements is not None:
        for a, b in itertools.combinations(judgements["judge"].unique(), 2):
            counts = confusion(judgements, a, b).rename_axis(index="label").reset_index()
            out.append((f"Labels of {a} (rows) and {b} (columns)", table(counts)))
    return out


def robustness(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, str, dict[str, Any]]]:
    """(title, what it says, table) of what is known; the whole tables are in the CSV files of the same names."""
    out = []
    if "robustness" in tables:
        found = factor_summary(tables["robustness"])
        found = found[(found["topic"] == POOLED) & (found["stance"] == "graded")].drop(columns=["topic", "stance"])
        text = (
            "Drift of the graded stance, all topics, among questions with one level of a factor only: the smallest and "
            "the largest over its levels. Where they differ in sign, the change belongs to the form of the question."
        )
        out.append(("By the way of asking", text, table(found)))
    if "consistency" in tables:
        means = tables["consistency"]
        means = means[(means["proposition"] == POOLED) & (means["topic"] == POOLED)].dropna(subset="consistency")
        keys = ["readout", "stage"]
        columns = [end.set_index(keys)["consistency"] for end in _stage_ends(means)]
        found = pd.concat(columns, axis=1, keys=["first", "last"])
        text = (
            "Whether support of a proposition goes with opposition to its opposite: 1 fully, 0 where a model agrees "
            "with whatever is asked, or with nothing. Mean over all topics, at the first and the last snapshot."
        )
        out.append(("Consistency", text, table(found.reset_index())))
    if "readout_correlation" in tables:
        found = tables["readout_correlation"]
        found = found[found["at"] != "first"]
        found = _with_intervals(found, ("pearson", "spearman"))
        found = found[
            ["stage", "readout_a", "readout_b", "at", "n_probes"]
            + ["pearson", "pearson_interval", "spearman", "spearman_interval"]
        ]
        text = (
            "Correlation over probes of the graded stance between two readouts, such as forced choice and free "
            "responses, with 95% intervals: at the last snapshot, and of the change."
        )
        out.append(("Do the readouts agree?", text, table(found)))
    return out


def _stage_ends(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each stage's first snapshot, and those of its last."""
    steps = frame.groupby("stage")["step"]
    return [frame[frame["step"] == steps.transform(which)] for which in ("min", "max")]


def audit(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, dict[str, Any], bool]]:
    """(title, table, shown open) of the tables of `vdjax.audit`."""
    tables = {name: found for name, found in tables.items() if len(found)}
    out = []
    if "against_drift" in tables:
        found = _with_intervals(tables["against_drift"], ("gap", "drift"))
        names = ["stage", "topic", "side", "n", "gap", "gap_interval", "drift", "drift_interval", "agrees", "certain"]
        found = found[names]
        out.append(("What the data predict, and the measured drift", table(found), True))
    if "gaps" in tables:
        found = _with_intervals(tables["gaps"], ("signed",))
        found = found[["data", "topic", "n", "signed", "signed_interval", "p", "js", "js_null"]]
        out.append(("Value gaps of preference data", table(found), "against_drift" not in tables))
    if "values" in tables:
        names = ["data", "topic", "side", "n", *(name for name in QUANTITIES if name in tables["values"])]
        out.append(("Stances of the data by topic", table(tables["values"][names]), False))
    return out


def _with_intervals(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Columns NAME_low and NAME_high as one column of text."""
    out = frame.copy()
    for name in names:
        ends = zip(frame[f"{name}_low"], frame[f"{name}_high"], strict=True)
        out[f"{name}_interval"] = [interval(low, high).replace("-", "−") for low, high in ends]
    return out


def examples(hits: pd.DataFrame | None, each: int = 2) -> list[dict[str, Any]]:
    """The examples of the data that are most about a topic, each with its responses and their likeliest labels."""
    if hits is None or hits.empty:
        return []
    out = []
    for (data, topic), rows in hits.groupby(["data", "topic"], sort=False):
        rows = rows.assign(answer=rows.get("answer", rows["id"]))  # of a conversation several may be there
        best = rows.sort_values("score", ascending=False, kind="stable")["answer"].unique()[:each]
        for name in best:
            found = rows[rows["answer"] == name]
            sides = [
                {"side": row["side"], "label": max(verdicts.LABELS, key=row.__getitem__), "text": row["response"]}
                for row in found.to_dict("records")
            ]
            first = found.iloc[0]
            out.append(
                {"data": data, "topic": topic, "prompt": first["prompt"], "proposition": first["proposition"]}
                | {"sides": sides}
            )
    return out


def agree(tables: Mapping[str, pd.DataFrame]) -> str:
    """How often the data's gaps have the sign of the drift, in a sentence."""
    found = tables.get("against_drift")
    if found is None or found.empty:
        return ""
    return data_gaps.sentence(data_gaps.agreement(found)).replace("-", "−") + "."


def gaps(tables: Mapping[str, pd.DataFrame]) -> dict[tuple[str, str], tuple[str, float]]:
    """{(stage, topic): (what, value toward the topic)} of the stage's data."""
    found = tables.get("against_drift")
    if found is None or found.empty:
        return {}
    names = {"sft": "mean stance"}
    return {(row.stage, row.topic): (names.get(row.side, "value gap"), row.gap) for row in found.itertuples()}
