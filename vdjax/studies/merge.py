"""What a study's experiments measured, put together: DIR/report.html, DIR/tables, DIR/figures.

Made from the files in the experiments' workdirs alone. A cell is measured once with each seed; every number here is the
mean over the seeds, with an interval: `over_seeds` says of what.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import pandas as pd
from ml_collections import ConfigDict

from vdjax.drift import noise
from vdjax.drift.scores import POOLED
from vdjax.errors import UserError
from vdjax.files import read_table, write_whole
from vdjax.studies.grid import Cell

TABLES = ("drift", "stances", "distances")
AXES = ["model", "sft", "objective", "preference"]  # of a cell, but for the seed
WHAT = ["readout", *AXES, "topic", "stance"]


class Merged(NamedTuple):
    """The tables of all finished experiments, each with the columns of `Cell` in front.

    Columns otherwise: those of an experiment's drift/drift.csv, stances.csv and distances.csv, and of gaps those of
    audit/against_drift.csv about preference data (empty where no experiment was audited).
    """

    drift: pd.DataFrame
    stances: pd.DataFrame
    distances: pd.DataFrame
    gaps: pd.DataFrame
    finished: list[str]  # trunks
    unfinished: list[str]


def write(
    workdir: Path,
    experiments: Mapping[str, ConfigDict],
    cells: Sequence[Cell],
    command: str,
    finished: Callable[[ConfigDict, Path], bool],
) -> None:
    """Writes the merged report on the experiments in WORKDIR/NAME that are finished, and says where it is."""
    from vdjax.studies import page  # draws: not needed to know what is in a study

    if jax.process_index():
        return
    done = [name for name, config in experiments.items() if finished(config, workdir / name)]
    if not done:
        return print("no experiment is finished: there is nothing to report on yet")
    merged = read(workdir, done, [name for name in experiments if name not in done], cells)
    for path, content in page.files(merged, cells, command).items():
        write_whole(workdir / path, content)
    print(f"report: {workdir / 'report.html'} ({len(done)} of {len(experiments)} experiments)")


def read(workdir: Path, finished: list[str], unfinished: list[str], cells: Sequence[Cell]) -> Merged:
    """The tables of the finished experiments; stages that are no cell (pretraining) are left out.

    Raises:
      UserError: a table that is not there, or lacks a stage or a column.
    """
    keys = pd.DataFrame(cells)
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in (*TABLES, "gaps")}
    for trunk in finished:
        own = keys[keys["trunk"] == trunk]
        for name in TABLES:
            found[name].append(_table(workdir / trunk / "drift" / f"{name}.csv", own))
        audited = workdir / trunk / "audit" / "against_drift.csv"
        if audited.exists():
            gaps = read_table(audited)
            found["gaps"].append(own.merge(gaps[gaps["side"] != "sft"], on="stage", how="inner"))
    tables = {name: _primary_first(pd.concat(parts)) for name, parts in found.items() if parts}
    return Merged(
        **{name: tables.get(name, pd.DataFrame(columns=[*Cell._fields])) for name in (*TABLES, "gaps")},
        finished=finished,
        unfinished=unfinished,
    )


def _primary_first(table: pd.DataFrame) -> pd.DataFrame:
    """One readout after the other, in the order in which the experiments have them."""
    if "readout" not in table:
        return table.reset_index(drop=True)
    order = {readout: i for i, readout in enumerate(table["readout"].unique())}
    return table.sort_values("readout", key=lambda column: column.map(order), kind="stable", ignore_index=True)


def _table(file: Path, cells: pd.DataFrame) -> pd.DataFrame:
    if not file.exists():
        raise UserError(f"{file} is missing; the command of its experiment writes it again")
    table = read_table(file)
    missing = set(cells["stage"]) - set(table.get("stage", ()))
    if missing:
        raise UserError(f"{file}: no row of stage {min(missing)!r}; the command of its experiment writes it again")
    return cells.merge(table, on="stage", how="inner")


def over_seeds(drift: pd.DataFrame) -> pd.DataFrame:
    """One row for each readout, cell (of all seeds), topic and stance, in the order of `drift`.

    Columns: seeds; magnitude (mean), low, high (least and greatest); ci_low, ci_high: a 95% interval for other
    `ci_over`, which is "propositions" with one seed, whose own bootstrap interval it is, and "seeds" with several, mean
    +- floor; floor, the noise floor of training for the mean of the seeds (see `training_floors`; NaN with one seed);
    significant: in how many seeds the drift is so, in the direction of the mean; floored, beyond: in how many it has a
    noise floor of its own experiment, and is beyond that; drift_time, drift_time_paired: means over the `timed` seeds
    that have them, with NAME_low and NAME_high: with one seed the interval of the drift time (the paired has none),
    with several the least and the greatest, as a time is that of one of a few snapshots and a t interval would leave
    [0, 1]; real: significant in every seed and beyond every floor that was measured, at least one.
    """
    direction = drift.groupby(WHAT)["magnitude"].transform("mean")
    groups = drift.assign(
        significant=drift["significant"].astype(bool) & (drift["magnitude"] * direction > 0),
        beyond=drift["magnitude"].abs() > drift["floor"],
    ).groupby(WHAT, sort=False)
    means = groups.agg(
        seeds=("seed", "nunique"),
        magnitude=("magnitude", "mean"),
        low=("magnitude", "min"),
        high=("magnitude", "max"),
        significant=("significant", "sum"),
        floored=("floor", "count"),
        beyond=("beyond", "sum"),
        ci_low=("ci_low", "mean"),
        ci_high=("ci_high", "mean"),
        drift_time=("drift_time", "mean"),
        drift_time_low=("drift_time_low", "min"),
        drift_time_high=("drift_time_high", "max"),
        drift_time_least=("drift_time", "min"),
        drift_time_greatest=("drift_time", "max"),
        drift_time_paired=("drift_time_paired", "mean"),
        drift_time_paired_low=("drift_time_paired", "min"),
        drift_time_paired_high=("drift_time_paired", "max"),
        timed=("drift_time", "count"),
    ).reset_index()
    means = _with_intervals(means.merge(training_floors(drift), on=WHAT, how="left"))
    measured = (means["floored"] > 0) | means["floor"].notna()
    within = (means["beyond"] < means["floored"]) | (means["magnitude"].abs() <= means["floor"])
    return means.assign(real=(means["significant"] == means["seeds"]) & measured & ~within)


def _with_intervals(means: pd.DataFrame) -> pd.DataFrame:
    """Of several seeds: what differs from seed to seed, not the mean of their own intervals."""
    several = means["seeds"] > 1
    means["ci_over"] = several.map({True: "seeds", False: "propositions"})
    for end, sign, extreme in (("low", -1, "least"), ("high", 1, "greatest")):
        means[f"ci_{end}"] = means[f"ci_{end}"].mask(several, means["magnitude"] + sign * means["floor"])
        means[f"drift_time_{end}"] = means[f"drift_time_{end}"].mask(several, means.pop(f"drift_time_{extreme}"))
        means[f"drift_time_paired_{end}"] = means[f"drift_time_paired_{end}"].where(several)
    return means


def training_floors(drift: pd.DataFrame) -> pd.DataFrame:
    """WHAT and `floor`: what the mean drift of n seeds stays below in 95% of cases where nothing drifts but by chance.

    The floor of one run, t s with s pooled over topics (see `vdjax.drift.noise`), over sqrt(n). So mean +- floor is
    also a 95% t interval of the mean over seeds.
    """
    tables = []
    for cell, rows in drift.groupby(AXES, sort=False):
        found = noise.pooled_floors(rows.assign(again=rows["seed"]))
        found["floor"] /= found["n"] ** 0.5
        tables.append(found.assign(**dict(zip(AXES, cell, strict=True))))
    return pd.concat(tables)[[*WHAT, "floor"]]


def ends_over_seeds(stances: pd.DataFrame) -> pd.DataFrame:
    """The value at the first and the last snapshot: one row as in `over_seeds`, columns before and after (means)."""
    ordered = stances.sort_values("step", kind="stable")
    by_seed = ordered.groupby([*WHAT, "seed"], sort=False)["value"].agg(before="first", after="last")
    means = by_seed.groupby(level=WHAT, sort=False).mean().reset_index()
    order = {key: i for i, key in enumerate(stances[WHAT].drop_duplicates().itertuples(index=False, name=None))}
    rank = [order[key] for key in means[WHAT].itertuples(index=False, name=None)]
    return means.assign(rank=rank).sort_values("rank", ignore_index=True).drop(columns="rank")


def curves_over_seeds(stances: pd.DataFrame) -> pd.DataFrame:
    """Values along training: one row for each of `over_seeds`' and each `share` of the stage's steps.

    Columns: share in [0, 1], value (mean over seeds), low, high: the least and the greatest, with one seed its own 95%
    interval.
    """
    last = stances.groupby(["trunk", "stage"])["step"].transform("max")
    # All seeds of a cell have the same number of steps, and so the same shares.
    shares = stances.assign(share=(stances["step"] / last.where(last > 0, 1)).round(6))
    alone = shares.groupby(WHAT)["seed"].transform("nunique") == 1
    ends = {end: shares[f"ci_{end}"].where(alone, shares["value"]) for end in ("low", "high")}
    groups = shares.assign(**ends).groupby([*WHAT, "share"], sort=False)
    return groups.agg(value=("value", "mean"), low=("low", "min"), high=("high", "max")).reset_index()


def gap_points(merged: Merged) -> pd.DataFrame:
    """One row for each readout, cell and topic that has both: `gap` of the data, and `drift` of the graded stance.

    The gap is the graded stance of chosen minus that of rejected responses (vdjax.audit); means over the seeds, and of
    the gap's interval too. agrees: they have the same sign. certain: the interval leaves out 0, and the drift is
    significant in every seed and in one direction.
    """
    if merged.gaps.empty:
        return merged.gaps
    means = over_seeds(merged.drift)
    moved = means[means["stance"] == "graded"].rename(columns={"magnitude": "drift"})
    gaps = merged.gaps.groupby([*AXES, "topic"], sort=False)[["gap", "gap_low", "gap_high"]].mean().reset_index()
    points = moved.merge(gaps, on=[*AXES, "topic"]).dropna(subset=["gap", "drift"])
    certain = (points["gap_low"] * points["gap_high"] > 0) & (points["significant"] == points["seeds"])
    return points.assign(agrees=points["gap"] * points["drift"] > 0, certain=certain)


def topics_of(frame: pd.DataFrame) -> list[str]:
    """All topics, the pooled one first."""
    return sorted(frame["topic"].unique(), key=lambda topic: (topic != POOLED, topic))
