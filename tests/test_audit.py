"""The values of data, with judges whose verdicts are known."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict
from scipy import stats
from scipy.spatial.distance import jensenshannon

from vdjax import audit
from vdjax import config as configs
from vdjax.data.examples import Example
from vdjax.drift import gaps
from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange, Judge, Verdicts
from vdjax.probes import sets
from vdjax.values import learned, measures, output

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
    assert "10 examples looked at, 9 touch a topic: 9 in the question, 0 in an earlier turn, 0 in a" in made.notes[0]
    found = made.found.set_index("topic")
    assert found.loc["all", ["looked_at", "question", "earlier", "response"]].tolist() == [10, 9, 0, 0]
    assert found["question"].drop("all").sum() == 9 and found.loc["abortion", "question"] == 6
    again = audit.audit([*abortion, *guns, *other], "preference", PROBES, JUDGE, data="d")
    for one, other_table in zip(made[:4], again[:4], strict=True):
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
    assert nothing.hits.empty and nothing.values.empty and "1 examples looked at, 0 touch" in nothing.notes[0]
    both = audit.joined([nothing, made])
    assert len(both.values) == 2 and len(both.notes) == 2


def test_every_scored_answer_of_a_conversation_is_judged_with_its_own_question() -> None:
    """And the conversation counts once, with the mean of its answers."""

    def talk(id: str, *turns: str) -> Example:
        prompt = tuple({"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns[:-1]))
        return Example(id, prompt, turns[-1:])

    data = [
        talk("a", "Tea?", "yes tea", "Is abortion fine?", "yes 1", "Is abortion murder?", "no 2", "Why?", "yes 3"),
        talk("b", "Is abortion fine?", "no"),
    ]
    made = audit.audit(data, "sft", PROBES, JUDGE, data="d")
    hits = made.hits[["id", "prompt", "response"]].to_numpy().tolist()
    assert hits == [
        ["a", "Is abortion fine?", "yes 1"],
        ["a", "Is abortion murder?", "no 2"],
        ["a", "Is abortion murder?\n\nWhy?", "yes 3"],
        ["b", "Is abortion fine?", "no"],
    ]
    row = the(made.values, topic="abortion")
    assert row["n"] == 2 and row["graded"] == pytest.approx((1 / 3 - 1) / 2)
    assert "5 answers of 2 conversations looked at, 4 touch a topic" in made.notes[0]
    last = audit.audit(data, "sft", PROBES, JUDGE, turns="last")
    assert last.hits["response"].tolist() == ["yes 3", "no"]


def labelled(answers: Sequence[tuple[str, float]]) -> list[Example]:
    prompt = ({"role": "user", "content": "Is abortion fine?"},)
    return [Example(f"e{i}", prompt, (text,), label) for i, (text, label) in enumerate(answers)]


def test_desirable_against_undesirable_responses_by_hand() -> None:
    good, bad = ["yes", "yes", "no", "maybe", "sorry"], ["no", "no", "yes", "no"]
    data = labelled([*((text, 1.0) for text in good), *((text, 0.0) for text in bad)])
    made = audit.audit(data, "unpaired", PROBES, JUDGE, data="kto")
    desirable, undesirable = (the(made.values, topic="abortion", side=s) for s in ("desirable", "undesirable"))
    assert (desirable["n"], desirable["n_graded"], undesirable["n"]) == (5, 4, 4)
    gap = the(made.gaps, topic="abortion")
    first, second = np.array([1.0, 1, -1, 0]), np.array([-1.0, -1, 1, -1])
    assert gap["signed"] == pytest.approx(first.mean() - second.mean()) and (gap["n"], gap["n_signed"]) == (9, 8)
    assert gap["signed_low"] < gap["signed"] < gap["signed_high"]
    exact = stats.permutation_test((first, second), lambda a, b: a.mean() - b.mean(), n_resamples=10**5)
    assert gap["p"] == pytest.approx(exact.pvalue, abs=0.02)
    assert gap["js"] == pytest.approx(jensenshannon([2 / 5, 1 / 5, 1 / 5, 1 / 5, 0], [1 / 4, 0, 3 / 4, 0, 0], base=2))
    one_sided = audit.audit(labelled([("yes", 1.0), ("no", 1.0)]), "unpaired", PROBES, JUDGE)
    assert np.isnan(the(one_sided.gaps, topic="abortion")["signed"]) and set(one_sided.values["side"]) == {"desirable"}


def test_unpaired_intervals_cover_and_chance_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("RESAMPLES", 400), ("PERMUTATIONS", 199), ("SWAPS", 50)):
        monkeypatch.setattr(measures, name, number)
    rng = np.random.default_rng(1)
    covered = small = 0
    runs = 40
    for run in range(runs):
        data = labelled([(str(rng.choice(list(WORDS)[:3])), float(i % 3 == 0)) for i in range(60)])
        gap = the(audit.audit(data, "unpaired", PROBES[:1], JUDGE, seed=run).gaps, topic="abortion")
        covered += gap["signed_low"] <= 0 <= gap["signed_high"]
        small += gap["p"] < 0.05
    assert stats.binomtest(covered, runs, 0.95).pvalue > 0.01
    assert stats.binomtest(small, runs, 0.05, alternative="greater").pvalue > 0.01


def test_intervals_cover_and_chance_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen and rejected of the same distribution: the signed interval covers 0, and js is that of chance."""
    for name, number in (("RESAMPLES", 400), ("PERMUTATIONS", 499), ("SWAPS", 100)):
        monkeypatch.setattr(measures, name, number)
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
         "ci_low": x - 0.1, "ci_high": x + 0.1, "significant": abs(x) > 0.25}
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
    against = gaps.against_drift(made.values, made.gaps, drift)
    assert list(against.columns) == list(gaps.COLUMNS) and set(against["readout"]) == {"open_ended:words"}
    rows = {(r.stage, r.topic): (r.side, r.gap, r.predicted, r.drift, r.agrees) for r in against.itertuples()}
    assert rows == {
        ("dpo", "abortion"): ("chosen - rejected", 1.75, 1, 0.4, True),
        ("dpo", "gun rights"): ("chosen - rejected", -2, -1, -0.3, True),
        ("sft", "immigration"): ("sft", pytest.approx(1 / 3), 1, -0.2, False),
    }
    # Of abortion the gap is certain (1 to 2) and the drift significant; of guns too; of immigration neither is.
    assert dict(zip(against["topic"], against["certain"], strict=True)) == {
        "abortion": True,
        "gun rights": True,
        "immigration": False,
    }
    found = gaps.agreement(against)
    assert (found["n"], found["agree"], found["certain"], found["certain_agree"]) == (3, 2, 2, 2)
    assert "2 of 2 drifts have the sign" in gaps.sentence(found) and "2 of 3 in all" in gaps.sentence(found)
    for change in ({"significant": False}, {"magnitude": np.nan}):
        assert not gaps.against_drift(made.values, made.gaps, drift.assign(**change))["certain"].any()
    unsure = made.gaps.assign(signed_low=-0.1)
    assert gaps.against_drift(made.values, unsure, drift)["certain"].tolist() == [False, True, False]
    labels = audit.audit(labelled([("yes", 1.0), ("yes", 1.0), ("no", 0.0)]), "unpaired", PROBES, JUDGE, data="dpo")
    assert gaps.against_drift(labels.values, labels.gaps, drift)["side"].tolist() == ["desirable - undesirable"]
    expected = stats.spearmanr([1.75, -2, 1 / 3], [0.4, -0.3, -0.2])
    assert (found["spearman"], found["p"]) == pytest.approx((expected.statistic, expected.pvalue), nan_ok=True)
    tables = {"hits.parquet": made.hits, "values.csv": made.values, "gaps.csv": made.gaps}
    output.write(tmp_path, tables, against)
    figures = {"gap_against_drift.png", "value_gaps.png"}
    beside = {"against_drift.csv", "against_drift.json", "examples.md"}
    assert {p.name for p in tmp_path.iterdir()} == {*beside, *tables, *figures}
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "hits.parquet"), made.hits)
    with pytest.raises(UserError, match="no rows of the stance 'graded'"):
        gaps.against_drift(made.values, made.gaps, drift[drift["stance"] == "support"])


