"""Sampled tokens as text, whole or as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from vdjax.data.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase


def response_text(tokens: Sequence[int], tokenizer: Tokenizer, template: Template) -> str:
    """The text of sampled tokens, without stop and special tokens; nothing tidied."""
    kept = [int(token) for token in tokens if token not in template.stop_ids]
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def text_pieces(tokens: Iterable[int], tokenizer: Tokenizer, template: Template) -> Iterator[str]:
    """The same text, a piece as soon as its characters are whole: bytes of one character may be several tokens."""
    sampled: list[int] = []
    shown = ""
    for token in tokens:
        sampled.append(token)
        text = response_text(sampled, tokenizer, template)
        if len(text) > len(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield response_text(sampled, tokenizer, template)[len(shown) :]
