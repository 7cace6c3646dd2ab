"""python -m vdjax.sample: files of prompts, talk on standard input, and what it refuses."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny
from test_commands import run

from vdjax import export, runs, sample
from vdjax.data import chat, tokenizer
from vdjax.data.examples import Counts, Dropped
from vdjax.sampling import Sampling, generate
from vdjax.sampling.text import response_text, text_pieces

TOK = tokenizer.byte_level()
TEMPLATE = chat.pick_template(TOK)
NOTHING: Any = None  # in place of what is not reached
MESSAGES = [{"role": "user", "content": "Hi. Ünïcödé?"}]


@pytest.fixture(scope="module")
def directory(finished: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last SFT snapshot as a Hugging Face directory."""
    out = tmp_path_factory.mktemp("exported") / "model"
    export.export(finished[0] / "sft" / "snapshots" / "6", out)
    return out


@pytest.mark.parametrize("name", ["auto", "plain"])
@pytest.mark.parametrize("prompt", [MESSAGES, [{"role": "system", "content": "Be."}, *MESSAGES], "Once upon"])
def test_a_prompt_is_what_precedes_a_response_in_training(prompt: Any, name: str) -> None:
    template = chat.pick_template(TOK, name)
    rendered = chat.render_responses(prompt, ["Yes", "no."], TOK, template, max_length=500, counts=Counts())
    assert rendered
    assert chat.prompt_ids(prompt, TOK, template) == rendered.tokens[rendered.branches == 0].tolist()


def test_prompts_that_would_forge_a_turn_or_are_empty_are_dropped() -> None:
    for prompt, reason in (
        ("a<|im_end|>b", "special_token_in_text"),
        ([{"role": "user", "content": "<|im_start|>"}], "special_token_in_text"),
        ("", "empty_prompt"),
        ([], "empty_prompt"),
    ):
        with pytest.raises(Dropped, match=reason):
            chat.prompt_ids(prompt, TOK, TEMPLATE)


def test_text_comes_without_stop_tokens_and_in_whole_characters() -> None:
    text = "é日本🙂!"
    ids = [*TOK.encode(text), TOK.convert_tokens_to_ids("<|im_end|>")]
    assert response_text(ids, TOK, TEMPLATE) == text
    pieces = list(text_pieces(iter(ids), TOK, TEMPLATE))
    assert [piece for piece in pieces if piece] == list(text)
    cut_short = "".join(text_pieces(iter(ids[:4]), TOK, TEMPLATE))
    assert cut_short == "é\N{REPLACEMENT CHARACTER}"


def test_a_file_of_prompts_gets_responses(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": 7, "prompt": "Is tea good?"}, {"messages": MESSAGES, "other": {"a": "é"}}, {"prompt": "x" * 40}]
    asked, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    arguments = ["--model", str(directory), "--prompts", str(asked), "--out", str(out), "--max_new_tokens", "9"]
    assert run(sample, monkeypatch, *arguments, "--temperature", "0.8", "--seed", "3", "--top_p", "0.9") == 0
    got = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in sample.ADDED} for row in got] == rows
    opened = sample.open_model(str(directory), "auto", [])
    prompts = [chat.prompt_ids(row.get("prompt") or row["messages"], opened.tokenizer, opened.template) for row in rows]
    how, seeds = Sampling(9, 0.8, 0.9), [(3, 0), (3, 1), (3, 2)]
    with jax.set_mesh(opened.mesh):
        want = generate(opened.model, opened.params, prompts, seeds, how, opened.template.stop_ids, opened.mesh)
    for i, row in enumerate(got):
        assert row["response"] == response_text(want.tokens[i, : want.lengths[i]], opened.tokenizer, opened.template)
        assert (row["tokens"], row["finish_reason"]) == (want.lengths[i], "stop" if want.stopped[i] else "length")
    first = out.read_bytes()
    assert run(sample, monkeypatch, *arguments, "--temperature", "0.8", "--seed", "3", "--top_p", "0.9") == 0
    assert out.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == ["in.jsonl", "out.jsonl"]
    assert run(sample, monkeypatch, *arguments, "--temperature", "0.8", "--seed", "4", "--top_p", "0.9") == 0
    assert out.read_bytes() != first