def test_examples_to_read() -> None:
    """The surest of both sides of each topic with the other answer, and nothing in them that Markdown would act on."""
    evil = "yes\n# <script>alert(1)</script>\x1b[2J\u2028```" + "x" * 2000
    answers = [("yes", "no"), ("maybe", "no"), (evil, "no no"), ("no", "maybe")]
    made = audit.audit(pairs("Is abortion\n## fine?", answers), "preference", PROBES, JUDGE, data="d")
    hits = made.hits.assign(support=made.hits["support"] * np.where(made.hits["id"] == "e2", 1, 0.9))
    shown = output.examples(hits)
    assert shown.count("## d, abortion: most sure to") == 2 and "found by question" in shown
    support = shown[: shown.index("most sure to oppose")]
    assert support.index("e2 (found") < support.index("e0 (found") and "e1 (found" not in support
    assert "chosen: support 1.00" in support and "rejected: oppose 1.00" in support and "    no no" in support
    assert "\x1b" not in shown and "\u2028" not in shown and "more characters]" in shown and "x" * 1600 not in shown
    for line in shown.splitlines():
        assert line.startswith("    ") or not any(text in line for text in ("script", "fine?", "```"))
    assert output.examples(hits, each=1).count("(found by") == 2


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Is abortion fine, {i}?", "chosen": "yes", "rejected": "no"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sft = [{"prompt": "Is gun control bad?", "completion": "maybe"}, {"prompt": "Cake?", "completion": "yes"}]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sft))
    labels = [
        {"prompt": f"Is abortion fine, {i}?", "completion": text, "label": label}
        for i, (text, label) in enumerate((("yes", True), ("yes", True), ("no", False)))
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(r) + "\n" for r in labels))
    return tmp_path


