"""The open-ended readout: responses to every probe, sampled from every snapshot with the same random numbers.

The draws of a response depend on (config.seed, replicate, probe, variant, sample) and not on the snapshot (common
random numbers), so that snapshots that say different things differ in their parameters and not in their luck.
"""

import functools
import hashlib
import re
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from jax.sharding import Mesh

from vdjax import sharding
from vdjax.data import chat
from vdjax.data.chat import Template
from vdjax.data.examples import Dropped
from vdjax.errors import UserError
from vdjax.models import hf, lora
from vdjax.models.functional import Model
from vdjax.models.products import jit
from vdjax.probes import evaluator, readouts
from vdjax.probes.readouts import Variant
from vdjax.probes.sets import Probe
from vdjax.sampling import Samples, Sampling
from vdjax.sampling.decode import Knobs, Prompts, cache_slots, decode
from vdjax.sampling.generate import ROWS, STATIC, batches_of, bucket, check, check_rows, filtered, knobs, layout, put
from vdjax.sampling.text import response_text

ROWS_ON_CPU = 160  # prompts a call and device: with fewer, or as many of several snapshots, fewer tokens a second
SHORTEST_REPETITION = 60  # characters; "No, no, no!" is an answer
PIECE = 12  # characters
FEWEST_DISTINCT = 0.5

LIST_MARK = re.compile(r"\A\s*(\d+[.)]|[-*•])?\s*")
SENTENCE_END = re.compile(r"""[.!?…]["'’”»)\]*_]*(\s|$)|[。．｡！？؟।॥۔]|\n""")


class Prompt(NamedTuple):
    """One probe in one variant, as tokens that a response is sampled behind."""

    probe_id: str
    variant: int
    system_prompt: str
    question: str  # as asked: in the variant's template
    tokens: list[int]


def prompts(
    probes: Sequence[Probe], variants: Sequence[Variant], tokenizer: Any, template: Template, max_length: int
) -> list[Prompt]:
    """Every probe in every variant.

    Raises:
      UserError: a system prompt that the chat template does not write, or a probe of more than `max_length` tokens or
        that cannot be rendered.
    """
    readouts.check_system_prompts(variants, tokenizer, template)
    out = []
    for v, variant in enumerate(variants):
        for probe in probes:
            text = readouts.question(probe, variant)
            try:
                tokens = chat.prompt_ids(readouts.conversation(text, variant), tokenizer, template, sampled=True)
                if len(tokens) > max_length:
                    raise Dropped(f"it has {len(tokens)}")
            except Dropped as reason:
                raise UserError(
                    f"probe {probe.id}: cannot be asked within probes.max_length={max_length} tokens: {reason}"
                ) from reason
            out.append(Prompt(probe.id, v, variant.system_prompt, text, tokens))
    return out


def asked_hash(
    asked: Sequence[Prompt], template: Template, sampling: Sampling, *, samples: int, replicates: int, seed: int
) -> str:
    """Hash of everything that responses are asked for and sampled with."""
    how = (chat.template_hash(template), template.stop_ids, tuple(sampling), samples, replicates, seed)
    return hashlib.sha256(repr((how, [tuple(prompt) for prompt in asked])).encode()).hexdigest()[:12]


