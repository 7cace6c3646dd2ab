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

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "dropped": dict(self.dropped), "noted": dict(self.noted), "first": dict(self.first)}


class Dropped(Exception):
    """One example is not usable; the message is the reason it is counted under."""
