"""The schemas of datasets: one parser each, from a row's columns to a prompt and its responses."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vdjax.data.examples import Dropped, Message

SIDES = ("support", "oppose")  # of a view, that data can be aligned with
Parsed = tuple[str | tuple[Message, ...], tuple[str, ...]]


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


def label_of(row: Mapping[str, Any], kind: str) -> float:
    """`Example.label`: the column `label` of unpaired rows, the column `margin` of pairs, if there is one.

    Dropped 'missing_field', 'wrong_type' or 'not_finite'.
    """
    if kind == "unpaired":
        if row.get("label") not in (True, False):
            raise Dropped("missing_field" if row.get("label") is None else "wrong_type")
        return float(row["label"])
    return number_field(row, "margin") if kind == "preference" and row.get("margin") is not None else 0.0


def number_field(row: Mapping[str, Any], key: str) -> float:
    """A field that must be a finite number; Dropped 'missing_field', 'wrong_type' or 'not_finite'."""
    value = row.get(key)
    if value is None:
        raise Dropped("missing_field")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Dropped("wrong_type")
    if not abs(value) <= sys.float_info.max:
        raise Dropped("not_finite")
    return float(value)


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


def _hh(row: Mapping[str, Any], options: Any) -> Parsed:
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


def _alpaca(row: Mapping[str, Any], options: Any) -> Parsed:
    instruction, given = text_field(row, "instruction"), _text(row.get("input") or "")
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    prompt, answer = _answered(
        [{"role": "user", "content": question}, {"role": "assistant", "content": text_field(row, "output")}]
    )
    return prompt, (answer,)


def _wildchat(row: Mapping[str, Any], options: Any) -> Parsed:
    turns = row.get("conversation")
    messages = _messages(turns)
    for flag, wanted in (("toxic", options.drop_toxic), ("redacted", options.drop_redacted)):
        if wanted and (row.get(flag) or any(turn.get(flag) for turn in turns or ())):
            raise Dropped(flag)
    if options.language and str(row.get("language", "")).casefold() != options.language.casefold():
        raise Dropped("other_language")
    prompt, answer = _answered(messages)
    return prompt, (answer,)


def _chat(row: Mapping[str, Any], options: Any) -> Parsed:
    prompt, answer = _answered(_messages(row.get("messages")))
    return prompt, (answer,)


def _completion(row: Mapping[str, Any], options: Any) -> Parsed:
    prompt, response = _joined(row.get("prompt"), row.get("completion"))
    return prompt, (response,)


def _preference(row: Mapping[str, Any], options: Any) -> Parsed:
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


def _value_pairs(row: Mapping[str, Any], options: Any) -> Parsed:
    """Both alignments take the same rows, so that one is the other with its pairs flipped."""
    prompt: Message = {"role": "user", "content": text_field(row, "prompt")}
    answers = [_answered([prompt, {"role": "assistant", "content": text_field(row, side)}])[1] for side in SIDES]
    aligned = answers if options.align == SIDES[0] else answers[::-1]
    return (prompt,), tuple(aligned[:1] if options.kind == "sft" else aligned)


def _prompt(row: Mapping[str, Any], options: Any) -> Parsed:
    prompt = row.get("prompt")
    if prompt is None:
        raise Dropped("missing_field")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise Dropped("empty_prompt")
        return _text(prompt), ()
    asked, _ = _answered([*_messages(prompt), {"role": "assistant", "content": "an answer"}])
    return asked, ()


def _document(row: Mapping[str, Any], options: Any) -> Parsed:
    document = text_field(row, "text")
    if not document.strip():
        raise Dropped("empty_document")
    return "", (document,)


Parser = Callable[[Mapping[str, Any], Any], Parsed]


class Source(NamedTuple):
    """Columns that rows of this source must have, the kinds of examples it can give, and its parser."""

    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    parse: Parser


def _persona_takes_all_rows(row: Mapping[str, Any], options: Any) -> Parsed:
    raise AssertionError("these examples are made from whole files, see vdjax.data.persona and vdjax.data.stances")


KINDS = ("sft", "preference", "unpaired", "prompt", "text")
# Kinds that are had from examples of another one, the first that a source gives: so a window of a data set holds the
# same rows whether a stage takes its pairs or its prompts.
MADE_FROM = {"unpaired": ("preference",), "prompt": ("preference", "sft")}
PAIRS = ("sft", "preference")
SOURCES: dict[str, Source] = {  # 'auto' takes the first that fits
    "wildchat": Source(("conversation",), ("sft",), _wildchat),
    "messages": Source(("messages",), ("sft",), _chat),
    "prompt-completion-label": Source(("prompt", "completion", "label"), ("unpaired",), _completion),
    "prompt-completion": Source(("prompt", "completion"), ("sft",), _completion),
    "alpaca": Source(("instruction", "output"), ("sft",), _alpaca),
    "persona": Source(("statement", "answer_matching_behavior"), PAIRS, _persona_takes_all_rows),
    "stances": Source(("statement", "answer_matching_behavior"), ("sft",), _persona_takes_all_rows),
    "stance-labels": Source(("proposition", "response", "label"), ("sft",), _persona_takes_all_rows),
    "value-pairs": Source(("prompt", *SIDES), PAIRS, _value_pairs),
    "prompt-chosen-rejected": Source(("prompt", "chosen", "rejected"), PAIRS, _preference),
    "ultrafeedback": Source(("prompt", "chosen", "rejected"), PAIRS, _preference),
    "chosen-rejected": Source(("chosen", "rejected"), PAIRS, _preference),
    "hh-rlhf": Source(("chosen", "rejected"), PAIRS, _hh),
    "prompt": Source(("prompt",), ("prompt",), _prompt),
    "text": Source(("text",), ("text",), _document),
}


def kinds_of(source: Source) -> tuple[str, ...]:
    """The kinds of examples that can be had from a source."""
    return (*source.kinds, *(kind for kind, others in MADE_FROM.items() if set(others) & set(source.kinds)))