def test_a_snapshot_answers_as_its_export(
    directory: Path, finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "in.jsonl"
    asked.write_text(json.dumps({"messages": MESSAGES}))
    for i, model in enumerate((directory, finished[0] / "sft" / "snapshots" / "6")):
        flags = ["--model", str(model), "--prompts", str(asked), "--out", str(tmp_path / str(i))]
        assert run(sample, monkeypatch, *flags, "--max_new_tokens", "9") == 0
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


def test_it_talks_on_standard_input_and_keeps_the_conversation(directory: Path) -> None:
    flags = ["--model", str(directory), "--temperature", "0", "--max_new_tokens", "12"]
    result = subprocess.run(
        [sys.executable, "-m", "vdjax.sample", *flags], input="Is tea good?\nAnd <|im_end|>?\nAnd rain?\n\nunread\n",
        env=tiny.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "special token" in result.stderr
    opened = sample.open_model(str(directory), "auto", [])
    messages: list[Any] = []
    answers = ""
    with jax.set_mesh(opened.mesh):
        for question in ("Is tea good?", "And rain?"):
            messages.append({"role": "user", "content": question})
            prompt = chat.prompt_ids(messages, opened.tokenizer, opened.template)
            how, stops = Sampling(12, 0.0), opened.template.stop_ids
            out = generate(opened.model, opened.params, [prompt], [0], how, stops, opened.mesh)
            text = response_text(out.tokens[0, : out.lengths[0]], opened.tokenizer, opened.template)
            answers += text + "\n"
            messages.append({"role": "assistant", "content": text})
    assert result.stdout == answers


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[list[int]] = []

    def streamer(*_: Any) -> Any:
        def stream(prompt: list[int], seed: tuple[int, ...]) -> Iterator[int]:
            asked.append(prompt)
            yield from b"ab"
            raise KeyboardInterrupt(*(["terminated"] if len(asked) == 3 else []))

        return stream

    monkeypatch.setattr(sample, "streamer", streamer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nthree\nfour\n"))
    opened = sample.LanguageModel(NOTHING, NOTHING, TOK, TEMPLATE, NOTHING)
    with pytest.raises(KeyboardInterrupt, match="terminated"):
        sample.talk(opened, Sampling(5), 0)
    assert capsys.readouterr().out.startswith("ab\nab\n")
    assert "ab<|im_end|>" in chat.decode(asked[1], TOK) and len(asked) == 3


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "is no JSON"),
        ("[]", "expected an object"),
        ('{"text": "a"}', "found 'text'"),
        ('{"prompt": "a", "messages": []}', "found both"),
        ('{"prompt": 3}', "prompt must be text"),
        ('{"prompt": "a", "response": "b"}', "already has the field 'response'"),
        ('{"messages": []}', "must be a list"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] must have"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "did you mean 'user'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "must be the user's"),
        ('{"prompt": "\\ud83d"}', "no Unicode"),
        ('{"prompt": "<|im_end|>"}', "special token"),
        ('{"prompt": ""}', "empty"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(line: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "good"}\n\n' + line)
    opened = sample.LanguageModel(NOTHING, NOTHING, TOK, TEMPLATE, NOTHING)
    with pytest.raises(sample.UserError, match=text) as error:
        sample.read_prompts(file, opened)
    assert f"{file}:3: " in str(error.value)


def test_wrong_flags_are_refused(
    directory: Path, finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "empty").write_text("\n")
    both = ["--prompts", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]
    snapshot = str(finished[0] / "sft" / "snapshots" / "6")
    for flags, text in (
        (["--model", str(directory), "--prompts", "x"], "go together"),
        (["--model", str(directory), "--temperature", "-1"], "temperature is -1.0"),
        (["--model", str(directory), "--seed", "-1"], "--seed -1"),
        (["--model", str(directory), *both], "holds no rows"),
        (["--model", str(directory), *both[:2], "--out", str(tmp_path / "no" / "out")], "no such directory"),
        (["--model", str(directory), "--prompts", str(tmp_path / "no"), *both[2:]], "cannot be read"),
        (["--model", str(tmp_path / "none"), *both], "no such directory"),
        (["--model", snapshot, *both, "--config.model.path=x"], "only --config.mesh"),
        (["--model", str(directory), *both, "--chat_template", "chatmll"], "did you mean 'chatml'"),
    ):
        assert run(sample, monkeypatch, *flags) == 2
        assert text in capsys.readouterr().err


def test_a_reward_model_is_refused(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(runs, "stage_head", lambda config, name: "score")
    monkeypatch.setattr(runs, "open_snapshot", lambda *_: runs.Opened({}, "rm", *[None] * 3))
    assert run(sample, monkeypatch, "--model", str(finished[0] / "sft" / "snapshots" / "6")) == 2
    assert "trains a reward model" in capsys.readouterr().err


def test_a_model_that_can_think_is_told_not_to_unless_a_flag_says_so(
    directory: Path, finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A directory and a snapshot alike, by `--config.tokenizer.template_options`."""
    file = tmp_path / "thinking.jinja"
    file.write_text(TEMPLATE.text + "{% if enable_thinking is defined and enable_thinking is false %}[]{% endif %}")
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    on = "--config.tokenizer.template_options.enable_thinking=True"
    for model in (directory, finished[0] / "sft" / "snapshots" / "6"):
        for flags, end in (([], "[]"), ([on], "\n")):
            opened = sample.open_model(str(model), str(file), flags)
            [tokens] = sample.read_prompts(rows, opened)[1]
            assert chat.decode(tokens, TOK).endswith(f"assistant\n{end}".replace("\n\n", "\n"))
        assert sample.open_model(str(model), "auto", [on]).template.options == {}
