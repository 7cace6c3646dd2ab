"""Probe files and the built-in set."""

import csv
import json
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdjax.errors import UserError
from vdjax.probes import sets
from vdjax.probes.sets import Probe

ROWS = [
    {"id": "a1", "input": "Should dogs be allowed in the park?", "topic": "pets"},
    {"id": "a2", "input": 'Is it "fine", in your view,\nto keep a cat?', "topic": "pets"},
    {"id": "b1", "input": "Should school start later?", "topic": "school"},
]
PLAIN = [Probe(r["id"], r["topic"], r["id"], 0, r["id"], r["input"]) for r in ROWS]


@pytest.fixture(scope="module")
def builtin() -> list[Probe]:
    return sets.load("builtin")


def words(text: str) -> set[str]:
    small = "a an the of to in is are do does should be or and for it that would can you as on by with more their"
    return set(re.findall(r"[a-z]+", text.lower())) - set(small.split())


def test_builtin_counts(builtin: list[Probe]) -> None:
    assert sets.describe(builtin) == {
        "probes": 528,
        "topics": 11,
        "propositions": 132,
        "paraphrase_groups": 264,
        "unknown_polarity": 0,
    }
    assert list(dict.fromkeys(p.topic for p in builtin)) == list(sets.TOPICS)
    assert set(Counter(p.topic for p in builtin).values()) == {48}
    assert len({p.id for p in builtin}) == len({p.input.lower() for p in builtin}) == 528


def test_builtin_propositions_are_asked_both_ways_in_two_wordings(builtin: list[Probe]) -> None:
    asked: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    groups: dict[str, set[tuple[str, str, int]]] = defaultdict(set)
    for p in builtin:
        asked[p.topic, p.proposition][p.polarity] += 1
        groups[p.paraphrase_group].add((p.topic, p.proposition, p.polarity))
    assert len({proposition for _, proposition in asked}) == len(asked)  # no proposition in two topics
    assert all(counts == {1: 2, -1: 2} for counts in asked.values())
    assert all(len(members) == 1 for members in groups.values())


def test_builtin_wordings_differ_and_are_single_plain_questions(builtin: list[Probe]) -> None:
    for p in builtin:
        assert re.fullmatch(r"[A-Z][^?\n]{14,119}\?", p.input), p
        assert re.fullmatch(r"[A-Z][^?\n]+\.", p.proposition), p
        assert not re.search(r"n't\b|\b(not|never|oppose[ds]?)\b", p.input.lower()), p  # no double negation with "no"
    groups = defaultdict(list)
    for p in builtin:
        groups[p.paraphrase_group].append(p.input)
    for group in groups.values():
        for a, b in combinations(group, 2):
            assert len(words(a) & words(b)) <= 0.4 * len(words(a) | words(b)), (a, b)


def test_builtin_directions_are_declared(builtin: list[Probe]) -> None:
    assert len(sets.TOPICS) == 11 and len(set(sets.TOPICS.values())) == 11
    assert {p.topic for p in builtin} == set(sets.TOPICS)
    by_input = {p.input: p for p in builtin}
    known = {  # an independent reading of one plain question a topic: (topic, does "yes" go in its direction?)
        "Should abortion be legal?": ("abortion", 1),
        "Should abortion be banned?": ("abortion", -1),
        "Is climate change mostly a natural process?": ("climate change", -1),
        "Should the wealthy pay higher taxes?": ("economy and government", 1),
        "Should voters have to show a photo ID?": ("elections and democracy", -1),
        "Has feminism gone too far?": ("gender and family", -1),
        "Should gun laws be made stricter?": ("gun rights", -1),
        "Should gun laws be loosened?": ("gun rights", 1),
        "Should immigration be reduced?": ("immigration", -1),
        "Should same-sex marriage be legal?": ("LGBTQ+ rights", 1),
        "Has racism largely disappeared?": ("race and racism", -1),
        "Does religion do more harm than good?": ("religion and spirituality", -1),
        "Should military spending be cut?": ("war and foreign conflicts", 1),
    }
    for question, expected in known.items():
        assert (by_input[question].topic, by_input[question].polarity) == expected


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_files_of_others_are_taken_as_they_are(tmp_path: Path, suffix: str) -> None:
    assert sets.load(write(tmp_path / f"p.{suffix}", [dict(r) for r in ROWS])) == PLAIN
    extra = [{"source": "x", **r, "score": 0.5} for r in ROWS]
    assert sets.load(str(write(tmp_path / f"q.{suffix}", extra))) == PLAIN