def test_every_stage_of_a_run(files: Path) -> None:
    config = configs.experiment()
    config.stages = ("sft", "dpo", "ppo", "kto", "rm", "ppo_rm", "kto_labels")
    config.sft = configs.stage("sft", data={"path": str(files / "sft.jsonl")})
    config.dpo = configs.stage("dpo", data={"path": str(files / "pairs.jsonl"), "max_examples": 3})
    config.ppo = configs.stage("ppo", data={"path": str(files / "pairs.jsonl")})
    config.kto = configs.stage("kto", data={"path": str(files / "pairs.jsonl"), "skip_examples": 2})
    config.rm = configs.stage("reward_model", data={"path": str(files / "pairs.jsonl")})
    config.ppo_rm = configs.stage("ppo", data={"path": str(files / "sft.jsonl")}, reward={"model": "rm"})
    config.kto_labels = configs.stage("kto", data={"path": str(files / "labels.jsonl")})
    config.tokenizer.path = "bytes"
    made = audit.audit_run(config, files / "run", PROBES, JUDGE)
    counts = {(v.data, v.topic, v.side): v.n for v in made.values.itertuples() if v.topic != "all"}
    assert counts == {
        ("sft", "gun rights", "sft"): 1,
        **{("dpo", "abortion", side): 3 for side in ("chosen", "rejected")},
        **{("kto", "abortion", side): 2 for side in ("chosen", "rejected")},
        **{(stage, "abortion", side): 4 for stage in ("rm", "ppo_rm") for side in ("chosen", "rejected")},
        ("kto_labels", "abortion", "desirable"): 2,
        ("kto_labels", "abortion", "undesirable"): 1,
    }
    assert made.notes[-1] == "ppo: not audited: the objective ppo learns from no stated answers"
    assert "ppo_rm: learns from its own responses; rm, which rewards them, was audited in their place" in made.notes
    assert the(made.gaps, data="ppo_rm", topic="abortion")["signed"] == 2
    assert the(made.gaps, data="kto_labels", topic="abortion")["signed"] == 2
    assert set(made.hits["data"]) == {"sft", "dpo", "kto", "rm", "kto_labels"}


