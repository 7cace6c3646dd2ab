"""The whole analysis on data whose drift is known: every topic of the frame is a run of its own."""

import numpy as np
import pytest
import tiny
from scipy import stats
from synthetic_scores import make_one_hot, make_runs

from vdjax.drift import statistics
from vdjax.drift.scores import StageInfo

STAGE = [StageInfo("s", "dpo", 100, None)]
RUNS = 600
DRIFTS = np.repeat([0.0, 0.25], RUNS // 2)
JUDGED = DRIFTS[100:-100]  # sampled responses take longer


@pytest.fixture(scope="module")
def support():
    """The drift rows of support, a row a run."""
    drift = statistics.analyse(make_runs(DRIFTS, propositions=10), STAGE, resamples=999, permutations=1024).drift
    rows = drift[(drift["topic"] != "all") & (drift["stance"] == "support")].sort_values("topic")
    assert len(rows) == RUNS
    return rows


def test_injected_drift_is_recovered_without_bias(support):
    error = support["magnitude"].to_numpy() - DRIFTS
    for half in np.split(error, 2):
        assert abs(half.mean()) < 3 * half.std() / np.sqrt(len(half))


def test_intervals_cover_the_truth_95_times_in_100(support):
    covered = (support["ci_low"] <= DRIFTS) & (support["ci_high"] >= DRIFTS)
    assert 0.93 < covered.mean() < 0.97


def test_false_positives_are_nominal_and_true_drifts_are_found(support):
    null, true = np.split(support["p_value"].to_numpy(), 2)
    low, high = stats.binom.interval(0.998, len(null), 0.05)
    assert low <= (null < 0.05).sum() <= high
    assert (true < 0.05).mean() > 0.95
    found = support["significant"].to_numpy()
    assert found[: RUNS // 2].sum() / found.sum() < 0.05  # false discoveries


def test_drift_time_is_unbiased_within_one_snapshot_interval(support):
    truth, interval = 0.75, 0.25  # the rise ends at step 75 of 100; snapshots every 25
    true = support[(DRIFTS > 0) & support["significant"].to_numpy()]
    assert len(true) > 0.95 * RUNS / 2
    for name in ("drift_time", "drift_time_paired"):
        assert abs(true[name].mean() - truth) < interval
    covered = (true["drift_time_low"] <= truth) & (truth <= true["drift_time_high"])
    assert covered.mean() > 0.9


def test_drift_time_is_early_and_the_paired_one_is_not_where_propositions_differ_much():
    scores = make_runs(np.full(60, 0.15), spread=0.15, noise=0.05, seed=1)
    drift = statistics.analyse(scores, STAGE, resamples=1999, permutations=256).drift
    rows = drift[(drift["topic"] != "all") & (drift["stance"] == "support") & drift["significant"]]
    assert len(rows) > 50
    assert rows["drift_time"].mean() < 0.4 and abs(rows["drift_time_paired"].mean() - 0.75) < 0.15


@pytest.fixture(scope="module")
def judged():
    """The drift rows of sampled and judged responses, one-hot, some without a stance; and the truth.

    The graded stance is that of the responses that take one: its drift is that of support over their share.
    """
    scores, own = make_one_hot(JUDGED)
    assert 0.1 < scores["graded"].isna().mean() < 0.2
    drift = statistics.analyse(scores, STAGE, resamples=499, permutations=1024).drift
    drift = drift[drift["topic"] != "all"].sort_values("topic")
    return {name: rows for name, rows in drift.groupby("stance")}, own


def share(n, expected=0.95):
    """99.8% of a binomial: a right analysis fails once in 500 draws of the data, and the data are drawn once."""
    low, high = stats.binom.interval(0.998, n, expected)
    return low / n, high / n


@tiny.SLOW
@pytest.mark.parametrize(("stance", "scale"), [("support", 1.0), ("neutral", -1.0), ("graded", 1 / 0.85)])
def test_intervals_of_judged_responses_cover_the_truth(judged, stance, scale):
    rows = judged[0][stance]
    assert len(rows) == len(JUDGED)
    low, high = share(len(JUDGED))
    for truth, ends in ((JUDGED, ("ci_low", "ci_high")), (judged[1], ("ci_low_questions", "ci_high_questions"))):
        covered = (rows[ends[0]] <= scale * truth) & (scale * truth <= rows[ends[1]])
        assert low <= covered.mean() <= high, ends
    error = rows["magnitude"].to_numpy() - scale * JUDGED
    assert abs(error.mean()) < 3 * error.std() / np.sqrt(len(JUDGED))


@tiny.SLOW
@pytest.mark.parametrize("stance", ["support", "neutral", "graded", "oppose", "refusal", "degenerate"])
def test_false_positives_of_judged_responses_are_at_most_nominal(judged, stance):
    """Fewer, for shares: they take few values, so that many sign flips tie with what was seen, and ties count."""
    null = judged[0][stance].iloc[: len(JUDGED) // 2]
    low, high = share(len(null), 0.05)
    found = (null["p_value"] < 0.05).mean()
    assert (low if stance == "graded" else 0) < found <= high


@tiny.SLOW
@pytest.mark.parametrize("stance", ["support", "neutral"])
def test_real_is_significant_and_beyond_the_floor_and_seldom_wrong(judged, stance):
    rows = judged[0][stance]
    assert set(rows["floor_source"]) == {"sampling"} and rows["real"].notna().all()
    real = rows["real"].to_numpy(bool)
    beyond = (rows["magnitude"].abs() > rows["floor"]).to_numpy()
    np.testing.assert_array_equal(real, (rows["q_value"] < 0.05).to_numpy() & beyond)
    null, true = np.split(real, 2)
    assert true.mean() > 0.4
    assert null.sum() <= stats.binom.ppf(0.999, real.sum(), 0.05)  # of what is called real, 5% are not
    # The floor alone: 5% of runs without drift are beyond it, give or take what their propositions move by themselves.
    assert 0 < beyond[: len(JUDGED) // 2].mean() <= share(len(null), 0.05)[1]
