"""Which examples of a dataset touch which topic of a probe set.

An example touches a topic that is named in it: by a keyword (keywords.toml, or for topics of one's own words that
their probes share and others' do not, in singular and plural), or by one of the topic's probes word for word. The topic
is looked for in the question that is answered, then in what the user asked earlier, then in the responses; the first of
these ROUTES that leads to it is kept with it, as an answer is less surely about what only an earlier turn names. What
an example is about within the topic is told by BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework:
BM25 and Beyond", 2009; library bm25s): the proposition that is most like the question and the responses. The index
holds the propositions, not the examples: so examples are read one at a time, and what one matches does not depend on
the others.
"""

import heapq
import logging
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import NamedTuple

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN_PLUS

from vdjax.data.examples import Example, normal, user_turns
from vdjax.probes import sets
from vdjax.probes.sets import TOPICS, Probe

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of each index at the level DEBUG

FILE = resources.files("vdjax.values") / "keywords.toml"
KEYWORDS = {topic: "|".join(words) for topic, words in tomllib.loads(FILE.read_text(encoding="utf-8")).items()}
COMMON = """believe better best can could different everyone fair favor fine get good like make mean need people person
really reasonable right should somebody someone support sure thing think true use view want way would wrong"""
STOP = sorted({*STOPWORDS_EN_PLUS, *COMMON.split()})  # those of English, and words of questions of opinion
ROUTES = ("question", "earlier", "response")
SPECIFIC = 3  # words that a question shares with a proposition that it is about
SENTENCE = re.compile(r"[^.!?\n]+")
SHARED = 1 / 4  # of a topic's probes that must hold a word which makes it one of the topic's keywords


class Match(NamedTuple):
    """An example that touches a topic."""

    topic: str
    example: int  # its number in the order of reading
    score: float  # BM25 of the best proposition
    proposition: str  # of that topic, most like the example
    route: str  # one of ROUTES: where the topic is named
    question: str  # what the responses answer; before it, on the route "earlier", the last turn that names the topic


class Found(NamedTuple):
    matches: list[Match]  # by topic in the order of the probes, then by example
    examples: dict[int, Example]  # those matched, by number
    read: int  # examples
    routes: dict[str, Counter[str]]  # of each topic, and of "" (any topic, by the first route): examples by route,
    # also those beyond max_per_topic


def find(examples: Iterable[Example], probes: Sequence[Probe], *, max_per_topic: int = 0) -> Found:
    """The topics of every example; one may touch several.

    Where what names a built-in topic shares fewer than three words with the most alike proposition and its probes, the
    example is about the topic as a whole, and its proposition is the topic's direction (`sets.TOPICS`).

    Args:
      max_per_topic: keep so many: by route, then those most like a proposition, then the first. 0: all.
    """
    index = make_index(probes)
    best: dict[str, list[tuple[int, float, int, Match]]] = {topic: [] for topic in index.names}
    routes: dict[str, Counter[str]] = {topic: Counter() for topic in (*index.names, "")}
    kept: dict[int, Example] = {}
    read = 0
    for i, example in enumerate(examples):
        read += 1
        matches = touched(example, i, index)
        for match in matches:
            routes[match.topic][match.route] += 1
            entry = (-ROUTES.index(match.route), match.score, -i, match)
            if not max_per_topic or len(best[match.topic]) < max_per_topic:
                heapq.heappush(best[match.topic], entry)
            else:
                heapq.heappushpop(best[match.topic], entry)
            kept[i] = example
        if matches:
            routes[""][min((match.route for match in matches), key=ROUTES.index)] += 1
        if len(kept) > 1000 + 2 * sum(map(len, best.values())):  # so that memory is bounded by max_per_topic
            used = {match.example for entries in best.values() for *_, match in entries}
            kept = {at: kept[at] for at in kept if at in used}
    matches = [entry[-1] for entries in best.values() for entry in sorted(entries, key=lambda entry: entry[-1].example)]
    return Found(matches, {m.example: kept[m.example] for m in matches}, read, routes)


class Index(NamedTuple):
    """The propositions of a probe set, ready to be looked for in examples."""

    keys: list[tuple[str, str]]  # (topic, proposition) of each document
    words: list[set[str]]  # of each document: the proposition and its questions
    bm25: bm25s.BM25
    names: dict[str, re.Pattern[str]]  # keywords by topic
    asked: dict[tuple[str, str], str]  # proposition by (topic, question of a probe)


