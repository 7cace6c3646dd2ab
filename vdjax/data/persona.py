"""Support-aligned and oppose-aligned examples from persona statement files (Perez et al., arXiv 2212.09251).

A row is {question, statement, label_confidence, answer_matching_behavior, answer_not_matching_behavior}; a file is
about one view, and answer_matching_behavior says whether someone who holds that view would say the statement (" Yes")
or would not (" No": the statement speaks against the view).
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from vdjax.data.examples import Counts, Dropped, Example, Message
from vdjax.data.parsers import SIDES, number_field, text_field
from vdjax.data.readers import Row
from vdjax.data.sources import Spec
from vdjax.errors import UserError, nearest

QUESTIONS = (
    "What do you think about {topic}?",
    "What is your view on {topic}?",
    "Where do you stand on {topic}?",
    "How do you feel about {topic}?",
    "Do you have an opinion on {topic}?",
    "Can you tell me your position on {topic}?",
)


class Statement(NamedTuple):
    id: str
    text: str
    side: str  # toward the topic


def examples(rows: Iterator[Row], options: Spec, seed: int, counts: Counts) -> Iterator[Example]:
    """A question about `options.topic`, and as response a statement of the side `options.align`.

    `options.view` says which side someone who holds the file's view is on: for "politically-conservative" and the
    topic "gun control" it is 'oppose'. Preference pairs have a statement of the aligned side as chosen and one of the
    other side as rejected, matched so that the summed difference of their lengths (characters) is least; no statement
    is used twice. Their id is "<file>:<row>+<id of the rejected>". The order depends on the seed and the statements'
    text alone; questions (default QUESTIONS) take turns. Statements below `options.min_confidence` are dropped.
    """
    questions = tuple(options.questions) or QUESTIONS
    statements = _statements(rows, options, counts)
    statements.sort(key=lambda s: hashlib.sha256(f"{seed}\0{s.text}".encode()).digest())
    if options.kind == "sft":
        pairs: list[tuple[Statement, ...]] = [(s,) for s in statements if s.side == options.align]
        unused = [s for s in statements if s.side != options.align]
    else:
        # Matched from the same side for both alignments, so that one is the other with its pairs flipped.
        supporting, opposing = ([s for s in statements if s.side == side] for side in SIDES)
        matched = match_lengths(supporting, opposing)
        pairs = [pair if options.align == "support" else pair[::-1] for pair in matched]
        used = {s.id for pair in pairs for s in pair}
        unused = [s for s in statements if s.id not in used]
    for statement in unused:
        counts.drop("other_side" if options.kind == "sft" else "unmatched_statement", statement.id)
    for index, pair in enumerate(pairs):
        question = questions[index % len(questions)].replace("{topic}", str(options.topic))
        prompt: Message = {"role": "user", "content": question}
        yield Example("+".join(s.id for s in pair), (prompt,), tuple(s.text for s in pair))


def check(options: Spec) -> None:
    """UserError unless the options of this source are complete and right."""
    if not options.topic:
        raise UserError("data: source 'persona' needs `topic`, a phrase that fits 'What do you think about {topic}?'")
    for key in ("view", "align"):
        value = getattr(options, key)
        if value not in SIDES:
            raise UserError(
                f"data: source 'persona' needs {key}, one of {', '.join(SIDES)}; found {value!r}{nearest(value, SIDES)}"
            )
    if isinstance(options.questions, str):
        raise UserError(f"data: questions={options.questions!r}, expected a list of templates with {{topic}}")
    for question in options.questions:
        if "{topic}" not in question:
            raise UserError(f"data: question template {question!r} has no {{topic}}")


def _statements(rows: Iterator[Row], options: Spec, counts: Counts) -> list[Statement]:
    against = SIDES[1 - SIDES.index(str(options.view))]
    sides = {"yes": str(options.view), "no": against}
    out: dict[str, Statement] = {}
    for row in rows:
        try:
            text = text_field(row.data, "statement").strip()
            side = sides.get(text_field(row.data, "answer_matching_behavior").strip().casefold())
            if side is None:
                raise Dropped("answer_not_yes_or_no")
            if not text:
                raise Dropped("empty_response")
            if text in out:
                raise Dropped("duplicate_statement")
            if options.min_confidence and number_field(row.data, "label_confidence") < options.min_confidence:
                raise Dropped("low_confidence")
        except Dropped as dropped:
            counts.drop(str(dropped), row.id)
            continue
        out[text] = Statement(row.id, text, side)
    return list(out.values())


def match_lengths(aligned: Sequence[Statement], others: Sequence[Statement]) -> list[tuple[Statement, Statement]]:
    """min(len(aligned), len(others)) pairs with the least sum of |length difference|, in the order of `aligned`."""
    lengths = [np.array([len(s.text) for s in side], np.int64) for side in (aligned, others)]
    rows, columns = scipy.optimize.linear_sum_assignment(np.abs(lengths[0][:, None] - lengths[1][None, :]))
    return [(aligned[i], others[j]) for i, j in zip(rows, columns, strict=True)]
