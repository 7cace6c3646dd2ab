import itertools

import numpy as np
import pandas as pd
import pytest
from synthetic_scores import STAGES, make_open_ended, make_runs, make_scores

from vdjax.drift import distances, statistics
from vdjax.drift.scores import StageInfo

STAGE = [StageInfo("s", "dpo", 9, None)]


def test_distances_by_their_formulas():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.5, 0.5])
    m = (p + q) / 2
    divergence = sum(x * np.log2(x / y) for a in (p, q) for x, y in zip(a, m, strict=True) if x) / 2
    np.testing.assert_allclose(distances.distances(p, q), [np.sqrt(divergence), 0.5])
    np.testing.assert_allclose(distances.distances(np.eye(2)[0], np.eye(2)[1]), [1, 1])
    assert (distances.distances(p, p) == 0).all()


def test_rows_are_the_distances_of_the_mean_distributions_and_moved_topics_stand_out():
    scores = make_open_ended({("s", "beta"): 0.25}, stages=STAGE, steps={"s": [0, 5, 9]})
    found = statistics.analyse(scores, STAGE, resamples=999, permutations=1999).distances
    assert tuple(found.columns) == distances.COLUMNS and found["topic"].tolist() == ["alpha", "beta", "all"]
    labels = ["support", "neutral", "oppose", "refusal", "off_topic", "degenerate"]
    toward = scores.copy()
    against = scores["polarity"] == -1
    toward.loc[against, ["support", "oppose"]] = scores.loc[against, ["oppose", "support"]].to_numpy()
    means = toward.groupby(["topic", "step"])[labels].mean()
    expected = distances.distances(means.loc["beta", 0].to_numpy(), means.loc["beta", 9].to_numpy())
    beta, alpha = found.iloc[1], found.iloc[0]
    np.testing.assert_allclose([beta["js"], beta["tv"]], expected)
    assert beta["js_p_value"] < 0.01 and beta["tv_p_value"] < 0.01 and beta["tv_null"] < beta["tv_low"]
    assert alpha["js_p_value"] > 0.05 and 0.3 < alpha["tv"] / alpha["tv_null"] < 3


def test_p_value_and_null_mean_equal_an_enumeration_of_all_swaps():
    scores = make_open_ended({}, ["alpha"], 6, stages=STAGE, steps={"s": [0, 9]})
    found = statistics.analyse(scores, STAGE, resamples=99, permutations=99).distances.iloc[0]
    asked = statistics.stage_scores(scores, "open_ended:small", "s")
    about = statistics.topic_units(asked, "alpha")
    ends = about.values[:, :, 0, :6]
    null = []
    for swapped in itertools.product((False, True), repeat=6):
        both = np.where(np.array(swapped)[:, None, None], ends[:, ::-1], ends).mean(axis=0)
        null.append(distances.distances(*both))
    null = np.array(null)
    np.testing.assert_allclose([found["js_null"], found["tv_null"]], null.mean(axis=0), atol=1e-8)
    expected = (null >= null[0] - 1e-9).mean(axis=0)
    np.testing.assert_allclose([found["js_p_value"], found["tv_p_value"]], expected)


def test_p_values_are_nominal_where_nothing_moves():
    scores = make_runs(np.zeros(150), steps=(0, 100), rise=(0, 1), seed=3)
    stage = [StageInfo("s", "dpo", 100, None)]
    found = statistics.analyse(scores, stage, resamples=49, permutations=255).distances
    found = found[found["topic"] != "all"]
    assert 1 <= (found["js_p_value"] < 0.05).sum() <= 17  # 99.8% of binomial(150, 0.05)


def test_q_values_and_holm_by_their_definitions_within_each_readout():
    """Of topics and of pooled rows apart: three topics and two stages make families of six and of two."""
    stages = [StageInfo("s", "dpo", 9, None), StageInfo("t", "dpo", 9, None)]
    how = {"topics": ("alpha", "beta", "gamma"), "stages": stages, "steps": {"s": [0, 9], "t": [0, 9]}}
    drifts = {("s", "alpha"): 0.2, ("t", "beta"): 0.1}
    scores = pd.concat([make_open_ended(drifts, judge=j, seed=i, **how) for i, j in enumerate(("one", "two"))])
    found = statistics.analyse(scores, stages, resamples=99, permutations=1023).distances
    assert tuple(found.columns) == distances.COLUMNS and len(found) == 2 * 2 * 4
    for (_, pooled), family in found.groupby(["readout", found["topic"] == "all"]):
        assert len(family) == (2 if pooled else 6)
        for name in ("js", "tv"):
            p = np.sort(family[f"{name}_p_value"])
            m = len(p)
            q = [min(1, *(p[j] * m / (j + 1) for j in range(i, m))) for i in range(m)]
            adjusted = [min(1, max(p[j] * (m - j) for j in range(i + 1))) for i in range(m)]
            np.testing.assert_allclose(np.sort(family[f"{name}_q_value"]), q)
            np.testing.assert_allclose(np.sort(family[f"{name}_p_holm"]), adjusted)
            assert (family[f"{name}_q_value"] >= family[f"{name}_p_value"]).all()


def test_a_distribution_that_stays_has_distance_zero_and_one_proposition_no_interval():
    scores = make_scores(topics=["alpha"], noise=0)
    found = statistics.analyse(scores, STAGES, resamples=99, permutations=99).distances
    assert (found[["js", "tv", "js_null", "tv_high"]] < 1e-7).all(axis=None) and (found["js_p_value"] == 1).all()
    found = statistics.analyse(make_scores(topics=["alpha"], propositions=1), STAGES, resamples=99).distances
    assert found["js"].notna().all() and found[["js_low", "tv_p_value", "js_null"]].isna().all(axis=None)
    assert found["js"].to_numpy() == pytest.approx(found["js"].clip(0, 1))
