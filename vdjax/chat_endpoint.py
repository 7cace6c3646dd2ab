"""A chat completion endpoint as data: where it is, what it may cost, what is sent to it. Asked by `vdjax.chat_api`."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from vdjax.errors import UserError

TOKENS_A_MESSAGE = 32  # at most, for its role and marks
LIMITS = ("max_tokens", "max_completion_tokens")  # of what a reply may hold, thoughts among it
OURS = ("model", "messages", "n", "stream", "logprobs", "top_logprobs")  # what `extra` cannot set


class Endpoint(NamedTuple):
    """Where to ask, how fast, and how much it may cost in all, counted over all runs with the same cache."""

    base_url: str  # up to and with /v1
    model: str
    key_env: str  # name of the environment variable with the key; empty: no key is sent
    concurrency: int  # calls at once
    requests_per_minute: float  # 0: no limit
    max_retries: int  # of a call that fails by the server's or the network's fault
    timeout_s: float
    max_calls: int  # retries count
    max_usd: float
    usd_per_million_input: float
    usd_per_million_output: float
    extra: Mapping[str, Any] = {}  # put into every request's body as it is; None takes a field out of it


class Request(NamedTuple):
    """Requests that are equal in all fields get one reply; another `seed` makes another request."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    temperature: float
    max_tokens: int
    top_logprobs: int = 0  # how many of the first token's alternatives to return; 0: none
    seed: int | None = None


def check(endpoint: Endpoint) -> None:
    """Raises UserError for an endpoint that cannot be asked."""
    if set(endpoint.base_url) & set("@?#"):  # not shown: there may be a key in it
        raise UserError("base_url: no user, password, query or fragment may be in it; the key comes from key_env")
    try:
        url = urlsplit(endpoint.base_url)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"base_url={endpoint.base_url!r}: expected http(s)://HOST/..., such as https://HOST/v1")
    if not endpoint.model:
        raise UserError("model is empty; expected the name of a model that the endpoint serves")
    for name in ("usd_per_million_input", "usd_per_million_output"):
        if not getattr(endpoint, name) >= 0:
            raise UserError(f"{name} is not given; the budget needs the price (0 for a server of your own)")
    zero = dict.fromkeys(("requests_per_minute", "max_retries", "max_calls", "max_usd"), 0.0)
    for name, low in {"concurrency": 1, "timeout_s": 0.01, **zero}.items():
        if not getattr(endpoint, name) >= low:
            raise UserError(f"{name}={getattr(endpoint, name)!r}, expected at least {low}")
    _check_extra(endpoint.extra)


def _check_extra(extra: Mapping[str, Any]) -> None:
    for name in extra:
        if name in OURS:
            raise UserError(f"extra.{name}: cannot be set; {', '.join(OURS)} are what is asked")
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise UserError(f"extra: is not what JSON can say: {error}") from error
    for name in LIMITS:
        value = extra.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"extra.{name}={value!r}, expected a number of tokens")
    if "max_tokens" in extra and not any(extra.get(name) for name in LIMITS):
        raise UserError("extra.max_tokens=None: set extra.max_completion_tokens, for a call's cost must have a bound")


def body_of(endpoint: Endpoint, request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [{"role": role, "content": content} for role, content in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    if request.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.seed is not None:
        body["seed"] = request.seed
    return {name: value for name, value in (body | dict(endpoint.extra)).items() if value is not None}


def request_hash(endpoint: Endpoint, request: Request) -> str:
    parts: list[Any] = [endpoint.base_url.rstrip("/"), endpoint.model, request]
    text = json.dumps([*parts, *([endpoint.extra] if endpoint.extra else [])], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cost_bound(endpoint: Endpoint, request: Request) -> float:
    """Dollars that a call costs at most: no tokenizer makes more than a token of a byte."""
    body = body_of(endpoint, request)
    tokens = sum(len(content.encode()) + TOKENS_A_MESSAGE for _, content in request.messages) + TOKENS_A_MESSAGE
    tokens += len(json.dumps(endpoint.extra).encode()) if endpoint.extra else 0
    return cost(endpoint, tokens, max(body[name] for name in LIMITS if name in body))


def cost(endpoint: Endpoint, input_tokens: int, output_tokens: int) -> float:
    dollars = input_tokens * endpoint.usd_per_million_input + output_tokens * endpoint.usd_per_million_output
    return dollars / 1e6


def key_of(endpoint: Endpoint) -> str:
    """The key itself; whatever is wrong with it, it is not shown.

    Raises:
      UserError: key_env names a variable that is not set, or that holds no key.
    """
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key:
        raise UserError(f"the environment variable {endpoint.key_env} is not set; it holds the key of the endpoint")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {endpoint.key_env} holds characters that no key has")
    return key
