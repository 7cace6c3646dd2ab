"""A judge's quality against brute force and closed forms, and the files that are written of it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vdjax.data.stances import Labelled
from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange, Judge, Verdicts, quality


def random_verdicts(n: int, seed: int) -> tuple[Verdicts, list[str]]:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(5, 0.5), n)
    labels = [LABELS[rng.choice(5, p=0.6 * row + 0.4 * np.eye(5)[rng.integers(5)])] for row in p]
    return Verdicts(p, p[:, 0] - p[:, 2]), labels


def test_numbers_are_those_of_brute_force() -> None:
    found, labels = random_verdicts(400, 1)
    got = quality.quality(found, labels)
    guesses = [LABELS[max(range(5), key=lambda k: row[k])] for row in found.p]
    assert got.accuracy == pytest.approx(sum(g == t for g, t in zip(guesses, labels, strict=True)) / 400)
    f1, brier, ece = [], 0.0, 0.0
    for label in LABELS:
        hits = sum(g == t == label for g, t in zip(guesses, labels, strict=True))
        precision, recall = hits / guesses.count(label), hits / labels.count(label)
        f1.append(2 * precision * recall / (precision + recall))
        for other in LABELS:
            count = sum((t, g) == (label, other) for g, t in zip(guesses, labels, strict=True))
            assert got.confusion.loc[label, other] == count
    assert got.macro_f1 == pytest.approx(sum(f1) / 5)
    for row, label in zip(found.p, labels, strict=True):
        brier += sum((row[k] - (LABELS[k] == label)) ** 2 for k in range(5)) / 400
    assert got.brier == pytest.approx(brier)
    for m in range(15):
        inside = [i for i in range(400) if m / 15 < max(found.p[i]) <= (m + 1) / 15]
        assert got.reliability["count"][m] == len(inside)
        if inside:
            accuracy = sum(guesses[i] == labels[i] for i in inside) / len(inside)
            confidence = sum(max(found.p[i]) for i in inside) / len(inside)
            ece += len(inside) / 400 * abs(accuracy - confidence)
    assert got.ece == pytest.approx(ece) and ece > 0.01
    directed = [i for i in range(400) if labels[i] in ("support", "oppose")]
    right = sum((found.p[i, 0] > found.p[i, 2]) == (labels[i] == "support") for i in directed)
    assert got.directed == len(directed) and got.direction == pytest.approx(right / len(directed))


def test_the_interval_is_wilsons() -> None:
    found, labels = random_verdicts(50, 2)
    got, z = quality.quality(found, labels), 1.959963984540054
    p, n = got.accuracy, 50
    middle, half = (p + z**2 / (2 * n)), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert got.accuracy_low == pytest.approx((middle - half) / (1 + z**2 / n))
    assert got.accuracy_high == pytest.approx((middle + half) / (1 + z**2 / n))


def verdicts_of(labels: Sequence[str], confidence: float, right: Sequence[bool]) -> Verdicts:
    p = np.full((len(labels), 5), (1 - confidence) / 4)
    for i, label in enumerate(labels):
        p[i, (LABELS.index(label) + (not right[i])) % 5] = confidence
    return Verdicts(p, np.zeros(len(labels)))


def test_closed_forms() -> None:
    labels = list(LABELS) * 20
    perfect = quality.quality(verdicts_of(labels, 1.0, [True] * 100), labels)
    assert (perfect.accuracy, perfect.macro_f1, perfect.ece, perfect.brier) == (1, 1, 0, 0)
    wrong = quality.quality(verdicts_of(labels, 1.0, [False] * 100), labels)
    assert (wrong.accuracy, wrong.macro_f1, wrong.ece, wrong.brier) == (0, 0, 1, 2)
    mixed = quality.quality(verdicts_of(labels, 0.9, [i % 10 < 6 for i in range(100)]), labels)
    assert mixed.ece == pytest.approx(0.3)  # sure to 0.9, right in 0.6
    calibrated = quality.quality(verdicts_of(labels, 0.6, [i % 10 < 6 for i in range(100)]), labels)
    assert calibrated.ece == pytest.approx(0, abs=1e-12)
    uniform = quality.quality(Verdicts(np.full((100, 5), 0.2), np.zeros(100)), labels)
    assert uniform.brier == pytest.approx(0.8) and uniform.direction == 0


def test_a_bin_holds_its_upper_edge() -> None:
    bins = quality.reliability_bins(np.array([0.0, 0.25, 0.26, 0.5, 1.0]), np.array([1, 1, 0, 1, 1]), 4)
    assert bins["count"].tolist() == [2, 2, 0, 1]
    assert bins["accuracy"][:2].tolist() == [1, 0.5] and np.isnan(bins["accuracy"][2])
    assert bins["confidence"][:2].tolist() == pytest.approx([0.125, 0.38])


def test_labels_that_nobody_gives_do_not_count() -> None:
    labels = ["refusal", "refusal", "neutral"]
    got = quality.quality(verdicts_of(labels, 0.8, [True, True, True]), labels)
    assert got.macro_f1 == 1 and got.directed == 0 and math.isnan(got.direction)


@pytest.mark.parametrize(
    ("labels", "text"),
    [([], "0 labels"), (["support"], "1 labels for 2"), (["suport", "oppose"], "did you mean 'supp")],
)
def test_wrong_labels_are_refused(labels: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        quality.quality(Verdicts(np.full((2, 5), 0.2), np.zeros(2)), labels)


def test_the_files_hold_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found, labels = random_verdicts(60, 3)
    sides = ("for", "against", "")
    items = [
        Labelled(Exchange("p", "q", f"r {i}"), label, "ab"[i % 2], sides[i // 20]) for i, label in enumerate(labels)
    ]
    items += [Labelled(Exchange("p", "q", "r"), "refusal", "none")]
    found = Verdicts(np.vstack([found.p, np.eye(5)[3]]), np.append(found.graded, np.nan))
    asked: list[int] = []

    def judge(exchanges: Sequence[Exchange], repeat: int) -> Verdicts:
        asked.append(len(exchanges))
        return found

    quality.measure(Judge("mine $x^$", "1234", judge), items, tmp_path / "out")
    assert asked == [61]
    whole = quality.quality(found, [item.label for item in items])
    assert capsys.readouterr().out == quality.summary(whole) + "\n"
    table = pd.read_csv(tmp_path / "out" / "quality.csv").set_index("topic")
    sides = {"propositions for their topic": 20, "propositions against their topic": 20}
    assert list(table["n"].items()) == list({"all": 61, **sides, "a": 30, "b": 30, "none": 1}.items())
    part = quality.quality(Verdicts(found.p[20:40], found.graded[20:40]), labels[20:40])
    assert table.loc["propositions against their topic", "direction"] == pytest.approx(part.direction, nan_ok=True)
    assert table.loc["all", "ece"] == pytest.approx(whole.ece)
    part = quality.quality(Verdicts(found.p[:60:2], found.graded[:60:2]), labels[::2])
    assert table.loc["a", "accuracy"] == pytest.approx(part.accuracy)
    assert table.loc["a", "brier"] == pytest.approx(part.brier)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    saved = json.loads((tmp_path / "out" / "quality.json").read_text(), parse_constant=refuse)
    assert saved["judge_hash"] == "1234" and saved["topics"][5]["direction"] is None
    assert pd.read_csv(tmp_path / "out" / "confusion.csv").set_index("label").to_numpy().sum() == 61
    every = pd.read_csv(tmp_path / "out" / "verdicts.csv")
    np.testing.assert_allclose(every[list(LABELS)], found.p)
    for name in ("reliability", "confusion"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert f"accuracy {whole.accuracy:.3f}" in quality.summary(whole)
