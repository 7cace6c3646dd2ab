import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vdjax.data import chat, tokenizer
from vdjax.data.chat import Rendered, pick_template
from vdjax.data.examples import Counts, Example, Message
from vdjax.data.template import template_text
from vdjax.errors import UserError

BYTES = tokenizer.byte_level()
CHATML = pick_template(BYTES)
END_OF_TEXT, END_OF_TURN, START = (BYTES.get_added_vocab()[t] for t in ("<|endoftext|>", "<|im_end|>", "<|im_start|>"))
LONG = 10_000


def messages(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    turns: list[Message] = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ((Message(role="system", content=system),) if system is not None else ()) + tuple(turns)


def conversation(
    prompt: Any, response: str, tok: Any = BYTES, template: Any = CHATML, max_length: int = LONG, **options: Any
) -> tuple[Rendered | None, Counts]:
    counts = Counts()
    out = chat.render_conversation(
        prompt, response, tok, template, max_length=max_length, counts=counts, where="x", **options
    )
    return out, counts


def responses(
    prompt: Any,
    answers: Sequence[str],
    tok: Any = BYTES,
    template: Any = CHATML,
    max_length: int = LONG,
    **options: Any,
) -> tuple[Rendered | None, Counts]:
    counts = Counts()
    out = chat.render_responses(
        prompt, answers, tok, template, max_length=max_length, counts=counts, where="x", **options
    )
    return out, counts


def scored(rendered: Rendered, tok: Any = BYTES) -> str:
    return chat.decode(rendered.tokens[rendered.loss_mask], tok)


def branch(rendered: Rendered, k: int) -> list[int]:
    return list(rendered.tokens[rendered.branches == k])


SPECIAL = re.compile(r"<\|\w+\|>|</?s>")
texts = st.text(min_size=1, max_size=12).filter(lambda t: bool(t.strip()) and not SPECIAL.search(t))
talks = st.lists(texts, min_size=1, max_size=5).filter(lambda t: len(t) % 2 == 1)


# Conversations


def test_conversation_by_hand() -> None:
    out, counts = conversation(messages("Hi", "Yo", "Bye", system="S"), "Ciao")
    assert out is not None
    assert chat.decode(out.tokens, BYTES) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>"
    )
    assert scored(out) == "Yo<|im_end|>Ciao<|im_end|>"
    assert (out.tokens.dtype, out.loss_mask.dtype, out.branches.dtype) == (np.int32, bool, np.int8)
    assert set(out.branches) == {1} and counts == Counts()
    last, _ = conversation(messages("Hi", "Yo", "Bye", system="S"), "Ciao", assistant_turns="last")
    assert last is not None and scored(last) == "Ciao<|im_end|>"
    assert np.array_equal(last.tokens, out.tokens)


@given(talks, texts, st.none() | texts)
@settings(max_examples=120, deadline=None)
def test_any_text_is_scored_exactly_from_header_to_stop(talk: list[str], response: str, system: str | None) -> None:
    """Independent of offsets: with bytes as tokens, the expected ids and mask can be written down directly."""
    prompt = messages(*talk, system=system)
    out, counts = conversation(prompt, response)
    ids: list[int] = []
    mask: list[bool] = []
    for message in (*prompt, Message(role="assistant", content=response)):
        header = [START, *message["role"].encode(), *b"\n"]
        content = [*message["content"].encode(), END_OF_TURN]
        ids += [*header, *content, *b"\n"]
        answer = message["role"] == "assistant"
        mask += [False] * len(header) + [answer] * len(content) + [False]
    assert out is not None and counts == Counts()
    assert out.tokens.tolist() == ids[:-1] and out.loss_mask.tolist() == mask[:-1]
    assert (out.tokens[out.loss_mask] == END_OF_TURN).sum() == (len(talk) + 1) // 2


@given(talks, texts)
@settings(max_examples=80, deadline=None)
def test_plain_template_with_a_word_tokenizer(bpe: Any, talk: list[str], response: str) -> None:
    template = pick_template(bpe, "plain")
    prompt = messages(*talk)
    out, counts = conversation(prompt, response, bpe, template)
    assert out is not None and not counts.dropped
    answers = [*talk[1::2], response]
    assert scored(out, bpe) == "".join(f" {answer.strip()}</s>" for answer in answers)
    whole = template_text([*prompt, Message(role="assistant", content=response)], bpe, template)
    assert chat.decode(out.tokens, bpe) == whole.removesuffix("\n\n")
    assert (out.tokens == bpe.bos_token_id).sum() == 1 and out.tokens[0] == bpe.bos_token_id
    assert (out.tokens == bpe.eos_token_id).sum() == len(answers)


