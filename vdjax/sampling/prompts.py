"""Prompts as the tokens that a response follows, and sampled tokens as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from vdjax.data.chat import Prompt
from vdjax.data.examples import Dropped
from vdjax.data.template import Template, template_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase


def render_prompt(prompt: Prompt, tokenizer: Tokenizer, template: Template) -> list[int]:
    """Token ids of a prompt: text as it is, behind the tokenizer's bos; messages with the generation prompt.

    They are those that precede the response in `chat.render_responses`, unless the response begins in the middle of a
    token there (a text prompt that ends with a space, say).

    Raises:
      Dropped: 'empty_prompt', 'special_token_in_text' (it would forge a turn), 'template_refuses'.
    """
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if any(template.forbidden.search(text) for text in texts):
        raise Dropped("special_token_in_text")
    if isinstance(prompt, str):
        text, first = prompt, template.bos_ids
    else:
        text, first = template_text(prompt, tokenizer, template, generation_prompt=True) if prompt else "", ()
    ids = [*first, *template.encoder.encode(text, add_special_tokens=False).ids]
    if not ids:
        raise Dropped("empty_prompt")
    return ids


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
