"""Noise floors: how large a drift the measurement's or the training's own noise makes where nothing drifts.

Three sources, each measured by doing the same thing again and looking at the spread of the drift magnitude D:

- "sampling": first and last snapshot answered again with other seeds (replicate 1, 2, ...);
- "judge": the same responses judged again (repeat 1, 2, ...);
- "training": the whole experiment with other seeds. This holds the noise of sampling too, as new seeds sample anew.

The formula. Let D_r, r = 0..R, be the measurement and its repeats: D_r = true drift + noise of standard deviation
sigma. Each D_r is already a difference of two snapshots, so its spread is that of a drift and no factor sqrt(2) is
needed. With s^2 = sum_r (D_r - mean)^2 / R, a further repeat without true drift has D / s ~ t_R (normal noise), so it
exceeds

    floor = t_{0.975, df} s

in 5% of repeats. Topics of one readout, stage and quantity are pooled, s^2 = sum of squares / sum of the topics' R: one
topic's two or three repeats tell little, but their noise is assumed alike. Sampling seeds are each probe's own, so
there the topics' noise is independent, df is the sum of the topics' R, and for topic "all", the mean of T topics, the
floor is that of the topics / sqrt(T). What a judge's repeat or a training seed does may be common to all topics; there
df is one topic's R, however many topics there are, and the pooled rows stand by themselves. The measurement is one of
the D_r, so it exceeds its own floor in a little less than 5% of runs, the more repeats or topics the closer to it.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import scipy

from vdjax.drift.scores import ASKED, POOLED, measured, stage_scores, topic_units
from vdjax.errors import UserError, nearest

COLUMNS = ("readout", "stage", "topic", "stance", "source", "floor", "n")
SOURCES = {
    "sampling": "the first and last snapshot were not sampled again (config.probes.replicates)",
    "judge": "no judge repeated its judgements (repeats of a judge; one that is asked for label texts, as trained "
    "judges are, always judges alike: its own noise is 0)",
    "training": "one training run was made (config.seeds)",
}
EXCEEDED = 0.05  # share of repeats without drift that exceed the floor
RESEEDED = ("seed", "readout", "stage", "topic", "stance", "magnitude")
KEYS = ["readout", "stage", "topic", "stance"]


def floors(
    scores: pd.DataFrame, drift: pd.DataFrame, reseeded: pd.DataFrame | None
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The floor of each row of `drift` by source (COLUMNS; n: repeats, the measurement among them), and notes.

    Args:
      scores: of all replicates and repeats.
      drift: of the measurement (KEYS, magnitude).
      reseeded: of the same experiment with other seeds (RESEEDED); None: none.

    Raises:
      UserError: `reseeded` lacks a column.
    """
    notes: list[str] = []
    repeats = {
        "sampling": _measured_again(scores, "replicate", notes),
        "judge": _measured_again(scores, "repeat", notes),
        "training": [drift.assign(again=0), *([] if reseeded is None else [_of_other_seeds(reseeded)])],
    }
    tables = []
    for source, frames in repeats.items():
        found = pooled_floors(pd.concat(frames), source == "sampling") if len(frames) > 1 else pd.DataFrame()
        if found.empty:
            notes.append(f"The noise of {source} is not known: {SOURCES[source]}.")
            continue
        found = found[found.set_index(KEYS).index.isin(drift.set_index(KEYS).index)]
        counts = sorted(set(found["n"]))
        notes.append(
            f"The noise of {source} was measured for {', '.join(found['readout'].unique())}, by "
            f"{' or '.join(map(str, counts))} repeats, the measurement among them."
        )
        tables.append(found.assign(source=source)[list(COLUMNS)])
    empty = pd.DataFrame({c: pd.Series(dtype=float if c in ("floor", "n") else object) for c in COLUMNS})
    return pd.concat(tables, ignore_index=True) if tables else empty, tuple(notes)