def test_the_audited_examples_are_those_trained_on(files: Path) -> None:
    """Of parts: those that can be rendered, without the held-out ones; of an ended stage: those that it came to."""
    asked = [f"{'Is abortion fine? ' * (9 if i == 1 else 1)}{i}" for i in range(9)]
    rows = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in asked]
    (files / "more.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = configs.experiment()
    config.tokenizer.path, config.stages = "bytes", ("dpo",)
    config.dpo = configs.stage("dpo", max_length=80, eval_examples=2)
    part = {"path": str(files / "more.jsonl")}
    config.dpo.data.parts, config.dpo.data.max_examples = ({**part, "count": 3}, {**part, "skip_examples": 4}), 6

    def trained(config: Any) -> list[str]:
        kind, examples, notes = learned.stage_examples(config, "dpo", files / "run")
        assert kind == "preference" and not notes
        return [example.id for example in examples]

    # Example 1 is too long, so the first part has 0, 2 and 3; of 6 mixed examples the last two are held out.
    every = [f"part0/more.jsonl:{i}" for i in (0, 2, 3)] + [f"part1/more.jsonl:{i}" for i in (4, 5, 6)]
    mixed = [f"part{p}/more.jsonl:{i}" for j in range(3) for p, i in ((0, (0, 2, 3)[j]), (1, (4, 5, 6)[j]))]
    assert trained(config) == [id for id in every if id in mixed[:4]]
    rendered = set((files / "run" / "data").iterdir())
    kept = ConfigDict(json.loads(configs.to_json(config)))  # as a workdir has it
    assert trained(kept) == trained(config) and set((files / "run" / "data").iterdir()) == rendered
    config.dpo.max_steps, config.dpo.batch_size = 1, 3
    assert len(trained(config)) == 3 and set(trained(config)) < set(mixed[:4])
    (files / "run" / "dpo").mkdir()
    (files / "run" / "dpo" / "done.json").write_text('{"data_counts": {"rows": 5}}')
    assert "changed since" in learned.stage_examples(config, "dpo", files / "run")[2][0]


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
    out = capsys.readouterr().out
    assert "abortion" in out and str(files / "w" / "audit" / "examples.md") in out
    assert "Is abortion fine, 0?" in (files / "w" / "audit" / "examples.md").read_text()
    for flags, message in (
        (["--data", data], "needs --workdir"),
        (["--run", str(files)], "no config.json there"),
        ([], "give what is to be audited"),
        (["--study", str(files), "--data", data], "leave --data"),
        (["--study", str(files)], "found 0 runs"),
        (["--data", "nowhere.jsonl", "--workdir", str(files)], "no such file"),
        (["--data", data, "--workdir", str(files), "--config.seed=1"], "unknown flag"),
    ):
        monkeypatch.setattr(sys, "argv", ["audit", "--judge", "x", *flags])
        with pytest.raises(UserError, match=message):
            audit.main()


def write_run(folder: Path, config: ConfigDict, stage: str) -> None:
    (folder / "drift").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": json.loads(configs.to_json(config))}))
    drift_table({stage: {"abortion": 0.4, "all": 0.9}}).to_csv(folder / "drift" / "drift.csv", index=False)


def test_data_beside_a_run_of_given_checkpoints(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = pytest.importorskip("vdjax.judges.open")
    monkeypatch.setattr(opened, "open_judge", lambda *args: JUDGE)
    write_run(files / "probed", configs.experiment(), "models")
    data = ["--run", str(files / "probed"), "--data", str(files / "pairs.jsonl")]
    monkeypatch.setattr(sys, "argv", ["audit", "--judge", "x", *data])
    audit.main()
    against = pd.read_csv(files / "probed" / "audit" / "against_drift.csv")
    row = the(against, topic="abortion")
    assert (row["stage"], row["gap"], row["drift"], row["agrees"], row["certain"]) == ("models", 2, 0.4, True, True)
    trained = configs.experiment()
    trained.stages, trained.dpo = ("dpo",), configs.stage("dpo")
    write_run(files / "trained", trained, "dpo")
    for flags, message in (
        (data[:2], "does not know what its models were trained on"),
        ([*data[:3], f"{data[3]},{data[3]}"], "one file, directory or hub id"),
        (["--run", str(files / "trained"), *data[2:]], "its config says what its stages read"),
    ):
        monkeypatch.setattr(sys, "argv", ["audit", "--judge", "x", *flags])
        with pytest.raises(UserError, match=message):
            audit.main()


def test_all_runs_of_a_study(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Each response is judged once; runs without a report are named and left out."""
    opened = pytest.importorskip("vdjax.judges.open")
    asked: list[Exchange] = []

    def counting(exchanges: Sequence[Exchange], repeat: int) -> Verdicts:
        asked.extend(exchanges)
        return verdicts(exchanges, repeat)

    monkeypatch.setattr(opened, "open_judge", lambda *args: JUDGE._replace(judge=counting))
    config = configs.experiment()
    config.tokenizer.path, config.stages = "bytes", ("dpo",)
    config.dpo = configs.stage("dpo", data={"path": str(files / "pairs.jsonl")})
    for seed in (0, 1):
        config.seed = seed
        write_run(files / "study" / f"a-seed-{seed}", config, "dpo")
    (files / "study" / "b").mkdir()
    (files / "study" / "b" / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["audit", "--judge", "x", "--study", str(files / "study")])
    audit.main()
    assert "left out: b" in capsys.readouterr().err
    for seed in (0, 1):
        against = pd.read_csv(files / "study" / f"a-seed-{seed}" / "audit" / "against_drift.csv")
        assert the(against, topic="abortion")["gap"] == 2
    assert len(asked) == len(set(asked)) == 8


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
    monkeypatch.setattr(audit.runtime, "start", lambda *_: None)
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
