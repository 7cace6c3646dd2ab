"""A judge that is a causal language model on our own devices: p(label) from the log-probs of its answers.

All answers to a prompt are branches of one packed document, so that a prompt is read once. Where answers are letters of
options, every exchange is asked in all rotations of an order of the options, so that each label has each letter once,
and the probabilities are averaged.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vdjax import runs, sharding
from vdjax.data import chat, packing, tokenizer
from vdjax.data.chat import Rendered
from vdjax.data.examples import Counts, Dropped
from vdjax.errors import UserError
from vdjax.files import absolute, as_path
from vdjax.judges.prompts import JudgeTemplate, answers, prompt_text, quote, read_template
from vdjax.judges.verdicts import LABELS, Exchange, Judge, Verdicts
from vdjax.language_model import identity, open_model
from vdjax.models import hf
from vdjax.models.functional import Model
from vdjax.models.log_probs import sequence_sums, token_log_probs
from vdjax.models.products import jit
from vdjax.progress import progress_over, say

CUT = " [...] "  # stands where the middle of a long response was


class Reader(NamedTuple):
    """What turns an exchange into tokens; made by `make_reader`."""

    tokenizer: Any
    template: chat.Template
    asked: JudgeTemplate
    max_length: int
    answers: tuple[tuple[int, ...], ...]  # the tokens of what the judge may answer, behind any prompt


def make_reader(tokenizer: Any, template: chat.Template, asked: JudgeTemplate, max_length: int) -> Reader:
    """Finds the answers' tokens.

    Raises:
      UserError: one answer's tokens begin another's, so that the two would not exclude each other; or the prompt ends
        within a token of the answer.
    """
    reader = Reader(tokenizer, template, asked, max_length, ())
    prompt = _prompt(asked, Exchange("a", "b", "c"), range(len(asked.labels)))
    out = chat.render_responses(prompt, answers(asked), tokenizer, template, max_length=2**31 - 1, counts=Counts())
    if out is None or out.tokens[out.branches == 0].tolist() != chat.prompt_ids(prompt, tokenizer, template):
        raise UserError(f"judge template {asked.name}: the prompt must end where an answer's first token begins")
    # The stop behind an answer is left out: it says nothing about the stance.
    found = [tuple(out.tokens[out.branches == b].tolist()[:-1]) for b in range(1, len(asked.labels) + 1)]
    for one, other in itertools.permutations(range(len(found)), 2):
        if found[other][: len(found[one])] == found[one]:
            texts = answers(asked)
            raise UserError(f"judge template {asked.name}: {texts[one]!r} begins {texts[other]!r}, token by token")
    return reader._replace(answers=tuple(found))


def open_local(name: str, fields: ConfigDict, mesh: jax.sharding.Mesh) -> Judge:
    """Loads a judge's model onto `mesh`, once.

    Args:
      fields: a judge of kind "local" (`vdjax.config.judge`); its path is a Hugging Face directory or hub id, or one of
        our snapshots WORKDIR/STAGE/snapshots/STEP.

    Raises:
      UserError: no such model or template, or one whose answers the tokenizer cannot tell apart.
    """
    check_local(name, fields)
    overrides = [f"--config.mesh.{axis}={mesh.shape[axis]}" for axis in ("data", "fsdp", "context", "tensor")]
    if fields.revision:
        overrides.append(f"--config.model.revision={fields.revision}")
    opened = open_model(fields.path, "auto", overrides)
    reader = make_reader(opened.tokenizer, opened.template, read_template(fields.template), fields.max_length)
    with jax.set_mesh(mesh):
        parts = identity(opened) | {"template": reader.asked.source, "max_length": fields.max_length}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return judge_of(name, digest, opened.model, opened.params, reader, mesh, fields.rows)


def check_fits(asked: str, tokenizer: Any, template: chat.Template) -> None:
    """UserError where a model with this tokenizer and chat template cannot be asked by a judge's template."""
    make_reader(tokenizer, template, read_template(asked), 2**31 - 1)