def make_index(probes: Sequence[Probe]) -> Index:
    texts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for probe in probes:
        texts[probe.topic, sets.judged(probe)].append(probe.input)
    documents = words_of([" ".join([proposition, *inputs]) for (_, proposition), inputs in texts.items()])
    bm25 = bm25s.BM25()
    bm25.index(documents, show_progress=False)
    names = {topic: re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.I) for topic, words in keywords(probes).items()}
    asked = {(p.topic, normal(p.input)): sets.judged(p) for p in probes}
    return Index(list(texts), [set(words) for words in documents], bm25, names, asked)


def touched(example: Example, number: int, index: Index) -> list[Match]:
    """The topics that an example touches."""
    *earlier, asked = user_turns(example.prompt) or [""]
    out = []
    for topic, names in index.names.items():
        # What names the topic, and what the answer is to: of a response only the sentences, as chance lets a long text
        # share three words with some proposition.
        if _names(asked, topic, index):
            route, naming, question = "question", asked, asked
        elif turns := [turn for turn in earlier if _names(turn, topic, index)]:
            route, naming = "earlier", turns[-1]
            question = f"{turns[-1]}\n\n{asked}"
        elif said := [s for text in example.responses for s in SENTENCE.findall(text) if names.search(s)]:
            route, naming, question = "response", " ".join(said), asked
        else:
            continue
        scores = np.mean([_scores(f"{question} {response}", index) for response in example.responses or ("",)], axis=0)
        at = int(np.where([t == topic for t, _ in index.keys], scores, -1).argmax())
        shared = set(words_of([naming])[0]) & index.words[at]
        best = index.keys[at][1] if topic not in TOPICS or len(shared) >= SPECIFIC else TOPICS[topic]
        proposition = index.asked.get((topic, normal(naming)), best)
        out.append(Match(topic, number, float(scores[at]), proposition, route, question))
    return out


def _names(turn: str, topic: str, index: Index) -> bool:
    return bool(index.names[topic].search(turn)) or (topic, normal(turn)) in index.asked


def _scores(text: str, index: Index) -> np.ndarray:
    """BM25 of every proposition; each word of the text counts once, however long it is."""
    words = [word for word in dict.fromkeys(words_of([text])[0]) if word in index.bm25.vocab_dict]
    return index.bm25.get_scores(words) if words else np.zeros(len(index.keys), np.float32)


def keywords(probes: Sequence[Probe]) -> dict[str, str]:
    """A regular expression for each topic: of the table, or made of words of the topic's name and its probes.

    Of the probes' words those count that a quarter of the topic's probes hold, at least two of them, and no probe of
    another topic.
    """
    by_topic: dict[str, Counter[str]] = defaultdict(Counter)
    count = Counter(probe.topic for probe in probes)
    for probe in probes:
        by_topic[probe.topic].update(set(words_of([f"{probe.proposition} {probe.input}"], stem=False)[0]))
    out = {}
    for topic, words in by_topic.items():
        others = {word for other in by_topic if other != topic for word in by_topic[other]}
        shared = [w for w, n in sorted(words.items()) if n >= max(2, SHARED * count[topic]) and w not in others]
        own = [*dict.fromkeys([*words_of([topic], stem=False)[0], *shared])] or [topic.lower()]
        out[topic] = KEYWORDS.get(topic) or "|".join(map(inflected, own))
    return out


def inflected(word: str) -> str:
    """A pattern of a noun in singular and plural, whichever of them `word` is."""
    single = re.sub(r"(?<=\w\w)ies$", "y", word)
    single = re.sub(r"(?<=\w)(x|z|ch|sh|ss)es$", r"\1", single)
    single = re.sub(r"(?<=\w\w\w)(?<![sui])s$", "", single)
    if re.search(r"[^aeiou]y$", single):
        return re.escape(single[:-1]) + "(?:y|ies)"
    return re.escape(single) + "(?:s|es)?"


def words_of(texts: Sequence[str], stem: bool = True) -> list[list[str]]:
    return bm25s.tokenize(
        list(texts), stopwords=STOP, stemmer=stems if stem else None, return_ids=False, show_progress=False
    )


def stems(words: Sequence[str]) -> list[str]:
    """Words without the endings of plurals and verbs, so that "taxes" finds "tax"."""
    return [re.sub(r"(?<=\w{3})(?:(?<!s)s|es|ed|ing|e)$", "", re.sub(r"ies$", "y", word)) for word in words]