def magnitudes(scores: pd.DataFrame) -> pd.DataFrame:
    """The drift magnitude of every readout, stage, topic and quantity (KEYS, magnitude), from rows of one repeat."""
    tables = []
    for (readout, stage), rows in scores.groupby(["readout", "stage"], sort=False):
        asked = stage_scores(rows, readout, stage)
        for topic in [*sorted(rows["topic"].unique()), POOLED]:
            about = topic_units(asked, topic)
            assert about is not None
            values = about.mean()[:, 0]
            keys = {"readout": readout, "stage": stage, "topic": topic, "stance": asked.quantities}
            tables.append(pd.DataFrame({**keys, "magnitude": values[-1] - values[0]}))
    return pd.concat(tables, ignore_index=True)


def _measured_again(scores: pd.DataFrame, what: str, notes: list[str]) -> list[pd.DataFrame]:
    """The drifts of the measurement (`again` 0) and of each replicate or repeat of it, where there are any."""
    other = {"replicate": "repeat", "repeat": "replicate"}[what]
    out = []
    for _, of_stage in scores[scores[other] == 0].groupby(["readout", "stage"], sort=False):
        if not (of_stage[what] > 0).any():
            continue
        base = measured(of_stage)
        ends = [base["step"].min(), base["step"].max()]
        base = base[base["step"].isin(ends)]
        for again, rows in _repeats(of_stage, what):
            rows = rows[rows["step"].isin(ends)]
            if what == "repeat":  # a degenerate response is not judged, so not judged again
                degenerate = base[base["degenerate"] == 1]
                rows = pd.concat([rows, degenerate]).drop_duplicates(["step", *ASKED], keep="first")
            # A response that was judged again at one end alone has no change.
            rows = rows[rows.groupby(list(ASKED))["step"].transform("nunique") == 2] if len(rows) else rows
            if rows["step"].nunique() < 2:
                notes.append(
                    f"Readout {base['readout'].iloc[0]!r}, stage {base['stage'].iloc[0]!r}: {what} {again} lacks the "
                    "first or the last snapshot and says nothing of the noise."
                )
                continue
            out.append(magnitudes(rows).assign(again=again))
        out.append(magnitudes(base).assign(again=0))
    return out


def _repeats(rows: pd.DataFrame, what: str) -> Iterator[tuple[int, pd.DataFrame]]:
    for again in sorted(rows[what].unique()):
        if again > 0:
            yield int(again), rows[rows[what] == again]


def _of_other_seeds(reseeded: pd.DataFrame) -> pd.DataFrame:
    missing = [c for c in RESEEDED if c not in reseeded.columns]
    if missing:
        raise UserError(f"reseeded: missing column {missing[0]!r}{nearest(missing[0], reseeded.columns)}")
    return reseeded.assign(again=reseeded["seed"].astype(str))


def pooled_floors(drifts: pd.DataFrame, independent: bool = False) -> pd.DataFrame:
    """KEYS, floor and n, from the drift magnitudes of all repeats. Topics pooled as the module says."""
    drifts = drifts.dropna(subset="magnitude")
    each = drifts.groupby(KEYS, sort=False)["magnitude"].agg(["var", "count"]).reset_index()
    each = each[each["count"] > 1].rename(columns={"count": "n"})
    each["df"] = each["n"] - 1
    each["squares"] = each["var"] * each["df"]
    alike = each.assign(pooled=each["topic"] == POOLED).groupby(["readout", "stage", "stance", "pooled"])
    total = alike["df"].transform("sum")
    df = total if independent else alike["df"].transform("max")
    each["floor"] = scipy.stats.t.isf(EXCEEDED / 2, df) * np.sqrt(alike["squares"].transform("sum") / total)
    if independent:
        topics = each[each["topic"] != POOLED].groupby(["readout", "stage", "stance"])["floor"].agg(["first", "size"])
        of_row = topics.reindex(pd.MultiIndex.from_frame(each[["readout", "stage", "stance"]]))
        pooled = (of_row["first"] / np.sqrt(of_row["size"])).to_numpy()
        each["floor"] = each["floor"].where(each["topic"] != POOLED, pooled)
    return each[[*KEYS, "floor", "n"]]
