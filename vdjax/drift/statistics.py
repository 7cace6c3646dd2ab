"""Is a drift more than noise? Intervals, p-values and q-values for every stage, topic and stance of a run.

The unit of resampling is the proposition, not the probe: wordings of one proposition are not independent. All numbers
of one stage and topic come from the same resampled propositions, at every snapshot (paired), so that a difference of
two snapshots is not blurred by propositions that differ from each other but do not move.

- Intervals: 95% bootstrap over propositions (scipy.stats.bootstrap), percentile. Percentile rather than BCa because
  one set of resamples and one pair of quantiles then serve levels, differences and drift time alike; because drift
  time is discrete, where BCa is undefined; and because BCa's acceleration is a skewness estimated from some ten
  propositions. The quantiles are those of the *expanded* percentile interval (`expanded_level`): with few
  propositions the plain one is too narrow.
- p-values: paired sign-flip permutation test over propositions (scipy.stats.permutation_test), two-sided.
- q-values: Benjamini-Hochberg (scipy.stats.false_discovery_control) over all stage x topic x stance comparisons of
  the run. The pooled rows of topic "all" repeat the same data, so they are a family of their own.
"""

import zlib
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from vdjax.drift import metrics
from vdjax.drift.metrics import STANCES
from vdjax.drift.scores import StageInfo, StageScores, check_scores, proposition_codes, stage_scores

POOLED = "all"
SIGNIFICANCE = 0.05
LEVEL = 0.95
STANCE_COLUMNS = (
    ("stage", "step", "topic", "stance", "value", "ci_low", "ci_high", "n_probes")
    + ("value_uncorrected", "ci_low_uncorrected", "ci_high_uncorrected")
)  # fmt: skip
DRIFT_COLUMNS = (
    ("stage", "topic", "stance", "from_step", "to_step", "magnitude", "ci_low", "ci_high", "p_value", "q_value")
    + ("drift_time", "drift_time_low", "drift_time_high", "significant")
    + ("magnitude_uncorrected", "ci_low_uncorrected", "ci_high_uncorrected", "p_value_uncorrected")
    + ("q_value_uncorrected", "n_propositions", "drift_time_paired")
)  # fmt: skip


class Analysis(NamedTuple):
    """`stances` has STANCE_COLUMNS, `drift` DRIFT_COLUMNS; `notes` says what was left out or undefined, and why."""

    stances: pd.DataFrame
    drift: pd.DataFrame
    notes: tuple[str, ...]


class Bootstrap(NamedTuple):
    low: Float[np.ndarray, " C"]
    high: Float[np.ndarray, " C"]
    distribution: Float[np.ndarray, "C R"]  # of the R resampled means


def expanded_level(n: int, level: float = LEVEL) -> float:
    """The percentile level whose interval for a mean of n values covers about `level`.

    A percentile interval is too narrow for small n: it has the spread of a variance divided by n, not n - 1, and of a
    normal, not a t. Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69 (2015),
    section 5.3, puts both right by taking the quantiles Phi(-sqrt(n / (n - 1)) t_{alpha/2, n-1}).
    """
    return float(1 - 2 * stats.norm.sf(np.sqrt(n / (n - 1)) * stats.t.isf((1 - level) / 2, n - 1)))


def bootstrap_means(values: Float[np.ndarray, "P C"], rng: np.random.Generator, resamples: int) -> Bootstrap:
    """Expanded-percentile 95% intervals of the column means; one set of resampled rows serves all columns.

    NaN where there are fewer than two rows: nothing can be said about the spread of one proposition.
    """
    n, columns = values.shape
    if n < 2:
        undefined = np.full(columns, np.nan)
        return Bootstrap(undefined, undefined, np.full((columns, 1), np.nan))

    def mean_of(rows: Int[np.ndarray, "... P"], axis: int) -> Float[np.ndarray, "C ..."]:
        # How often each proposition was drawn turns all means into one matrix product.
        draws = rows.reshape(-1, n)
        shifted = draws + n * np.arange(len(draws))[:, None]
        counts = np.bincount(shifted.ravel(), minlength=draws.size).reshape(draws.shape)
        return (values.T @ counts.T / n).reshape(columns, *rows.shape[:-1])

    result = stats.bootstrap(
        (np.arange(n),), mean_of, axis=-1, vectorized=True, n_resamples=resamples, batch=2000,
        confidence_level=expanded_level(n), method="percentile", rng=rng,
    )  # fmt: skip
    low, high = result.confidence_interval
    return Bootstrap(low, high, result.bootstrap_distribution)


