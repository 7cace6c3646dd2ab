"""What an audit's verdicts come to: stances of each side of the data, and how far the two sides are apart."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from vdjax.drift.bootstrap import Units, bootstrap_means
from vdjax.drift.distances import distances
from vdjax.drift.significance import sign_flip_p_values
from vdjax.judges import LABELS

SIDES = {"sft": ("sft",), "preference": ("chosen", "rejected"), "unpaired": ("desirable", "undesirable")}
QUANTITIES = (*LABELS, "graded")
RESAMPLES = 9999
PERMUTATIONS = 19999
SWAPS = 1999
GAP_COLUMNS = (
    ("data", "topic", "n", "js", "js_low", "js_high", "js_null")
    + ("signed", "signed_low", "signed_high", "p", "n_signed")
)  # fmt: skip


def by_example(rows: pd.DataFrame, side: str) -> Float[np.ndarray, "n 6"]:
    """QUANTITIES of each example's response; the mean over answers and topics where it has or touches several."""
    means = rows[rows["side"] == side].groupby("index")[list(QUANTITIES)].mean()
    return means.to_numpy(float)


def _units(values: Float[np.ndarray, "n C"]) -> Units:
    return Units(values, np.zeros((len(values), 1), int))


def values_of(data: str, topic: str, side: str, rows: pd.DataFrame, seed: int) -> dict[str, Any]:
    values = by_example(rows, side)
    stanced = ~np.isnan(values[:, -1])
    boot = bootstrap_means(_units(values), np.random.default_rng([seed, len(values)]), RESAMPLES)
    out: dict[str, Any] = {"data": data, "topic": topic, "side": side, "n": len(values), "n_graded": stanced.sum()}
    for i, name in enumerate(QUANTITIES):
        mean = float(np.nanmean(values[:, i])) if name != "graded" or stanced.any() else np.nan
        out |= {name: mean, f"{name}_low": boot.low[i], f"{name}_high": boot.high[i]}
    return out


def paired_gap(data: str, topic: str, rows: pd.DataFrame, seed: int) -> dict[str, Any]:
    """How far the chosen responses are from the rejected ones; 95% intervals over examples.

    js: Jensen-Shannon distance (base 2) of the mean distributions over LABELS. It is never negative, so it is to be
    read against js_null, its mean where chosen and rejected are swapped at random within the examples.
    signed: mean of graded(chosen) - graded(rejected), p by a paired sign-flip test. A response that takes no stance
    (graded NaN: a refusal, say) counts as 0, between the two sides; examples neither of whose responses takes one say
    nothing of a direction and are left out: n_signed examples are left.
    """
    chosen, rejected = (by_example(rows, side) for side in SIDES["preference"])
    labels = slice(len(LABELS))
    rng = np.random.default_rng([seed, len(chosen)])
    js = _js(chosen[:, labels].mean(axis=0), rejected[:, labels].mean(axis=0))
    boot = bootstrap_means(_units(np.hstack([chosen[:, labels], rejected[:, labels]])), rng, RESAMPLES)
    resampled = _js(*boot.distribution.reshape(2, len(LABELS), -1).swapaxes(1, 2))
    tail = (1 - boot.level[0]) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail]) if len(chosen) > 1 else (np.nan, np.nan)
    middle, half = (chosen + rejected)[:, labels].mean(axis=0) / 2, (chosen - rejected)[:, labels] / 2 / len(chosen)
    change = rng.choice((-1.0, 1.0), (SWAPS, len(chosen))) @ half
    null = float(np.mean(_js(np.maximum(middle + change, 0), np.maximum(middle - change, 0))))
    graded = np.stack([chosen[:, -1], rejected[:, -1]], axis=1)
    graded = graded[~np.isnan(graded).all(axis=1)]
    difference = np.nan_to_num(graded[:, :1]) - np.nan_to_num(graded[:, 1:])
    signed = bootstrap_means(_units(difference), rng, RESAMPLES) if len(graded) else None
    p = sign_flip_p_values(_units(difference), rng, PERMUTATIONS)[0] if len(graded) else np.nan
    mean = float(difference.mean()) if len(graded) else np.nan
    ends = (signed.low[0], signed.high[0]) if signed else (np.nan, np.nan)
    return dict(
        zip(GAP_COLUMNS, (data, topic, len(chosen), js, low, high, null, mean, *ends, p, len(graded)), strict=True)
    )


def _js(first: np.ndarray, last: np.ndarray) -> Any:
    return distances(first, last)[0]


def unpaired_gap(data: str, topic: str, rows: pd.DataFrame, seed: int) -> dict[str, Any]:
    """As `paired_gap`, of desirable and undesirable responses to whatever questions; 95% intervals over both.

    A response that takes no stance is left out of the signed gap, as there is no other answer to the same question. p
    by a permutation test of the labels, js_null the mean js where they are shuffled. NaN where a side has no response.
    """
    rng = np.random.default_rng([seed, len(rows)])
    both = [by_example(rows, side) for side in SIDES["unpaired"]]
    labels = [values[:, : len(LABELS)] for values in both]
    graded = [values[~np.isnan(values[:, -1]), -1:] for values in both]
    js = low = high = null = mean = signed_low = signed_high = p = np.nan
    if all(map(len, labels)):
        js = _js(*(values.mean(axis=0) for values in labels))
        boots = [bootstrap_means(_units(values), rng, RESAMPLES) for values in labels]
        low, high = _ends(_js(*(boot.distribution.T for boot in boots)), boots)
        null = float(np.mean(_js(*_shuffled(labels, rng, SWAPS))))
    if all(map(len, graded)):
        mean = float(graded[0].mean() - graded[1].mean())
        boots = [bootstrap_means(_units(values), rng, RESAMPLES) for values in graded]
        signed_low, signed_high = _ends(boots[0].distribution[0] - boots[1].distribution[0], boots)
        first, second = _shuffled(graded, rng, PERMUTATIONS)
        p = (1 + int((np.abs(first - second) >= abs(mean) - 1e-12).sum())) / (1 + PERMUTATIONS)
    counts = [sum(map(len, values)) for values in (labels, graded)]
    found = (data, topic, counts[0], js, low, high, null, mean, signed_low, signed_high, p, counts[1])
    return dict(zip(GAP_COLUMNS, found, strict=True))


def _ends(resampled: np.ndarray, boots: list[Any]) -> tuple[float, float]:
    """The percentiles that two groups' intervals have: those of the smaller group, which are the wider ones."""
    if any(np.isnan(boot.level[0]) for boot in boots):
        return np.nan, np.nan
    tail = (1 - max(boot.level[0] for boot in boots)) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _shuffled(
    groups: list[Float[np.ndarray, "n C"]], rng: np.random.Generator, times: int
) -> tuple[Float[np.ndarray, "times C"], Float[np.ndarray, "times C"]]:
    """The means of two groups whose members are dealt out anew, `times` times."""
    every, first = np.concatenate(groups), len(groups[0])
    member = np.arange(len(every)) < first
    sums = np.stack([every[rng.permutation(member)].sum(axis=0) for _ in range(times)])
    return sums / first, (every.sum(axis=0) - sums) / (len(every) - first)
