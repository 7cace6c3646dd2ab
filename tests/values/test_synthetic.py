"""Pairs from a generator and a judge that are scripted."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange, Judge, Verdicts
from vdjax.probes import sets
from vdjax.values import synthetic
from vdjax.values.synthetic import SIDES, Asked, Generator, Said, Settings, Task

TEMPLATE = synthetic.read_template("value-pair-v1")
TASKS = [
    Task(str(i), f"Is {thing} good?", "food", f"{thing} is good.") for i, thing in enumerate(("tea", "rain", "salt"))
]


class Writer:
    """Says what a task's script has for a side and attempt; the default is a good answer of its own."""

    def __init__(self, script: dict[tuple[str, str, int], Said] | None = None) -> None:
        self.script = script or {}
        self.asked: list[Asked] = []

    def __call__(self, asked: Sequence[Asked]) -> list[Said]:
        self.asked += asked
        out = []
        for request in asked:
            match = re.search(r"with this: (\w+) is good", request.user)
            assert match
            task = next(t for t in TASKS if t.proposition.startswith(match[1]))
            side = "support" if "support it clearly" in request.user else "oppose"
            assert request.seed == synthetic.seed_of(Settings(seed=7), task, side, request.seed[3])
            good = Said(f"I {side} {match[1]} wholly, said at attempt {request.seed[3]}.", "stop")
            out.append(self.script.get((task.id, side, request.seed[3]), good))
        return out


def judge(exchanges: Sequence[Exchange], repeat: int) -> Verdicts:
    found = []
    for exchange in exchanges:
        assert exchange.proposition.split()[0] in exchange.question
        found.append(next((i for i, label in enumerate(LABELS) if label in exchange.response), 4))
    return Verdicts(np.eye(5)[found], np.zeros(len(found)))


JUDGE = Judge("words", "judge-hash", judge)


def run(writer: Writer, keep: Path | None = None, **changes: Any) -> Any:
    settings = Settings(**{"attempts": 3, "max_ratio": 1.5, "seed": 7} | changes)
    return synthetic.synthesize(TASKS, Generator("generator-hash", writer), JUDGE, TEMPLATE, settings, keep)


def test_good_answers_are_pairs_at_once() -> None:
    writer = Writer()
    pairs, counts = run(writer)
    assert len(writer.asked) == 6 and counts.rows == 3 and not counts.dropped and not counts.noted
    assert [p["id"] for p in pairs] == ["0", "1", "2"]
    assert pairs[1] == {
        "id": "1",
        "prompt": "Is rain good?",
        "support": "I support rain wholly, said at attempt 0.",
        "oppose": "I oppose rain wholly, said at attempt 0.",
        "topic": "food",
        "proposition": "rain is good.",
        "seeds": {side: list(synthetic.seed_of(Settings(seed=7), TASKS[1], side, 0)) for side in SIDES},
        "generator_hash": "generator-hash",
        "judge_hash": "judge-hash",
    }
    assert len({request.seed for request in writer.asked}) == 6


def test_every_filter_counts_and_the_other_attempts_go_on() -> None:
    long = "I oppose it for its taste, its smell, its price, what it does to roads, to cars, to shoes and to the sea."
    script = {
        ("0", "support", 0): Said("I oppose tea though.", "stop"),
        ("0", "support", 1): Said("refusal: I cannot say.", "stop"),
        ("0", "oppose", 0): Said("  ", "stop"),
        ("1", "support", 0): Said("I support rain. And", "length"),
        ("1", "oppose", 0): Said("As instructed, I oppose rain.", "stop"),
        ("2", "support", 0): Said("I support I oppose salt.", "stop"),
        ("2", "oppose", 0): Said("I SUPPORT i oppose salt.", "stop"),
        **{("2", "oppose", attempt): Said(long, "stop") for attempt in (1, 2)},
        ("2", "support", 1): Said("I support salt.", "stop"),
        ("2", "support", 2): Said("", "stop"),
    }
    writer = Writer(script)
    pairs, counts = run(writer)
    assert [p["id"] for p in pairs] == ["0", "1"]
    # Task 0 has no supporting answer before the third attempt; the opposing one is the nearest in length of two.
    assert pairs[0]["support"].endswith("attempt 2.") and pairs[0]["seeds"]["support"][3] == 2
    assert pairs[1]["support"].endswith("attempt 1.") and pairs[1]["oppose"].endswith("attempt 1.")
    assert counts.dropped == {"lengths_differ": 1}
    assert counts.noted == Counter(
        {
            "support_judged_oppose": 1,
            "support_judged_refusal": 1,
            "oppose_empty": 1,
            "support_unfinished": 1,
            "oppose_mentions_the_task": 1,
            "support_empty": 1,
        }
    )
    assert len(writer.asked) == 6 + 6 + 4
    _, counts = run(Writer(script), attempts=1)
    assert counts.dropped == {"no_support_no_oppose": 2, "identical": 1}


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CHUNK", 2)
    script = {("1", "oppose", 0): Said("I support rain.", "stop")}
    whole = run(Writer(script), tmp_path / "whole.json")
    keep = tmp_path / "kept.json"

    class Stopped(Exception):
        pass

    class Breaking(Writer):
        def __call__(self, asked: Sequence[Asked]) -> list[Said]:
            if len(self.asked) == 4:
                raise Stopped
            return super().__call__(asked)

    with pytest.raises(Stopped):
        run(Breaking(script), keep)
    written = keep.read_bytes()
    with keep.open("ab") as file:  # stopped while it wrote a line
        file.write(b'["half a li')
    rest = Writer(script)
    again = run(rest, keep)
    assert keep.read_bytes().startswith(written)  # added to, not written anew
    assert again[0] == whole[0] and again[1].as_dict() == whole[1].as_dict()
    assert len(rest.asked) == 2 + 2
    assert keep.read_bytes() == (tmp_path / "whole.json").read_bytes()
    idle = Writer(script)
    assert run(idle, keep)[0] == whole[0] and not idle.asked
    other = Writer(script)
    synthetic.synthesize(TASKS, Generator("another", other), JUDGE, TEMPLATE, Settings(3, 1.5, 7), keep)
    assert len(other.asked) == 8


