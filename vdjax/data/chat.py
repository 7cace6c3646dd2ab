"""Examples as tokens: the chat template, where each response begins and ends, truncation.

A conversation is rendered once by the template and tokenised once, so that tokens are what the model meets when it
answers; boundaries are found in the text first and then among the tokens. No token is ever judged by its id but the
stop ids, and those only inside a response.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int8, Int32

from vdjax.data.examples import Counts, Dropped, Example, Message
from vdjax.data.template import NO_THOUGHTS, Template, pick_template, template_hash, template_text
from vdjax.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase

__all__ = [
    "NO_THOUGHTS",
    "Rendered",
    "Template",
    "decode",
    "pick_template",
    "prompt_ids",
    "render",
    "render_conversation",
    "render_prompt",
    "render_responses",
    "template_hash",
]

Prompt = str | Sequence[Message]
TRUNCATION = ("response_end", "oldest_turns")
TURNS = ("all", "last")


class Rendered(NamedTuple):
    """One example as tokens. `loss_mask[i]` says that token i is scored, as predicted from the tokens it can see.

    Branch 0 is the shared prompt, k >= 1 the k-th response, blind to the other responses. A conversation or document
    is all branch 1. The first token of a document is never scored: nothing comes before it.
    """

    tokens: Int32[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]
    branches: Int8[np.ndarray, " n"]


class Encoded(NamedTuple):
    """Token ids, where each begins and ends in the text (in characters), and whether all of the text is in them."""

    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray
    whole: bool


def _encode(text: str, template: Template, bos_ids: tuple[int, ...] = ()) -> Encoded:
    out = template.encoder.encode(text, add_special_tokens=False)
    starts, ends = np.array([(0, 0)] * len(bos_ids) + out.offsets, np.int64).reshape(-1, 2).T
    utf8 = text.encode()
    return Encoded([*bos_ids, *out.ids], starts, ends, len(utf8.translate(None, template.lost_bytes)) == len(utf8))


def _first_beyond(encoded: Encoded, boundary: int) -> int:
    """Index of the first token that ends beyond `boundary` characters (it may begin before: a straddling token)."""
    beyond = encoded.ends > boundary
    return int(beyond.argmax()) if beyond.any() else len(encoded.ids)


def _notes(encoded: Sequence[Encoded], starts: Sequence[int], boundaries: Sequence[int]) -> dict[str, bool]:
    """Whether an answer begins with a token that begins before its boundary, and whether text got lost."""
    across = any(s < len(e.ids) and e.starts[s] < b for e, s, b in zip(encoded, starts, boundaries, strict=True))
    return {"boundary_token": across, "characters_without_token": not all(e.whole for e in encoded)}


def _first_stop(ids: Sequence[int], start: int, limit: int, template: Template) -> int | None:
    return next((i for i in range(start, limit) if ids[i] in template.stop_ids), None)


# One document: SFT, pretraining


def render_conversation(
    prompt: Prompt,
    response: str,
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    truncation: str = "response_end",
    assistant_turns: str = "all",
    counts: Counts,
    where: str = "",
) -> Rendered | None:
    """A prompt and its response as one causal document of at most `max_length` tokens, ending at its last scored token.

    Scored are the assistant's turns (`assistant_turns` 'all', or 'last' only), each from the end of its generation
    prompt through its first stop id. A token across that boundary belongs to the answer (noted 'boundary_token'). A
    text prompt is joined with the response as it is, without template; the eos is put behind it. Characters that the
    vocabulary has no tokens for are noted 'characters_without_token'.

    truncation: 'response_end' cuts the end of the document (noted 'truncated_response'; dropped 'prompt_too_long' when
    nothing scored is left); 'oldest_turns' first leaves out the oldest question and answer, again and again, as long as
    the document does not fit, keeping a system message and the last question (noted 'truncated_turns').

    Returns None when the example is dropped; the reason is counted in `counts` under `where`, the example's id.
    """
    _check_arguments(max_length, truncation, assistant_turns)
    try:
        _refuse_text(prompt, (response,), template)
        whole = prompt
        ids, mask, notes = _document(prompt, response, tokenizer, template, assistant_turns)
        if len(ids) > max_length and truncation == "oldest_turns":
            prompt = _without_oldest(
                prompt, lambda p: len(_document(p, response, tokenizer, template, assistant_turns)[0]) <= max_length
            )
            ids, mask, notes = _document(prompt, response, tokenizer, template, assistant_turns)
        mask[:1] = False
        if not mask.any():
            raise Dropped("nothing_scored")
        cut = len(ids) > max_length
        mask = mask[:max_length]
        if not mask.any():
            raise Dropped("prompt_too_long")
    except Dropped as dropped:
        counts.drop(str(dropped), where)
        return None
    cut_turns = len(prompt) < len(whole)
    _note(notes | {"truncated_turns": cut_turns, "truncated_response": cut}, counts, where)
    length = int(np.flatnonzero(mask)[-1]) + 1
    return Rendered(np.array(ids[:length], np.int32), mask[:length], np.ones(length, np.int8))


def _document(
    prompt: Prompt, response: str, tokenizer: Tokenizer, template: Template, assistant_turns: str
) -> tuple[list[int], np.ndarray, dict[str, bool]]:
    """(token ids through the last stop, loss mask, what is to be noted)."""
    if isinstance(prompt, str):
        encoded = _encode(prompt + response, template, template.bos_ids)
        start = _first_beyond(encoded, len(prompt))
        ids = [*encoded.ids, template.end_id]
        return ids, np.arange(len(ids)) >= start, _notes([encoded], [start], [len(prompt)])
    messages: list[Message] = [*prompt, {"role": "assistant", "content": response}]
    whole = template_text(messages, tokenizer, template)
    encoded = _encode(whole, template)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    boundaries = [_boundary(messages[:i], whole, tokenizer, template) for i in answers]
    starts = [_first_beyond(encoded, b) for b in boundaries]
    ids = encoded.ids
    mask = np.zeros(len(ids) + 1, bool)
    for start, limit in zip(starts[:-1], starts[1:], strict=True):
        stop = _first_stop(ids, start, limit, template)
        if stop is None and assistant_turns == "all":
            raise UserError(
                f"template: {template.name} ends an answer before the last one with no stop token, so the model would "
                "not learn to stop there; add one to the template, or score the last answer (assistant_turns='last')"
            )
        if stop is not None and assistant_turns == "all":
            mask[start : stop + 1] = True
    stop = _first_stop(ids, starts[-1], len(ids), template)
    if stop is None:
        stop, ids = len(ids), [*ids, template.end_id]
    mask[starts[-1] : stop + 1] = True
    if assistant_turns == "last":
        starts, boundaries = starts[-1:], boundaries[-1:]
    return ids[: stop + 1], mask[: stop + 1], _notes([encoded] * len(starts), starts, boundaries)


def _boundary(messages: Sequence[Message], whole: str, tokenizer: Tokenizer, template: Template) -> int:
    """Where the answer to `messages` begins in the text; Dropped where their content turns the template against it."""
    begun = template_text(messages, tokenizer, template, generation_prompt=True)
    if not whole.startswith(begun):
        raise Dropped("template_not_a_prefix")
    return len(begun)


def _without_oldest(prompt: Prompt, fits: Callable[[Prompt], bool]) -> Prompt:
    """The prompt without the fewest oldest questions and answers that make it fit, or with the last question alone."""
    if isinstance(prompt, str):
        return prompt
    system = list(prompt[:1]) if prompt and prompt[0]["role"] == "system" else []
    turns = prompt[len(system) :]
    shorter = [[*system, *turns[2 * n :]] for n in range((len(turns) + 1) // 2)]
    return shorter[min(bisect_left(shorter, True, key=fits), len(shorter) - 1)] if shorter else prompt


# A prompt shared by several responses: preference pairs, probes


def render_responses(
    prompt: Prompt,
    responses: Sequence[str],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    truncation: str = "response_end",
    distinct: bool = False,
    counts: Counts,
    where: str = "",
) -> Rendered | None:
    """A prompt once (branch 0), then every response (branches 1, 2, ...), each scored through its stop id.

    Every response is rendered and tokenised together with the prompt; the tokens before the earliest boundary are
    shared. Where a token straddles the boundary, that split is used for all, so that all responses are scored after the
    same tokens (noted 'boundary_token'); if the prompts' tokens differ before it, the example is dropped
    'prompt_tokens_differ'. `max_length` is for the prompt with one response. truncation: as in `render_conversation`;
    'oldest_turns' makes room for the longest response. `distinct`: responses with the same tokens (as rendered and cut)
    are dropped 'equal_responses'.

    Returns None when the example is dropped; the reason is counted in `counts` under `where`, the example's id.
    """
    _check_arguments(max_length, truncation, "last")
    if not 1 <= len(responses) <= 127:
        raise UserError(f"{where}: {len(responses)} responses, expected 1 to 127")
    try:
        _refuse_text(prompt, responses, template)
        whole = prompt
        shared, answers, notes = _branches(prompt, responses, tokenizer, template)
        if _longest(shared, answers) > max_length and truncation == "oldest_turns":
            prompt = _without_oldest(
                prompt, lambda p: _longest(*_branches(p, responses, tokenizer, template)[:2]) <= max_length
            )
            shared, answers, notes = _branches(prompt, responses, tokenizer, template)
        cut = _longest(shared, answers) > max_length
        if not shared:
            raise Dropped("empty_prompt")
        answers = [answer[: max(0, max_length - len(shared))] for answer in answers]
        if not answers[0]:
            raise Dropped("prompt_too_long")
        if distinct and any(answer in answers[:i] for i, answer in enumerate(answers)):
            raise Dropped("equal_responses")
    except Dropped as dropped:
        counts.drop(str(dropped), where)
        return None
    cut_turns = len(prompt) < len(whole)
    _note(notes | {"truncated_turns": cut_turns, "truncated_response": cut}, counts, where)
    parts = [shared, *answers]
    branches = np.repeat(np.arange(len(parts), dtype=np.int8), [len(part) for part in parts])
    return Rendered(np.concatenate([np.array(part, np.int32) for part in parts]), branches > 0, branches)


def _longest(shared: Sequence[int], answers: Sequence[Sequence[int]]) -> int:
    return len(shared) + max(map(len, answers))


def _branches(
    prompt: Prompt, responses: Sequence[str], tokenizer: Tokenizer, template: Template
) -> tuple[list[int], list[list[int]], dict[str, bool]]:
    """(shared prompt ids, ids of every response through its stop, what is to be noted)."""
    if isinstance(prompt, str):
        boundaries = [len(prompt)] * len(responses)
        encoded = [_encode(prompt + response, template, template.bos_ids) for response in responses]
    else:
        texts = [template_text([*prompt, {"role": "assistant", "content": r}], tokenizer, template) for r in responses]
        boundaries = [_boundary(prompt, text, tokenizer, template) for text in texts[:1]] * len(texts)
        if not all(text.startswith(texts[0][: boundaries[0]]) for text in texts):
            raise Dropped("template_not_a_prefix")
        encoded = [_encode(text, template) for text in texts]
    starts = [_first_beyond(e, b) for e, b in zip(encoded, boundaries, strict=True)]
    split = min(starts)
    shared = encoded[0].ids[:split]
    if any(e.ids[:split] != shared for e in encoded):
        raise Dropped("prompt_tokens_differ")
    answers = []
    for e, start in zip(encoded, starts, strict=True):
        stop = _first_stop(e.ids, start, len(e.ids), template)
        answers.append([*e.ids[split:], template.end_id] if stop is None else e.ids[split : stop + 1])
    return shared, answers, _notes(encoded, [split] * len(encoded), boundaries)


# A prompt alone: what a response is sampled for


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer, template: Template, *, sampled: bool = False) -> list[int]:
    """The tokens that a response to `prompt` comes after: text behind the bos, messages with the generation prompt.

    They are those of branch 0 in `render_responses`, unless a response begins in the middle of a token there (after a
    text prompt that ends with a space, say).

    sampled: with the template's options, as where a model that can think is to answer at once.

    Raises:
      Dropped: 'empty_prompt', 'special_token_in_text' (it would forge a turn), or the template's refusal.
    """
    _refuse_text(prompt, (), template)
    if isinstance(prompt, str):
        ids = _encode(prompt, template, template.bos_ids).ids
    else:
        options = template.options if sampled else {}
        text = template_text(prompt, tokenizer, template, generation_prompt=True, options=options)
        ids = _encode(text, template).ids
    if not ids:
        raise Dropped("empty_prompt")
    return ids


def render_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    truncation: str = "response_end",
    counts: Counts,
    where: str = "",
) -> Rendered | None:
    """A prompt as a document of which nothing is scored (branch 0), of at most `max_length` tokens.

    truncation: 'response_end' drops what is longer ('prompt_too_long'); 'oldest_turns' first leaves out the oldest
    questions and answers (noted 'truncated_turns').

    Returns None when the example is dropped; the reason is counted in `counts` under `where`, the example's id.
    """
    _check_arguments(max_length, truncation, "last")
    try:
        whole = prompt
        ids = prompt_ids(prompt, tokenizer, template)
        if len(ids) > max_length and truncation == "oldest_turns":
            prompt = _without_oldest(prompt, lambda p: len(prompt_ids(p, tokenizer, template)) <= max_length)
            ids = prompt_ids(prompt, tokenizer, template)
        if len(ids) > max_length:
            raise Dropped("prompt_too_long")
    except Dropped as dropped:
        counts.drop(str(dropped), where)
        return None
    _note({"truncated_turns": len(prompt) < len(whole)}, counts, where)
    return Rendered(np.array(ids, np.int32), np.zeros(len(ids), bool), np.zeros(len(ids), np.int8))


def render(
    example: Example,
    kind: str,
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    truncation: str = "response_end",
    assistant_turns: str = "all",
    counts: Counts,
) -> Rendered | None:
    """An example as its stage needs it.

    kind: 'sft' and 'text' make a document, 'preference' (chosen, rejected) and 'unpaired' (the response and another
        example's) a prompt with two branches, 'prompt' a prompt alone.
    """
    if kind == "prompt":
        return render_prompt(
            example.prompt,
            tokenizer,
            template,
            max_length=max_length,
            truncation=truncation,
            counts=counts,
            where=example.id,
        )
    if kind in ("sft", "text"):
        return render_conversation(
            example.prompt,
            example.responses[0],
            tokenizer,
            template,
            max_length=max_length,
            truncation=truncation,
            assistant_turns=assistant_turns,
            counts=counts,
            where=example.id,
        )
    if kind not in ("preference", "unpaired"):
        raise UserError(f"data: kind={kind!r}{nearest(kind, ('sft', 'text', 'preference', 'unpaired', 'prompt'))}")
    if len(example.responses) != 2:
        raise UserError(f"data: {example.id}: expected two responses, found {len(example.responses)}")
    return render_responses(
        example.prompt,
        example.responses,
        tokenizer,
        template,
        max_length=max_length,
        truncation=truncation,
        distinct=kind == "preference",
        counts=counts,
        where=example.id,
    )


# Shared checks


def _note(reasons: Mapping[str, bool], counts: Counts, where: str) -> None:
    for reason, applies in reasons.items():
        if applies:
            counts.note(reason, where)


def _refuse_text(prompt: Prompt, responses: Sequence[str], template: Template) -> None:
    """Dropped when a response is blank, or a text contains a special or stop token (it would forge a turn)."""
    if not all(response.strip() for response in responses):
        raise Dropped("empty_response")
    if not prompt and not isinstance(prompt, str):
        raise Dropped("empty_prompt")
    if isinstance(prompt, str):  # joined, for the pieces of a token may stand on both sides
        texts = [prompt + response for response in responses or ("",)]
    else:
        texts = [*(message["content"] for message in prompt), *responses]
    if any(template.forbidden.search(text) for text in texts):
        raise Dropped("special_token_in_text")


def _check_arguments(max_length: int, truncation: str, assistant_turns: str) -> None:
    if max_length < 2:
        raise UserError(f"data: max_length={max_length}, expected at least 2")
    if truncation not in TRUNCATION:
        raise UserError(f"data: truncation={truncation!r}{nearest(truncation, TRUNCATION)}")
    if assistant_turns not in TURNS:
        raise UserError(f"data: assistant_turns={assistant_turns!r}{nearest(assistant_turns, TURNS)}")


def decode(tokens: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of tokens, special tokens visible, nothing tidied."""
    return str(tokenizer.decode(list(map(int, tokens)), skip_special_tokens=False, clean_up_tokenization_spaces=False))
