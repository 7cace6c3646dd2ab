"""Synthetic preference data: python -m vdjax.synthesize --generator DIR --judge DIR --out FILE.jsonl [--prompts FILE]

For every question of a probe set, or every line {prompt, topic, proposition} of --prompts, the generator writes an
answer that supports the proposition and one that opposes it, until the judge finds the intended stances in two of
nearly the same length (vdjax.values.synthetic). A stage trains on the pairs by `data.path=FILE.jsonl` and
`data.options.align=support` or `oppose`. --generator is a Hugging Face directory or hub id, one of our snapshots, or
`api`: an OpenAI-compatible endpoint, set by --config.generator.* (base_url, model, key_env, ...). --judge is such a
model, or one of a config's judges, of any kind: --judge NAME --config FILE.py. The same command goes on where it was
interrupted.

Pairs made from --probes answer the probes' own questions. Train on them and ask the same probes, and what is measured
is in part what was learned by heart; the run then says how many examples that are. To keep them apart, give --prompts
in other words, or a --probes file with other propositions than `config.probes.path` (docs/measuring.md).
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vdjax import chat_api, hosts, runtime, sharding
from vdjax import config as configs
from vdjax.cli import run_cli
from vdjax.data import chat
from vdjax.data.examples import Dropped, Message
from vdjax.errors import UserError
from vdjax.files import as_path, is_folder, write_whole
from vdjax.judges import LABELS, Exchange, Judge, Verdicts
from vdjax.judges.open import check_judge, judge_of_flags, open_judge
from vdjax.language_model import LanguageModel, identity, open_model
from vdjax.probes import sets
from vdjax.progress import progress_over, say
from vdjax.sampling import Sampling, generate
from vdjax.sampling.generate import check
from vdjax.sampling.text import response_text
from vdjax.values import synthetic
from vdjax.values.synthetic import Asked, Generator, Said

# --config.generator.*, of --generator api
ENDPOINT: dict[str, Any] = {name: configs.JUDGES["api"][name] for name in chat_api.Endpoint._fields}


def local_generator(opened: LanguageModel, sampling: Sampling) -> Generator:
    """A generator from a loaded model; call it under `jax.set_mesh(opened.mesh)`."""
    parts = identity(opened) | {"sampling": sampling}
    if opened.template.options:
        parts |= {"template_options": dict(opened.template.options)}

    def write(asked: Sequence[Asked]) -> list[Said]:
        samples = generate(
            opened.model,
            opened.params,
            [prompt_ids(request, opened) for request in asked],
            [request.seed for request in asked],
            sampling,
            opened.template.stop_ids,
            opened.mesh,
            progress=lambda batches, total: progress_over(batches, total, "writing"),
        )
        return [
            Said(response_text(tokens[:n].tolist(), opened.tokenizer, opened.template), "stop" if stop else "length")
            for tokens, n, stop in zip(samples.tokens, samples.lengths, samples.stopped, strict=True)
        ]

    return Generator(_digest(parts), write)


def prompt_ids(asked: Asked, opened: LanguageModel) -> list[int]:
    """The request as system and user message; UserError where the chat template cannot write it."""
    messages: list[Message] = [{"role": "system", "content": asked.system}, {"role": "user", "content": asked.user}]
    try:
        said = [m for m in messages if m["content"].strip()]
        return chat.prompt_ids(said, opened.tokenizer, opened.template, sampled=True)
    except Dropped as dropped:
        raise UserError(
            f"the generator cannot be asked ({dropped}): {asked.user[:200]!r}; a template of one's own may leave "
            "`system` empty"
        ) from dropped


def api_generator(endpoint: chat_api.Endpoint, sampling: Sampling, cache: Path) -> Generator:
    """A generator behind an endpoint. What it has written once is in `cache` and not paid for again."""
    where = (endpoint.base_url.rstrip("/"), endpoint.model, *([endpoint.extra] if endpoint.extra else []))

    def write(asked: Sequence[Asked]) -> list[Said]:
        requests = [
            chat_api.Request(
                tuple((role, text) for role, text in (("system", a.system), ("user", a.user)) if text.strip()),
                sampling.temperature,
                sampling.max_new_tokens,
                seed=int(hashlib.sha256(repr(a.seed).encode()).hexdigest()[:7], 16),
            )
            for a in asked
        ]

        def said() -> list[Said]:
            replies = chat_api.ask(endpoint, requests, cache, "writing")
            return [Said(reply.text, "length" if reply.finish_reason == "length" else "stop") for reply in replies]

        return [Said(*one) for one in hosts.by_first("the answers of the endpoint", said)]

    return Generator(_digest({"endpoint": where, "sampling": sampling}), write)


def decided(judge: Judge) -> Judge:
    """The judge, to whom a response that it has no verdict on is off topic: it shows neither side's stance."""

    def judged(exchanges: Sequence[Exchange], repeat: int) -> Verdicts:
        p, graded = judge.judge(exchanges, repeat)
        unknown = np.isnan(p).any(axis=1, keepdims=True)
        return Verdicts(np.where(unknown, np.array(LABELS) == "off_topic", p), graded)

    return judge._replace(judge=judged)


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vdjax.synthesize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    settings = synthetic.Settings()
    parser.add_argument("--generator", required=True, help="a directory, hub id or snapshot; or api")
    parser.add_argument("--judge", required=True, help="a directory, hub id or snapshot; or a judge of --config")
    parser.add_argument("--config", default="", metavar="FILE.py[:ARG]", help="a config with that judge, of any kind")
    parser.add_argument("--template", default="", help="of a model as judge; default: stance-v1")
    parser.add_argument("--out", type=as_path, required=True, metavar="FILE.jsonl")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompts", type=as_path, metavar="FILE.jsonl", help="lines of prompt, topic, proposition")
    what.add_argument("--probes", default="builtin", help="a file whose questions are answered; default: builtin")
    parser.add_argument("--topics", nargs="+", default=(), help="default: all")
    parser.add_argument("--max_per_topic", type=int, default=0, help="default: all")
    parser.add_argument("--instructions", default="value-pair-v1", help="in vdjax/values/templates, or a .toml file")
    parser.add_argument("--attempts", type=int, default=settings.attempts, help="at each prompt and side")
    parser.add_argument("--max_ratio", type=float, default=settings.max_ratio, help="of the lengths of a pair")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max_new_tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=settings.seed)
    flags, overrides = parser.parse_known_args()
    check_flags(flags)
    config = configs.experiment()
    config.generator = ConfigDict(ENDPOINT)
    name, fields = judge_of_flags(config, flags.judge, flags.template, flags.config)
    own = "generator" if flags.generator == "api" else "tokenizer.template_options"
    groups = ["mesh", own, *["judges"] * bool(flags.config)]
    configs.override_only(config, overrides, *groups)
    template = synthetic.read_template(flags.instructions)
    tasks = read_tasks(flags)
    endpoint = chat_api.Endpoint(**config.generator.to_dict())
    if flags.generator == "api":
        chat_api.check(endpoint)
    sampling = Sampling(flags.max_new_tokens, flags.temperature)
    check(sampling)
    if flags.config:
        check_judge(name, fields)
    runtime.start()
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    cache = flags.out.with_name(f"{flags.out.name}.replies.sqlite")
    with jax.set_mesh(mesh):
        if flags.generator == "api":
            generator = api_generator(endpoint, sampling, cache)
        else:
            mesh_flags = [flag for flag in overrides if flag.startswith(("--config.mesh.", "--config.tokenizer."))]
            generator = local_generator(open_model(flags.generator, "auto", mesh_flags), sampling)
        judge = decided(open_judge(name, fields, mesh, flags.out.with_name(f"{flags.out.name}.calls")))
        chosen = synthetic.Settings(flags.attempts, flags.max_ratio, flags.seed)
        keep = flags.out.with_name(f"{flags.out.name}.written.jsonl")
        pairs, counts = synthetic.synthesize(tasks, generator, judge, template, chosen, keep)
    if jax.process_index():
        return
    say("\n".join(counts.lines()))
    if not flags.prompts:
        say(f"the prompts are the questions of --probes {flags.probes}: ask others of a model that is trained on these")
    write_whole(flags.out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    say(f"wrote {flags.out}: {len(pairs)} pairs from {len(tasks)} prompts")


def check_flags(flags: argparse.Namespace) -> None:
    for name, least in (("attempts", 1), ("max_ratio", 1), ("max_per_topic", 0)):
        if not getattr(flags, name) >= least:
            raise UserError(f"--{name} {getattr(flags, name)}: expected at least {least}")
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed {flags.seed}: expected at least 0 and below 2^32")
    if not is_folder(flags.out.parent):
        raise UserError(f"--out {flags.out}: no such directory: {flags.out.parent}")


def read_tasks(flags: argparse.Namespace) -> list[synthetic.Task]:
    if not flags.prompts:
        limit = flags.max_per_topic or None
        return synthetic.tasks_of(sets.load(flags.probes, topics=flags.topics or None, max_per_topic=limit))
    if flags.topics or flags.max_per_topic:
        raise UserError("--topics and --max_per_topic choose probes; of --prompts all lines are used")
    return synthetic.read_tasks(flags.prompts)


if __name__ == "__main__":
    run_cli(main)
