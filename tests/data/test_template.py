import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vdjax.data import chat, tokenizer
from vdjax.data.chat import pick_template, template_hash
from vdjax.data.examples import Counts
from vdjax.data.sources import Message
from vdjax.data.template import read_template, template_text
from vdjax.errors import UserError

TALK: list[Message] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": " Hello. "},
    {"role": "user", "content": "Bye"},
]
ENDED = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
ASKED = "{% if add_generation_prompt %}[assistant]{% endif %}"


def test_plain_is_as_documented(bpe: Any) -> None:
    template = pick_template(bpe, "auto")  # it has none of its own
    assert template.name == "plain"
    assert template_text(TALK, bpe, template, generation_prompt=True) == (
        "<s>Be brief.\n\nUser: Hi\n\nAssistant: Hello.</s>\n\nUser: Bye\n\nAssistant:"
    )


def test_bos_is_written_only_if_the_tokenizer_adds_it_by_itself(bpe: Any, letters: Callable[..., Any]) -> None:
    assert pick_template(bpe).bos_ids == (bpe.bos_token_id,)
    without = letters()
    without.bos_token = "</s>"  # named, never added: GPT-2, SmolLM2
    template = pick_template(without)
    assert template.bos_ids == () and template_text(TALK[1:], without, template).startswith("User: Hi")


