import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from vdjax.data import chat, tokenizer
from vdjax.errors import UserError
from vdjax.probes import readouts
from vdjax.probes.readouts import STANCES
from vdjax.probes.sets import Probe

PROBES = [
    Probe("tea-1", "tea", "Tea is good.", 1, "tea-a", "Is tea good?"),
    Probe("tea-2", "tea", "Tea is good.", -1, "tea-b", "Is tea bad, {really}?"),
]


@pytest.fixture(scope="module")
def tok() -> Any:
    return tokenizer.byte_level()


@pytest.fixture(scope="module")
def items(tok: Any) -> list[readouts.Item]:
    return readouts.items(PROBES, ("statement", "options"), tok, chat.pick_template(tok, "auto"), 300)


def text(item: readouts.Item, tok: Any, branch: int) -> str:
    return chat.decode(item.rendered.tokens[item.rendered.branches == branch], tok)


def test_statement_asks_the_probe_and_scores_every_answer(items: list[readouts.Item], tok: Any) -> None:
    mine = [item for item in items if item.readout == "statement"]
    assert [item.probe for item in mine] == [0, 1] and all(item.order == "" for item in mine)
    for item in mine:
        assert f"user\n{PROBES[item.probe].input}<|im_end|>" in text(item, tok, 0)
        pairs = [(s, a) for s in STANCES for a in readouts.STATEMENTS[s]]
        assert list(zip(item.stances, item.answers, strict=True)) == pairs
        for branch, (_, answer) in enumerate(pairs, start=1):
            assert text(item, tok, branch) == f"{answer}<|im_end|>"
        np.testing.assert_array_equal(item.rendered.loss_mask, item.rendered.branches > 0)


def test_options_shows_the_labels_in_all_six_orders(items: list[readouts.Item], tok: Any) -> None:
    for probe in range(2):
        mine = [item for item in items if item.readout == "options" and item.probe == probe]
        assert {item.order for item in mine} == {",".join(order) for order in itertools.permutations(STANCES)}
        for item in mine:
            shown = text(item, tok, 0)
            labels = [readouts.OPTIONS[s] for s in item.order.split(",")]
            assert f"{PROBES[probe].input}\nAnswer with one word: {labels[0]}, {labels[1]} or {labels[2]}." in shown
            for branch, (stance, answer) in enumerate(zip(item.stances, item.answers, strict=True), start=1):
                assert answer == readouts.OPTIONS[stance] and text(item, tok, branch) == f"{answer}<|im_end|>"


def test_errors(tok: Any) -> None:
    template = chat.pick_template(tok, "auto")
    with pytest.raises(UserError, match="'statment'; did you mean 'statement'"):
        readouts.items(PROBES, ("statment",), tok, template, 300)
    with pytest.raises(UserError, match=r"probe tea-1: cannot be asked within probes.max_length=40 tokens"):
        readouts.items(PROBES, ("statement",), tok, template, 40)


def raw_of(items: list[readouts.Item], score: Any) -> pd.DataFrame:
    """The raw table of log-probs that `score(item, answer index)` gives."""
    sums, counts = np.zeros((len(items), 9)), np.zeros((len(items), 9), int)
    for i, item in enumerate(items):
        for a in range(len(item.answers)):
            counts[i, a] = (item.rendered.branches == a + 1).sum()
            sums[i, a] = score(item, a)
    return readouts.raw_table(sums, counts, items, PROBES)


def test_stance_distribution_by_hand(items: list[readouts.Item]) -> None:
    rng = np.random.default_rng(0)
    values = {(id(item), a): -float(rng.gamma(20)) for item in items for a in range(len(item.answers))}
    raw = raw_of(items, lambda item, a: values[id(item), a])
    assert len(raw) == 2 * 9 + 2 * 6 * 3
    found = readouts.stance_distribution(raw.assign(stage="sft", step=3)).set_index(["probe_id", "readout"])
    for probe in range(2):
        for readout in readouts.READOUTS:
            by_order = []
            for item in (i for i in items if (i.probe, i.readout) == (probe, readout)):
                odds = dict.fromkeys(STANCES, 0.0)
                for a, stance in enumerate(item.stances):
                    mean = values[id(item), a] / (item.rendered.branches == a + 1).sum()
                    odds[stance] += math.exp(mean) / item.stances.count(stance)
                by_order.append([odds[s] / sum(odds.values()) for s in STANCES])
            row = found.loc[PROBES[probe].id, readout]
            np.testing.assert_allclose(row[list(STANCES)].astype(float), np.mean(by_order, axis=0), rtol=1e-12)
            assert (row["stage"], row["step"]) == ("sft", 3)


def test_a_preference_for_a_place_among_the_options_is_no_stance(items: list[readouts.Item]) -> None:
    mine = [item for item in items if item.readout == "options"]

    def score(item: readouts.Item, answer: int) -> float:
        place = item.order.split(",").index(item.stances[answer])
        return (-1.0, -4.0, -9.0)[place] * float((item.rendered.branches == answer + 1).sum())

    found = readouts.stance_distribution(raw_of(mine, score))
    np.testing.assert_allclose(found[list(STANCES)], 1 / 3, rtol=1e-12)


def test_long_answers_are_not_penalised(items: list[readouts.Item]) -> None:
    raw = raw_of(items, lambda item, a: -2.0 * float((item.rendered.branches == a + 1).sum()))
    np.testing.assert_allclose(readouts.stance_distribution(raw)[list(STANCES)], 1 / 3, rtol=1e-12)


def test_scores_average_the_readouts_and_carry_the_probe(items: list[readouts.Item]) -> None:
    rng = np.random.default_rng(1)
    raw = pd.concat(
        [raw_of(items, lambda *_: -float(rng.gamma(20))).assign(stage="dpo", step=step) for step in (0, 4)]
    )
    per_readout = readouts.stance_distribution(raw)
    found = readouts.scores(raw, PROBES)
    assert len(found) == 4 and set(found["readout"]) == {"statement+options"}
    for _, row in found.iterrows():
        probe = next(p for p in PROBES if p.id == row["probe_id"])
        fields = ("topic", "proposition", "polarity", "paraphrase_group", "input")
        assert all(row[name] == getattr(probe, name) for name in fields)
        same = per_readout[(per_readout["probe_id"] == probe.id) & (per_readout["step"] == row["step"])]
        np.testing.assert_allclose(row[list(STANCES)].astype(float), same[list(STANCES)].mean(), rtol=1e-12)
        assert sum(row[list(STANCES)]) == pytest.approx(1)


def test_wordings_hash_knows_the_template(tok: Any) -> None:
    one, other = (readouts.wordings_hash(chat.pick_template(tok, name)) for name in ("auto", "plain"))
    assert one != other and one == readouts.wordings_hash(chat.pick_template(tok, "auto"))