def sample(
    model: Model,
    readers: Sequence[hf.Reader],
    steps: Sequence[int],
    asked: Sequence[Prompt],
    sampling: Sampling,
    tokenizer: Any,
    template: Template,
    mesh: Mesh,
    *,
    stage: str,
    seed: int,
    samples: int,
    replicates: int = 1,
    replicated: Collection[int] = (),
    base: Any = None,
    rows: int = 0,
    memory_bytes: float = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda batches, total: batches,
) -> pd.DataFrame:
    """Responses of all snapshots of a stage, one row each, in the order of steps, replicates, prompts and samples.

    Args:
      readers, steps: of each snapshot.
      samples: responses to a prompt; its numbers are 0, 1, ...
      replicates: 2 or more sample the snapshots of the steps `replicated` so often in all, each with seeds of its own.
      base, rows, memory_bytes, progress: as in `generate`.

    Returns:
      stage, step, probe_id, variant, replicate, sample, seed (its numbers joined by "."), question, system_prompt,
      response, tokens (sampled, the stop token among them), finish_reason (stop or length), degenerate (`degenerate`),
      template_hash, asked_hash.

    Raises:
      UserError: no sample or replicate is asked for, or what `generate` raises.
    """
    for name, number in (("samples", samples), ("replicates", replicates)):
        if number < 1:
            raise UserError(f"probes.{name} is {number}; expected at least 1")
    again = [i for i, step in enumerate(steps) if step in replicated]
    parts = [(list(range(len(readers))), [0]), (again, list(range(1, replicates)))]
    found: list[tuple] = []
    for which, numbers in (part for part in parts if all(part)):
        keys = [(r, prompt, s) for r in numbers for prompt in asked for s in range(samples)]
        seeds = [(seed, r, zlib.crc32(prompt.probe_id.encode()), prompt.variant, s) for r, prompt, s in keys]
        out = generate(
            model,
            [readers[i] for i in which],
            [prompt.tokens for _, prompt, _ in keys],
            seeds,
            sampling,
            template.stop_ids,
            mesh,
            base=base,
            rows=rows,
            memory_bytes=memory_bytes,
            progress=progress,
        )
        for place, snapshot in enumerate(which):
            for i, ((replicate, prompt, number), numbers_of) in enumerate(zip(keys, seeds, strict=True)):
                length = int(out.lengths[place, i])
                text = response_text(out.tokens[place, i, :length], tokenizer, template)
                reason = "stop" if out.stopped[place, i] else "length"
                key = (steps[snapshot], prompt.probe_id, prompt.variant, replicate, number)
                words = (".".join(map(str, numbers_of)), prompt.question, prompt.system_prompt)
                found.append((stage, *key, *words, text, length, reason, degenerate(text, reason)))
    columns = ["stage", "step", "probe_id", "variant", "replicate", "sample", "seed", "question", "system_prompt"]
    columns += ["response", "tokens", "finish_reason", "degenerate"]
    table = pd.DataFrame(found, columns=columns)
    table = table.sort_values(["step", "replicate"], kind="stable", ignore_index=True)
    own = asked_hash(asked, template, sampling, samples=samples, replicates=replicates, seed=seed)
    return table.assign(template_hash=chat.template_hash(template), asked_hash=own)


