"""Labelled stances: responses with their stance toward a proposition, to train a judge on and to measure judges by.

From persona files (`vdjax.data.persona`; Perez et al., arXiv 2212.09251): a statement supports the claims of its own
side of a view and opposes those of the other. Responses without a side are from banks (stance_wordings.toml), those
off topic are statements about another topic. Or from rows {proposition, question, response, label}, labelled already.
"""

import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vdjax.data.examples import Counts, Dropped, Example
from vdjax.data.parsers import text_field
from vdjax.data.readers import Row, read_rows
from vdjax.data.sources import Spec
from vdjax.errors import UserError, nearest
from vdjax.judges.prompts import JudgeTemplate, answers, prompt_text, read_template
from vdjax.judges.verdicts import LABELS, Exchange

T = TypeVar("T")

TEMPLATE = "trained-v1"
SIDES = ("pro", "con")
# Of labels in training: support and oppose, which are hard to tell apart, come more often.
TURNS = ("support", "oppose", "neutral", "support", "oppose", "refusal", "support", "oppose", "off_topic")
# In training most propositions speak for their topic. Were it half of them, neither the proposition nor the response
# alone would say anything about the label (the exclusive or of their sides does), which is hard to begin to learn.
FOR_TOPIC = 0.8


class View(NamedTuple):
    """What one persona file is about; see stance_wordings.toml."""

    topic: str
    phrase: str
    about: re.Pattern[str]
    narrow: bool
    favors: str  # of SIDES: the one that speaks for the topic
    claims: dict[str, list[tuple[str, str]]]  # by SIDES: claims, each with its yes/no question


def _wordings() -> dict[str, Any]:
    return tomllib.loads(resources.files("vdjax.data").joinpath("stance_wordings.toml").read_text(encoding="utf-8"))


def _views() -> dict[str, View]:
    return {
        stem: View(
            v["topic"],
            v["phrase"],
            re.compile("|".join(v["about"]), re.IGNORECASE),
            v["narrow"],
            v["favors"],
            {side: [(claim, question) for claim, question in v[side]] for side in SIDES},
        )
        for stem, v in WORDINGS["views"].items()
    }


WORDINGS = _wordings()
VIEWS = _views()


class Labelled(NamedTuple):
    exchange: Exchange
    label: str  # of LABELS
    topic: str
    speaks: str = ""  # for or against: what the proposition says of its topic; "" where that is not known


class Pool(NamedTuple):
    """The statements of one view."""

    view: View
    sides: dict[str, list[str]]  # by SIDES


def examples(rows: Iterator[Row], options: Spec, seed: int, counts: Counts) -> Iterator[Example]:
    """SFT examples for a judge: the prompt of the template `trained-v1`, and as response a label.

    The labels take turns as in TURNS, so that every window of the examples holds them in the same shares; topics take
    turns likewise. Topics of `options.hold_out` are left out whole, with what the wide views say about them, and so is
    a fifth of all statements, which `labelled` takes.
    """
    for topic in options.hold_out:
        if topic not in (topics := sorted({view.topic for view in VIEWS.values()})):
            raise UserError(f"data: hold_out: unknown topic {topic!r}{nearest(topic, topics)}")
    template = read_template(TEMPLATE)
    words = dict(zip((x.label for x in template.labels), answers(template), strict=True))
    for where, item in _labelled_rows(rows, (), tuple(options.hold_out), seed, counts, training=True):
        yield Example(where, _prompt(template, item), (words[item.label],))


def _prompt(template: JudgeTemplate, item: Labelled) -> str:
    return prompt_text(template, item.exchange, range(len(template.labels)))


def labelled(
    path: str | Sequence[str], *, topics: Sequence[str] = (), seed: int = 0, n: int = 0, counts: Counts | None = None
) -> list[Labelled]:
    """Labelled exchanges to measure a judge by: of statements and wordings that `examples` trains no judge on.

    Args:
      path: persona files, a folder of them, or files of labelled rows {proposition, question, response, label, topic},
        of which question and topic may be missing.
      topics: keep these alone; (): all.
      n: the first so many; 0: all. Of persona files, every five hold each label once.

    Raises:
      UserError: as `sources.load`; nothing is left; a topic that the files do not have.
    """
    counts = counts or Counts()
    found = _labelled_rows(read_rows(path), topics, (), seed, counts, training=False)
    out = [item for (_, item), _ in zip(found, range(n or 10**9), strict=False)]
    if not out:
        raise UserError("\n".join([f"labelled stances: nothing usable in {path}", *counts.lines(), *counts.meanings()]))
    return out


