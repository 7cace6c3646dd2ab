"""Datasets in their own schemas, as examples: a prompt with one response (SFT) or with two (chosen, rejected).

`load` picks a parser by the rows' source. A parser takes one row and returns (prompt, responses), or raises `Dropped`.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from itertools import chain, islice
from typing import Any, NamedTuple

from vdjax.data.examples import Counts, Dropped, Example, Message
from vdjax.data.readers import Row, read_rows
from vdjax.errors import UserError, nearest

__all__ = ["SOURCES", "Counts", "Example", "Message", "Spec", "load"]


@dataclass(frozen=True)
class Spec:
    """What to load. None, "" and () mean "not given".

    kind: what the stage needs: 'sft', 'preference', 'unpaired' (a response with a label; a pair gives two), 'prompt'
        (without a response) or 'text' (documents for pretraining).
    source: a name in SOURCES, or 'auto' to choose by the columns.
    path: a local file, directory or list of files, or a hub id; revision, split, name (config) and data_dir as in
        `datasets.load_dataset`. Hub ids need a revision.
    skip_examples, max_examples: a window of the usable examples, in file order.
    topic, view, align, questions, min_confidence: for 'persona', see `vdjax.data.persona`.
    language, drop_toxic, drop_redacted: for 'wildchat': keep one language (such as "English"), and drop conversations
        flagged toxic or with redacted personal data.
    """

    kind: str
    path: str | Sequence[str]
    source: str = "auto"
    revision: str | None = None
    split: str | None = None
    name: str | None = None
    data_dir: str | None = None
    max_examples: int | None = None
    skip_examples: int = 0
    topic: str | None = None
    view: str | None = None
    align: str | None = None
    questions: Sequence[str] = ()
    min_confidence: float = 0.0
    language: str | None = None
    drop_toxic: bool = False
    drop_redacted: bool = False


PERSONA_ONLY = ("topic", "view", "align", "questions", "min_confidence")
RENDERING = ("truncation", "assistant_turns")
WILDCHAT_ONLY = ("language", "drop_toxic", "drop_redacted")

Parsed = tuple[str | tuple[Message, ...], tuple[str, ...]]


def load(spec: Mapping[str, Any], *, seed: int = 0, counts: Counts) -> Iterator[Example]:
    """Examples of a dataset, lazily and always in the same order.

    The keys of `spec` are the fields of `Spec`; those of a nested `options` count as its own, and the keys of rendering
    that stand beside them in a stage's config (RENDERING) are passed over. Rows are read as the iterator goes, so
    million-row datasets need no memory; `counts` is complete once it is exhausted. Rows behind the last wanted example
    are not read. `seed` orders persona statements and nothing else.

    Raises UserError at the call for a wrong `spec`, missing files and columns that fit no source; and while iterating
    for damaged files and when there is no usable example at all.
    """
    options = _options(spec)
    kind = options.kind
    rows = read_rows(
        options.path, revision=options.revision, split=options.split, name=options.name, data_dir=options.data_dir
    )
    head = list(islice(rows, 100))
    if not head:
        raise UserError(f"data: {options.path} holds no rows")
    source = choose_source(options, head)
    _refuse_foreign_options(options, source)
    counted = _counted(chain(head, rows), counts)
    if options.kind not in SOURCES[source].kinds:
        options = replace(options, kind=MADE_FROM[options.kind])
    if source == "persona":
        from vdjax.data import persona

        persona.check(options)
        examples = persona.examples(counted, options, seed, counts)
    else:
        examples = _parse_rows(counted, SOURCES[source].parse, options, counts)
    examples = _window(examples, options, counts)
    if options.kind == kind:
        return examples
    return _prompts(examples) if kind == "prompt" else _unpaired(examples)


def _prompts(examples: Iterator[Example]) -> Iterator[Example]:
    return (example._replace(responses=()) for example in examples)


def _unpaired(examples: Iterator[Example]) -> Iterator[Example]:
    for example in examples:
        for response, name, label in zip(example.responses, ("chosen", "rejected"), (1.0, 0.0), strict=True):
            yield Example(f"{example.id}:{name}", example.prompt, (response,), label)


def kinds_of(source: "Source") -> tuple[str, ...]:
    """The kinds of examples that can be had from a source."""
    return (*source.kinds, *(kind for kind, other in MADE_FROM.items() if other in source.kinds))


def _counted(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    for row in rows:
        counts.rows += 1
        yield row


def _options(spec: Mapping[str, Any]) -> Spec:
    valid = [f.name for f in fields(Spec)]
    flat = {key: spec[key] for key in spec if key not in ("options", *RENDERING)} | dict(spec.get("options") or {})
    given = {key: value for key, value in flat.items() if value not in (None, "", ())}
    for key in given:
        if key not in valid:
            raise UserError(f"data: unknown key {key!r}{nearest(key, valid)}")
    for key in ("kind", "path"):
        if key not in given:
            raise UserError(f"data: {key!r} is missing")
    options = Spec(**given)
    if options.kind not in KINDS:
        raise UserError(f"data: kind={options.kind!r}{nearest(options.kind, KINDS)}")
    if options.source not in ("auto", *SOURCES):
        raise UserError(f"data: source={options.source!r}{nearest(options.source, ('auto', *SOURCES))}")
    if options.source != "auto" and options.kind not in kinds_of(SOURCES[options.source]):
        kinds = ", ".join(kinds_of(SOURCES[options.source]))
        raise UserError(f"data: source {options.source!r} gives {kinds} examples, but the stage needs {options.kind!r}")
    for key in ("skip_examples", "max_examples"):
        if not isinstance(given.get(key, 0), int) or given.get(key, 0) < 0:
            raise UserError(f"data: {key}={given[key]!r}, expected a whole number, at least 0")
    return options


def choose_source(options: Spec, head: Sequence[Row]) -> str:
    """The source's name, checked against the columns of the first rows; UserError when they do not fit."""
    columns = sorted(set().union(*(row.data for row in head)))
    fitting = [name for name, source in SOURCES.items() if options.kind in kinds_of(source)]
    if options.source != "auto":
        fitting = [options.source]
    matches = [name for name in fitting if set(SOURCES[name].columns) <= set(columns)]
    if matches:
        transcripts = isinstance(head[0].data.get("chosen"), str)
        return "hh-rlhf" if matches[0] == "chosen-rejected" and transcripts else matches[0]
    closest = max(fitting, key=lambda name: _likeness(SOURCES[name].columns, columns))
    missing = [c for c in SOURCES[closest].columns if c not in columns]
    hints = "; ".join(f"no column {c!r}{nearest(c, columns)}" for c in missing)
    wanted = " | ".join(dict.fromkeys(", ".join(SOURCES[name].columns) for name in fitting))
    raise UserError(
        f"data: {options.path}: found columns {', '.join(columns) or '(none)'}; "
        f"{options.kind} examples (source {options.source!r}) need {wanted}; nearest: {closest} ({hints})"
    )


