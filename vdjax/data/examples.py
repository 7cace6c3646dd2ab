"""What data sources make: examples, and counts of what was not used."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict


class Message(TypedDict):
    role: str  # 'system' (first only), 'user', 'assistant'
    content: str


class Example(NamedTuple):
    """`prompt` is raw text (no chat template) or messages (rendered with it); one response, (chosen, rejected) or none.

    label: of an unpaired response 1 (desirable) or 0; of a pair the margin by which its chosen response is better,
        where the data say so; else 0.
    """

    id: str
    prompt: str | tuple[Message, ...]
    responses: tuple[str, ...]
    label: float = 0.0


def normal(text: str) -> str:
    """A text's words alone, whatever its case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def user_turns(prompt: str | tuple[Message, ...]) -> list[str]:
    """What is asked in a prompt, the last question last; a raw text is one question."""
    return [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt if m["role"] == "user"]


# What was expected of an example that is dropped, by reason.
EXPECTED = {
    "missing_field": "every field of the source, and none of them null",
    "wrong_type": "text where the source has text, a list of {role, content} where it has messages",
    "invalid_unicode": "text without half of a surrogate pair (such as \\ud83d alone)",
    "not_finite": "a finite number, not NaN or infinity",
    "unknown_role": "the roles system, user and assistant",
    "no_messages": "at least a question and its answer",
    "ends_without_answer": "a conversation whose last message is the assistant's",
    "roles_do_not_alternate": "user and assistant in turn, behind a system message at most",
    "empty_turn": "messages that are not blank",
    "empty_prompt": "a prompt that is not blank",
    "empty_response": "responses that are not blank",
    "empty_document": "text that is not blank",
    "equal_responses": "a chosen response that is not the rejected one",
    "no_common_prompt": "chosen and rejected that begin with the same conversation",
    "prompts_differ": "chosen and rejected that differ in their last answer alone",
    "no_transcript": "text such as '\\n\\nHuman: ...\\n\\nAssistant: ...'",
    "special_token_in_text": "text without the special tokens of the tokenizer, which would forge a turn",
    "prompt_too_long": "prompts that leave room for a response in max_length",
    "nothing_scored": "a response of at least one token",
    "template_refuses": "messages that the chat template takes",
    "template_not_a_prefix": "messages that do not change what the chat template writes before an answer",
    "view_without_wordings": "a file with the name of a view in vdjax/data/stance_wordings.toml",
    "answer_not_yes_or_no": "answer_matching_behavior: Yes or No",
}


@dataclass
class Counts:
    """What became of the rows read: `dropped` and, for used but changed ones, `noted`, both by reason.

    `first` holds the id of the first example of every reason. One object may go through loading and rendering:
    rows = rendered + dropped + noted["skipped_by_config"], where a persona pair takes two rows.
    """

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def note(self, reason: str, where: str) -> None:
        self.noted[reason] += 1
        self.first.setdefault(reason, where)

    def lines(self) -> list[str]:
        """The number of rows, then one line a reason, most frequent first."""
        out = [f"{self.rows} rows read, {self.dropped.total()} dropped"]
        for what, counter in (("dropped", self.dropped), ("noted", self.noted)):
            out += [f"  {what} {n} x {reason} (first: {self.first[reason]})" for reason, n in counter.most_common()]
        return out

    def meanings(self) -> list[str]:
        """What was expected instead, one line a reason that examples were dropped for, where there is more to say."""
        return [f"  {why}: expected {EXPECTED[why]}" for why, _ in self.dropped.most_common() if why in EXPECTED]

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "dropped": dict(self.dropped), "noted": dict(self.noted), "first": dict(self.first)}


class Dropped(Exception):
    """One example is not usable; the message is the reason it is counted under."""