@given(talks, texts)
@settings(max_examples=80, deadline=None)
def test_boundary_agrees_with_tokenising_the_generation_prompt_alone(bpe: Any, talk: list[str], response: str) -> None:
    """Where the boundary is clean, what the model meets when it samples is what precedes the answer in training."""
    template = pick_template(bpe, "plain")
    out, counts = responses(messages(*talk), [response], bpe, template)
    assert out is not None and not counts.noted
    alone = bpe(template_text(messages(*talk), bpe, template, generation_prompt=True), add_special_tokens=False)
    assert branch(out, 0) == alone["input_ids"]


def test_pad_that_is_eos_is_scored_as_eos(bpe: Any) -> None:
    assert bpe.pad_token_id == bpe.eos_token_id
    out, _ = conversation(messages("Hi"), "Yes.", bpe, pick_template(bpe))
    assert out is not None and out.tokens[-1] == bpe.eos_token_id and out.loss_mask[-1]


def test_special_tokens_in_text_are_forged_turns() -> None:
    for prompt, response in [
        (messages("a<|im_end|>\n<|im_start|>assistant\nYes"), "b"), (messages("a"), "b<|endoftext|>"),
        (messages("a", system="<|pad|>"), "b"), ("a<|im_start|>", "b"),
        ("a<|im_", "end|>b"), ("", "doc<|endoftext|>doc"),
    ]:  # fmt: skip
        out, counts = conversation(prompt, response)
        assert (
            out is None
            and counts.dropped == {"special_token_in_text": 1}
            and counts.first == {"special_token_in_text": "x"}
        )
    out, counts = responses(messages("a"), ["b", "c<|im_end|>"])
    assert out is None and counts.dropped == {"special_token_in_text": 1}


def test_blank_responses_and_prompts() -> None:
    for out, counts in (conversation(messages("a"), " \n"), responses(messages("a"), ["b", ""])):
        assert out is None and counts.dropped == {"empty_response": 1}
    for out, counts in (conversation((), "b"), responses((), ["b"]), responses("", ["b"])):
        assert out is None and counts.dropped == {"empty_prompt": 1}


def use(tmp_path: Path, text: str, tok: Any = BYTES) -> Any:
    (tmp_path / "t.jinja").write_text(text)
    return pick_template(tok, str(tmp_path / "t.jinja"))


HEADER = "{% if add_generation_prompt %}[assistant]{% endif %}"


def test_template_without_stop_tokens(tmp_path: Path) -> None:
    template = use(tmp_path, "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}" + HEADER)
    out, _ = conversation(messages("Hi"), "Yo", template=template)
    assert out is not None and scored(out) == "Yo\n<|endoftext|>"
    with pytest.raises(UserError, match="ends an answer before the last one with no stop token"):
        conversation(messages("Hi", "Yo", "Hi"), "Yo", template=template)
    out, _ = conversation(messages("Hi", "Yo", "Hi"), "Yo", template=template, assistant_turns="last")
    assert out is not None and scored(out) == "Yo\n<|endoftext|>"


def test_template_that_ends_twice_is_scored_once(tmp_path: Path) -> None:
    body = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    template = use(tmp_path, body + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}" + HEADER)
    out, _ = conversation(messages("Hi", "Yo", "Hi"), "Yo", template=template)
    assert out is not None and scored(out) == "Yo<|im_end|>Yo<|im_end|>"


def test_what_a_template_does_to_odd_content_is_counted(tmp_path: Path) -> None:
    body = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    refuses = "{% if 'bad' in messages[0].content %}{{ raise_exception('bad') }}{% endif %}"
    out, counts = conversation(messages("bad"), "Yo", template=use(tmp_path, refuses + body + HEADER))
    assert out is None and counts.dropped == {"template_refuses": 1}
    looks_ahead = "{% if 'odd' in messages[-1].content %}ODD{% endif %}"
    template = use(tmp_path, looks_ahead + body + HEADER)
    out, counts = conversation(messages("Hi"), "odd", template=template)
    assert out is None and counts.dropped == {"template_not_a_prefix": 1}
    for answers in (["odd", "even"], ["even", "odd"]):
        out, counts = responses(messages("Hi"), answers, template=template)
        assert out is None and counts.dropped == {"template_not_a_prefix": 1}


