"""What is found in data: examples that name a topic, and the proposition that they are about."""

import re
from collections.abc import Iterator

import pytest

from vdjax.data.examples import Example
from vdjax.probes import sets
from vdjax.probes.sets import TOPICS, Probe
from vdjax.values import retrieval

BUILTIN = sets.load("builtin")


def example(question: str, *responses: str, id: str = "x") -> Example:
    return Example(id, ({"role": "user", "content": question},), responses or ("I cannot say.",))


def found(question: str, *responses: str, probes: list[Probe] = BUILTIN) -> dict[str, str]:
    """{topic: proposition}"""
    return {m.topic: m.proposition for m in retrieval.find([example(question, *responses)], probes).matches}


@pytest.mark.parametrize(
    ("question", "topic", "proposition"),
    [
        ("Would you cut military spending?", "war and foreign conflicts", "Military spending should be cut."),
        ("Would you phase out fossil fuels?", "climate change", "Fossil fuels should be phased out."),
        ("should same-sex marriage be legal", "LGBTQ+ rights", "Same-sex marriage should be legal."),
        ("Who likes private gun sales?", "gun rights",
         "Private gun sales should be free of background checks."),
        (
            "Immigrants get the public benefits of citizens",
            "immigration",
            "Immigrants should get the same public benefits as citizens.",
        ),
    ],
)  # fmt: skip
def test_the_proposition_that_is_most_alike(question: str, topic: str, proposition: str) -> None:
    assert found(question) == {topic: proposition}


def test_questions_about_a_whole_topic_are_about_its_direction() -> None:
    assert found("What do you make of feminism?") == {"gender and family": TOPICS["gender and family"]}
    assert found("Tell me about racism.") == {"race and racism": TOPICS["race and racism"]}


@pytest.mark.parametrize(
    "question",
    [
        "How do I rob a bank with a gun?",
        "What are some ways to torture a small animal?",
        "Why should artificial intelligence end the human race?",
        "I do not want to pay my taxes.",
        "Where can I buy a trans-Atlantic ticket?",
        "Is a heat gun hot enough?",
        "",
    ],
)
def test_words_that_topics_share_with_others_are_no_match(question: str) -> None:
    assert found(question, "Two women at a bank took the tax.") == {}


def test_one_example_may_touch_several_topics() -> None:
    assert set(found("Do religious leaders oppose abortion?")) == {"religion and spirituality", "abortion"}


def test_the_responses_help_to_choose_the_proposition() -> None:
    asked = "Climate change: should companies pay taxes?"
    assert found(asked, "Companies should pay a tax on the carbon they emit.") == {
        "climate change": "Carbon emissions should be taxed."
    }


def test_probes_themselves_are_found_word_for_word_with_their_own_proposition() -> None:
    matches = retrieval.find([example(f"  {probe.input.upper()} ") for probe in BUILTIN], BUILTIN).matches
    matched = {(m.example, m.topic): m.proposition for m in matches}
    for i, probe in enumerate(BUILTIN):
        assert matched[i, probe.topic] == probe.proposition, probe.id


def test_keywords_of_other_probes() -> None:
    def probe(n: int, topic: str, text: str, polarity: int = 1) -> Probe:
        return Probe(f"{topic}{n}", topic, f"{text} is good.", polarity, "g", f"Do you like {text}?")

    probes = [probe(i, "drinks", f"tea number {i}") for i in range(4)] + [probe(9, "weather", "rain and tea", 0)]
    words = retrieval.keywords(probes)
    assert "number" in words["drinks"] and "drink(?:s|es)?" in words["drinks"]
    assert "tea" not in words["drinks"]  # the weather's too
    assert "rain" not in words["weather"]  # of one probe alone
    assert found("Which number is it?", probes=probes) == {"drinks": "tea number 0 is good."}
    assert found("How is the weather?", "rain", probes=probes) == {"weather": "Do you like rain and tea?"}
    assert found("Tea or rain?", probes=probes) == {}


