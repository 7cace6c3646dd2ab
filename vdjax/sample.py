"""Samples from a model: python -m vdjax.sample --model DIR [--prompts FILE.jsonl --out FILE.jsonl]

DIR is a Hugging Face directory or hub id, or a snapshot WORKDIR/STAGE/snapshots/STEP. Each line of FILE.jsonl is an
object with `prompt` (text, taken as it is) or `messages` (of `role` and `content`, the last a user's); --out gets the
same objects with `response`, `finish_reason` ("stop" or "length") and `tokens`, how many were sampled. Without
--prompts it talks in the terminal: one line a turn, Ctrl-C stops an answer, an empty line or Ctrl-D ends.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

from vdjax import runtime
from vdjax.cli import run_cli
from vdjax.data import chat
from vdjax.data.examples import Dropped, Message
from vdjax.errors import UserError, nearest
from vdjax.files import as_path, is_folder, json_objects, write_whole
from vdjax.language_model import LanguageModel, open_model
from vdjax.progress import progress_over, say
from vdjax.sampling import Sampling, generate
from vdjax.sampling.generate import check
from vdjax.sampling.stream import streamer
from vdjax.sampling.text import response_text, text_pieces

ADDED = ("response", "finish_reason", "tokens")  # fields of a row of --out
ROLES = ("system", "user", "assistant")
WHY = {
    "special_token_in_text": "it contains a special token of the tokenizer, which would forge a turn",
    "template_refuses": "the chat template refuses these messages",
    "empty_prompt": "it is empty",
}


def read_prompts(file: Path, opened: LanguageModel) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The rows of a file and the tokens of their prompts.

    Raises:
      UserError: a row that cannot be used, with file and line.
    """
    rows, prompts = [], []
    for where, row in json_objects(file, "--prompts", "prompt or messages", ADDED):
        try:
            prompt = prompt_of(row, where)
            prompts.append(chat.prompt_ids(prompt, opened.tokenizer, opened.template, sampled=True))
        except Dropped as dropped:
            raise UserError(f"{where}: the prompt cannot be used: {WHY[str(dropped)]}") from dropped
        rows.append(row)
    return rows, prompts


def prompt_of(row: dict[str, Any], where: str) -> chat.Prompt:
    """The prompt of a row; UserError with `where` when it is not as the module says."""
    if ("prompt" in row) == ("messages" in row):
        hint = "both" if "prompt" in row else f"{', '.join(map(repr, row)) or 'nothing'}"
        raise UserError(f"{where}: expected one of 'prompt' and 'messages', found {hint}")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise UserError(f"{where}: prompt must be text, found {type(row['prompt']).__name__}; or use 'messages'")
        prompt: chat.Prompt = row["prompt"]
    else:
        prompt = parse_messages(row["messages"], where)
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON's \ud83d alone gives
        raise UserError(f"{where}: holds a character that is no Unicode text: {error}") from error
    return prompt


def parse_messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{where}: messages[{i}] must have role and content, both text")
        if message["role"] not in ROLES:
            raise UserError(f"{where}: messages[{i}] has role {message['role']!r}{nearest(message['role'], ROLES)}")
    if value[-1]["role"] != "user":
        raise UserError(f"{where}: the last message must be the user's, for the assistant answers it")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def answer_file(file: Path, out: Path, opened: LanguageModel, sampling: Sampling, seed: int) -> None:
    """Writes the rows of `file` with responses to `out`, whole or not at all."""
    rows, prompts = read_prompts(file, opened)
    samples = generate(
        opened.model,
        opened.params,
        prompts,
        [(seed, i) for i in range(len(prompts))],
        sampling,
        opened.template.stop_ids,
        opened.mesh,
        progress=lambda batches, total: progress_over(batches, total, "sampling"),
    )
    if jax.process_index():
        return
    lines = []
    for row, tokens, length, stopped in zip(rows, samples.tokens, samples.lengths, samples.stopped, strict=True):
        response = response_text(tokens[:length].tolist(), opened.tokenizer, opened.template)
        reason = "stop" if stopped else "length"
        added = dict(zip(ADDED, (response, reason, int(length)), strict=True))
        lines.append(json.dumps(row | added, ensure_ascii=False) + "\n")
    write_whole(out, "".join(lines))
    say(f"wrote {out}: {len(rows)} responses, {int(samples.stopped.sum())} of them whole")


def talk(opened: LanguageModel, sampling: Sampling, seed: int) -> None:
    """A conversation, one line of standard input a turn."""
    if jax.process_count() > 1:
        raise UserError("without --prompts it talks in one terminal, but there are several processes")
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 - input() edits lines with it

        say("one line a turn; Ctrl-C stops an answer, an empty line or Ctrl-D ends")
    stream = streamer(opened.model, opened.params, sampling, opened.template.stop_ids, opened.mesh)
    messages: list[Message] = []
    for turn in range(2**32):
        try:
            line = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt) as end:
            _unless_terminated(end)
            return
        if not line:
            return
        asked: list[Message] = [*messages, {"role": "user", "content": line}]
        try:
            prompt = chat.prompt_ids(asked, opened.tokenizer, opened.template, sampled=True)
        except Dropped as dropped:
            say(f"this cannot be asked: {WHY[str(dropped)]}")
            continue
        answer = ""
        try:
            for piece in text_pieces(stream(prompt, (seed, turn)), opened.tokenizer, opened.template):
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt as stop:
            _unless_terminated(stop)
        print(flush=True)
        if answer.strip():
            messages = [*asked, {"role": "assistant", "content": answer}]


def _unless_terminated(error: BaseException) -> None:
    if "terminated" in error.args:  # SIGTERM ends the program (`vdjax.runtime.start`)
        raise error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vdjax.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="a directory, hub id or snapshot")
    parser.add_argument("--prompts", type=as_path, metavar="FILE.jsonl")
    parser.add_argument("--out", type=as_path, metavar="FILE.jsonl")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token; default 1")
    parser.add_argument("--top_p", type=float, default=1.0, help="share of probability to sample from; default 1: all")
    parser.add_argument("--top_k", type=int, default=0, help="most likely tokens to sample from; default 0: all")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat_template", default="auto", help="auto (the model's own, else plain), a name or a file")
    flags, overrides = parser.parse_known_args()
    if (flags.prompts is None) != (flags.out is None):
        raise UserError("--prompts and --out go together; without both, the model talks in the terminal")
    if flags.out and not is_folder(flags.out.parent):
        raise UserError(f"--out {flags.out}: no such directory: {flags.out.parent}")
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed {flags.seed}: expected at least 0 and below 2^32")
    sampling = Sampling(flags.max_new_tokens, flags.temperature, flags.top_p, flags.top_k)
    check(sampling)
    runtime.start()
    opened = open_model(flags.model, flags.chat_template, overrides)
    with jax.set_mesh(opened.mesh):
        if flags.prompts:
            answer_file(flags.prompts, flags.out, opened, sampling, flags.seed)
        else:
            talk(opened, sampling, flags.seed)


if __name__ == "__main__":
    run_cli(main)