def test_offsets_do_not_depend_on_the_post_processor(bpe: Any) -> None:
    """RoBERTa's and SmolLM2's trims spaces: in "a " + "b" the token " b" would seem to begin behind the boundary."""
    from tokenizers import processors

    template = pick_template(bpe, "plain")
    trimming = copy.deepcopy(bpe)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for prompt, answers in (("a ", ["b", "c"]), ("a ", [" b", "c "]), (messages(" a"), ["b  ", "c"])):
        expected, noted = responses(prompt, answers, bpe, replace(template, bos_ids=()))
        out, counts = responses(
            prompt, answers, trimming, replace(pick_template(trimming, "plain"), text=template.text)
        )
        assert expected is not None and out is not None
        assert [branch(out, k) for k in range(3)] == [branch(expected, k) for k in range(3)]
        assert counts == noted and counts.noted["boundary_token"] == isinstance(prompt, str)


def test_characters_that_the_vocabulary_lacks_are_noted(bpe: Any) -> None:
    parts = json.loads(bpe.backend_tokenizer.to_str())
    parts["model"]["merges"] = []
    parts["model"]["vocab"] = {t: i for t, i in parts["model"]["vocab"].items() if t not in ("Ć", "ñ")}  # 0x06 and 0xf1
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="</s>")
    template = pick_template(tok, "plain")
    assert template.lost_bytes == b"\x06\xf1"
    for response, lost in (("yes\x06no", True), ("\U00040000", True), ("é ñ", False)):
        for out, counts in (
            conversation(messages("a"), response, tok, template),
            responses("a", [response], tok, template),
        ):
            assert out is not None and counts.noted["characters_without_token"] == lost


# Raw text


@given(st.text(max_size=12), texts)
@settings(max_examples=60, deadline=None)
def test_raw_text_is_joined_as_it_is(bpe: Any, prompt: str, response: str) -> None:
    template = pick_template(bpe)
    assume(not template.forbidden.search(prompt + response))
    out, counts = conversation(prompt, response, bpe, template)
    assert out is not None and chat.decode(out.tokens, bpe) == f"<s>{prompt}{response}</s>"
    assert out.loss_mask[-1] and not out.loss_mask[0] and (np.diff(out.loss_mask.astype(int)) >= 0).all()
    if not counts.noted:
        assert scored(out, bpe) == response + "</s>"


def test_documents_are_scored_but_for_their_first_token(bpe: Any) -> None:
    out, _ = conversation("", "doc")
    assert out is not None and out.tokens.tolist() == [*b"doc", END_OF_TEXT]
    assert out.loss_mask.tolist() == [False, True, True, True]
    out, _ = conversation("", "doc", bpe, pick_template(bpe))  # with a BOS the first word is scored too
    assert out is not None and scored(out, bpe) == "doc</s>" and out.tokens[0] == bpe.bos_token_id


# Shared prompts


