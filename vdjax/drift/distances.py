"""How far the whole distribution of labels moved: Jensen-Shannon distance and total variation.

Both take the mean label distribution of a topic at the first and the last snapshot, toward the topic (polarity
corrected). Jensen-Shannon distance: the square root of the divergence, base 2, in [0, 1] (scipy). Total variation: half
the sum of the absolute differences.

Neither can be negative, so noise alone makes both positive, and an interval never reaches below 0: what a distance
says is to be read against `js_null` and `tv_null`, its mean when first and last are swapped at random within each unit,
and the p-value of the same permutations. The intervals are expanded percentile intervals of the same bootstrap as the
drift's; where nothing moved, they lie above the truth, like the distance.
"""

from typing import Any

import numpy as np
import scipy
from jaxtyping import Float

from vdjax.drift.bootstrap import weights
from vdjax.drift.metrics import LABELS
from vdjax.drift.scores import StageScores, TopicUnits

COLUMNS = (
    ("readout", "stage", "topic", "from_step", "to_step", "js", "js_low", "js_high", "js_null", "js_p_value")
    + ("js_q_value", "js_p_holm", "tv", "tv_low", "tv_high", "tv_null", "tv_p_value", "tv_q_value", "tv_p_holm")
    + ("n_propositions", "unit")
)  # fmt: skip


def distances(first: Float[np.ndarray, "... L"], last: Float[np.ndarray, "... L"]) -> Float[np.ndarray, "2 ..."]:
    """Jensen-Shannon distance (base 2) and total variation of distributions over L labels, both in [0, 1]."""
    unknown = np.isnan(first).any(axis=-1) | np.isnan(last).any(axis=-1)
    with np.errstate(invalid="ignore"):  # scipy: the root of -1e-17 where two distributions are equal
        js = scipy.spatial.distance.jensenshannon(first, last, base=2, axis=-1)
    js = np.where(unknown, np.nan, np.nan_to_num(js))
    return np.stack([js, np.abs(last - first).sum(axis=-1) / 2])


def row(
    asked: StageScores,
    about: TopicUnits,
    resampled: Float[np.ndarray, "2 Q R"],
    level: float,
    rng: np.random.Generator,
    permutations: int,
) -> dict[str, Any]:
    """One row of COLUMNS but the corrections, which take all rows (`statistics.analyse`); interval and p-value are NaN
    where there are fewer than two units.

    `resampled` holds the bootstrap's means at the first and last snapshot, `level` that of their percentiles.
    """
    of_labels = [i for i, name in enumerate(asked.quantities) if name in LABELS]
    ends = about.values[:, [0, -1], 0][..., of_labels]  # [n, 2, L]
    weighted = ends * weights(about.parents)[:, None, None]
    found = distances(*weighted.sum(axis=0))
    out = {
        "readout": asked.readout, "stage": asked.stage, "topic": about.topic, "from_step": asked.steps[0],
        "to_step": asked.steps[-1], "n_propositions": about.n_propositions, "unit": about.unit,
    }  # fmt: skip
    low = high = null = p_values = np.full(2, np.nan)
    if len(ends) > 1:
        tail = (1 - level) / 2
        low, high = np.quantile(distances(*resampled[:, of_labels].swapaxes(1, 2)), [tail, 1 - tail], axis=1)
        null, p_values = _swapped(weighted, rng, permutations)
    for i, name in enumerate(("js", "tv")):
        values = (found[i], low[i], high[i], null[i], p_values[i])
        out |= dict(zip((name, f"{name}_low", f"{name}_high", f"{name}_null", f"{name}_p_value"), values, strict=True))
    return out


def _swapped(
    weighted: Float[np.ndarray, "n 2 L"], rng: np.random.Generator, permutations: int
) -> tuple[Float[np.ndarray, " 2"], Float[np.ndarray, " 2"]]:
    """Mean of both distances over swaps of first and last within the units, and the p-values of the observed ones."""
    both = weighted.sum(axis=(0, 1)) / 2
    half = (weighted[:, 1] - weighted[:, 0]) / 2

    def of_signs(signs: Float[np.ndarray, "... n"], axis: int) -> Float[np.ndarray, "... 2"]:
        change = signs @ half
        found = distances(np.maximum(both - change, 0), np.maximum(both + change, 0))
        # Rounded, so that two swaps that mirror each other tie: the root in js makes much of the last bits.
        return np.moveaxis(found, 0, -1).round(9)

    # scipy flips signs of ones; a flipped unit has its first and last snapshot swapped.
    result = scipy.stats.permutation_test(
        (np.ones(len(half)),), of_signs, permutation_type="samples", vectorized=True, n_resamples=permutations,
        batch=2000, rng=rng, alternative="greater", axis=-1,
    )  # fmt: skip
    return np.mean(result.null_distribution, axis=0), result.pvalue
