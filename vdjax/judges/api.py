"""A judge behind a chat completion endpoint: p(label) from the log-probs of option letters, or from sampled votes.

The prompt is that of a local judge's template. By log-probs every exchange is asked in all rotations of the options, so
that each label has each letter once; by votes each vote is asked in the next rotation. Which of the two is part of the
judge's hash.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from vdjax.chat_api import Endpoint, Reply, Request, ask, check, serves_log_probs
from vdjax.errors import UserError
from vdjax.judges.local import label_orders, verdicts
from vdjax.judges.prompts import LETTERS, JudgeTemplate, prompt_text, read_template
from vdjax.judges.verdicts import Exchange, Judge, Verdicts
from vdjax.progress import say

TOP = 20  # log-probs asked for, the most that OpenAI gives
LEAST_MASS = 0.1  # of all letters together, below which a model has not answered with a letter
VOTES = 10  # where log-probs are wanted and not served
VOTE_TOKENS = 16
VOTE = re.compile(r"[(*]*([A-Z])[)*.:]*")
SAMPLE = Exchange("Tea is good.", "Is tea good?", "Yes.")  # asked of an endpoint to see what it serves
ATTEMPTS = 3  # at a vote, until it is a letter
MOST_UNREADABLE = 0.1  # share of answers

Answers = Float[np.ndarray, "exchanges orders labels"]  # p of the template's labels; NaN where unreadable


def check_api(name: str, fields: Mapping[str, Any]) -> tuple[Endpoint, JudgeTemplate]:
    """Where a judge asks, and what; nothing is asked.

    Raises:
      UserError: an endpoint that cannot be asked, no such template, or one that is not answered by letters.
    """
    given = ConfigDict(fields).to_dict()  # plain dicts all the way down, as JSON wants them
    endpoint = Endpoint(**{field: given[field] for field in Endpoint._fields if field in given})
    votes, where = fields["votes"], f"config.judges.{name}"
    try:
        check(endpoint)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if votes < 0:
        raise UserError(f"{where}.votes={votes}, expected 0 (by log-probs) or the number of votes")
    asked = read_template(fields["template"])
    if not (asked.chat and asked.letters):
        raise UserError(f"{where}.template={asked.name!r}: an API needs one with chat = true and letters = true")
    return endpoint, asked


def open_api(name: str, fields: Mapping[str, Any], cache: Path) -> Judge:
    """The judge of an endpoint. Where log-probs are wanted, one call tells whether there are any; else VOTES are taken.

    Answers that are no option's letter are left out and counted; an exchange without any other has NaN in its verdict.
    The judge raises UserError where more than a tenth of all answers are such, and as `chat_api.ask` does. Where
    several processes run, one of them should judge.

    Args:
      fields: a judge of kind "api" (`vdjax.config.judge`).
      cache: folder for the replies and what they cost.

    Raises:
      UserError: as `check_api` and `chat_api.ask`.
    """
    endpoint, asked = check_api(name, fields)
    file, votes = cache / "replies.sqlite", fields["votes"]
    if not votes:
        sample = messages(asked, SAMPLE, range(len(asked.labels)))
        if not serves_log_probs(endpoint, Request(sample, 0.0, 1, TOP), file, f"judge {name}"):
            votes = VOTES
            say(f"judge {name}: {endpoint.model} serves no log-probs; it is asked for {VOTES} votes a response instead")
    # With the number of votes, not what was wished for: verdicts of one hash were all read in one way.
    parts = [endpoint.base_url.rstrip("/"), endpoint.model, asked.source, votes]
    parts += [endpoint.extra] if endpoint.extra else []
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def judge(exchanges: Sequence[Exchange], repeat: int = 0) -> Verdicts:
        if votes:
            answers, example = by_votes(endpoint, asked, exchanges, repeat, file, f"judge {name}", votes)
        else:
            answers, example = by_log_probs(endpoint, asked, exchanges, repeat, file, f"judge {name}")
        _check_readable(answers, example, name)
        with np.errstate(divide="ignore", invalid="ignore"):
            readable = np.isfinite(answers).all(axis=2, keepdims=True)
            p = np.where(readable, answers, 0.0).sum(axis=1) / readable.sum(axis=1)
            return verdicts(np.log(p)[:, None, :], [range(len(asked.labels))], asked)

    return Judge(name, digest, judge)


def by_log_probs(
    endpoint: Endpoint, asked: JudgeTemplate, exchanges: Sequence[Exchange], repeat: int, file: Path, what: str
) -> tuple[Answers, str]:
    """p by the letters' log-probs, renormalised over them; and an answer that could not be read.

    One that has no log-probs is such: an endpoint that serves them for some responses only is not voted on for others.
    """
    orders = label_orders(asked, repeat)
    requests = [Request(messages(asked, x, order), 0.0, 1, TOP) for x in exchanges for order in orders]
    replies = ask(endpoint, requests, file, what)
    out, example = np.full((len(requests), len(asked.labels)), np.nan), ""
    for i, reply in enumerate(replies):
        mass = letter_mass(reply, len(asked.labels))
        if mass.sum() >= LEAST_MASS:
            out[i, orders[i % len(orders)]] = mass / mass.sum()
        else:
            example = "no log-probs" if reply.top_logprobs is None else reply.text
    return out.reshape(len(exchanges), len(orders), len(asked.labels)), example


def by_votes(
    endpoint: Endpoint, asked: JudgeTemplate, exchanges: Sequence[Exchange], repeat: int, file: Path, what: str, n: int
) -> tuple[Answers, str]:
    """`n` sampled answers to each exchange; one that is no letter is sampled again, ATTEMPTS times at most."""
    orders = label_orders(asked, repeat)
    out, example = np.full((len(exchanges), n, len(asked.labels)), np.nan), ""
    pending = list(np.ndindex(len(exchanges), n))
    for attempt in range(ATTEMPTS):
        requests = [
            Request(
                messages(asked, exchanges[x], orders[vote % len(orders)]),
                temperature=1.0,
                max_tokens=VOTE_TOKENS,
                seed=(repeat * n + vote) * ATTEMPTS + attempt,
            )
            for x, vote in pending
        ]
        unread = []
        for (x, vote), reply in zip(pending, ask(endpoint, requests, file, what), strict=True):
            letter = read_vote(reply.text, len(asked.labels))
            if letter is None:
                unread.append((x, vote))
                example = reply.text
            else:
                out[x, vote] = 0.0
                out[x, vote, orders[vote % len(orders)][letter]] = 1.0
        pending = unread
    return out, example


def messages(asked: JudgeTemplate, exchange: Exchange, order: Sequence[int]) -> tuple[tuple[str, str], ...]:
    """One message of the user's, whatever the exchange's texts are."""
    return (("user", prompt_text(asked, exchange, order)),)


def letter_mass(reply: Reply, labels: int) -> Float[np.ndarray, " labels"]:
    """Probability of each letter as the first token, with or without white space around it."""
    mass = np.zeros(labels)
    for token, log_prob in (reply.top_logprobs or {}).items():
        letter = token.strip()
        if len(letter) == 1 and letter in LETTERS[:labels]:
            mass[LETTERS.index(letter)] += np.exp(log_prob)
    return mass


def read_vote(text: str, labels: int) -> int | None:
    """The place of the letter that is all of the answer but marks around it; None: there is none."""
    found = VOTE.fullmatch(text.strip())
    return LETTERS.index(found[1]) if found and found[1] in LETTERS[:labels] else None


def _check_readable(answers: Answers, example: str, name: str) -> None:
    unreadable = ~np.isfinite(answers).all(axis=2)
    if not unreadable.any():
        return
    count = f"judge {name}: {unreadable.sum()} of {unreadable.size} answers are no option's letter, such as {example!r}"
    if unreadable.mean() > MOST_UNREADABLE:
        raise UserError(f"{count}; expected less than {MOST_UNREADABLE:.0%}: try another model or template")
    say(f"{count}; {unreadable.all(axis=1).sum()} of {len(answers)} responses are without a verdict")