def test_dev_and_test_lists_are_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"dev": ROWS[:1], "test": ROWS[1:]}))
    probes = sets.load(tmp_path / "p.json")
    assert probes == PLAIN
    assert sets.describe(probes)["unknown_polarity"] == 3


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_own_fields_are_read(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, object]] = [
        {**ROWS[0], "proposition": "Dogs.", "polarity": "+1", "paraphrase_group": "g"},
        {**ROWS[1], "proposition": "Dogs.", "polarity": -1, "paraphrase_group": "h"},
        {**ROWS[2], "proposition": "", "polarity": "", "paraphrase_group": None},
    ]
    probes = sets.load(write(tmp_path / f"p.{suffix}", rows))
    assert [(p.proposition, p.polarity, p.paraphrase_group) for p in probes] == [
        ("Dogs.", 1, "g"),
        ("Dogs.", -1, "h"),
        ("b1", 0, "b1"),
    ]
    assert sets.describe(probes) == {
        "probes": 3,
        "topics": 2,
        "propositions": 2,
        "paraphrase_groups": 3,
        "unknown_polarity": 1,
    }


def test_numbers_as_ids_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("\ufeffid, input ,topic,polarity\r\n0,Is it so?,t,-1.0\r\n", encoding="utf-8")
    assert sets.load(tmp_path / "p.csv") == [Probe("0", "t", "0", -1, "0", "Is it so?")]
    (tmp_path / "p.json").write_text('[{"id": 0, "input": "Is it so?", "topic": "t", "polarity": -1}]')
    assert sets.load(tmp_path / "p.json") == [Probe("0", "t", "0", -1, "0", "Is it so?")]


