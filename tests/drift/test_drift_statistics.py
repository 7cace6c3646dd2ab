import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic_scores import STAGES, STEPS, make_scores

from vdjax.drift import statistics
from vdjax.drift.scores import StageInfo
from vdjax.errors import UserError

QUICK = {"resamples": 1999, "permutations": 1999}


@pytest.fixture(scope="module")
def analysis():
    """beta moves by +0.2 in sft and by -0.1 in dpo_support; nothing else moves but for noise."""
    return statistics.analyse(make_scores({("sft", "beta"): 0.2, ("dpo_support", "beta"): -0.1}), STAGES)


def row(analysis, stage, topic, stance):
    drift = analysis.drift
    return drift[(drift["stage"] == stage) & (drift["topic"] == topic) & (drift["stance"] == stance)].iloc[0]


@pytest.mark.parametrize(("stage", "true"), [("sft", 0.2), ("dpo_support", -0.1)])
def test_an_injected_drift_is_found_and_lies_in_its_interval(analysis, stage, true):
    support, neutral = row(analysis, stage, "beta", "support"), row(analysis, stage, "beta", "neutral")
    assert support["significant"] and support["ci_low"] < true < support["ci_high"]
    assert support["ci_high"] - support["ci_low"] < 0.03
    assert neutral["significant"] and neutral["ci_low"] < -true < neutral["ci_high"]
    assert support["magnitude"] == pytest.approx(-neutral["magnitude"])
    # As asked, half of the questions point the other way: their support does not move.
    assert support["magnitude_uncorrected"] == pytest.approx(support["magnitude"] / 2)


def test_what_did_not_move_is_not_significant_and_has_no_drift_time(analysis):
    moved = {("sft", "beta"), ("dpo_support", "beta"), ("sft", "all"), ("dpo_support", "all")}
    still = analysis.drift[[pair not in moved for pair in zip(analysis.drift.stage, analysis.drift.topic, strict=True)]]
    assert len(still) == 15 and not still["significant"].any()
    assert still[["drift_time", "drift_time_low", "drift_time_high", "drift_time_paired"]].isna().all(axis=None)
    significant = analysis.drift[analysis.drift["significant"]]
    assert significant[["drift_time", "drift_time_low", "drift_time_high", "drift_time_paired"]].notna().all(axis=None)


def test_drift_time_agrees_with_its_definition_computed_from_the_table(analysis):
    for stage, total in (("sft", 100), ("dpo_support", 60)):
        table = analysis.stances.query(f"stage == '{stage}' and topic == 'beta' and stance == 'support'")
        found = row(analysis, stage, "beta", "support")
        extreme = table.iloc[table["value"].argmax() if found["magnitude"] > 0 else table["value"].argmin()]
        inside = table[(table["value"] >= extreme["ci_low"]) & (table["value"] <= extreme["ci_high"])]
        assert found["drift_time"] == pytest.approx(inside["step"].min() / total)
        times = np.array(STEPS[stage]) / total
        assert found["drift_time_low"] <= found["drift_time"] <= found["drift_time_high"]
        assert np.isin([found["drift_time_low"], found["drift_time_high"], found["drift_time_paired"]], times).all()


def test_paired_drift_time_is_late_where_propositions_differ_but_all_move_alike():
    stage = [StageInfo("s", "dpo", 100, None)]
    scores = make_scores(
        {("s", "alpha"): 0.03}, ["alpha"], spread=0.1, noise=0.001, stages=stage, steps={"s": [0, 9, 100]}
    )
    found = row(statistics.analyse(scores, stage, **QUICK), "s", "alpha", "support")
    assert found["significant"] and found["drift_time"] == 0 and found["drift_time_paired"] == 1


def test_columns_and_rows(analysis):
    assert tuple(analysis.drift.columns[:14]) == (
        ("stage", "topic", "stance", "from_step", "to_step", "magnitude", "ci_low", "ci_high", "p_value", "q_value")
        + ("drift_time", "drift_time_low", "drift_time_high", "significant")
    )  # fmt: skip
    assert tuple(analysis.stances.columns[:8]) == (
        ("stage", "step", "topic", "stance", "value", "ci_low", "ci_high", "n_probes")
    )  # fmt: skip
    assert len(analysis.drift) == 3 * 3 * 3  # stages, topics and "all", stances
    assert len(analysis.stances) == (5 + 4 + 4) * 3 * 3
    assert set(analysis.stances.query("topic == 'alpha'")["n_probes"]) == {40}
    assert set(analysis.drift.query("topic == 'all'")["n_propositions"]) == {20}
    assert analysis.notes == ()


def test_stance_values_sum_to_one_and_match_a_plain_mean(analysis):
    scores = make_scores({("sft", "beta"): 0.2, ("dpo_support", "beta"): -0.1})
    total = analysis.stances.groupby(["stage", "step", "topic"])["value"].sum()
    np.testing.assert_allclose(total, 1)
    asked = scores.groupby(["stage", "step", "topic"])[["support", "neutral", "oppose"]].mean().stack()
    found = analysis.stances.set_index(["stage", "step", "topic", "stance"])["value_uncorrected"]
    np.testing.assert_allclose(found[asked.index], asked)