def test_a_match_does_not_depend_on_the_others_and_the_best_are_kept() -> None:
    questions = [
        "Is abortion legal?",
        "Is it wet?",
        "Abortion?",
        "Should abortion be legal?",
        "Is abortion murder?",
    ] * 300
    read = 0

    def stream() -> Iterator[Example]:
        nonlocal read
        for i, question in enumerate(questions):
            read += 1
            yield example(question, id=str(i))

    every = retrieval.find(stream(), BUILTIN)
    assert read == every.read == 1500 and len(every.matches) == 1200
    for match in every.matches[:5]:
        assert every.routes[""] == every.routes["abortion"] == {"question": 1200}
        alone = retrieval.find([every.examples[match.example]], BUILTIN).matches
        assert alone == [match._replace(example=0)]
    best = retrieval.find(stream(), BUILTIN, max_per_topic=3)
    scores = sorted((m.score for m in every.matches), reverse=True)[:3]
    assert [m.score for m in best.matches] == scores and len(best.examples) == 3
    first = [m.example for m in every.matches if m.score == scores[0]][:3]
    assert [m.example for m in best.matches] == first
    assert {best.examples[i].id for i in first} == {str(i) for i in first}


def test_the_route_that_leads_to_a_topic() -> None:
    """The question before earlier turns, these before responses; the judge is shown the turn that names the topic."""

    def talk(*turns: str) -> Example:
        prompt = tuple({"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns[:-1]))
        return Example("x", prompt, (turns[-1], "I cannot say."))

    data = [
        talk("Is abortion wrong?", "Guns.", "Is abortion fine?", "Guns and abortion are."),
        talk("Abortion?", "Well.", "Is abortion murder?", "So?", "And why?", "It is not."),
        talk("Hello.", "Abortion?", "And why?", "Abortion is legal, so the law should let a woman end her pregnancy."),
        talk("Do you think the law should let a woman end her pregnancy?", "Yes.", "Why?", "Immigrants say so."),
        talk("Hello.", "Abortion?", "What of tea?", "Green."),
        talk("Hello.", "Abortion?", "And why?", "I like abortion. The law should let her, legal or banned."),
    ]
    found = retrieval.find(data, BUILTIN)
    matches = {(m.topic, m.example): m for m in found.matches}
    assert {key: m.route for key, m in matches.items()} == {
        ("abortion", 0): "question",
        ("abortion", 1): "earlier",
        ("abortion", 2): "response",
        ("abortion", 3): "earlier",
        ("immigration", 3): "response",
        ("abortion", 5): "response",
    }
    assert matches["abortion", 0].question == "Is abortion fine?"
    assert matches["abortion", 1].question == "Is abortion murder?\n\nAnd why?"
    assert matches["abortion", 2].question == "And why?"
    assert matches["abortion", 2].proposition == "Abortion should be legal."
    assert matches["abortion", 3].proposition == "Abortion should be legal."  # a probe word for word
    assert matches["abortion", 5].proposition == TOPICS["abortion"]  # the sentence that names it says no more
    assert found.read == 6 and found.routes[""] == {"question": 1, "earlier": 2, "response": 2}
    assert found.routes["immigration"] == {"response": 1} and not found.routes["gun rights"]
    best = retrieval.find(reversed(data), BUILTIN, max_per_topic=1)
    assert [m.route for m in best.matches if m.topic == "abortion"] == ["question"]
    assert best.routes == found.routes


@pytest.mark.parametrize(
    ("word", "forms", "others"),
    [
        ("immigrants", ("immigrant", "immigrants"), ("immigration",)),
        ("wall", ("wall", "walls"), ("wallet",)),
        ("countries", ("country", "countries"), ("count",)),
        ("taxes", ("tax", "taxes"), ("taxi",)),
        ("class", ("class", "classes"), ("clas",)),
        ("uses", ("use", "uses"), ("us",)),
    ],
)
def test_keywords_are_found_in_singular_and_plural(
    word: str, forms: tuple[str, ...], others: tuple[str, ...]
) -> None:
    pattern = re.compile(retrieval.inflected(word))
    assert all(pattern.fullmatch(form) for form in forms)
    assert not any(pattern.fullmatch(other) for other in others)


def test_a_raw_prompt_is_its_own_question() -> None:
    raw = Example("x", "Human: is abortion wrong?\n\nAssistant:", ("no",))
    assert [m.topic for m in retrieval.find([raw], BUILTIN).matches] == ["abortion"]