def check_local(name: str, fields: ConfigDict) -> None:
    """UserError where `open_local` would find no model or template, or two that do not fit; loads no weights."""
    if not fields.path:
        raise UserError(f"config.judges.{name}.path is empty; it is the directory, hub id or snapshot of a model")
    template = read_template(fields.template)
    if fields.repeats > 1 and not template.letters:
        raise UserError(f"config.judges.{name}.repeats={fields.repeats}: {template.name} shows no options to reorder")
    if absolute(as_path(fields.path)).parent.name == "snapshots":
        directory = runs.locate(as_path(fields.path))[2] / "model"
    else:
        directory = hf.resolve(fields.path, fields.revision or None)
        hf.read_config(directory)
    tok = tokenizer.load(directory)
    check_fits(fields.template, tok, chat.pick_template(tok))


def judge_of(
    name: str, digest: str, model: Model, params: Any, reader: Reader, mesh: jax.sharding.Mesh, rows: int = 0
) -> Judge:
    """A judge from a loaded model. `rows`: prompts a call; 0: four for each batch shard."""
    shards = sharding.batch_shards(mesh)
    rows = -(-(rows or 4 * shards) // shards) * shards
    score = scorer(model, mesh)

    def judge(exchanges: Sequence[Exchange], repeat: int = 0) -> Verdicts:
        counts = Counts()
        orders = label_orders(reader.asked, repeat)
        rendered = [
            render(safe, order, reader, counts, f"exchange {i}")
            for i, safe in enumerate(harmless(exchange, reader, counts, i) for i, exchange in enumerate(exchanges))
            for order in orders
        ]
        if counts.noted:
            say("\n".join([f"judge {name}:", *counts.lines()[1:]]))
        if not rendered:
            return Verdicts(np.zeros((0, len(LABELS))), np.zeros(0))
        sums = label_log_probs(score, params, rendered, rows, len(reader.asked.labels), mesh, name)
        return verdicts(sums.reshape(len(exchanges), len(orders), -1), orders, reader.asked)

    return Judge(name, digest, judge)


def label_orders(asked: JudgeTemplate, repeat: int) -> list[list[int]]:
    """Orders of the labels: all rotations of the template's own or, of another repeat than 0, of a seeded one."""
    count = len(asked.labels)
    if not asked.letters:
        return [list(range(count))]
    base = np.random.default_rng(repeat).permutation(count) if repeat else np.arange(count)
    return [np.roll(base, -shift).tolist() for shift in range(count)]


def harmless(exchange: Exchange, reader: Reader, counts: Counts, index: int) -> Exchange:
    """The exchange as it may stand in a prompt: quoted, the text of special tokens taken apart (and this noted)."""
    quoted = Exchange(*map(quote, exchange))
    safe = Exchange(*(without_special(text, reader.template) for text in quoted))
    if safe != quoted:
        counts.note("special_token_in_text", f"exchange {index}")
    return safe


def render(exchange: Exchange, order: Sequence[int], reader: Reader, counts: Counts, where: str) -> Rendered:
    """The prompt (branch 0) and each answer (branch 1, 2, ...) about a harmless exchange.

    A response that does not fit loses its middle (noted 'truncated_middle').

    Raises:
      UserError: it does not fit without any response, or the chat template refuses it.
    """
    response, room = exchange.response, reader.max_length - max(map(len, reader.answers))

    def ids(kept: int) -> list[int]:
        """Of the prompt with so many characters of the response."""
        shown = response
        if kept < len(response):
            shown = response[: -(-kept // 2)] + CUT + response[len(response) - kept // 2 :]
        prompt = _prompt(reader.asked, exchange._replace(response=shown), order)
        try:
            return chat.prompt_ids(prompt, reader.tokenizer, reader.template)
        except Dropped as dropped:
            raise UserError(f"judge template {reader.asked.name}: {where} cannot be asked: {dropped}") from dropped

    prompt = ids(len(response))
    if len(prompt) > room:
        # The first number of characters with which it is too long; without any it may be so already.
        too_many = bisect.bisect_left(range(len(response)), True, key=lambda kept: len(ids(kept)) > room)
        if not too_many:
            raise UserError(f"judge: {where} does not fit max_length={reader.max_length} even without its response")
        prompt = ids(too_many - 1)
        counts.note("truncated_middle", where)
    parts = [prompt, *reader.answers]
    branches = np.repeat(np.arange(len(parts), dtype=np.int8), [len(part) for part in parts])
    return Rendered(np.concatenate([np.array(part, np.int32) for part in parts]), branches > 0, branches)


def _prompt(asked: JudgeTemplate, exchange: Exchange, order: Sequence[int]) -> chat.Prompt:
    text = prompt_text(asked, exchange, order)
    return [{"role": "user", "content": text}] if asked.chat else text


def without_special(text: str, template: chat.Template) -> str:
    """The text with a space within what would be read as a special token, so that nothing can forge a turn."""
    while found := template.forbidden.search(text):
        apart = found[0][0] + " " + found[0][1:] if len(found[0]) > 1 else "?"
        text = text[: found.start()] + apart + text[found.end() :]
    return text


def scorer(model: Model, mesh: jax.sharding.Mesh) -> Callable[[Any, dict[str, Array], int], Array]:
    """`score(params, batch, sequences)`: log-probs of every sequence of a packed batch, [rows, sequences]."""

    def score(params: Any, batch: dict[str, Array], sequences: int) -> Float[Array, "rows sequences"]:
        module = nnx.merge(model.graphdef, params)
        log_probs = token_log_probs(module, batch, chunk=model.head_chunk)
        return sequence_sums(log_probs, batch["sequence_ids"], sequences)

    return jit(score, static_argnums=2)


def label_log_probs(
    score: Callable[[Any, dict[str, Array], int], Array],
    params: Any,
    rendered: Sequence[Rendered],
    rows: int,
    labels: int,
    mesh: jax.sharding.Mesh,
    name: str,
) -> Float[np.ndarray, "prompts labels"]:
    """Summed log-probs of each prompt's answers, in nats."""
    sizes = [len(r.tokens) for r in rendered]
    length = packing.row_lengths(max(sizes))[0]
    # Every row has room for the most prompts that could stand in it, so that one program serves most calls.
    sequences = labels * max(1, length // max(64, min(sizes)))
    most = sequences // labels
    packed = [row[i : i + most] for row in packing.best_fit(sizes, length) for i in range(0, len(row), most)]
    shape = packing.Shape(rows, length, sequences)
    out = np.zeros((len(rendered), labels))
    starts = range(0, len(packed), rows)
    with jax.set_mesh(mesh):
        for start in progress_over(starts, len(starts), f"judge {name}"):
            part = packed[start : start + rows]
            batch = packing.pack(rendered, part, shape)
            batch.pop("source")
            arrays = {k: sharding.put_global(v, sharding.rows_sharding(mesh, 2)) for k, v in batch.items()}
            sums = sharding.fetch(score(params, arrays, sequences))
            for r, row in enumerate(part):
                out[row] = sums[r, : len(row) * labels].reshape(len(row), labels)
    return out


def verdicts(
    log_probs: Float[np.ndarray, "exchanges orders answers"], orders: Sequence[Sequence[int]], asked: JudgeTemplate
) -> Verdicts:
    """The softmax over the answers, brought back to the labels and averaged over the orders.

    The graded stance is the mean of the labels' grades under p, given one of the labels that have a grade; NaN where
    these have less than half of p: a refusal's traces of a stance are none.
    """
    odds = np.exp(log_probs - log_probs.max(axis=-1, keepdims=True))
    by_answer = odds / odds.sum(axis=-1, keepdims=True)
    by_label = np.zeros_like(by_answer)
    for o, order in enumerate(orders):
        by_label[:, o, order] = by_answer[:, o]
    p = by_label.mean(axis=1)
    grades = np.array([np.nan if x.graded is None else x.graded for x in asked.labels])
    graded = np.isfinite(grades)
    mass = p[:, graded].sum(axis=1)
    mean = np.divide(p[:, graded] @ grades[graded], mass, out=np.full(len(p), np.nan), where=mass >= 0.5)
    places = np.array([LABELS.index(x.label) for x in asked.labels])
    return Verdicts(p @ np.eye(len(LABELS))[places], mean)