def _likeness(wanted: Sequence[str], found: Sequence[str]) -> float:
    best = [max((SequenceMatcher(None, w, f).ratio() for f in found), default=0.0) for w in wanted]
    return sum(best) / len(best)


def _refuse_foreign_options(options: Spec, source: str) -> None:
    for owner, keys in (("persona", PERSONA_ONLY), ("wildchat", WILDCHAT_ONLY)):
        for key in keys:
            if source != owner and getattr(options, key):
                raise UserError(f"data: {key} is for source {owner!r}, but {options.path} is read as {source!r}")


def _parse_rows(rows: Iterator[Row], parse: "Parser", options: Spec, counts: Counts) -> Iterator[Example]:
    for row in rows:
        try:
            prompt, responses = parse(row.data, options)
            label = _label(row.data, options.kind)
            if len(responses) == 2 and responses[0].strip() == responses[1].strip():
                raise Dropped("equal_responses")
        except Dropped as dropped:
            counts.drop(str(dropped), row.id)
            continue
        yield Example(row.id, prompt, responses, label)


def _window(examples: Iterator[Example], options: Spec, counts: Counts) -> Iterator[Example]:
    for example in islice(examples, options.skip_examples):
        counts.note("skipped_by_config", example.id)
    found = False
    for example in islice(examples, options.max_examples or None):
        found = True
        yield example
    if not found:
        raise UserError("\n".join([f"data: no usable example in {options.path}", *counts.lines()]))