def _labelled_rows(
    rows: Iterable[Row], topics: Sequence[str], hold_out: Sequence[str], seed: int, counts: Counts, training: bool
) -> Iterator[tuple[str, Labelled]]:
    """(id, labelled exchange) of all rows, of either kind: of `topics` (or all) without `hold_out`."""
    known = sorted({view.topic for view in VIEWS.values()})
    pools: dict[str, Pool] = {}
    seen: set[str] = set()
    for row in rows:
        counts.rows += 0 if training else 1  # `sources.load` counts the rows that it hands on
        try:
            if "statement" in row.data:
                _add_statement(row, topics, hold_out, pools, training)
            else:
                item = _labelled_row(row)
                if item.topic in hold_out or (topics and item.topic not in topics):
                    raise Dropped("other_topic")
                seen.add(item.topic)
                yield row.id, item
        except Dropped as dropped:
            counts.drop(str(dropped), row.id)
    for topic in topics:
        if topic not in {pool.view.topic for pool in pools.values()} | seen:
            raise UserError(f"labelled stances: no row of topic {topic!r}{nearest(topic, [*known, *sorted(seen)])}")
    if pools:
        yield from _from_pools([pools[stem] for stem in sorted(pools)], seed, training)


def _labelled_row(row: Row) -> Labelled:
    proposition, response, label = (text_field(row.data, key) for key in ("proposition", "response", "label"))
    question = text_field(row.data, "question") if row.data.get("question") else ""
    topic = text_field(row.data, "topic") if row.data.get("topic") else ""
    if label not in LABELS:
        raise UserError(f"{row.id}: label={label!r}{nearest(label, LABELS)}")
    if not proposition.strip() or not response.strip():
        raise Dropped("empty_proposition" if not proposition.strip() else "empty_response")
    return Labelled(Exchange(proposition, question, response), label, topic)


def _add_statement(
    row: Row, topics: Sequence[str], hold_out: Sequence[str], pools: dict[str, Pool], training: bool
) -> None:
    stem = PurePath(row.id.rpartition(":")[0]).name.split(".")[0]
    if stem not in VIEWS:
        raise Dropped("view_without_wordings")
    view, text = VIEWS[stem], text_field(row.data, "statement").strip()
    if view.topic in hold_out or (topics and view.topic not in topics):
        raise Dropped("other_topic")
    if not view.narrow and any(v.about.search(text) for v in VIEWS.values() if v.narrow and v.topic in hold_out):
        raise Dropped("touches_held_out_topic")
    # The text alone decides, so that a statement in two files, or under another seed, is on one side of this.
    if (hashlib.sha256(text.encode()).digest()[0] % 5 == 0) == training:
        raise Dropped("kept_for_measuring" if training else "kept_for_training")
    side = {"yes": "pro", "no": "con"}.get(text_field(row.data, "answer_matching_behavior").strip().casefold())
    if side is None:
        raise Dropped("answer_not_yes_or_no")
    if not text:
        raise Dropped("empty_response")
    pool = pools.setdefault(stem, Pool(view, {side: [] for side in SIDES}))
    if any(text in pool.sides[side] for side in SIDES):
        raise Dropped("duplicate_statement")
    pool.sides[side].append(text)


