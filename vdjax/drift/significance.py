"""p-values, their corrections for many comparisons, and effect sizes."""

import numpy as np
import scipy
from jaxtyping import Float

from vdjax.drift.bootstrap import Units, by_presence, weights


def sign_flip_p_values(differences: Units, rng: np.random.Generator, permutations: int) -> Float[np.ndarray, " C"]:
    """Two-sided p-values for a mean of zero in each column: paired sign-flip permutation test over the units.

    Exact where 2^n <= `permutations`. NaN where fewer than two units have a value.
    """
    out = np.full(differences.values.shape[1], np.nan)
    for rows, columns in by_presence(differences.values):
        if rows.sum() < 2:
            continue
        weighted = differences.values[np.ix_(rows, columns)] * weights(differences.parents[rows])[:, None]

        def mean_of(signs: Float[np.ndarray, "... n"], axis: int, weighted=weighted) -> Float[np.ndarray, "... C"]:
            return signs @ weighted

        # scipy flips the signs of a single sample; flipping those of ones gives the signs for all columns at once.
        result = scipy.stats.permutation_test(
            (np.ones(len(weighted)),), mean_of, permutation_type="samples", vectorized=True, n_resamples=permutations,
            batch=2000, rng=rng, axis=-1,
        )  # fmt: skip
        out[columns] = result.pvalue
    return out


def smallest_p_value(n: int, permutations: int) -> float:
    """The smallest p-value that the sign-flip test can give for n units."""
    return 2 / 2**n if 2**n <= permutations else 2 / (permutations + 1)


def q_values(p_values: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """Benjamini-Hochberg q-values over the comparisons that have a p-value; NaN for the others."""
    defined = np.isfinite(p_values)
    out = np.full(len(p_values), np.nan)
    if defined.any():
        out[defined] = scipy.stats.false_discovery_control(p_values[defined], method="bh")
    return out


def holm(p_values: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """Step-down p-values that bound the chance of any false claim; NaN where there is no p-value.

    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979). Not statsmodels':
    its multipletests collects garbage at every call, 30 ms a family.
    """
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]  # NaN sorts last
    out = np.full(len(p_values), np.nan)
    out[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)), 1)
    return out


def effect_sizes(differences: Float[np.ndarray, "n C"]) -> Float[np.ndarray, " C"]:
    """The standardised mean difference of paired values, d_z = mean / sd (ddof 1), times Hedges' correction.

    d_z: Lakens, "Calculating and reporting effect sizes", Frontiers in Psychology 4:863 (2013). The factor that takes
    its bias out, J(m) = Gamma(m/2) / (sqrt(m/2) Gamma((m-1)/2)) with m = n - 1: Hedges, "Distribution theory for
    Glass's estimator of effect size and related estimators", J. Educ. Stat. 6 (1981). NaN where fewer than three
    differences are at hand (J is 0 for two: they tell nothing of their spread) or all are equal.
    """
    out = np.full(differences.shape[1], np.nan)
    for rows, columns in by_presence(differences):
        n = int(rows.sum())
        if n < 3:
            continue
        values = differences[np.ix_(rows, columns)]
        spread = values.std(axis=0, ddof=1)
        m = n - 1
        factor = np.exp(scipy.special.gammaln(m / 2) - scipy.special.gammaln((m - 1) / 2)) / np.sqrt(m / 2)
        equal = spread < 1e-12
        out[columns] = np.where(equal, np.nan, values.mean(axis=0) / np.where(equal, 1, spread) * factor)
    return out
