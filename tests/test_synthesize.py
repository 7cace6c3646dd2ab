"""The command that writes synthetic pairs: generators, files, and that it does the same twice."""

import dataclasses
import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fake_chat_server import Answer, completion, serve

from vdjax import chat_api, sharding, snapshots, synthesize
from vdjax.data import chat, tokenizer
from vdjax.data.examples import Counts
from vdjax.data.sources import load
from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange, Judge, Verdicts
from vdjax.language_model import LanguageModel
from vdjax.models.functional import Model
from vdjax.sampling import Sampling
from vdjax.values.synthetic import Asked, Generator, Said


@pytest.fixture(scope="module")
def opened(qwen: tuple[Model, Any]) -> LanguageModel:
    tok = tokenizer.byte_level()
    return LanguageModel(*qwen, tok, chat.pick_template(tok, "auto"), sharding.make_mesh(data=1, fsdp=-1, tensor=1))


def test_a_local_generator(opened: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "fingerprint", lambda params: "weights")
    asked = [
        Asked("Be brief.", f"Question {i}?", (0, i, 1, attempt)) for i, attempt in ((0, 2), (1, 2), (1, 2), (1, 3))
    ]
    with jax.set_mesh(opened.mesh):
        generator = synthesize.local_generator(opened, Sampling(12, 1.0))
        said = generator.write(asked)
        assert generator.write(asked[::-1]) == said[::-1]
        assert said[1] == said[2] and len(set(said)) == 3
        hashes = {synthesize.local_generator(opened, Sampling(12, t)).hash for t in (1.0, 0.9)} | {generator.hash}
    assert len(hashes) == 2
    assert {answer.finish_reason for answer in said} <= {"stop", "length"}
    assert synthesize.prompt_ids(asked[0], opened) == chat.prompt_ids(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Question 0?"}],
        opened.tokenizer,
        opened.template,
    )
    told = dataclasses.replace(
        opened.template,
        text=opened.template.text + "{% if enable_thinking is false %}At once.{% endif %}",
        options={"enable_thinking": False},
    )
    at_once = synthesize.prompt_ids(asked[0], opened._replace(template=told))
    assert chat.decode(at_once, opened.tokenizer).endswith("assistant\nAt once.")
    with jax.set_mesh(opened.mesh):
        off, on = (
            synthesize.local_generator(
                opened._replace(template=dataclasses.replace(told, options=o)), Sampling(12, 1.0)
            ).hash
            for o in (told.options, {})
        )
    assert off != on
    empty = Asked("", "Question?", (0,))
    assert synthesize.prompt_ids(empty, opened) == chat.prompt_ids(
        [{"role": "user", "content": "Question?"}], opened.tokenizer, opened.template
    )
    special = opened.tokenizer.all_special_tokens[0]
    with pytest.raises(UserError, match="special_token_in_text"):
        synthesize.prompt_ids(empty._replace(user=special), opened)


ENDPOINT = chat_api.Endpoint(**(synthesize.ENDPOINT | {"base_url": "https://host/v1", "model": "m"}))


def test_an_api_generator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[chat_api.Request] = []

    def ask(endpoint: Any, requests: Sequence[chat_api.Request], cache: Path, what: str) -> list[chat_api.Reply]:
        sent.extend(requests)
        return [chat_api.Reply(f"{r.messages[-1][1]}!", reason, None, 1, 1)
                for r, reason in zip(requests, ("stop", "length", "content_filter"), strict=False)]  # fmt: skip

    monkeypatch.setattr(chat_api, "ask", ask)
    generator = synthesize.api_generator(ENDPOINT, Sampling(50, 0.7), tmp_path / "cache")
    asked = [Asked("s", "a", (0, 1)), Asked("", "b", (0, 1)), Asked("s", "c", (0, 2))]
    said = generator.write(asked)
    assert [tuple(answer) for answer in said] == [("a!", "stop"), ("b!", "length"), ("c!", "stop")]
    assert sent[0].messages == (("system", "s"), ("user", "a")) and sent[1].messages == (("user", "b"),)
    assert (sent[0].temperature, sent[0].max_tokens) == (0.7, 50)
    assert sent[0].seed == sent[1].seed != sent[2].seed
    other = synthesize.api_generator(ENDPOINT._replace(model="n"), Sampling(50, 0.7), tmp_path)
    assert other.hash != generator.hash
    cheaper = synthesize.api_generator(ENDPOINT._replace(concurrency=1, max_usd=9.0), Sampling(50, 0.7), tmp_path)
    assert cheaper.hash == generator.hash


def judge(exchanges: Sequence[Exchange], repeat: int) -> Verdicts:
    """Supports where the response has an even number of characters."""
    odd = np.array([len(e.response) % 2 for e in exchanges])
    return Verdicts(np.eye(5)[2 * odd], 1.0 - 2 * odd)


