"""What drift is: stance values, drift magnitude and drift time, as pure functions on arrays.

The definitions are those of Bhatia et al., "Value Drifts: Tracing Value Alignment During LLM Post-Training",
arXiv 2510.26707 (its metrics "drift magnitude" and "drift time"). Here they are written for a stance distribution
that has already been read for each probe; how it was read (the readout) does not matter to this file.

Axes: N probes, P propositions, K snapshots of one stage in the order of their steps, S = 3 stances in the order of
`STANCES`. Every value is a probability.
"""

import numpy as np
from jaxtyping import Float, Int

STANCES = ("support", "neutral", "oppose")


def polarity_corrected(stances: Float[np.ndarray, "N 3"], polarity: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N 3"]:
    """Stances toward the topic, from stances toward the questions.

    A probe of polarity -1 asks against its topic ("Should X be legal?" where the topic's support is "ban X"), so its
    support and oppose change places. Probes of polarity +1, and of unknown polarity 0, stay as they were asked.
    """
    return np.where(np.asarray(polarity)[:, None] == -1, stances[:, ::-1], stances)


def proposition_means(
    stances: Float[np.ndarray, "N 3"], proposition: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "P 3"]:
    """The mean over each proposition's probes; `proposition` holds 0..P-1, each at least once."""
    counts = np.bincount(proposition)
    sums = np.stack([np.bincount(proposition, weights=column) for column in stances.T], axis=1)
    return sums / counts[:, None]


def stance_values(propositions: Float[np.ndarray, "P ..."]) -> Float[np.ndarray, "..."]:
    """v(T)[s]: the mean over the propositions of a topic of the mean over each proposition's probes.

    The paper takes the mean over the probes of a topic. The two are equal where every proposition has as many probes;
    where not, this one keeps a proposition that is asked often from weighing more than one that is asked once, and it
    is the mean that a bootstrap over propositions resamples.
    """
    return propositions.mean(axis=0)


def drift_magnitude(values: Float[np.ndarray, "K ..."]) -> Float[np.ndarray, "..."]:
    """M_s(t, t') = v_t'(T)[s] - v_t(T)[s], signed, in [-1, 1], from the first to the last snapshot."""
    return values[-1] - values[0]


def extreme_index(values: Float[np.ndarray, "K ..."]) -> Int[np.ndarray, "..."]:
    """The snapshot of the extreme: of the maximum where the net magnitude is positive, else of the minimum.

    Of equal extremes the first counts.
    """
    return np.where(drift_magnitude(values) > 0, values.argmax(axis=0), values.argmin(axis=0))


def at_snapshot(values: Float[np.ndarray, "K ..."], index: Int[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """`values` at one snapshot for each of the remaining positions."""
    return np.take_along_axis(values, index[None], axis=0)[0]


def drift_time(
    values: Float[np.ndarray, "K ..."],
    steps: Int[np.ndarray, " K"],
    low: Float[np.ndarray, "..."],
    high: Float[np.ndarray, "..."],
    total_steps: int,
) -> Float[np.ndarray, "..."]:
    """eta_s(t, t') = (first step whose value lies in the 95% interval of the extreme) / total steps, in [0, 1].

    `low` and `high` bound the interval of the extreme snapshot's value. The extreme lies in its own interval by
    definition, so the time is at most that of the extreme itself. NaN where the interval is NaN.
    """
    extreme = at_snapshot(values, extreme_index(values))
    inside = (values >= np.minimum(low, extreme)) & (values <= np.maximum(high, extreme))
    time = np.asarray(steps)[inside.argmax(axis=0)] / total_steps
    return np.where(np.isnan(low) | np.isnan(high), np.nan, time)
