"""Hierarchical resampling: topics > propositions > wordings > responses.

Which level is resampled decides what an interval says. The *unit* is the highest level whose members stand for
others like them; the levels above it are fixed and averaged equally; the levels below it are carried whole with their
unit. So unit "proposition" says: other propositions of these topics; unit "response": other responses to these very
questions.

Below the unit nothing is resampled, on purpose. The variance between units already holds what their own parts add
(a unit's mean is over its parts), so resampling the parts again counts them twice: Davison and Hinkley, "Bootstrap
Methods and their Application" (1997), section 3.8, on strategies 1 and 2 for nested data; Field and Welsh,
"Bootstrapping clustered data", J. R. Statist. Soc. B 69 (2007), where the cluster bootstrap, which carries clusters
whole, is the one that is consistent under the random-effect model. In simulations with normal effects of propositions,
wordings (4) and responses (5), 4,000 runs and 9,999 resamples, the 95% intervals here cover 94.4 to 94.8% with 12
propositions, 94.2% with 8 and 93.1% with 6 (tests: 1,000 runs of 12 and 8). Where responses vary more than
propositions, intervals with replacement at every level are 1.4 times as wide and cover over 98%.

Where the levels above the unit are fixed the bootstrap is stratified: each parent's units are resampled within it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from vdjax.drift.metrics import group_means

LEVELS = ("topic", "proposition", "wording", "response")
LEVEL = 0.95


class Units(NamedTuple):
    """n units, each with C values (NaN: it has none), and the units' parents from the root on (A >= 1 levels)."""

    values: Float[np.ndarray, "n C"]
    parents: Int[np.ndarray, "n A"]


class Bootstrap(NamedTuple):
    low: Float[np.ndarray, " C"]
    high: Float[np.ndarray, " C"]
    distribution: Float[np.ndarray, "C R"]  # of the R resampled means
    level: Float[np.ndarray, " C"]  # of the percentiles that low and high are


def hierarchical_bootstrap(
    values: Float[np.ndarray, "M C"],
    codes: Int[np.ndarray, "M L"],
    unit: str,
    rng: np.random.Generator,
    resamples: int,
) -> Bootstrap:
    """95% intervals of the means of C columns of M rows, that resample the level `unit` (one of LEVELS).

    Args:
      values: of the finest level at hand. Columns are resampled together, so differences of columns are paired.
      codes: the row's topic, proposition, wording and response as integers, down to its own level.
    """
    return bootstrap_means(units(values, codes, unit), rng, resamples)


def units(values: Float[np.ndarray, "M C"], codes: Int[np.ndarray, "M L"], unit: str) -> Units:
    """The means of each unit, every level below it averaged equally: responses, then wordings, then propositions.

    The paper takes the mean over all probes of a topic. The two are equal where every proposition has as many probes;
    where not, this one keeps a proposition that is asked often from weighing more than one that is asked once.
    """
    depth = LEVELS.index(unit) + 1
    for level in range(codes.shape[1] - 1, depth - 1, -1):
        codes, group = np.unique(codes[:, :level], axis=0, return_inverse=True)
        values = group_means(values, group.ravel())
    return Units(values, np.column_stack([np.zeros(len(codes), int), codes[:, : depth - 1]]))


def weights(parents: Int[np.ndarray, "n A"]) -> Float[np.ndarray, " n"]:
    """What each unit counts in the mean, sum 1: the children of one parent count alike, at every level."""
    out = np.ones(len(parents))
    above = np.zeros(len(parents), int)
    for level in range(1, parents.shape[1] + 1):
        pairs = parents[:, :level]
        found, index = np.unique(pairs, axis=0, return_inverse=True)
        index = index.ravel()
        first = np.unique(index, return_index=True)[1]
        siblings = np.bincount(above[first])  # distinct groups of this level under each of the level above
        out /= siblings[above]
        above = index
    return out / np.bincount(above)[above]


def mean(units: Units) -> Float[np.ndarray, " C"]:
    """The mean over the units, parents averaged equally; over those that have a value. NaN where none has."""
    out = np.full(units.values.shape[1], np.nan)
    for rows, columns in by_presence(units.values):
        if rows.any():
            out[columns] = weights(units.parents[rows]) @ units.values[np.ix_(rows, columns)]
    return out


