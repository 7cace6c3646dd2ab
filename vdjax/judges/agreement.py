"""How far judges agree: for every pair of judges, and for all together.

The unit is the response; labels are the likeliest of a verdict. Intervals are 95% percentile bootstrap over probes
(scipy.stats.bootstrap): responses to one probe are not independent.
"""

import warnings
from collections.abc import Callable
from itertools import combinations

import krippendorff
import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float, Int

from vdjax.errors import UserError, nearest
from vdjax.judges.verdicts import LABELS, RESPONSE

ALL = "all"
AGREEMENT_COLUMNS = ("judge_a", "judge_b", "measure", "value", "ci_low", "ci_high", "n_responses", "n_probes")
RESAMPLES = 500

Statistic = Callable[[np.ndarray], float]
Counts = Int[np.ndarray, "n labels"]  # how many judges gave each label to each of n responses


def agreement(judgements: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES) -> pd.DataFrame:
    """One row a measure for each pair of judges, and for all of them (judge_a and judge_b "all") where three or more.

    Measures:
      percent: share of pairs of judges that give a response the same label; 0 to 1.
      cohen_kappa: Cohen 1960, of pairs (statsmodels).
      fleiss_kappa: Fleiss 1971, of responses that all have judged (statsmodels).
      alpha_label: Krippendorff's alpha, nominal (krippendorff), of responses that at least two have judged.
      alpha_graded: the same for graded stances, interval, of responses where at least two see a stance.

    Only repeat 0 counts, and no row without a verdict (NaN). A value is NaN where it is undefined, as where all labels
    are the same, an interval where there are fewer than two probes.

    Args:
      judgements: columns stage, step, probe_id, variant, replicate, sample, judge, repeat, LABELS and graded.

    Raises:
      UserError: a missing column, or two verdicts of a judge on one response.
    """
    labels, graded = _tables(judgements)
    judges = list(labels.columns)
    rng = np.random.default_rng(seed)
    groups = [list(pair) for pair in combinations(judges, 2)] + ([judges] if len(judges) > 2 else [])
    rows = []
    for group in groups:
        pair = len(group) == 2
        for measure, (codes, statistic, of_draw) in _measures(labels[group], graded[group], pair).items():
            value, low, high = _estimate(codes, statistic, of_draw, rng, resamples)
            probes = len(codes.index.get_level_values("probe_id").unique())
            rows.append((*(group if pair else (ALL, ALL)), measure, value, low, high, len(codes), probes))
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def confusion(judgements: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """Numbers of responses by the label of judge `a` (rows) and of judge `b` (columns), of those that both have judged.

    Raises:
      UserError: no such judge.
    """
    labels, _ = _tables(judgements)
    for name in (a, b):
        if name not in labels:
            raise UserError(f"judgements: no judge {name!r}{nearest(name, labels.columns)}")
    table = _square(labels[[a, b]].dropna().to_numpy(int))
    return pd.DataFrame(table, index=pd.Index(LABELS, name=a), columns=pd.Index(LABELS, name=b))


def _tables(judgements: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Labels (0 to 4) and graded stances, responses x judges, NaN where a judge has not judged or saw no stance."""
    needed = [*RESPONSE, "judge", "repeat", *LABELS, "graded"]
    missing = [c for c in needed if c not in judgements.columns]
    if missing:
        raise UserError(f"judgements: missing column {missing[0]!r}{nearest(missing[0], judgements.columns)}")
    first = judgements[(judgements["repeat"] == 0) & judgements[list(LABELS)].notna().all(axis=1)]
    twice = first.duplicated([*RESPONSE, "judge"])
    if twice.any():
        row = first[twice].iloc[0]
        place = ", ".join(f"{c} {row[c]!r}" for c in RESPONSE)
        raise UserError(f"judgements: judge {row['judge']!r} has two verdicts on {place}; expected one")
    first = first.assign(label=first[list(LABELS)].to_numpy(float).argmax(axis=1))
    index = {"index": RESPONSE, "columns": "judge"}
    return first.pivot(values="label", **index), first.pivot(values="graded", **index)


def _measures(
    labels: pd.DataFrame, graded: pd.DataFrame, pair: bool
) -> dict[str, tuple[pd.DataFrame, Statistic, Statistic]]:
    """By name: what it looks at, responses x ..., the statistic of those rows, and the same for many draws of them."""
    complete = _counts(labels.dropna())
    shared = _counts(labels[labels.notna().sum(axis=1) >= 2])
    measures: dict[str, tuple[pd.DataFrame, Statistic, Statistic]] = {"percent": (complete, percent, percent)}
    if pair:
        measures["cohen_kappa"] = (labels.dropna().astype(int), cohen_kappa, cohen_kappa)
    measures["fleiss_kappa"] = (complete, fleiss_kappa, fleiss_kappa)
    measures["alpha_label"] = (shared, alpha_label, alpha_label_of_draw)
    measures["alpha_graded"] = (graded[graded.notna().sum(axis=1) >= 2], alpha_graded, alpha_graded)
    return measures


def _counts(labels: pd.DataFrame) -> pd.DataFrame:
    values = labels.to_numpy()[:, :, None] == np.arange(len(LABELS))
    return pd.DataFrame(values.sum(axis=1), index=labels.index)


def _square(codes: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "5 5"]:
    size = len(LABELS)
    return np.bincount(codes[:, 0] * size + codes[:, 1], minlength=size * size).reshape(size, size)


def percent(counts: Counts) -> float:
    """Mean share of agreeing pairs of judges; the same number of judges, two or more, in every row."""
    judges = counts.sum(axis=1)
    return float(np.mean((counts * (counts - 1)).sum(axis=1) / (judges * (judges - 1))))


def cohen_kappa(codes: Int[np.ndarray, "n 2"]) -> float:
    from statsmodels.stats import inter_rater  # a second to import, here and below only where it is used

    return float(inter_rater.cohens_kappa(_square(codes), return_results=False))


def fleiss_kappa(counts: Counts) -> float:
    from statsmodels.stats import inter_rater

    return float(inter_rater.fleiss_kappa(counts))


def alpha_label(counts: Counts) -> float:
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def alpha_label_of_draw(counts: Counts) -> float:
    """`alpha_label` in its closed form, which takes a thousandth of the time, for resamples.

    Krippendorff (2011), section C, with m values in a row, n_c of them of label c, and N and N_c in all:
      alpha = 1 - (N - 1) sum_rows((m^2 - sum_c n_c^2) / (m - 1)) / (N^2 - sum_c N_c^2).
    """
    m, of_labels = counts.sum(axis=1), counts.sum(axis=0)
    observed = np.sum((m**2 - (counts**2).sum(axis=1)) / (m - 1))
    expected = of_labels.sum() ** 2 - np.sum(of_labels**2)
    return float(1 - (of_labels.sum() - 1) * observed / expected) if expected else float("nan")


def alpha_graded(values: Float[np.ndarray, "n judges"]) -> float:
    """Krippendorff's alpha for interval data, NaN where there is no value; two values or more in every row.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section D, with the squared differences of the
    N values of all rows and of the m values of a row written as sums and sums of squares:
      alpha = 1 - (N - 1) sum_rows((m s2 - s^2) / (m - 1)) / (N S2 - S^2).
    The library lays out all pairs of distinct values for every row, too many where values are continuous.
    """
    m = np.sum(~np.isnan(values), axis=1)
    s, s2 = np.nansum(values, axis=1), np.nansum(values**2, axis=1)
    observed = np.sum((m * s2 - s**2) / (m - 1))
    expected = m.sum() * s2.sum() - s.sum() ** 2
    if expected <= 1e-12 * m.sum() * s2.sum():  # all values are the same
        return float("nan")
    return float(1 - (m.sum() - 1) * observed / expected)


def _estimate(
    frame: pd.DataFrame, statistic: Statistic, of_draw: Statistic, rng: np.random.Generator, resamples: int
) -> tuple[float, float, float]:
    """The statistic of all rows, and its interval by resampled probes."""
    if frame.empty:
        return float("nan"), float("nan"), float("nan")
    values, nan = frame.to_numpy(), float("nan")
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        estimate = statistic(values)
        probes = frame.index.get_level_values("probe_id").factorize()[0]
        rows = np.split(np.argsort(probes, kind="stable"), np.cumsum(np.bincount(probes))[:-1])
        if len(rows) < 2:
            return estimate, nan, nan

        def of_probes(chosen: Int[np.ndarray, "... P"], axis: int) -> Float[np.ndarray, "..."]:
            flat = [
                of_draw(values[np.concatenate([rows[i] for i in draw])]) for draw in chosen.reshape(-1, len(rows))
            ]
            return np.reshape(flat, chosen.shape[:-1])

        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)  # of draws that are all the same; see below
        result = scipy.stats.bootstrap(
            (np.arange(len(rows)),),
            of_probes,
            vectorized=True,
            n_resamples=resamples,
            batch=50,  # draws at once in memory
            method="percentile",
            rng=rng,
        )
    drawn = result.bootstrap_distribution
    # Where all drawn labels are the same a kappa is undefined; with few such draws the others give the interval.
    if np.isnan(drawn).mean() > 0.05:
        return estimate, nan, nan
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return estimate, float(low), float(high)
