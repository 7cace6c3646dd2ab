"""Is a drift more than noise? Intervals, p-values, effect sizes and noise floors for every readout, stage, topic and
quantity of a run. Every readout is analysed by itself.

The unit of resampling is the proposition, not the probe: wordings of one proposition are not independent, and neither
are responses to one wording (drift/bootstrap.py says why units are carried whole). The pooled rows of topic "all"
resample topics where there are enough of them, else propositions within these topics. All numbers of one stage and
topic come from the same resampled units, at every snapshot (paired), so that a difference of two snapshots is not
blurred by propositions that differ from each other but do not move.

- Intervals: 95% bootstrap, percentile. Percentile rather than BCa because one set of resamples and one pair of
  quantiles then serve levels, differences and drift time alike; because drift time is discrete, where BCa is undefined;
  and because BCa's acceleration is a skewness estimated from some ten propositions. The quantiles are those of the
  *expanded* percentile interval (`bootstrap.expanded_level`): with few propositions the plain one is too narrow.
- Intervals for these very questions (`ci_low_questions`): only responses are resampled, each within its question.
- p-values: paired sign-flip permutation test over the units (scipy.stats.permutation_test), two-sided.
- q-values (Benjamini-Hochberg) and `p_holm`: within a family. A family is the comparisons of one readout, of its
  topics or of the pooled rows (which repeat the same data), of the three stances or of the other quantities. The
  Jensen-Shannon and the total-variation distances of these topics or pooled rows are a family each.
- `real`: significant, and larger than what noise alone does (drift/noise.py); None where no noise was measured.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from vdjax.drift import distances, metrics, noise
from vdjax.drift.bootstrap import Bootstrap, bootstrap_means, expanded_level, strata
from vdjax.drift.metrics import STANCES
from vdjax.drift.scores import (
    POOLED,
    StageInfo,
    StageScores,
    TopicUnits,
    check_scores,
    measured,
    responses,
    stage_scores,
    topic_units,
)
from vdjax.drift.significance import effect_sizes, holm, q_values, sign_flip_p_values, smallest_p_value

__all__ = ["POOLED", "Analysis", "analyse", "smallest_p_value"]

SIGNIFICANCE = 0.05
STANCE_COLUMNS = (
    ("readout", "stage", "step", "topic", "stance", "value", "ci_low", "ci_high", "n_probes")
    + ("value_uncorrected", "ci_low_uncorrected", "ci_high_uncorrected")
)  # fmt: skip
TIMES = ("drift_time", "drift_time_low", "drift_time_high", "drift_time_paired")
DRIFT_COLUMNS = (
    ("readout", "stage", "topic", "stance", "from_step", "to_step", "magnitude", "ci_low", "ci_high", "p_value")
    + ("q_value", "drift_time", "drift_time_low", "drift_time_high", "significant")
    + ("magnitude_uncorrected", "ci_low_uncorrected", "ci_high_uncorrected", "p_value_uncorrected")
    + ("q_value_uncorrected", "n_propositions", "drift_time_paired")
    + ("p_holm", "effect_size", "unit", "ci_low_questions", "ci_high_questions", "floor", "floor_source", "real")
)  # fmt: skip


class Analysis(NamedTuple):
    """`stances` has STANCE_COLUMNS, `drift` DRIFT_COLUMNS, `distances` distances.COLUMNS, `floors` noise.COLUMNS;
    `notes` says what was left out or undefined, and why."""

    stances: pd.DataFrame
    drift: pd.DataFrame
    distances: pd.DataFrame
    floors: pd.DataFrame
    notes: tuple[str, ...]


def analyse(
    scores: pd.DataFrame,
    stages: list[StageInfo],
    *,
    seed: int = 0,
    resamples: int = 9999,
    permutations: int = 19999,
    reseeded: pd.DataFrame | None = None,
) -> Analysis:
    """Stance values at every snapshot, and the drift of every stage, with intervals, p- and q-values.

    Args:
      scores: SCORE_COLUMNS at least. Every snapshot of a stage must hold the same rows of the same probes.
      reseeded: the drift of the same experiment with other seeds (not this one's): seed, readout, stage, topic, stance,
        magnitude. None: the noise of training is not known.

    The topic "all" pools all topics, each counting alike. Deterministic in `seed`.

    Raises UserError for missing columns, unknown stages, repeated or missing rows and values that are no distribution.
    """
    check_scores(scores, stages)
    notes: list[str] = []
    if (scores["topic"] == POOLED).any():
        notes.append(f"The topic {POOLED!r} is listed as '{POOLED} (topic)'; {POOLED!r} stands for all topics pooled.")
        scores = scores.assign(topic=scores["topic"].replace(POOLED, f"{POOLED} (topic)"))
    tables: dict[str, list[pd.DataFrame]] = {"stances": [], "drift": [], "distances": []}
    readouts = scores["readout"].unique()
    for readout in readouts:
        of_readout = f"Readout {readout!r}: " if len(readouts) > 1 else ""
        frame = measured(scores[scores["readout"] == readout])
        silent: list[str] = []
        for stage in stages:
            rows = frame[frame["stage"] == stage.name]
            if rows.empty:
                notes.append(f"{of_readout}Stage {stage.name!r} was not probed.")
                continue
            asked = stage_scores(rows, readout, stage.name)
            if len(asked.steps) < 2:
                note = f"Stage {stage.name!r} has one probed snapshot: no drift can be measured in it."
                notes.append(of_readout + note)
            if asked.without_stance:
                text = f"{stage.name} {asked.without_stance:,} of {len(asked.rows) * len(asked.steps):,} rows"
                silent.append(text + (f" ({asked.unstanced} probes whole)" if asked.unstanced else ""))
            for table, found in _stage_tables(stage, asked, scores, seed, resamples, permutations).items():
                tables[table] += found
        if silent:
            notes.append(
                f"{of_readout}Rows that took no stance are left out of graded, and at every snapshot the probes that "
                f"took none at some snapshot: {', '.join(silent)}."
            )
    drift = _joined(tables["drift"], DRIFT_COLUMNS)
    thin = sorted({t for t, n in zip(drift["topic"], drift["n_propositions"], strict=True) if n < 2})
    if thin:
        notes.append(f"Fewer than two propositions, so no interval, p-value or drift time: {', '.join(thin)}.")
    missing = [t for s in stages for t in _not_probed(scores, s)]
    floors, floor_notes = noise.floors(scores, drift, reseeded)
    drift = _with_floors(_with_corrections(drift), floors)
    return Analysis(
        _joined(tables["stances"], STANCE_COLUMNS), drift, _distances(tables["distances"]), floors,
        tuple(dict.fromkeys([*notes, *missing, *floor_notes])),
    )  # fmt: skip


def _stage_tables(
    stage: StageInfo, asked: StageScores, scores: pd.DataFrame, seed: int, resamples: int, permutations: int
) -> dict[str, list[pd.DataFrame]]:
    """The tables of one readout and stage, topic by topic; drift and distances where there are two snapshots."""
    out: dict[str, list[pd.DataFrame]] = {"stances": [], "drift": [], "distances": []}
    questions: list[Bootstrap] = []
    sizes: list[Int[np.ndarray, " H"]] = []
    for topic in [*sorted(scores["topic"].unique()), POOLED]:
        about = topic_units(asked, topic)
        if about is None:
            continue
        # Seeded by topic alone: with the same propositions, stages that share a snapshot share its interval.
        rng = np.random.default_rng([seed, zlib.crc32(topic.encode())])
        columns = np.concatenate([about.values, about.values[:, -1:] - about.values[:, :1]], axis=1)
        boot = bootstrap_means(about.columns(columns), rng, resamples)
        out["stances"].append(_stance_rows(asked, about, boot))
        if len(asked.steps) < 2:
            continue
        drift = _drift_rows(stage, asked, about, boot, rng, permutations)
        if asked.samples:
            # The pooled value is the mean of the topics', whose responses are drawn apart: so is its distribution.
            if topic == POOLED:
                low, high = _question_interval([b.distribution for b in questions], np.concatenate(sizes))
            else:
                changes = responses(asked, topic)
                assert changes is not None
                questions.append(bootstrap_means(changes, rng, resamples))
                sizes.append(np.bincount(strata(changes.parents)))
                low, high = questions[-1][:2]
            drift["ci_low_questions"], drift["ci_high_questions"] = low, high
        out["drift"].append(drift)
        ends = boot.distribution.reshape(len(asked.steps) + 1, 2, len(asked.quantities), -1)[[0, -2], 0]
        moved = distances.row(asked, about, ends, boot.level[0], rng, permutations)
        out["distances"].append(pd.DataFrame([moved], columns=list(distances.COLUMNS)))
    return out


def _question_interval(
    topics: list[Float[np.ndarray, "Q R"]], sizes: Int[np.ndarray, " H"]
) -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    undefined = [np.isnan(t).all(axis=1) for t in topics]  # a quantity without a value in a topic counts in the others
    total = sum(np.where(u[:, None], 0, t) for u, t in zip(undefined, topics, strict=True))
    with np.errstate(invalid="ignore"):
        pooled = total / (len(topics) - np.sum(undefined, axis=0))[:, None]
    tail = (1 - expanded_level(sizes)) / 2
    low, high = np.quantile(pooled, [tail, 1 - tail], axis=1)
    return low, high


def _stance_rows(asked: StageScores, about: TopicUnits, boot: Bootstrap) -> pd.DataFrame:
    """K * Q rows. `boot` has the K snapshots and the change, corrected and as asked, of each quantity."""
    n_snapshots, q = len(asked.steps), len(asked.quantities)
    low, high = (bound.reshape(n_snapshots + 1, 2, q)[:-1] for bound in (boot.low, boot.high))
    values = about.mean()
    return pd.DataFrame(
        {
            "readout": asked.readout, "stage": asked.stage, "topic": about.topic, "n_probes": about.n_probes,
            "step": np.repeat(asked.steps, q), "stance": np.tile(asked.quantities, n_snapshots),
            "value": values[:, 0].ravel(), "ci_low": low[:, 0].ravel(), "ci_high": high[:, 0].ravel(),
            "value_uncorrected": values[:, 1].ravel(),
            "ci_low_uncorrected": low[:, 1].ravel(), "ci_high_uncorrected": high[:, 1].ravel(),
        }
    )  # fmt: skip


def _drift_rows(
    stage: StageInfo,
    asked: StageScores,
    about: TopicUnits,
    boot: Bootstrap,
    rng: np.random.Generator,
    permutations: int,
) -> pd.DataFrame:
    """Q rows; see `_stance_rows` for `boot`."""
    shape = (len(asked.steps) + 1, 2, len(asked.quantities))
    values = about.mean()
    low, high, level = (x.reshape(shape) for x in (boot.low, boot.high, boot.level))
    distribution = boot.distribution.reshape(*shape, -1)
    moved = about.values[:, -1] - about.values[:, 0]
    p_values = sign_flip_p_values(about.columns(moved), rng, permutations).reshape(shape[1:])
    magnitude = metrics.drift_magnitude(values)
    times = [
        drift_times(
            values[:, 0, i], asked.steps, low[:-1, 0, i], high[:-1, 0, i], distribution[:-1, 0, i], level[-1, 0, i],
            stage.total_steps,
        ) if p_values[0, i] < SIGNIFICANCE else dict.fromkeys(TIMES, np.nan)  # q >= p: it will not be shown
        for i in range(shape[2])
    ]  # fmt: skip
    return pd.DataFrame(
        {
            "readout": asked.readout, "stage": stage.name, "topic": about.topic, "stance": asked.quantities,
            "from_step": asked.steps[0], "to_step": asked.steps[-1],
            "magnitude": magnitude[0], "ci_low": low[-1, 0], "ci_high": high[-1, 0], "p_value": p_values[0],
            "magnitude_uncorrected": magnitude[1], "p_value_uncorrected": p_values[1],
            "ci_low_uncorrected": low[-1, 1], "ci_high_uncorrected": high[-1, 1],
            "n_propositions": about.n_propositions, "unit": about.unit, "effect_size": effect_sizes(moved[:, 0]),
            "ci_low_questions": np.nan, "ci_high_questions": np.nan,
            **{name: [t[name] for t in times] for name in TIMES},
        }
    )  # fmt: skip


def drift_times(
    values: Float[np.ndarray, " K"],
    steps: Int[np.ndarray, " K"],
    low: Float[np.ndarray, " K"],
    high: Float[np.ndarray, " K"],
    distribution: Float[np.ndarray, "K R"],
    level: float,
    total_steps: int,
) -> dict[str, float]:
    """Drift time, its interval, and the paired drift time of one quantity (TIMES).

    The interval: the drift time of every resample, with the half-widths of the extreme's interval held at those of
    the full sample (resampling each resample again would cost its square and change little).

    The paired drift time: the first step whose paired difference to the extreme snapshot has an interval that holds
    zero. Where propositions differ much from each other, the extreme's own interval is wide enough to hold a whole
    significant drift, and the paper's drift time is early, down to 0; the paired one still tells early from late. In
    the simulation of the tests (a ramp that ends at a snapshot) it is on average within one snapshot interval of the
    truth; the paper's is so only where propositions differ little beside the drift.
    """
    if np.isnan(low).any():
        return dict.fromkeys(TIMES, np.nan)
    index = metrics.extreme_index(values)
    extreme, extreme_low, extreme_high = (metrics.at_snapshot(x, index) for x in (values, low, high))
    time = metrics.drift_time(values, steps, extreme_low, extreme_high, total_steps)

    resampled = metrics.at_snapshot(distribution, metrics.extreme_index(distribution))  # [R]
    resampled_time = metrics.drift_time(
        distribution, steps, resampled + (extreme_low - extreme), resampled + (extreme_high - extreme), total_steps
    )
    tail = (1 - level) / 2
    # inverted_cdf: a quantile of drift times is a snapshot's time, never one in between.
    time_low, time_high = np.quantile(resampled_time, [tail, 1 - tail], method="inverted_cdf")

    gap_low, gap_high = np.quantile(distribution - distribution[index], [tail, 1 - tail], axis=1)
    paired = steps[((gap_low <= 0) & (gap_high >= 0)).argmax()] / total_steps
    return dict(zip(TIMES, (float(time), float(time_low), float(time_high), float(paired)), strict=True))


def families(table: pd.DataFrame) -> pd.Series:
    """The family of comparisons of each row: readout, topics or pooled, and of drifts stances or other quantities."""
    out = table["readout"].astype(str) + np.where(table["topic"] == POOLED, "/pooled", "/topics")
    return out + np.where(table["stance"].isin(STANCES), "/stances", "/others") if "stance" in table else out


def _corrected(p_values: pd.Series, family: pd.Series, correct: Callable[[np.ndarray], np.ndarray]) -> pd.Series:
    groups = p_values.astype(float).groupby(family, sort=False)
    return groups.transform(lambda p: correct(p.to_numpy())).astype(float)


def _distances(rows: list[pd.DataFrame]) -> pd.DataFrame:
    """All rows, each distance's p-values corrected within its families."""
    table = _joined(rows, distances.COLUMNS)
    family = families(table)
    for name in ("js", "tv"):
        table[f"{name}_q_value"] = _corrected(table[f"{name}_p_value"], family, q_values)
        table[f"{name}_p_holm"] = _corrected(table[f"{name}_p_value"], family, holm)
    return table


def _with_corrections(drift: pd.DataFrame) -> pd.DataFrame:
    """q-values and Holm's within each family, significance, and drift times only where the drift is significant."""
    drift = drift.copy()
    family = families(drift)
    drift["q_value"] = _corrected(drift["p_value"], family, q_values)
    drift["q_value_uncorrected"] = _corrected(drift["p_value_uncorrected"], family, q_values)
    drift["p_holm"] = _corrected(drift["p_value"], family, holm)
    drift["significant"] = (drift["q_value"] < SIGNIFICANCE).astype(bool)
    for column in TIMES:
        drift[column] = drift[column].astype(float).where(drift["significant"])
    return drift


def _with_floors(drift: pd.DataFrame, floors: pd.DataFrame) -> pd.DataFrame:
    """The largest known floor of each drift, its source, and whether the drift is real."""
    keys = ["readout", "stage", "topic", "stance"]
    largest = floors.sort_values("floor", kind="stable").drop_duplicates(keys, keep="last").set_index(keys)
    known = largest.reindex(pd.MultiIndex.from_frame(drift[keys]))
    drift = drift.assign(floor=known["floor"].to_numpy(float), floor_source=known["source"].fillna("").to_numpy(object))
    beyond = drift["significant"] & (drift["magnitude"].abs() > drift["floor"])
    drift["real"] = beyond.astype(object).where(drift["floor"].notna(), None)
    return drift


def _not_probed(scores: pd.DataFrame, stage: StageInfo) -> list[str]:
    probed = scores.loc[scores["stage"] == stage.name, "topic"].unique()
    missing = sorted(set(scores["topic"].unique()) - set(probed), key=str) if len(probed) else []
    return [f"Topic {topic!r} was not probed in stage {stage.name!r}." for topic in missing]


def _joined(tables: list[pd.DataFrame], columns: tuple[str, ...]) -> pd.DataFrame:
    out: Any = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return out.reindex(columns=list(columns))