def sign_flip_p_values(
    differences: Float[np.ndarray, "P C"], rng: np.random.Generator, permutations: int
) -> Float[np.ndarray, " C"]:
    """Two-sided p-values for a mean of zero in each column: paired sign-flip permutation test over the rows.

    Exact where 2^P <= `permutations`. NaN where there are fewer than two rows.
    """
    n, columns = differences.shape
    if n < 2:
        return np.full(columns, np.nan)

    def mean_of(signs: Float[np.ndarray, "... P"], axis: int) -> Float[np.ndarray, "... C"]:
        return signs @ differences / n

    # scipy flips the signs of a single sample; flipping those of ones gives the signs for all columns at once.
    result = stats.permutation_test(
        (np.ones(n),), mean_of, permutation_type="samples", vectorized=True, n_resamples=permutations,
        batch=2000, rng=rng, axis=-1,
    )  # fmt: skip
    return np.asarray(result.pvalue)


def q_values(p_values: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """Benjamini-Hochberg q-values over the comparisons that have a p-value; NaN for the others."""
    defined = np.isfinite(p_values)
    out = np.full(len(p_values), np.nan)
    if defined.any():
        out[defined] = stats.false_discovery_control(p_values[defined], method="bh")
    return out


def smallest_p_value(n: int, permutations: int) -> float:
    """The smallest p-value that the sign-flip test can give for n propositions."""
    return 2 / 2**n if 2**n <= permutations else 2 / (permutations + 1)


def analyse(
    scores: pd.DataFrame,
    stages: list[StageInfo],
    *,
    seed: int = 0,
    resamples: int = 9999,
    permutations: int = 19999,
) -> Analysis:
    """Stance values at every snapshot, and the drift of every stage, with intervals, p- and q-values.

    `scores` has one row for each (stage, step, probe), with at least SCORE_COLUMNS. Every snapshot of a stage must
    hold the same probes. The topic "all" pools the propositions of all topics. Deterministic in `seed`.

    Raises UserError for missing columns, unknown stages, repeated or missing probes and values that are no
    distribution.
    """
    check_scores(scores, stages)
    notes = []
    if (scores["topic"] == POOLED).any():
        notes.append(f"The topic {POOLED!r} is listed as '{POOLED} (topic)'; {POOLED!r} stands for all topics pooled.")
        scores = scores.assign(topic=scores["topic"].replace(POOLED, f"{POOLED} (topic)"))
    topics = sorted(scores["topic"].unique())
    stance_rows: list[pd.DataFrame] = []
    drift_rows: list[pd.DataFrame] = []
    for stage in stages:
        frame = scores[scores["stage"] == stage.name]
        if frame.empty:
            notes.append(f"Stage {stage.name!r} was not probed.")
            continue
        asked = stage_scores(frame, stage.name)
        if len(asked.steps) < 2:
            notes.append(f"Stage {stage.name!r} has one probed snapshot: no drift can be measured in it.")
        for topic in [*topics, POOLED]:
            chosen = (asked.probes["topic"] == topic).to_numpy() | (topic == POOLED)
            if not chosen.any():
                notes.append(f"Topic {topic!r} was not probed in stage {stage.name!r}.")
                continue
            stances, drift = _topic_rows(stage, topic, asked, chosen, seed, resamples, permutations)
            stance_rows.append(stances)
            if drift is not None:
                drift_rows.append(drift)
    drift = (
        pd.concat(drift_rows, ignore_index=True)[list(DRIFT_COLUMNS)]
        if drift_rows
        else pd.DataFrame(columns=list(DRIFT_COLUMNS))
    )
    thin = sorted({t for t, n in zip(drift["topic"], drift["n_propositions"], strict=True) if n < 2})
    if thin:
        notes.append(f"Fewer than two propositions, so no interval, p-value or drift time: {', '.join(thin)}.")
    stances = pd.concat(stance_rows, ignore_index=True)[list(STANCE_COLUMNS)]
    return Analysis(stances, _with_q_values(drift), tuple(notes))


def _topic_rows(
    stage: StageInfo,
    topic: str,
    scores: StageScores,
    chosen: np.ndarray,
    seed: int,
    resamples: int,
    permutations: int,
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """The rows of one stage and topic: K * 3 of stances and 3 of drift (None where there is one snapshot)."""
    probes = scores.probes[chosen]
    polarity = probes["polarity"].to_numpy()
    proposition = proposition_codes(probes)
    asked = [metrics.proposition_means(s[chosen], proposition) for s in scores.stances]
    corrected = [
        metrics.proposition_means(metrics.polarity_corrected(s[chosen], polarity), proposition) for s in scores.stances
    ]
    both = np.stack([np.stack(corrected, axis=1), np.stack(asked, axis=1)], axis=2)  # [P, K, 2, 3]
    moved = both[:, -1] - both[:, 0]  # [P, 2, 3]
    n, n_snapshots = both.shape[:2]

    # Seeded by topic alone: with the same propositions, stages that share a snapshot share its interval.
    rng = np.random.default_rng([seed, zlib.crc32(topic.encode())])
    columns = np.concatenate([both.reshape(n, -1), moved.reshape(n, -1)], axis=1)
    boot = bootstrap_means(columns, rng, resamples)
    low, high = (bound[: -moved[0].size].reshape(both.shape[1:]) for bound in (boot.low, boot.high))
    drift_low, drift_high = (bound[-moved[0].size :].reshape(moved.shape[1:]) for bound in (boot.low, boot.high))

    values = metrics.stance_values(both)  # [K, 2, 3]
    stances = pd.DataFrame(
        {
            "stage": stage.name, "topic": topic, "n_probes": len(probes),
            "step": np.repeat(scores.steps, len(STANCES)), "stance": np.tile(STANCES, n_snapshots),
            "value": values[:, 0].ravel(), "ci_low": low[:, 0].ravel(), "ci_high": high[:, 0].ravel(),
            "value_uncorrected": values[:, 1].ravel(),
            "ci_low_uncorrected": low[:, 1].ravel(), "ci_high_uncorrected": high[:, 1].ravel(),
        }
    )  # fmt: skip
    if n_snapshots < 2:
        return stances, None

    p_values = sign_flip_p_values(moved.reshape(n, -1), rng, permutations).reshape(2, 3)
    distribution = boot.distribution[: -moved[0].size].reshape(*values.shape, -1)[:, 0]  # [K, 3, R]
    times = _drift_times(values[:, 0], scores.steps, low[:, 0], high[:, 0], distribution, stage.total_steps, n)
    magnitude = metrics.drift_magnitude(values)
    drift = pd.DataFrame(
        {
            "stage": stage.name, "topic": topic, "stance": STANCES, "n_propositions": n,
            "from_step": scores.steps[0], "to_step": scores.steps[-1],
            "magnitude": magnitude[0], "ci_low": drift_low[0], "ci_high": drift_high[0], "p_value": p_values[0],
            "magnitude_uncorrected": magnitude[1], "p_value_uncorrected": p_values[1],
            "ci_low_uncorrected": drift_low[1], "ci_high_uncorrected": drift_high[1],
            **times, "q_value": np.nan, "q_value_uncorrected": np.nan, "significant": False,
        }
    )  # fmt: skip
    return stances, drift


def _drift_times(
    values: Float[np.ndarray, "K 3"],
    steps: Int[np.ndarray, " K"],
    low: Float[np.ndarray, "K 3"],
    high: Float[np.ndarray, "K 3"],
    distribution: Float[np.ndarray, "K 3 R"],
    total_steps: int,
    n_propositions: int,
) -> dict[str, Float[np.ndarray, " 3"]]:
    """Drift time, its interval, and the paired drift time of each stance.

    The interval: the drift time of every resample, with the half-widths of the extreme's interval held at those of
    the full sample (resampling each resample again would cost its square and change little).

    The paired drift time: the first step whose paired difference to the extreme snapshot has an interval that holds
    zero. Where propositions differ much from each other, the extreme's own interval is wide enough to hold a whole
    significant drift, and the paper's drift time is 0; the paired one still tells early from late.
    """
    if n_propositions < 2:
        undefined = np.full(len(STANCES), np.nan)
        return dict.fromkeys(("drift_time", "drift_time_low", "drift_time_high", "drift_time_paired"), undefined)
    index = metrics.extreme_index(values)
    extreme, extreme_low, extreme_high = (metrics.at_snapshot(x, index) for x in (values, low, high))
    time = metrics.drift_time(values, steps, extreme_low, extreme_high, total_steps)

    resampled = metrics.at_snapshot(distribution, metrics.extreme_index(distribution))  # [3, R]
    resampled_time = metrics.drift_time(
        distribution,
        steps,
        resampled + (extreme_low - extreme)[:, None],
        resampled + (extreme_high - extreme)[:, None],
        total_steps,
    )
    tail = (1 - expanded_level(n_propositions)) / 2
    # inverted_cdf: a quantile of drift times is a snapshot's time, never one in between.
    time_low, time_high = np.quantile(resampled_time, [tail, 1 - tail], axis=1, method="inverted_cdf")

    gap = distribution - np.take_along_axis(distribution, index[None, :, None], axis=0)
    gap_low, gap_high = np.quantile(gap, [tail, 1 - tail], axis=2)
    paired = steps[((gap_low <= 0) & (gap_high >= 0)).argmax(axis=0)] / total_steps
    return {
        "drift_time": time,
        "drift_time_low": time_low,
        "drift_time_high": time_high,
        "drift_time_paired": paired,
    }


def _with_q_values(drift: pd.DataFrame) -> pd.DataFrame:
    """q-values within each family, significance, and drift times only where the drift is significant."""
    drift = drift.copy()
    is_pooled = (drift["topic"] == POOLED).to_numpy()
    for suffix in ("", "_uncorrected"):
        q = np.full(len(drift), np.nan)
        for family in (~is_pooled, is_pooled):
            q[family] = q_values(drift.loc[family, f"p_value{suffix}"].to_numpy(float))
        drift[f"q_value{suffix}"] = q
    drift["significant"] = (drift["q_value"] < SIGNIFICANCE).astype(bool)
    for column in ("drift_time", "drift_time_low", "drift_time_high", "drift_time_paired"):
        drift[column] = drift[column].astype(float).where(drift["significant"])
    return drift
