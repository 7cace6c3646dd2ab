"""The values of data, with judges whose verdicts are known."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from vdjax import audit
from vdjax import config as configs
from vdjax.data.examples import Example
from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange, Judge, Verdicts
from vdjax.probes import sets
from vdjax.values import output

PROBES = sets.load("builtin")
WORDS = {"yes": 0, "maybe": 1, "no": 2, "sorry": 3, "banana": 4}


def verdicts(exchanges: Sequence[Exchange], repeat: int) -> Verdicts:
    """Sure of what the response's first word says."""
    labels = np.array([WORDS[e.response.split()[0]] for e in exchanges])
    return Verdicts(np.eye(5)[labels], np.array([1.0, 0.0, -1.0, np.nan, np.nan])[labels])


JUDGE = Judge("words", "hash", verdicts)


def pairs(topic_question: str, answers: Sequence[tuple[str, ...]], start: int = 0) -> list[Example]:
    prompt = ({"role": "user", "content": topic_question},)
    return [Example(f"e{start + i}", prompt, answer) for i, answer in enumerate(answers)]


def the(frame: pd.DataFrame, **values: Any) -> Any:
    chosen = frame[np.logical_and.reduce([frame[k] == v for k, v in values.items()])]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_pairs_without_a_verdict_are_left_out_and_counted() -> None:
    """Not read as a distribution that equals every other."""

    def some(exchanges: Sequence[Exchange], repeat: int) -> Verdicts:
        found = verdicts(exchanges, repeat)
        unread = [i for i, e in enumerate(exchanges) if e.response.startswith("maybe")]
        found.p[unread] = np.nan
        return found

    examples = pairs("Should abortion be legal?", [("yes", "no")] * 4 + [("maybe", "no")])
    made = audit.audit(examples, "preference", PROBES, JUDGE._replace(judge=some), data="d")
    gap = the(made.gaps, topic="abortion")
    assert (gap["n"], gap["js"], gap["signed"]) == (4, 1, 2)
    assert "1 of 5 matches left out: words has no verdict" in made.notes[1]


def test_preference_data_by_hand() -> None:
    abortion = pairs(
        "Should abortion be legal?",
        [("yes", "no"), ("yes", "no"), ("maybe", "no"), ("sorry", "yes"), ("sorry", "banana"), ("yes", "yes")],
    )
    guns = pairs("Do you own a gun?", [("no", "yes")] * 3, start=6)
    other = pairs("Do you like cake?", [("yes", "no")], start=9)
    made = audit.audit([*abortion, *guns, *other], "preference", PROBES, JUDGE, data="d")
    assert len(made.hits) == 18 and set(made.hits["topic"]) == {"abortion", "gun rights"}
    hit = the(made.hits, id="e3", side="chosen")
    assert hit["response"] == "sorry" and hit["refusal"] == 1 and np.isnan(hit["graded"])
    assert hit["proposition"] == "Abortion should be legal." and hit["judge_hash"] == "hash"
    chosen = the(made.values, topic="abortion", side="chosen")
    assert [chosen[label] for label in LABELS] == pytest.approx([3 / 6, 1 / 6, 0, 2 / 6, 0])
    assert chosen["graded"] == pytest.approx(3 / 4) and (chosen["n"], chosen["n_graded"]) == (6, 4)
    assert chosen["support_low"] < 0.5 < chosen["support_high"]
    gap = the(made.gaps, topic="abortion")
    assert gap["js"] == pytest.approx(jensenshannon([3, 1, 0, 2, 0], [2, 0, 3, 0, 1], base=2))
    assert gap["js_low"] < gap["js"] < gap["js_high"]
    differences = np.array([2, 2, 1, -1, 0])  # a response without a stance is 0; a pair without any is left out
    assert gap["signed"] == pytest.approx(differences.mean()) and (gap["n"], gap["n_signed"]) == (6, 5)
    exact = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=10**5)
    assert gap["p"] == pytest.approx(exact.pvalue)
    assert the(made.gaps, topic="gun rights")["signed"] == -2
    pooled = the(made.gaps, topic="all")
    assert pooled["n"] == 9 and pooled["signed"] == pytest.approx((4 - 6) / 8)
    assert "10 examples read, 9 touch a topic" in made.notes[0]
    again = audit.audit([*abortion, *guns, *other], "preference", PROBES, JUDGE, data="d")
    for one, other_table in zip(made[:3], again[:3], strict=True):
        pd.testing.assert_frame_equal(one, other_table)