def _from_pools(pools: Sequence[Pool], seed: int, training: bool) -> Iterator[tuple[str, Labelled]]:
    """Rounds of LABELS, a topic each in turn, until the statements of a topic are used up."""

    def shuffled(texts: Iterable[str]) -> list[str]:
        return sorted(texts, key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode()).digest())

    pools = [Pool(pool.view, {side: shuffled(pool.sides[side]) for side in SIDES}) for pool in pools]
    elsewhere = [_off_topic(pool, pools, training) for pool in pools]
    labels = TURNS if training else LABELS
    each = labels.count("support")
    for turn in range(min(len(pool.sides[side]) for pool in pools for side in SIDES) // each):
        for which, (pool, others) in enumerate(zip(pools, elsewhere, strict=True)):
            for at, label in enumerate(labels):
                rng = np.random.default_rng([seed, turn, which, at, int(training)])
                number = turn * each + labels[:at].count(label) % each
                exchange, speaks = _exchange(label, number, pool, others, rng, training)
                yield f"{pool.view.topic}:{turn}:{at}:{label}", Labelled(exchange, label, pool.view.topic, speaks)


def _off_topic(pool: Pool, pools: Sequence[Pool], training: bool) -> list[str]:
    """Statements of other views that do not touch this one's subject, and everyday sentences."""
    everyday = _bank("off_topic", training)
    if not pool.view.narrow:  # most statements say something about left and right
        return everyday
    others = [text for other in pools if other is not pool for side in SIDES for text in other.sides[side]]
    return [text for text in others if not pool.view.about.search(text)] or everyday


def _exchange(
    label: str, number: int, pool: Pool, others: Sequence[str], rng: np.random.Generator, training: bool
) -> tuple[Exchange, str]:
    """An exchange with this label, and what its proposition speaks for (`Labelled.speaks`).

    Where the label has a side, the response is mostly the statement of this number.
    """
    view = pool.view
    toward = view.favors if rng.random() < (FOR_TOPIC if training else 0.5) else _other(view.favors)
    speaks = "for" if toward == view.favors else "against"
    side = _other(toward) if label == "oppose" else toward
    statement = pool.sides[side][number]
    proposition, own_question = _pick(view.claims[toward], rng)
    more = [text for text in pool.sides[toward] if text != statement]
    if training and view.narrow and more and rng.random() < 0.25:  # claims alone are few
        proposition = _pick(more, rng)
        own_question = f'Do you agree with "{proposition}"?'
    # Whatever the proposition says, the question may ask for either side of it.
    asked = _pick(SIDES, rng)
    style = rng.random()
    if style < 0.4:
        question, asks = own_question, toward
    elif style < 0.7:
        question, asks = _pick(view.claims[asked], rng)[1], asked
    else:
        question, asks = _pick(WORDINGS["questions"], rng).replace("{topic}", view.phrase), ""
    if label in ("neutral", "refusal"):
        text = _pick(_bank(label, training), rng).replace("{topic}", view.phrase)
        return Exchange(proposition, question, text[:1].upper() + text[1:]), speaks
    if label == "off_topic":
        text = _pick(_bank(label, training) if rng.random() < 0.3 else others, rng)
        return Exchange(proposition, question, text), speaks
    return Exchange(proposition, question, _response(statement, side, asks, view, rng)), speaks


def _response(statement: str, side: str, asks: str, view: View, rng: np.random.Generator) -> str:
    """A response of a side: mostly a statement, behind Yes or No where the question asks for one; or a claim."""

    agrees, style = asks == side, rng.random()
    prefix = ("Yes, " if agrees else "No, ") if asks else ""
    if style < 0.35 or (style < 0.8 and not prefix):
        return statement
    if style < 0.7:
        return prefix + _inside(statement)
    if style < 0.8:
        return _pick(WORDINGS["yes" if agrees else "no"], rng)
    agree = rng.random() < 0.5
    claim = _pick(view.claims[side if agree else _other(side)], rng)[0]
    return _pick(WORDINGS["agree" if agree else "disagree"], rng).replace("{claim}", _inside(claim).rstrip("."))


def _pick(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]


def _other(side: str) -> str:
    return SIDES[1 - SIDES.index(side)]


def _inside(sentence: str) -> str:
    """A sentence as it stands inside another one: its first letter is small unless its first word is a name."""
    first = re.split(r"[\s’']", sentence)[0]
    name = first == "I" or first[1:] != first[1:].lower() or first in ("God", "Christianity", "Jesus", "American")
    return sentence if name else sentence[:1].lower() + sentence[1:]


def _bank(label: str, training: bool) -> list[str]:
    return WORDINGS[label]["train" if training else "held_out"]