def by_presence(values: Float[np.ndarray, "n C"]) -> Iterator[tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " c"]]]:
    """The columns in groups that have values in the same rows: (those rows, columns of the group); the fullest first.

    So what is missing in one column changes nothing in another.
    """
    present = ~np.isnan(values)
    if present.all():
        yield np.ones(len(values), bool), np.arange(values.shape[1])
        return
    patterns, index = np.unique(present, axis=1, return_inverse=True)
    for i in np.argsort(-patterns.sum(axis=0), kind="stable"):
        yield patterns[:, i], np.flatnonzero(index.ravel() == i)


def expanded_level(sizes: int | Int[np.ndarray, " H"], level: float = LEVEL) -> float:
    """The percentile level whose interval for a mean of n values covers about `level`; `sizes` of H strata, or n.

    A percentile interval is too narrow for small n: it has the spread of a variance divided by n, not n - 1, and of a
    normal, not a t. Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69 (2015),
    section 5.3, puts both right by taking the quantiles Phi(-sqrt(n / (n - 1)) t_{alpha/2, n-1}). With strata of n_h
    the factor is sqrt(H / sum (n_h - 1) / n_h), exact where strata vary alike, and t has sum (n_h - 1) degrees.
    """
    n = np.atleast_1d(sizes)
    factor = np.sqrt(len(n) / ((n - 1) / n).sum())
    return float(1 - 2 * scipy.stats.norm.sf(factor * scipy.stats.t.isf((1 - level) / 2, (n - 1).sum())))


def strata(parents: Int[np.ndarray, "n A"]) -> Int[np.ndarray, " n"]:
    """Which units are resampled together: those of one parent.

    A parent with one unit shows no spread of its own. Such parents are made one stratum (a single one joins the
    smallest other): collapsed strata, Cochran, "Sampling Techniques" (1977), section 5A.12; the variance comes out
    too large rather than too small.
    """
    out = np.unique(parents, axis=0, return_inverse=True)[1].ravel()
    alone = np.bincount(out)[out] == 1
    if alone.sum() == 1 and len(out) > 1:
        sizes = np.bincount(out)
        sizes[out[alone]] = len(out) + 1
        alone |= out == sizes.argmin()
    if alone.any():
        out = np.unique(np.where(alone, -1, out), return_inverse=True)[1].ravel()
    return out


def bootstrap_means(units: Units, rng: np.random.Generator, resamples: int) -> Bootstrap:
    """Expanded-percentile 95% intervals of the columns' means; one set of resampled units serves all columns.

    NaN where there are fewer than two units: nothing can be said about the spread of one.
    """
    columns = units.values.shape[1]
    low, high, level = (np.full(columns, np.nan) for _ in range(3))
    distribution = np.full((columns, resamples), np.nan)
    for rows, chosen in by_presence(units.values):
        if rows.sum() < 2:
            continue
        parents = units.parents[rows]
        stratum = strata(parents)
        # How often each unit was drawn turns all means into one matrix product.
        counted = draws(stratum, rng, resamples) * weights(parents)
        counted /= counted.sum(axis=1, keepdims=True)  # 1 but where strata of unlike weights were collapsed
        distribution[chosen] = means = units.values[np.ix_(rows, chosen)].T @ counted.T
        level[chosen] = expanded = expanded_level(np.bincount(stratum))
        tail = (1 - expanded) / 2
        low[chosen], high[chosen] = np.quantile(means, [tail, 1 - tail], axis=1)
    return Bootstrap(low, high, distribution, level)


def draws(stratum: Int[np.ndarray, " n"], rng: np.random.Generator, resamples: int) -> Float[np.ndarray, "R n"]:
    """How often each unit is drawn when every stratum is resampled to its own size."""
    out = np.empty((resamples, len(stratum)))
    sizes = np.bincount(stratum)
    members = np.split(np.argsort(stratum, kind="stable"), np.cumsum(sizes)[:-1])
    for size in np.unique(sizes):
        alike = np.stack([m for m in members if len(m) == size])  # [strata, size]
        out[:, alike] = rng.multinomial(size, np.full(size, 1 / size), size=(resamples, len(alike)))
    return out