def test_an_example_of_two_topics_counts_once_in_all() -> None:
    both = pairs("Do religious people oppose abortion?", [("yes", "no"), ("no", "yes")])
    made = audit.audit([*both, *pairs("Is abortion fine?", [("yes", "no")], 2)], "preference", PROBES, JUDGE)
    assert len(made.hits) == 2 * (2 * 2 + 1)
    assert the(made.values, topic="all", side="chosen")["n"] == 3
    assert the(made.gaps, topic="all")["signed"] == pytest.approx((2 - 2 + 2) / 3)


def test_sft_data() -> None:
    made = audit.audit(pairs("Is abortion fine?", [("yes",), ("no",), ("yes",)]), "sft", PROBES, JUDGE, data="d")
    assert made.gaps.empty and the(made.values, topic="abortion", side="sft")["graded"] == pytest.approx(1 / 3)
    nothing = audit.audit(pairs("Cake?", [("yes",)]), "sft", PROBES, JUDGE, data="d")
    assert nothing.hits.empty and nothing.values.empty and "1 examples read, 0 touch" in nothing.notes[0]
    both = audit.joined([nothing, made])
    assert len(both.values) == 2 and len(both.notes) == 2


def test_intervals_cover_and_chance_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen and rejected of the same distribution: the signed interval covers 0, and js is that of chance."""
    for name, number in (("RESAMPLES", 400), ("PERMUTATIONS", 499), ("SWAPS", 100)):
        monkeypatch.setattr(audit, name, number)
    rng = np.random.default_rng(0)
    words = list(WORDS)[:3]
    covered, ratios, small = 0, [], 0
    runs = 40
    for run in range(runs):
        answers = [tuple(rng.choice(words, 2)) for _ in range(30)]
        rows = audit.audit(pairs("Is abortion fine?", answers), "preference", PROBES[:1], JUDGE, seed=run).gaps
        gap = the(rows, topic="abortion")
        covered += gap["signed_low"] <= 0 <= gap["signed_high"]
        ratios.append(gap["js"] / gap["js_null"])
        small += gap["p"] < 0.05
    assert stats.binomtest(covered, runs, 0.95).pvalue > 0.01
    assert stats.binomtest(small, runs, 0.05, alternative="greater").pvalue > 0.01
    assert 0.8 < np.mean(ratios) < 1.2


def drift_table(stages: dict[str, dict[str, float]]) -> pd.DataFrame:
    rows = [
        {"readout": readout, "stage": stage, "topic": topic, "stance": stance, "magnitude": sign * x,
         "ci_low": x - 0.1, "ci_high": x + 0.1}
        for readout, sign in (("open_ended:words", 1), ("statement", -1))
        for stage, topics in stages.items()
        for topic, x in topics.items()
        for stance in ("support", "graded")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_gaps_against_drift(tmp_path: Path) -> None:
    preference = pairs("Is abortion fine?", [("yes", "no")] * 3 + [("yes", "maybe")]) + pairs(
        "Own a gun?", [("no", "yes")]
    )
    guns = pairs("Is gun control good?", [("no", "yes")] * 2, start=9)
    sft = pairs("Is immigration good?", [("yes",), ("yes",), ("no",)])
    made = audit.joined(
        [
            audit.audit([*preference, *guns], "preference", PROBES, JUDGE, data="dpo"),
            audit.audit(sft, "sft", PROBES, JUDGE, data="sft"),
        ]
    )
    drift = drift_table({"dpo": {"abortion": 0.4, "gun rights": -0.3, "all": 0.9}, "sft": {"immigration": -0.2}})
    against = audit.against_drift(made, drift)
    assert list(against.columns) == list(audit.AGAINST_COLUMNS) and set(against["readout"]) == {"open_ended:words"}
    rows = {(r.stage, r.topic): (r.side, r.gap, r.predicted, r.drift, r.agrees) for r in against.itertuples()}
    assert rows == {
        ("dpo", "abortion"): ("chosen - rejected", 1.75, 1, 0.4, True),
        ("dpo", "gun rights"): ("chosen - rejected", -2, -1, -0.3, True),
        ("sft", "immigration"): ("sft", pytest.approx(1 / 3), 1, -0.2, False),
    }
    found = audit.agreement(against)
    assert (found["n"], found["agree"]) == (3, 2)
    expected = stats.spearmanr([1.75, -2, 1 / 3], [0.4, -0.3, -0.2])
    assert (found["spearman"], found["p"]) == pytest.approx((expected.statistic, expected.pvalue), nan_ok=True)
    tables = {"hits.parquet": made.hits, "values.csv": made.values, "gaps.csv": made.gaps}
    output.write(tmp_path, tables, against, found)
    figures = {"gap_against_drift.png", "value_gaps.png"}
    assert {p.name for p in tmp_path.iterdir()} == {"against_drift.csv", "against_drift.json", *tables, *figures}
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "hits.parquet"), made.hits)
    with pytest.raises(UserError, match="no rows of the stance 'graded'"):
        audit.against_drift(made, drift[drift["stance"] == "support"])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Is abortion fine, {i}?", "chosen": "yes", "rejected": "no"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sft = [{"prompt": "Is gun control bad?", "completion": "maybe"}, {"prompt": "Cake?", "completion": "yes"}]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sft))
    return tmp_path


def test_every_stage_of_a_run(files: Path) -> None:
    config = configs.experiment()
    config.stages = ("sft", "dpo", "ppo", "kto")
    config.sft = configs.stage("sft", data={"path": str(files / "sft.jsonl")})
    config.dpo = configs.stage("dpo", data={"path": str(files / "pairs.jsonl"), "max_examples": 3})
    config.ppo = configs.stage("ppo", data={"path": str(files / "pairs.jsonl")})
    config.kto = configs.stage("kto", data={"path": str(files / "pairs.jsonl"), "skip_examples": 3})
    made = audit.audit_run(config, PROBES, JUDGE)
    counts = {(v.data, v.topic, v.side): v.n for v in made.values.itertuples() if v.topic != "all"}
    assert counts == {
        ("sft", "gun rights", "sft"): 1,
        **{("dpo", "abortion", side): 3 for side in ("chosen", "rejected")},
        **{("kto", "abortion", side): 1 for side in ("chosen", "rejected")},
    }
    assert made.notes[-1] == "ppo: not audited: the objective ppo learns from no stated answers"


def test_the_parts_of_a_mixture(files: Path) -> None:
    stage = configs.stage("dpo")
    with stage.unlocked():
        stage.data.parts = ({"path": str(files / "pairs.jsonl"), "count": 2}, {"path": str(files / "pairs.jsonl")})
        stage.data.max_examples = 5
    kind, examples, _ = audit.stage_examples(stage, 0)
    assert kind == "preference" and [e.id for e in examples] == [f"pairs.jsonl:{i}" for i in (0, 1, 0, 1, 2)]


def test_the_command(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    opened = pytest.importorskip("vdjax.judges.open")
    monkeypatch.setattr(opened, "open_judge", lambda *args: JUDGE)
    data = f"{files / 'pairs.jsonl'},{files / 'sft.jsonl'}"
    monkeypatch.setattr(sys, "argv", ["audit", "--data", data, "--judge", "x", "--workdir", str(files / "w")])
    audit.main()
    values = pd.read_csv(files / "w" / "audit" / "values.csv")
    assert set(zip(values["data"], values["side"], strict=True)) == {
        ("pairs.jsonl", "chosen"),
        ("pairs.jsonl", "rejected"),
        ("sft.jsonl", "sft"),
    }
    assert "abortion" in capsys.readouterr().out
    for flags, message in (
        (["--data", data], "needs --workdir"),
        (["--run", str(files)], "no config.json there"),
        (["--data", "nowhere.jsonl", "--workdir", str(files)], "no such file"),
        (["--data", data, "--workdir", str(files), "--config.seed=1"], "unknown flag"),
    ):
        monkeypatch.setattr(sys, "argv", ["audit", "--judge", "x", *flags])
        with pytest.raises(UserError, match=message):
            audit.main()


def test_a_judge_of_a_config_reads_the_data(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"proposition": proposition, "question": f"Is abortion fine, {i}?", "response": text, "label": label}
        for proposition in {*sets.TOPICS.values(), *(p.proposition for p in PROBES)}
        for i in range(4)
        for text, label in (("yes", "support"), ("no", "oppose"))
    ]
    pd.DataFrame(rows).to_csv(files / "labels.csv", index=False)
    (files / "judges.py").write_text(
        "from vdjax import config as base\n\n\ndef get_config():\n    c = base.experiment()\n"
        f"    c.judges.people = base.judge('human', path={str(files / 'labels.csv')!r})\n    return c\n"
    )
    flags = ["--data", str(files / "pairs.jsonl"), "--workdir", str(files / "w"), "--config", str(files / "judges.py")]
    monkeypatch.setattr(audit.runtime, "start", lambda: None)
    monkeypatch.setattr(sys, "argv", ["audit", *flags, "--judge", "people"])
    audit.main()
    hits = pd.read_parquet(files / "w" / "audit" / "hits.parquet")
    assert set(hits["judge"]) == {"people"} and set(zip(hits["side"], hits["support"], strict=True)) == {
        ("chosen", 1.0),
        ("rejected", 0.0),
    }
    monkeypatch.setattr(sys, "argv", ["audit", *flags, "--judge", "peple"])
    with pytest.raises(UserError, match="did you mean 'people'"):
        audit.main()