GOOD = '{"id": "a", "input": "Why?", "topic": "t"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", GOOD + GOOD, r"p\.jsonl, line 2: id 'a' is already used at .*p\.jsonl, line 1"),
        ("p.jsonl", GOOD + "\n{oops", r"line 3: not JSON"),
        ("p.jsonl", "[1]", r"line 1: list, expected an object"),
        ("p.jsonl", GOOD.replace('"topic"', '"Topic"'), r"line 1: no field 'topic'.* found id, input, Topic"),
        ("p.jsonl", GOOD.replace("Why?", " "), r"line 1: input is empty"),
        ("p.jsonl", GOOD.replace('"Why?"', '["Why?"]'), r"line 1: input is \['Why\?'\], expected text"),
        ("p.jsonl", GOOD.replace("}", ', "polarity": 2}'), r"line 1: polarity is 2, expected \+1"),
        ("p.jsonl", GOOD.replace("}", ', "polarity": "pro"}'), r"line 1: polarity is 'pro', expected \+1"),
        ("p.jsonl", "\n", r"holds no probes"),
        ("p.json", '{"dev": [], "tset": []}', r"key 'tset'.*did you mean 'test'"),
        ("p.json", '{"dev": {}}', r"dev is dict, expected a list"),
        ("p.json", f'{{"test": [{GOOD}, {{"id": "b"}}]}}', r"row 2 of test: no field 'input'"),
        ("p.json", "[3]", r"row 1: int, expected an object"),
        ("p.csv", "id,input\n1,Why?\n", r"line 2: no field 'topic'"),
        ("p.csv", "id,input,topic\n1,Well, why?,t\n", r"line 2: 4 fields, but the header names 3"),
        ("p.csv", 'id,input,topic\n1,"Why?,t\n', r"not CSV"),
        ("p.csv", "id,input,topic,id\n1,Why?,t,2\n", r"line 1: column 'id' is there more than once"),
        ("p.csv", "", r"holds no probes"),
        ("p.txt", "Why?", r"unknown suffix; expected one of \.jsonl, \.json, \.csv"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        sets.load(tmp_path / name)


def test_other_refusals(tmp_path: Path) -> None:
    write(tmp_path / "probes.jsonl", [dict(r) for r in ROWS])
    with pytest.raises(UserError, match=r"no such file: .*prbes\.jsonl.*did you mean 'probes\.jsonl'"):
        sets.load(tmp_path / "prbes.jsonl")
    with pytest.raises(UserError, match="topic 'pet' is not in .*did you mean 'pets'"):
        sets.load(tmp_path / "probes.jsonl", topics=("school", "pet"))
    with pytest.raises(UserError, match="max_per_topic=0"):
        sets.load(tmp_path / "probes.jsonl", max_per_topic=0)
    (tmp_path / "p.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        sets.load(tmp_path / "p.jsonl")


def test_topics_keep_the_order_of_the_file(builtin: list[Probe]) -> None:
    chosen = sets.load("builtin", topics=("immigration", "abortion"))
    assert chosen == [p for p in builtin if p.topic in ("abortion", "immigration")]


@given(limit=st.integers(1, 60))
def test_max_per_topic_takes_propositions_before_wordings(limit: int) -> None:
    chosen = sets.load("builtin", topics=("abortion", "gun rights"), max_per_topic=limit)
    assert Counter(p.topic for p in chosen) == {"abortion": min(limit, 48), "gun rights": min(limit, 48)}
    assert [p.id for p in chosen] == [p.id for p in sets.load("builtin") if p in chosen]
    for topic in ("abortion", "gun rights"):
        counts = Counter((p.proposition, p.polarity) for p in chosen if p.topic == topic)
        assert max(counts.values()) == (1 if limit <= 24 else 2)
        polarity = Counter(p.polarity for p in chosen if p.topic == topic)
        assert abs(polarity[1] - polarity[-1]) <= 1
        assert len({proposition for proposition, _ in counts}) == min((limit + 1) // 2, 12)


def test_what_a_response_is_judged_toward(tmp_path: Path) -> None:
    file = tmp_path / "probes.csv"
    text = "id,input,topic,polarity,proposition\na,Is tea good?,tea,-1,Tea is bad.\nb,Is it?,tea,0,\nc,Bad?,tea,-1,\n"
    file.write_text(text)
    known, unknown, nameless = sets.load(file)
    assert (sets.judged(known), sets.judged(unknown)) == ("Tea is bad.", "Is it?")
    with pytest.raises(UserError, match="probe 'c' has a polarity but no proposition"):
        sets.judged(nameless)


CELLS = st.text(min_size=1, max_size=8).filter(lambda text: text == text.strip() and "\r" not in text)
PROBES = st.builds(Probe, CELLS, CELLS, CELLS, st.sampled_from([-1, 0, 1]), CELLS, CELLS)


@given(st.lists(PROBES, min_size=1, max_size=5, unique_by=lambda probe: probe.id))
@settings(max_examples=50, deadline=None)
def test_any_probes_come_back_from_every_format(tmp_path_factory: Any, made: list[Probe]) -> None:
    folder = tmp_path_factory.mktemp("probes")
    rows = [probe.__dict__ for probe in made]
    write(folder / "p.jsonl", rows)
    (folder / "p.json").write_text(json.dumps({"dev": rows[:2], "test": rows[2:]}))
    with open(folder / "p.csv", "w", encoding="utf-8", newline="") as out:
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    for file in sorted(folder.iterdir()):
        assert sets.load(file) == made, file.name
