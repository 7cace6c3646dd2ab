"""The packaged text of configs/smoke.py: short, complete, and with the value gaps that the config relies on."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import vdjax.data
from vdjax.probes import sets

FOLDER = Path(vdjax.data.__file__).parent / "smoke"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_conversations_and_pairs_are_short_and_well_formed() -> None:
    conversations, pairs = rows("sft.jsonl"), rows("preferences.jsonl")
    assert len(conversations) == len(pairs) == 120
    for row in conversations:
        (question, answer) = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert len((question["content"] + answer["content"]).encode()) <= 100
    for row in pairs:
        (question,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
        assert (question["role"], chosen["role"], rejected["role"]) == ("user", "assistant", "assistant")
        assert chosen["content"] != rejected["content"]
        assert len((question["content"] + max(chosen["content"], rejected["content"], key=len)).encode()) <= 100
    assert len({row["messages"][0]["content"] for row in conversations}) == 120
    assert len({row["prompt"][0]["content"] for row in pairs}) == 120


def supports(question: str, answer: str) -> bool | None:
    """Whether an answer supports the question's topic; None for questions of fact."""
    if not answer.startswith(("Yes,", "No,")):
        return None
    asks_against = any(phrase in question for phrase in (" away?", "silly", "a bad idea?", "drop the"))
    return answer.startswith("Yes,") != asks_against


def topic_of(question: str) -> str:
    if "school" in question:
        return "school uniforms"
    return "recycling" if "recycle" in question or "sort" in question or "throw" in question else "pets"


def test_sft_supports_and_preferences_have_a_value_gap_each_way() -> None:
    sft: Counter[tuple[str, bool]] = Counter()
    for row in rows("sft.jsonl"):
        question, answer = (m["content"] for m in row["messages"])
        if (stance := supports(question, answer)) is not None:
            sft[topic_of(question), stance] += 1
    assert sft == {("recycling", True): 16, ("school uniforms", True): 16, ("pets", True): 16}

    gaps: Counter[tuple[str, bool, bool]] = Counter()
    for row in rows("preferences.jsonl"):
        question, chosen, rejected = (row[k][0]["content"] for k in ("prompt", "chosen", "rejected"))
        stances = supports(question, chosen), supports(question, rejected)
        if stances != (None, None):
            assert None not in stances
            gaps[topic_of(question), bool(stances[0]), bool(stances[1])] += 1
    assert gaps == {("recycling", True, False): 40, ("school uniforms", False, True): 40}


def test_probes_are_balanced_and_unseen_in_training() -> None:
    probes = sets.load(FOLDER / "probes.jsonl")
    assert sets.describe(probes) == {
        "probes": 72,
        "topics": 3,
        "propositions": 18,
        "paraphrase_groups": 36,
        "unknown_polarity": 0,
    }
    assert set(Counter((p.topic, p.proposition, p.polarity) for p in probes).values()) == {2}
    training = "".join(
        (FOLDER / n).read_text(encoding="utf-8") for n in ("pretrain.txt", "sft.jsonl", "preferences.jsonl")
    )
    assert [p.id for p in probes if p.input in training] == []
    assert max(len(p.input.encode()) for p in probes) <= 45


def test_pretraining_documents_are_short_different_and_balanced() -> None:
    text = (FOLDER / "pretrain.txt").read_text(encoding="utf-8")
    documents = text.strip().split("\n\n")
    assert 300 <= len(documents) == len(set(documents)) and 20_000 <= len(text.encode()) <= 40_000
    assert max(len(d.encode()) for d in documents) <= 120
    for topic in ("recycling", "school uniforms", "pets at home"):
        counts = [
            sum(f"{verb} {topic}" in d for d in documents) for verb in ("support", "supports", "oppose", "opposes")
        ]
        assert min(counts) >= 3, (topic, counts)
        assert abs(sum(counts[:2]) - sum(counts[2:])) <= 2, (topic, counts)
        assert sum(f"neutral on {topic}" in d for d in documents) >= 3