def write(asked: Sequence[Asked]) -> list[Said]:
    """Answers of 20 to 23 characters, by the seed alone."""
    return [Said("a" * (20 + zlib.crc32(repr(request.seed).encode()) % 4), "stop") for request in asked]


def test_the_command(opened: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(synthesize, "open_model", lambda *args: opened)
    monkeypatch.setattr(synthesize, "local_generator", lambda *args: Generator("generator", write))
    monkeypatch.setattr(synthesize, "open_judge", lambda *args: Judge("parity", "hash", judge))
    tasks = [{"prompt": f"Is {i} good?", "topic": "t", "proposition": f"{i} is good."} for i in range(4)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    flags = [
        "--generator",
        "x",
        "--judge",
        "y",
        "--prompts",
        str(prompts),
        "--max_new_tokens",
        "12",
        "--max_ratio",
        "9",
    ]

    def run(out: Path, *more: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["synthesize", *flags, "--out", str(out), *more])
        synthesize.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    pairs = run(tmp_path / "one.jsonl")
    assert pairs and {p["prompt"] for p in pairs} <= {t["prompt"] for t in tasks}
    assert all(len(p["support"]) % 2 == 0 and len(p["oppose"]) % 2 == 1 for p in pairs)
    run(tmp_path / "two.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert run(tmp_path / "three.jsonl", "--seed", "1") != pairs
    spec = {"kind": "preference", "path": str(tmp_path / "one.jsonl"), "align": "oppose"}
    assert [e.responses for e in load(spec, counts=Counts())] == [(p["oppose"], p["support"]) for p in pairs]
    for more, message in (
        (["--attempts", "0"], "--attempts 0: expected at least 1"),
        (["--max_ratio", "0.5"], "--max_ratio 0.5"),
        (["--topics", "t"], "--topics and --max_per_topic choose probes"),
        (["--config.seed=3"], "unknown flag"),
        (["--config.generator.model=m"], "unknown flag"),
        (["--instructions", "value-pair"], "did you mean 'value-pair-v1'"),
        (["--generator", "api"], "base_url"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "four.jsonl", *more)
    assert not (tmp_path / "four.jsonl").exists()


def test_a_judge_of_a_config_judges_the_pairs(
    opened: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An API judge to whom even answers support and odd ones oppose; nothing is paid for twice."""
    monkeypatch.setattr(synthesize, "open_model", lambda *args: opened)
    monkeypatch.setattr(synthesize, "local_generator", lambda *args: Generator("generator", write))
    monkeypatch.setattr(synthesize.runtime, "start", lambda *_: None)
    (tmp_path / "judges.py").write_text(
        "from vdjax import config as base\n\n\ndef get_config():\n    c = base.experiment()\n"
        "    c.judges.remote = base.judge('api', model='m', usd_per_million_input=0, usd_per_million_output=0)\n"
        "    return c\n"
    )
    tasks = [{"prompt": f"Is {i} good?", "topic": "t", "proposition": f"{i} is good."} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))

    def answer(body: dict[str, Any], n: int) -> Answer:
        lines = body["messages"][0]["content"].splitlines()
        wanted = ("supports", "opposes")[len(lines[lines.index("<response>") + 1]) % 2]
        letter = next(line for line in lines if f"The response {wanted}" in line)[0]
        return completion(letter, {letter: -0.1})

    def run(url: str, judge: str = "remote") -> None:
        flags = ["--generator", "x", "--judge", judge, "--config", str(tmp_path / "judges.py"), "--max_ratio", "9"]
        flags += ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
        monkeypatch.setattr(sys, "argv", ["synthesize", *flags, f"--config.judges.remote.base_url={url}"])
        synthesize.main()

    with serve(answer) as server:
        run(server.url)
        paid = len(server.seen)
        (tmp_path / "out.jsonl.written.jsonl").unlink()
        run(server.url)
        assert len(server.seen) == paid > 0
    pairs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert pairs and all(len(p["support"]) % 2 == 0 and len(p["oppose"]) % 2 == 1 for p in pairs)
    with pytest.raises(UserError, match="did you mean 'remote'"):
        run("http://127.0.0.1:1/v1", "remot")


def test_a_response_without_a_verdict_shows_no_side() -> None:
    found = Verdicts(np.array([[np.nan] * 5, [0.0, 0, 1, 0, 0]]), np.array([np.nan, -1]))
    p = synthesize.decided(Judge("n", "h", lambda exchanges, repeat: found)).judge([], 0).p
    assert [LABELS[i] for i in p.argmax(axis=1)] == ["off_topic", "oppose"]