# Checks that every parser shares


def text_field(row: Mapping[str, Any], key: str) -> str:
    """A field that must be text; Dropped 'missing_field', 'wrong_type' or 'invalid_unicode'."""
    if row.get(key) is None:
        raise Dropped("missing_field")
    return _text(row[key])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Dropped("wrong_type")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON's \ud83d alone gives
            raise Dropped("invalid_unicode") from None
    return value


def _label(row: Mapping[str, Any], kind: str) -> float:
    """`Example.label`: the column `label` of unpaired rows, the column `margin` of pairs, if there is one."""
    if kind == "unpaired":
        if row.get("label") not in (True, False):
            raise Dropped("missing_field" if row.get("label") is None else "wrong_type")
        return float(row["label"])
    margin = row.get("margin") if kind == "preference" else None
    if margin is not None and not isinstance(margin, int | float):
        raise Dropped("wrong_type")
    return float(margin or 0)


def _messages(value: object) -> list[Message]:
    if value is None:
        raise Dropped("missing_field")
    if not isinstance(value, list | tuple):
        raise Dropped("wrong_type")
    out: list[Message] = []
    for message in value:
        if not isinstance(message, Mapping):
            raise Dropped("wrong_type")
        if message.get("role") not in ("system", "user", "assistant"):
            raise Dropped("unknown_role" if message.get("role") is not None else "missing_field")
        out.append({"role": message["role"], "content": text_field(message, "content")})
    return out


def _answered(conversation: Sequence[Message]) -> tuple[tuple[Message, ...], str]:
    """(prompt, last answer) of [system,] user, assistant, ..., user, assistant; Dropped when it is anything else."""
    if not conversation:
        raise Dropped("no_messages")
    turns = conversation[1:] if conversation[0]["role"] == "system" else conversation
    if conversation[-1]["role"] != "assistant":
        raise Dropped("ends_without_answer")
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        raise Dropped("roles_do_not_alternate")
    if not conversation[-1]["content"].strip():
        raise Dropped("empty_response")
    if not all(turn["content"].strip() for turn in turns):
        raise Dropped("empty_turn")
    return tuple(conversation[:-1]), conversation[-1]["content"]


# Parsers

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ASSISTANT = "\n\nAssistant:"


def _hh(row: Mapping[str, Any], options: Spec) -> Parsed:
    chosen = text_field(row, "chosen")
    if options.kind == "sft":
        prompt, answer = _answered(_transcript(chosen))
        return prompt, (answer,)
    rejected = text_field(row, "rejected")
    cut = os.path.commonprefix([chosen, rejected]).rfind(HH_ASSISTANT)
    if cut < 0:
        raise Dropped("no_common_prompt")
    if chosen.rfind(HH_ASSISTANT) != cut or rejected.rfind(HH_ASSISTANT) != cut:
        raise Dropped("prompts_differ")
    prompt, first = _answered(_transcript(chosen))
    _, second = _answered(_transcript(rejected))
    return prompt, (first, second)