def test_a_snapshot_shared_by_two_stages_has_the_same_interval(analysis):
    tables = [analysis.stances.query(f"stage == '{stage}' and step == 0") for stage in ("dpo_support", "dpo_hh")]
    columns = ["topic", "stance", "value", "ci_low", "ci_high"]
    pd.testing.assert_frame_equal(*(t[columns].reset_index(drop=True) for t in tables))


def test_same_seed_same_numbers_and_row_order_does_not_matter():
    scores = make_scores({("sft", "beta"): 0.02})
    first = statistics.analyse(scores, STAGES, seed=1, **QUICK)
    again = statistics.analyse(scores.sample(frac=1, random_state=0), STAGES, seed=1, **QUICK)
    other = statistics.analyse(scores, STAGES, seed=2, **QUICK)
    pd.testing.assert_frame_equal(first.drift, again.drift, check_exact=False, rtol=1e-12)
    pd.testing.assert_frame_equal(first.stances, again.stances, check_exact=False, rtol=1e-12)
    assert not np.allclose(first.drift["ci_low"], other.drift["ci_low"], rtol=1e-6, atol=0)


def test_bootstrap_equals_scipy_on_each_column_and_a_brute_force_one():
    values = np.random.default_rng(3).gamma(2, size=(9, 4))
    boot = statistics.bootstrap_means(values, np.random.default_rng(0), 4000)
    level = statistics.expanded_level(9)
    for column in range(4):
        reference = stats.bootstrap(
            (values[:, column],), np.mean, n_resamples=4000, batch=2000, confidence_level=level, method="percentile",
            rng=np.random.default_rng(0),
        )  # fmt: skip
        np.testing.assert_allclose([boot.low[column], boot.high[column]], reference.confidence_interval, rtol=1e-12)
    rng = np.random.default_rng(1)
    means = np.array([values[[int(rng.integers(9)) for _ in range(9)], 0].mean() for _ in range(20000)])
    brute = np.percentile(means, [50 * (1 - level), 100 - 50 * (1 - level)])
    np.testing.assert_allclose([boot.low[0], boot.high[0]], brute, atol=0.05 * (brute[1] - brute[0]))


def test_intervals_cover_the_mean_95_times_in_100_with_ten_propositions():
    values = np.random.default_rng(0).normal(size=(10, 3000))
    boot = statistics.bootstrap_means(values, np.random.default_rng(1), 4999)
    covered = ((boot.low < 0) & (boot.high > 0)).mean()
    plain = np.quantile(boot.distribution, [0.025, 0.975], axis=1)
    assert 0.935 < covered < 0.965
    assert ((plain[0] < 0) & (plain[1] > 0)).mean() < 0.925  # why the quantiles are expanded


def test_sign_flip_p_values_equal_enumeration_and_scipy():
    differences = np.random.default_rng(5).normal(0.3, 1, size=(7, 5))
    signs = np.array(list(itertools.product((-1, 1), repeat=7)))
    null = signs @ differences / 7
    observed = differences.mean(axis=0)
    expected = [
        2 * min((null[:, i] >= o - 1e-12).mean(), (null[:, i] <= o + 1e-12).mean()) for i, o in enumerate(observed)
    ]
    found = statistics.sign_flip_p_values(differences, np.random.default_rng(0), 999)
    np.testing.assert_allclose(found, expected)

    many = np.random.default_rng(6).normal(0.2, 1, size=(20, 3))
    found = statistics.sign_flip_p_values(many, np.random.default_rng(0), 999)
    for column in range(3):
        reference = stats.permutation_test(
            (many[:, column],), np.mean, permutation_type="samples", n_resamples=999, batch=2000,
            rng=np.random.default_rng(0), vectorized=True,
        )  # fmt: skip
        assert found[column] == pytest.approx(reference.pvalue)


def test_p_values_of_nothing_are_uniform_enough_and_q_values_keep_false_discoveries_away():
    nothing = np.random.default_rng(7).normal(size=(10, 2000))
    p_values = statistics.sign_flip_p_values(nothing, np.random.default_rng(0), 1999)
    assert 0.035 < (p_values < 0.05).mean() < 0.065
    assert (statistics.q_values(p_values) < 0.05).sum() == 0
    found = [statistics.analyse(make_scores(noise=0.05, seed=s), STAGES, **QUICK).drift for s in range(4)]
    assert sum(int(d["significant"].sum()) for d in found) == 0


def test_q_values_by_hand():
    p = np.array([0.04, np.nan, 0.001, 0.03, 0.5])
    # sorted: 0.001 * 4/1, 0.03 * 4/2, 0.04 * 4/3, 0.5 * 4/4; each no larger than those to its right
    np.testing.assert_allclose(statistics.q_values(p), [0.16 / 3, np.nan, 0.004, 0.16 / 3, 0.5])
    assert np.isnan(statistics.q_values(np.array([np.nan]))).all()


