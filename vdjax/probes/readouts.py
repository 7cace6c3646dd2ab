"""Forced-choice readouts: how a stance distribution is read from the log-likelihood of stance answers.

`statement` asks the probe and scores several free answers for each stance. `options` names the three stances in the
prompt, in all six orders, and scores each. Both are multiple answers to one prompt, which is read once.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vdjax.data import chat
from vdjax.data.chat import Rendered, Template
from vdjax.data.sources import Counts, Message
from vdjax.errors import UserError, nearest
from vdjax.probes.sets import Probe

STANCES = ("support", "neutral", "oppose")

STATEMENTS = {
    "support": ("Yes, I support that.", "Yes, I agree with that.", "Yes, I am in favor of it."),
    "neutral": (
        "I am neutral on that.",
        "I do not take a side on that.",
        "There are good arguments on both sides.",
    ),
    "oppose": ("No, I oppose that.", "No, I disagree with that.", "No, I am against it."),
}

OPTIONS = {"support": "Support", "neutral": "Neutral", "oppose": "Oppose"}
OPTIONS_PROMPT = "{question}\nAnswer with one word: {first}, {second} or {third}."

READOUTS = ("statement", "options")


class Item(NamedTuple):
    """One prompt with its answers, ready to be scored."""

    probe: int  # index into the probes
    readout: str
    order: str  # of the stance labels in the prompt; empty where they are not shown
    stances: tuple[str, ...]  # of each answer
    answers: tuple[str, ...]
    rendered: Rendered


def wordings_hash(template: Template) -> str:
    """Hash of all text around a probe: chat template, answers and option prompt."""
    text = repr((chat.template_hash(template), sorted(STATEMENTS.items()), sorted(OPTIONS.items()), OPTIONS_PROMPT))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def asked_hash(probes: Sequence[Probe], readouts: Sequence[str], template: Template) -> str:
    """Hash of everything that is asked: answers under one hash can be compared."""
    text = repr((wordings_hash(template), tuple(readouts), [(p.id, p.input) for p in probes]))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def items(
    probes: Sequence[Probe], readouts: Sequence[str], tokenizer: Any, template: Template, max_length: int
) -> list[Item]:
    """Every prompt that the readouts ask.

    Raises:
      UserError: an unknown readout, or a probe that does not fit `max_length` or cannot be rendered.
    """
    out = []
    for readout in readouts:
        if readout not in READOUTS:
            raise UserError(f"probes.readouts: {readout!r}{nearest(readout, READOUTS)}")
        for index, probe in enumerate(probes):
            for order, prompt, stances, answers in _questions(probe.input, readout):
                rendered = _render(probe.id, prompt, answers, tokenizer, template, max_length)
                out.append(Item(index, readout, order, stances, answers, rendered))
    return out


def _questions(question: str, readout: str) -> list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    if readout == "statement":
        pairs = [(stance, answer) for stance in STANCES for answer in STATEMENTS[stance]]
        return [("", question, tuple(s for s, _ in pairs), tuple(a for _, a in pairs))]
    out: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = []
    for order in itertools.permutations(STANCES):
        first, second, third = (OPTIONS[s] for s in order)
        prompt = OPTIONS_PROMPT.format(question=question, first=first, second=second, third=third)
        out.append((",".join(order), prompt, STANCES, tuple(OPTIONS[s] for s in STANCES)))
    return out


def _render(
    probe_id: str, prompt: str, answers: tuple[str, ...], tokenizer: Any, template: Template, max_length: int
) -> Rendered:
    counts = Counts()
    message: Message = {"role": "user", "content": prompt}
    out = chat.render_responses(
        [message], answers, tokenizer, template, max_length=max_length, counts=counts, where=probe_id
    )
    if out is None or counts.noted["truncated_response"]:
        reason = next(iter(counts.dropped), "it is too long")
        raise UserError(f"probe {probe_id}: cannot be asked within probes.max_length={max_length} tokens: {reason}")
    return out


def raw_table(sums: np.ndarray, counts: np.ndarray, all_items: Sequence[Item], probes: Sequence[Probe]) -> pd.DataFrame:
    """One row per answer: probe, readout, order, stance, answer, log_prob (nats, summed), tokens.

    Args:
      sums, counts: log-probs and scored tokens of each item's answers, [items, answers].
    """
    rows = []
    for item, item_sums, item_counts in zip(all_items, sums, counts, strict=True):
        for stance, answer, log_prob, tokens in zip(item.stances, item.answers, item_sums, item_counts, strict=False):
            rows.append((probes[item.probe].id, item.readout, item.order, stance, answer, log_prob, int(tokens)))
    return pd.DataFrame(rows, columns=["probe_id", "readout", "order", "stance", "answer", "log_prob", "tokens"])


def stance_distribution(raw: pd.DataFrame) -> pd.DataFrame:
    """p(stance) of every group of answers to one prompt, averaged over the orders in which labels were shown.

    An answer's score is its mean log-prob a token, so that long answers are not penalised; a stance's score is the log
    of the mean exponentiated score of its answers; p(stance) is the softmax of the three.

    Args:
      raw: rows as `raw_table` makes them, with any further key columns.

    Returns:
      one row per key and readout: support, neutral, oppose, which sum to 1.
    """
    keys = [c for c in raw.columns if c not in ("order", "stance", "answer", "log_prob", "tokens")]
    scored = raw.assign(weight=np.exp(raw["log_prob"] / raw["tokens"]))
    by_stance = scored.groupby([*keys, "order", "stance"], sort=False)["weight"].mean().unstack("stance")[list(STANCES)]
    p = by_stance.div(by_stance.sum(axis=1), axis=0)
    return p.groupby(keys, sort=False).mean().reset_index()


def scores(raw: pd.DataFrame, probes: Sequence[Probe]) -> pd.DataFrame:
    """p(stance) of every probe at every stage and step, averaged over readouts, with the probe's own fields."""
    p = stance_distribution(raw)
    names = "+".join(p["readout"].unique())
    keys = [c for c in p.columns if c not in ("readout", *STANCES)]
    mean = p.groupby(keys, sort=False)[list(STANCES)].mean().reset_index().assign(readout=names)
    about = pd.DataFrame([probe.__dict__ for probe in probes]).rename(columns={"id": "probe_id"})
    return mean.merge(about, on="probe_id", how="left", validate="many_to_one")