@given(talks, st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_every_branch_is_the_conversation_alone(bpe: Any, talk: list[str], answers: list[str]) -> None:
    for tok, template in ((BYTES, CHATML), (bpe, pick_template(bpe))):
        out, counts = responses(messages(*talk), answers, tok, template)
        assert out is not None and not counts.dropped
        assert out.branches.tolist() == sorted(out.branches.tolist()) and set(out.branches) == set(
            range(len(answers) + 1)
        )
        assert np.array_equal(out.loss_mask, out.branches > 0)
        for k, answer in enumerate(answers, start=1):
            alone, _ = conversation(messages(*talk), answer, tok, template, assistant_turns="last")
            assert alone is not None and branch(out, 0) + branch(out, k) == alone.tokens.tolist()
            assert branch(out, k) == alone.tokens[alone.loss_mask].tolist()


def test_straddling_token_moves_the_shared_boundary(letters: Callable[..., Any]) -> None:
    """Prompt "a:" with answers " b" and "x": the token ": " crosses the boundary, so "a" alone is shared."""
    tok = letters((":", " "))
    template = pick_template(tok)
    out, counts = responses("a:", [" b", "x"], tok, template)
    assert out is not None and counts.noted == {"boundary_token": 1}
    assert [tok.convert_ids_to_tokens(branch(out, k)) for k in range(3)] == [
        ["a"],
        [": ", "b", "</s>"],
        [":", "x", "</s>"],
    ]
    out, counts = responses("a:", [" b", " c"], tok, template)  # crossing in both
    assert out is not None and counts.noted == {"boundary_token": 1} and chat.decode(branch(out, 0), tok) == "a"
    alone, counts = conversation("a:", " b", tok, template)
    assert alone is not None and counts.noted == {"boundary_token": 1} and scored(alone, tok) == ": b</s>"
    out, counts = responses("a:", ["b", "x"], tok, template)
    assert out is not None and not counts.noted and chat.decode(branch(out, 0), tok) == "a:"


def test_prompts_whose_tokens_differ_further_back_are_dropped(letters: Callable[..., Any]) -> None:
    """ "ab" + "c" is a|bc, but "ab" + "x" is ab|x: before the earliest boundary the tokens are a and ab."""
    tok = letters(("b", "c"), ("a", "b"))
    out, counts = responses("ab", ["c", "x"], tok, pick_template(tok))
    assert out is None and counts.dropped == {"prompt_tokens_differ": 1}


# Truncation


@given(talks, texts, st.integers(2, 90), st.sampled_from(chat.TRUNCATION), st.sampled_from(chat.TURNS))
@settings(max_examples=150, deadline=None)
def test_truncated_conversations(talk: list[str], response: str, room: int, truncation: str, turns: str) -> None:
    prompt = messages(*talk)
    whole, _ = conversation(prompt, response, assistant_turns=turns)
    out, counts = conversation(prompt, response, max_length=room, truncation=truncation, assistant_turns=turns)
    assert whole is not None and (out is not None) + counts.dropped.total() == 1
    if len(whole.tokens) <= room:
        assert out is not None and np.array_equal(out.tokens, whole.tokens) and not counts.noted
        return
    if out is None:
        assert counts.dropped == {"prompt_too_long": 1}
        return
    assert len(out.tokens) <= room and out.loss_mask[-1] and counts.noted
    if truncation == "response_end":
        assert np.array_equal(out.tokens, whole.tokens[: len(out.tokens)])
        assert np.array_equal(out.loss_mask, whole.loss_mask[: len(out.tokens)])
        assert counts.noted == {"truncated_response": 1}
        assert not whole.loss_mask[len(out.tokens) : room].any()  # nothing scored was lost that had room


@given(talks, st.integers(2, 90), st.sampled_from(chat.TRUNCATION))
@settings(max_examples=100, deadline=None)
def test_truncated_prompts(talk: list[str], room: int, truncation: str) -> None:
    prompt, counts = messages(*talk), Counts()
    whole = chat.prompt_ids(prompt, BYTES, CHATML)
    out = chat.render_prompt(prompt, BYTES, CHATML, max_length=room, truncation=truncation, counts=counts, where="x")
    last = chat.prompt_ids(prompt[-1:], BYTES, CHATML)
    fits = len(whole if truncation == "response_end" else last) <= room
    assert (out is not None) == fits and counts.dropped == ({} if fits else {"prompt_too_long": 1})
    if out is None:
        return
    assert len(out.tokens) <= room and not out.loss_mask.any() and not out.branches.any()
    assert list(out.tokens) == whole[len(whole) - len(out.tokens) :] and list(out.tokens[-len(last) :]) == last
    assert counts.noted == ({"truncated_turns": 1} if len(out.tokens) < len(whole) else {})


@given(st.lists(texts, min_size=2, max_size=4), texts, texts, st.integers(2, 90), st.sampled_from(chat.TRUNCATION))
@settings(max_examples=120, deadline=None)
def test_truncated_pairs(talk: list[str], chosen: str, rejected: str, room: int, truncation: str) -> None:
    prompt = messages(*talk[: len(talk) - (len(talk) + 1) % 2])
    whole, _ = responses(prompt, [chosen, rejected])
    out, counts = responses(prompt, [chosen, rejected], max_length=room, truncation=truncation)
    assert whole is not None and (out is not None) + counts.dropped.total() == 1
    if out is None:
        assert counts.dropped == {"prompt_too_long": 1}
        return
    for k in (1, 2):
        assert 0 < len(branch(out, k)) <= room - len(branch(out, 0))
        assert branch(out, k) == branch(whole, k)[: len(branch(out, k))]
        if len(branch(out, k)) < len(branch(whole, k)):
            assert "truncated_response" in counts.noted and len(branch(out, 0)) + len(branch(out, k)) == room
    assert branch(whole, 0)[-len(b"assistant\n") :] == branch(out, 0)[-len(b"assistant\n") :]
    assert ("truncated_turns" in counts.noted) == (len(branch(out, 0)) < len(branch(whole, 0)))


@pytest.mark.parametrize("system", [None, "S"])
def test_oldest_turns_go_first_and_no_more_than_needed(system: str | None) -> None:
    talk = [f"{role}{i}" for i in range(5) for role in ("q", "a")][:-1]
    sizes = []
    for dropped in range(5):
        kept = messages(*talk[2 * dropped :], system=system)
        expected, _ = conversation(kept, "last")
        assert expected is not None
        sizes.append(len(expected.tokens))
        out, counts = conversation(
            messages(*talk, system=system), "last", max_length=sizes[-1], truncation="oldest_turns"
        )
        assert out is not None and np.array_equal(out.tokens, expected.tokens)
        assert counts.noted == ({"truncated_turns": 1} if dropped else {})
        pair, _ = responses(kept, ["last", "x"])
        cut, counts = responses(
            messages(*talk, system=system), ["x", "last"], max_length=sizes[-1], truncation="oldest_turns"
        )
        assert pair is not None and cut is not None and branch(cut, 0) == branch(pair, 0)
        assert not counts.noted["truncated_response"]
    out, counts = conversation(
        messages(*talk, system=system), "last", max_length=sizes[-1] - 1, truncation="oldest_turns"
    )
    assert out is not None and scored(out) == "last"
    assert counts.noted == {"truncated_turns": 1, "truncated_response": 1}


# Dispatch and arguments


def test_render_dispatches_by_kind() -> None:
    counts = Counts()
    example = Example("f:3", messages("Hi"), ("yes", "no"))
    pair = chat.render(example, "preference", BYTES, CHATML, max_length=LONG, counts=counts)
    single = chat.render(example, "sft", BYTES, CHATML, max_length=LONG, counts=counts)
    document = chat.render(Example("f:4", "", ("doc",)), "text", BYTES, CHATML, max_length=LONG, counts=counts)
    assert pair is not None and set(pair.branches) == {0, 1, 2}
    assert single is not None and scored(single) == "yes<|im_end|>"
    assert document is not None and scored(document) == "oc<|endoftext|>" and counts == Counts()
    with pytest.raises(UserError, match="did you mean 'preference'"):
        chat.render(example, "preferences", BYTES, CHATML, max_length=LONG, counts=counts)
    with pytest.raises(UserError, match="f:3: expected two responses, found 1"):
        chat.render(example._replace(responses=("a",)), "preference", BYTES, CHATML, max_length=LONG, counts=counts)


def test_pairs_that_truncation_makes_equal_are_dropped() -> None:
    example = Example("f:3", messages("Hi"), ("same beginning, one end", "same beginning, other end"))
    counts = Counts()
    whole = chat.render(example, "preference", BYTES, CHATML, max_length=LONG, counts=counts)
    assert whole is not None and counts == Counts()
    room = int((whole.branches == 0).sum()) + 10
    assert chat.render(example, "preference", BYTES, CHATML, max_length=room, counts=counts) is None
    assert counts.dropped == {"equal_responses": 1} and not counts.noted


def test_wrong_arguments() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_length": 1}, "max_length=1"),
        ({"truncation": "oldest"}, "did you mean 'oldest_turns'"),
        ({"assistant_turns": "lst"}, "did you mean 'last'"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            conversation(messages("a"), "b", **options)
    for number in (0, 128):
        with pytest.raises(UserError, match=f"x: {number} responses"):
            responses(messages("a"), ["b"] * number)


@given(st.lists(st.tuples(talks, st.text(max_size=6) | st.just("<|im_end|>"), st.text(max_size=6)), max_size=6))
@settings(max_examples=40, deadline=None)
def test_counts_add_up(rows: list[tuple[list[str], str, str]]) -> None:
    for kind in ("sft", "preference"):
        counts = Counts()
        examples = [Example(str(i), messages(*talk), (a, b)) for i, (talk, a, b) in enumerate(rows)]
        out = [chat.render(e, kind, BYTES, CHATML, max_length=60, counts=counts) for e in examples]
        assert len(rows) == sum(r is not None for r in out) + counts.dropped.total()
        assert set(counts.first.values()) <= {e.id for e in examples}