def _transcript(text: str) -> list[Message]:
    """ "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages, white space around the turns removed."""
    before, *parts = HH_TURN.split(text)
    if before.strip() or not parts:
        raise Dropped("no_transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _alpaca(row: Mapping[str, Any], options: Spec) -> Parsed:
    instruction, given = text_field(row, "instruction"), _text(row.get("input") or "")
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    prompt, answer = _answered(
        [{"role": "user", "content": question}, {"role": "assistant", "content": text_field(row, "output")}]
    )
    return prompt, (answer,)


def _wildchat(row: Mapping[str, Any], options: Spec) -> Parsed:
    turns = row.get("conversation")
    messages = _messages(turns)
    for flag, wanted in (("toxic", options.drop_toxic), ("redacted", options.drop_redacted)):
        if wanted and (row.get(flag) or any(turn.get(flag) for turn in turns or ())):
            raise Dropped(flag)
    if options.language and str(row.get("language", "")).casefold() != options.language.casefold():
        raise Dropped("other_language")
    prompt, answer = _answered(messages)
    return prompt, (answer,)


def _chat(row: Mapping[str, Any], options: Spec) -> Parsed:
    prompt, answer = _answered(_messages(row.get("messages")))
    return prompt, (answer,)


def _completion(row: Mapping[str, Any], options: Spec) -> Parsed:
    prompt, response = _joined(row.get("prompt"), row.get("completion"))
    return prompt, (response,)


def _preference(row: Mapping[str, Any], options: Spec) -> Parsed:
    prompt, chosen = _joined(row.get("prompt"), row.get("chosen"))
    if options.kind == "sft":
        return prompt, (chosen,)
    other_prompt, rejected = _joined(row.get("prompt"), row.get("rejected"))
    if prompt != other_prompt:
        raise Dropped("prompts_differ")
    return prompt, (chosen, rejected)


def _joined(prompt: object, completion: object) -> tuple[str | tuple[Message, ...], str]:
    """Prompt and completion in any mix of text and messages; the completion may repeat the prompt's messages."""
    if completion is None:
        raise Dropped("missing_field")
    if isinstance(completion, str):
        if prompt is None:
            raise Dropped("missing_field")
        if isinstance(prompt, str):
            if not prompt.strip():
                raise Dropped("empty_prompt")
            if not completion.strip():
                raise Dropped("empty_response")
            return _text(prompt), _text(completion)
        return _answered([*_messages(prompt), {"role": "assistant", "content": _text(completion)}])
    answer = _messages(completion)
    before: list[Message] = []
    if isinstance(prompt, str):  # beside a whole conversation the text only repeats its question (UltraFeedback)
        whole = answer[:1] != [] and answer[0]["role"] != "assistant"
        before = [] if whole else [{"role": "user", "content": _text(prompt)}]
    elif prompt is not None:
        before = _messages(prompt)
        if answer[: len(before)] == before:
            before = []
    return _answered([*before, *answer])


def _prompt(row: Mapping[str, Any], options: Spec) -> Parsed:
    prompt = row.get("prompt")
    if prompt is None:
        raise Dropped("missing_field")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise Dropped("empty_prompt")
        return _text(prompt), ()
    asked, _ = _answered([*_messages(prompt), {"role": "assistant", "content": "an answer"}])
    return asked, ()


def _document(row: Mapping[str, Any], options: Spec) -> Parsed:
    document = text_field(row, "text")
    if not document.strip():
        raise Dropped("empty_document")
    return "", (document,)


Parser = Callable[[Mapping[str, Any], Spec], Parsed]


class Source(NamedTuple):
    """Columns that rows of this source must have, the kinds of examples it can give, and its parser."""

    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    parse: Parser


def _persona_takes_all_rows(row: Mapping[str, Any], options: Spec) -> Parsed:
    raise AssertionError("persona examples are made from the whole file, see vdjax.data.persona")


KINDS = ("sft", "preference", "unpaired", "prompt", "text")
MADE_FROM = {"unpaired": "preference", "prompt": "sft"}  # kinds that are had from examples of another one
PAIRS = ("sft", "preference")
SOURCES: dict[str, Source] = {  # 'auto' takes the first that fits
    "wildchat": Source(("conversation",), ("sft",), _wildchat),
    "messages": Source(("messages",), ("sft",), _chat),
    "prompt-completion-label": Source(("prompt", "completion", "label"), ("unpaired",), _completion),
    "prompt-completion": Source(("prompt", "completion"), ("sft",), _completion),
    "alpaca": Source(("instruction", "output"), ("sft",), _alpaca),
    "persona": Source(("statement", "answer_matching_behavior"), PAIRS, _persona_takes_all_rows),
    "prompt-chosen-rejected": Source(("prompt", "chosen", "rejected"), PAIRS, _preference),
    "ultrafeedback": Source(("prompt", "chosen", "rejected"), PAIRS, _preference),
    "chosen-rejected": Source(("chosen", "rejected"), PAIRS, _preference),
    "hh-rlhf": Source(("chosen", "rejected"), PAIRS, _hh),
    "prompt": Source(("prompt",), ("prompt",), _prompt),
    "text": Source(("text",), ("text",), _document),
}