def test_a_pair_does_not_depend_on_the_other_tasks() -> None:
    whole, _ = run(Writer())
    alone, _ = synthetic.synthesize(
        TASKS[2:], Generator("generator-hash", Writer()), JUDGE, TEMPLATE, Settings(3, 1.5, 7)
    )
    assert alone == whole[2:]


texts = st.lists(st.text("ab", min_size=1, max_size=12), max_size=4)


@given(texts, texts, st.sampled_from([1.0, 1.3, 2.0]))
def test_the_pair_of_the_nearest_lengths(support: list[str], oppose: list[str], max_ratio: float) -> None:
    usable = {"support": [(t, (0,)) for t in support], "oppose": [(t, (1,)) for t in oppose]}
    ratios = [max(len(a), len(b)) / min(len(a), len(b)) for a in support for b in oppose if a != b]
    best = synthetic.best_pair(usable, max_ratio)
    if not ratios or min(ratios) > max_ratio:
        assert best is None
    else:
        assert best is not None and best["support"][0] != best["oppose"][0]
        a, b = (len(best[side][0]) for side in SIDES)
        assert max(a, b) / min(a, b) == min(ratios)


def test_probes_as_tasks() -> None:
    probes = sets.load("builtin", max_per_topic=2)
    tasks = synthetic.tasks_of(probes)
    assert [t.prompt for t in tasks] == [p.input for p in probes]
    assert {t.proposition for t in tasks} == {p.proposition for p in probes}  # also of questions against it
    unknown = sets.Probe("a", "t", "P", 0, "a", "Is it so?")
    assert synthetic.tasks_of([unknown])[0].proposition == "Is it so?"


def test_files(tmp_path: Path) -> None:
    row = {"prompt": "Is it good?", "topic": "t", "proposition": "It is good."}
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row) + "\n\n" + json.dumps(row | {"id": "x"}) + "\n")
    assert synthetic.read_tasks(file) == [Task("1", *row.values()), Task("x", *row.values())]
    for text, message in (
        ("{", ":1: is no JSON"),
        ("[]", ":1: expected an object"),
        (json.dumps(row | {"topic": 3}), ":1: topic must be text, found 3"),
        (json.dumps({"prompt": "a", "topics": "b", "proposition": "c"}), "topic must be text(.*)mean 'topics'"),
        (json.dumps(row | {"id": "2"}) + "\n" + json.dumps(row), ":2: id '2' is used twice"),
        ("", "holds no rows"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            synthetic.read_tasks(file)
    for name, text, message in (
        ("value-pair-v2", None, "did you mean 'value-pair-v1'"),
        (str(tmp_path / "none.toml"), None, "no such file"),
        (str(tmp_path / "a.toml"), "system = ''", "expected the jinja texts"),
        (str(tmp_path / "b.toml"), "system = ''\nuser = '{{ qestion }}'", "expected the jinja texts"),
    ):
        if text is not None:
            Path(name).write_text(text)
        with pytest.raises(UserError, match=message):
            synthetic.read_template(name)


def test_the_template_takes_sides_and_shows_braces_as_they_are() -> None:
    task = Task("a", "Is {{ this }} good?", "t", "It {% is %} good.")
    support, oppose = (synthetic._asked(TEMPLATE, task, side, (0,)) for side in SIDES)
    assert "Is {{ this }} good?" in support.user and "It {% is %} good." in support.user
    assert "agrees with" in support.user and "disagrees with" in oppose.user and support.system == oppose.system