def generate(
    model: Model,
    readers: Sequence[hf.Reader],
    tokens: Sequence[Sequence[int]],
    seeds: Sequence[tuple[int, ...]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    mesh: Mesh,
    *,
    base: Any = None,
    rows: int = 0,
    memory_bytes: float = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda batches, total: batches,
) -> Samples:
    """`vdjax.sampling.generate` for many snapshots, each of which samples what it would alone with the same seeds.

    Args:
      model, readers, base: as in `evaluator.evaluate`: snapshots of adapters lie beside one base.
      tokens, seeds: of each prompt.
      rows: prompts a call at most; 0 takes 32 for each batch shard, on CPU 160. Fewer are taken where their caches
        lack room.
      memory_bytes: for the parameters held at once on all devices, of which sampling makes a second copy; the caches of
        keys and values may take half as much beside them, unless one row a batch shard takes more. 0 takes half of what
        there is, on CPU for one snapshot a device (of adapters, more).

    Returns:
      NumPy arrays with the axes [snapshots, prompts, ...].

    Raises:
      UserError: not even one snapshot fits, or what `vdjax.sampling.generate` raises.
    """
    check(sampling)
    numbers = np.array(seeds, np.int64)
    check_rows(tokens, numbers, stop_ids, model.cfg.vocab_size)
    memory = memory_bytes or evaluator.default_memory()
    copies = 2 * (mesh.shape["data"] if model.lora else 1)
    most = evaluator.most_on_cpu(model, mesh, memory_bytes)
    parts = evaluator.groups(len(readers), model, memory_bytes, copies, most)
    mesh = mesh if model.lora else evaluator.evaluator_mesh(mesh, len(parts[0]))
    shards = sharding.batch_shards(mesh)
    slots = cache_slots(bucket(max(map(len, tokens))), sampling.max_new_tokens)
    room = int(memory / 2 // (len(parts[0]) * cache_bytes(model, slots)))
    each = ROWS_ON_CPU if jax.default_backend() == "cpu" else ROWS
    most_rows = max(shards, min(rows or each * shards, room // shards * shards))
    batches = list(batches_of([len(prompt) for prompt in tokens], most_rows, shards))
    shape = (len(readers), len(tokens))
    ids, log_probs = (np.zeros((*shape, sampling.max_new_tokens), dtype) for dtype in (np.int32, np.float32))
    out = Samples(ids, np.zeros(shape, np.int32), log_probs, np.zeros(shape, bool))
    with jax.set_mesh(mesh):
        how = {"max_new_tokens": sampling.max_new_tokens, "stop_ids": tuple(stop_ids), "filtered": filtered(sampling)}
        for part in parts:
            params = evaluator.load([readers[i] for i in part], model, mesh)
            for places, size in progress(batches, len(batches)):
                laid = layout([tokens[i] for i in places], numbers[places], size, shards)
                samples = run(model.graphdef, params, base or {}, put(laid, mesh), knobs(sampling), **how)
                for whole, piece in zip(out, samples, strict=True):
                    whole[np.ix_(part, places)] = sharding.fetch(piece)[:, : len(places)]
            del params
    return out


@functools.partial(jit, static_argnums=0, static_argnames=STATIC)
def run(graphdef: Any, stacked: Any, base: Any, batch: Prompts, knobs: Knobs, **how: Any) -> Samples:
    """`decode` under every snapshot of `stacked` over one base: each array with a snapshot axis in front."""

    def one(params: Any) -> Samples:
        return decode(graphdef, lora.join(base, params), batch, knobs, **how)

    axes = hf.snapshot_axes(stacked)
    leaf, axis = jax.tree.leaves(stacked)[0], jax.tree.leaves(axes)[0]
    if leaf.shape[axis] == 1:  # under vmap XLA on CPU would copy the caches at every token
        return jax.tree.map(lambda x: x[None], one(jax.tree.map(jax.numpy.squeeze, stacked, axes)))
    return jax.vmap(one, in_axes=(axes,), spmd_axis_name="snapshot")(stacked)


def cache_bytes(model: Model, slots: int) -> int:
    """Of the keys and values of one row under one snapshot."""
    cfg = model.cfg
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * slots * jax.numpy.dtype(model.compute_dtype).itemsize


def degenerate(text: str, finish_reason: str) -> str:
    """Why a response can take no stance; "" where it may.

    empty: nothing but spaces, punctuation and control characters.
    repetition: of at least 60 characters, and fewer than half of its pieces of 12 characters (one begins at each) are
      distinct, in small letters, with every number as 0 and runs of spaces as one. A response that says one thing three
      times over is caught, one that says it twice is not; of the turns in hh-rlhf 99 of 100 have more than 0.9.
    cut_off: ran out of room before it finished even one sentence or line; a mark of a list's first item does not count.
    """
    if all(unicodedata.category(c)[0] in "ZCP" for c in text):
        return "empty"
    plain = re.sub(r"\s+", " ", re.sub(r"\d+", "0", text.lower())).strip()
    if len(plain) >= SHORTEST_REPETITION:
        pieces = [plain[i : i + PIECE] for i in range(len(plain) - PIECE + 1)]
        if len(set(pieces)) < FEWEST_DISTINCT * len(pieces):
            return "repetition"
    if finish_reason == "length" and not SENTENCE_END.search(LIST_MARK.sub("", text)):
        return "cut_off"
    return ""