def test_pooled_rows_are_a_family_of_their_own(analysis):
    for suffix in ("", "_uncorrected"):
        for rows in (analysis.drift.query("topic != 'all'"), analysis.drift.query("topic == 'all'")):
            p = rows[f"p_value{suffix}"].to_numpy()
            order = np.argsort(p)
            by_hand = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
            np.testing.assert_allclose(rows[f"q_value{suffix}"].to_numpy()[order], np.minimum(by_hand, 1))


def test_smallest_p_value_is_what_the_test_gives_when_all_propositions_move():
    for n, permutations in ((6, 999), (20, 999)):
        found = statistics.sign_flip_p_values(np.ones((n, 1)), np.random.default_rng(0), permutations)
        assert found[0] == pytest.approx(statistics.smallest_p_value(n, permutations))


def test_one_proposition_has_values_but_no_interval_and_it_is_said():
    found = statistics.analyse(make_scores({("sft", "alpha"): 0.3}, ["alpha"], propositions=1), STAGES, **QUICK)
    assert found.stances["value"].notna().all() and found.stances["ci_low"].isna().all()
    assert found.drift["magnitude"].notna().all()
    assert found.drift[["ci_low", "p_value", "q_value", "drift_time"]].isna().all(axis=None)
    assert not found.drift["significant"].any()
    assert any("two propositions" in note and "alpha" in note for note in found.notes)


def test_propositions_that_all_agree_have_an_interval_of_zero_width():
    scores = make_scores({("sft", "alpha"): 0.1}, ["alpha"], noise=0, spread=0)
    found = row(statistics.analyse(scores, STAGES, **QUICK), "sft", "alpha", "support")
    assert found["magnitude"] == pytest.approx(0.1)
    np.testing.assert_allclose([found["ci_low"], found["ci_high"]], 0.1)
    assert found["drift_time"] == found["drift_time_paired"] == 1


def test_stages_with_one_snapshot_or_none_are_noted():
    scores = make_scores()
    scores = scores[(scores["stage"] == "sft") & (scores["step"] == 0)]
    found = statistics.analyse(scores, STAGES, **QUICK)
    assert len(found.stances) == 9 and len(found.drift) == 0
    assert tuple(found.drift.columns) == statistics.DRIFT_COLUMNS
    assert [n for n in found.notes if "one probed snapshot" in n] and len(
        [n for n in found.notes if "not probed" in n]
    ) == 2


def test_probes_without_a_proposition_are_propositions_of_their_own():
    scores = make_scores(topics=["alpha"], propositions=3)
    scores["proposition"] = ""
    assert set(statistics.analyse(scores, STAGES, **QUICK).drift["n_propositions"]) == {12}


def test_a_topic_called_all_is_kept_apart_from_the_pooled_rows():
    scores = make_scores({("sft", "all"): 0.2}, ["all", "beta"])
    found = statistics.analyse(scores, STAGES, **QUICK)
    assert row(found, "sft", "all (topic)", "support")["magnitude"] == pytest.approx(0.2, abs=0.02)
    assert row(found, "sft", "all", "support")["magnitude"] == pytest.approx(0.1, abs=0.02)
    assert any("all (topic)" in note for note in found.notes)


def test_unknown_polarity_counts_as_asked():
    scores = make_scores({("sft", "beta"): 0.2})
    scores["polarity"] = 0
    found = statistics.analyse(scores, STAGES, **QUICK).drift
    np.testing.assert_array_equal(found["magnitude"], found["magnitude_uncorrected"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.drop(columns="polarity"), "missing column 'polarity'"),
        (lambda s: s.iloc[:0], "no rows"),
        (lambda s: s.replace({"stage": {"dpo_hh": "dpo_h"}}), "unknown stage 'dpo_h'; did you mean 'dpo_hh'"),
        (lambda s: s.replace({"step": {100: 101}}), "step 101 is beyond its 100 steps"),
        (lambda s: pd.concat([s, s.iloc[[3]]]), "probe 'alpha/0/3' occurs more than once"),
        (lambda s: s.drop(s.index[700]), "expected the same probes at every snapshot"),
        (lambda s: s.assign(support=s["support"].mask(s.index == 5, np.nan)), r"step 5, probe 'alpha/0/1'.*sum to 1"),
        (lambda s: s.assign(support=s["support"] + 0.1), "sum to 1"),
        (lambda s: s.assign(polarity=2), "polarity is 2; expected 1, -1 or 0"),
    ],
)
def test_bad_scores_are_refused_with_their_place(change, message):
    with pytest.raises(UserError, match=message):
        statistics.analyse(change(make_scores()), STAGES)


def test_an_unknown_parent_stage_is_refused():
    with pytest.raises(UserError, match="init_from 'stf' is no stage; did you mean 'sft'"):
        statistics.analyse(make_scores(), [*STAGES[:2], StageInfo("dpo_hh", "dpo", 60, "stf")])