def test_the_tokenizers_own_comes_first(byte_level: Any) -> None:
    template = pick_template(byte_level)
    assert template.text == byte_level.chat_template
    assert template_text(TALK[1:2], byte_level, template, generation_prompt=True) == (
        "<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert pick_template(byte_level, "chatml").text == template.text
    assert pick_template(byte_level, "plain").text != template.text


def test_stop_ids(byte_level: Any, bpe: Any, tmp_path: Path) -> None:
    end_of_text, end_of_turn = byte_level.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert pick_template(byte_level).stop_ids == (end_of_text, end_of_turn)
    assert pick_template(byte_level, "plain").stop_ids == (end_of_text,)
    bpe.save_pretrained(tmp_path)
    for value, stops in ((7, (1, 7)), ([2, 1, 9], (1, 2, 9)), (None, (1,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert pick_template(tokenizer.load(tmp_path)).stop_ids == stops
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        pick_template(tokenizer.load(tmp_path))


def test_template_from_a_file(byte_level: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(ENDED + ASKED)
    template = pick_template(byte_level, str(tmp_path / "t.jinja"))
    assert (
        template_text(TALK[1:2], byte_level, template, generation_prompt=True) == "[user] Hi\n<|endoftext|>[assistant]"
    )
    with pytest.raises(UserError, match="no such file"):
        pick_template(byte_level, str(tmp_path / "u.jinja"))
    with pytest.raises(UserError, match="did you mean 'plain'"):
        pick_template(byte_level, "plane")


def test_several_named_templates(byte_level: Any) -> None:
    many = tokenizer.byte_level()
    many.chat_template = {"tool_use": "{{ nothing.of.this }}", "default": byte_level.chat_template}
    assert pick_template(many).text == byte_level.chat_template


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENDED + "{% if add_generation_prompt %}[assistant]\n{% endif %}", "is not how the whole conversation begins"),
        ("{% for m in messages if m.role == 'user' %}[user]{{ m.content }}{% endfor %}", "leaves out the answer"),
        ("{{ messages[9].content + 1 }}", "fails on an ordinary conversation"),
        ("{{ raise_exception('no') }}", "fails on an ordinary conversation: no"),
        ("{% for m in messages %}", "fails on an ordinary conversation: .*endfor"),
        ("{{ strftime_now(format) }}" + ENDED + ASKED, "asks for the time"),
    ],
)
def test_templates_that_cannot_be_split_are_refused(byte_level: Any, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(UserError, match=message):
        pick_template(byte_level, str(tmp_path / "t.jinja"))


def test_a_turn_end_that_is_not_marked_special(letters: Callable[..., Any], tmp_path: Path) -> None:
    plain_tokens = letters()
    plain_tokens.add_tokens(["<|end|>"])
    (tmp_path / "t.jinja").write_text(ENDED.replace("{{ eos_token }}", "<|end|>") + ASKED)
    template = pick_template(plain_tokens, str(tmp_path / "t.jinja"))
    end = plain_tokens.convert_tokens_to_ids("<|end|>")
    assert template.stop_ids == tuple(sorted((end, plain_tokens.eos_token_id)))
    assert template.forbidden.search("a <|end|> b") and template.forbidden.search("</s>")


def test_two_bos_are_refused(bpe: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ bos_token }}{{ bos_token }}" + ENDED + ASKED)
    with pytest.raises(UserError, match="two BOS"):
        pick_template(bpe, str(tmp_path / "t.jinja"))


def test_tokens_and_eos_that_are_missing(bpe: Any, byte_level: Any) -> None:
    with pytest.raises(UserError, match=r"'chatml' needs the token <\|im_end\|>"):
        pick_template(bpe, "chatml")
    with pytest.raises(UserError, match=r"'llama3' needs the token <\|end_header_id\|>"):
        pick_template(byte_level, "llama3")
    endless = tokenizer.byte_level()
    endless.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        pick_template(endless)


def test_dates_are_fixed(byte_level: Any, tmp_path: Path) -> None:
    head = "{% if not date_string is defined %}{% set date_string = 'today' %}{% endif %}{{ date_string }}"
    (tmp_path / "t.jinja").write_text(head + "|{{ strftime_now('%d %B %Y') }}|" + ENDED + ASKED)
    template = pick_template(byte_level, str(tmp_path / "t.jinja"))
    assert template_text(TALK[1:2], byte_level, template).startswith("26 Jul 2024|26 July 2024|[user]")


def test_hash_depends_on_the_text(byte_level: Any) -> None:
    own, chatml, plain = (template_hash(pick_template(byte_level, name)) for name in ("auto", "chatml", "plain"))
    assert own == chatml != plain
    assert len(own) == 12 and int(own, 16)


def test_plain_template_documents_itself() -> None:
    assert read_template("plain").startswith('{#- vdjax "plain"')


THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if loop.last and m.role == "assistant" %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""  # in the form of Qwen-3's


def test_a_model_that_can_think_answers_at_once_where_it_is_sampled(byte_level: Any, tmp_path: Path) -> None:
    file = tmp_path / "thinking.jinja"
    file.write_text(THINKING)
    asked: list[Message] = [{"role": "user", "content": "Is tea good?"}]
    template = pick_template(byte_level, str(file))
    thinking = pick_template(byte_level, str(file), {"enable_thinking": True})
    plain, sampled = (
        chat.decode(chat.prompt_ids(asked, byte_level, template, sampled=sampled), byte_level)
        for sampled in (False, True)
    )
    assert plain.endswith("assistant\n") and sampled == plain + "<think>\n\n</think>\n\n"
    assert chat.decode(chat.prompt_ids(asked, byte_level, thinking, sampled=True), byte_level) == plain

    # What is trained on and scored is written as it was: the empty thought belongs to the answer.
    def rendered(template: chat.Template) -> list[list[int]]:
        both = chat.render_responses(asked, ["Yes", "No"], byte_level, template, max_length=200, counts=Counts())
        whole = chat.render_conversation(asked, "Yes", byte_level, template, max_length=200, counts=Counts())
        assert both and whole
        return [part.tolist() for part in (*both, *whole)]

    assert rendered(template) == rendered(thinking)
    assert template_hash(template) == template_hash(thinking)


def test_options_that_a_template_has_not(byte_level: Any) -> None:
    assert pick_template(byte_level).options == {}
    with pytest.raises(UserError, match="has no variable 'enable_thinkin', which tokenizer.template_options sets"):
        pick_template(byte_level, "auto", {"enable_thinkin": False})
