"""Which examples of a dataset touch which topic of a probe set.

An example touches a topic where the question that it answers names it: by a keyword (keywords.toml, or for topics of
one's own words that their probes share and others' do not), or by being one of the topic's probes word for word. What
it is about within the topic is told by BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and
Beyond", 2009; library bm25s): the proposition that is most like the question and the responses. The index holds the
propositions, not the examples: so examples are read one at a time, and what one matches does not depend on the others.
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

from vdjax.data.examples import Example, normal
from vdjax.probes import sets
from vdjax.probes.sets import TOPICS, Probe

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of each index at the level DEBUG

FILE = resources.files("vdjax.values") / "keywords.toml"
KEYWORDS = {topic: "|".join(words) for topic, words in tomllib.loads(FILE.read_text(encoding="utf-8")).items()}
COMMON = """believe better best can could different everyone fair favor fine get good like make mean need people person
really reasonable right should somebody someone support sure thing think true use view want way would wrong"""
STOP = sorted({*STOPWORDS_EN_PLUS, *COMMON.split()})  # those of English, and words of questions of opinion
SPECIFIC = 3  # words that a question shares with a proposition that it is about
SHARED = 1 / 4  # of a topic's probes that must hold a word which makes it one of the topic's keywords


class Match(NamedTuple):
    """An example that touches a topic."""

    topic: str
    example: int  # its number in the order of reading
    score: float  # BM25 of the best proposition; what max_per_topic keeps most of
    proposition: str  # of that topic, most like the example


class Found(NamedTuple):
    matches: list[Match]  # by topic in the order of the probes, then by example
    examples: dict[int, Example]  # those matched, by number
    read: int  # examples


def find(examples: Iterable[Example], probes: Sequence[Probe], *, max_per_topic: int = 0) -> Found:
    """The topics of every example; one may touch several.

    Where a question that names a built-in topic shares fewer than three words with the most alike proposition and its
    probes, the example is about the topic as a whole, and its proposition is the topic's direction (`sets.TOPICS`).

    Args:
      max_per_topic: keep those most like a proposition, the first of equals. 0: all.
    """
    index = make_index(probes)
    best: dict[str, list[tuple[float, int, str]]] = {topic: [] for topic in index.names}
    kept: dict[int, Example] = {}
    read = 0
    for i, example in enumerate(examples):
        read += 1
        for topic, score, proposition in touched(example, index):
            entry = (score, -i, proposition)
            if not max_per_topic or len(best[topic]) < max_per_topic:
                heapq.heappush(best[topic], entry)
            else:
                heapq.heappushpop(best[topic], entry)
            kept[i] = example
        if len(kept) > 1000 + 2 * sum(map(len, best.values())):  # so that memory is bounded by max_per_topic
            used = {-at for entries in best.values() for _, at, _ in entries}
            kept = {at: kept[at] for at in kept if at in used}
    matches = [
        Match(topic, -at, score, proposition)
        for topic, entries in best.items()
        for score, at, proposition in sorted(entries, key=lambda entry: -entry[1])
    ]
    return Found(matches, {m.example: kept[m.example] for m in matches}, read)


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


def touched(example: Example, index: Index) -> list[tuple[str, float, str]]:
    """(topic, score, proposition) of each topic that an example touches."""
    asked = question(example)
    as_probe = normal(asked)
    named = [t for t, names in index.names.items() if (t, as_probe) in index.asked or names.search(asked)]
    if not named:
        return []
    words = set(words_of([asked])[0])
    scores = np.mean([_scores(f"{asked} {response}", index) for response in example.responses or ("",)], axis=0)
    out = []
    for topic in named:
        at = int(np.where([t == topic for t, _ in index.keys], scores, -1).argmax())
        specific = topic not in TOPICS or len(words & index.words[at]) >= SPECIFIC
        best = index.keys[at][1] if specific else TOPICS[topic]
        out.append((topic, float(scores[at]), index.asked.get((topic, as_probe), best)))
    return out


def _scores(text: str, index: Index) -> np.ndarray:
    """BM25 of every proposition; each word of the text counts once, however long it is."""
    words = [word for word in dict.fromkeys(words_of([text])[0]) if word in index.bm25.vocab_dict]
    return index.bm25.get_scores(words) if words else np.zeros(len(index.keys), np.float32)


def question(example: Example) -> str:
    """What an example's responses answer: the last message of its prompt, or the whole of a raw prompt."""
    return example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]


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
        out[topic] = KEYWORDS.get(topic) or "|".join(re.escape(word) + "(?:s|es)?" for word in own)
    return out


def words_of(texts: Sequence[str], stem: bool = True) -> list[list[str]]:
    return bm25s.tokenize(
        list(texts), stopwords=STOP, stemmer=stems if stem else None, return_ids=False, show_progress=False
    )


def stems(words: Sequence[str]) -> list[str]:
    """Words without the endings of plurals and verbs, so that "taxes" finds "tax"."""
    return [re.sub(r"(?<=\w{3})(?:(?<!s)s|es|ed|ing|e)$", "", re.sub(r"ies$", "y", word)) for word in words]
