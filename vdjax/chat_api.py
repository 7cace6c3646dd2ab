"""A client for chat completion endpoints that speak OpenAI's protocol.

What is asked is paid for once: replies are kept in a SQLite file, and a call that was interrupted goes on with what is
missing. The budget is hard: an upper bound of what a call can cost is written down before it is sent, and replaced by
the true cost when the reply is there; a call that was cut off keeps the bound.
"""

import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

import filelock
import httpx2
import tenacity
from tqdm import tqdm

from vdjax.chat_endpoint import Endpoint, Request, body_of, check, cost, cost_bound, key_of, request_hash
from vdjax.errors import UserError
from vdjax.files import edited, in_bucket, parse_json

__all__ = [
    "Endpoint",
    "Refused",
    "Reply",
    "Request",
    "Spent",
    "ask",
    "check",
    "cost_bound",
    "key_of",
    "request_hash",
    "serves_log_probs",
    "spent",
]

BACKOFF_S = 1.0  # before the first retry; doubled for each further one
LONGEST_WAIT_S = 600.0  # a server that asks for more is given up
MOST_TOKENS = 10**9  # that a server may say one call took


class Reply(NamedTuple):
    text: str
    finish_reason: str
    top_logprobs: dict[str, float] | None  # of the first token; None: not asked for or not served
    input_tokens: int  # as the server counts; -1: it does not say
    output_tokens: int


class Spent(NamedTuple):
    calls: int
    usd: float


class Refused(UserError):
    """The server understood the request and does not take it (status 400 or 422)."""


class _Unavailable(Exception):
    """The server's or the network's fault: worth another try."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class _Stopped(Exception):
    """Another call has failed, or the budget is spent."""


def ask(endpoint: Endpoint, requests: Sequence[Request], cache: Path, what: str = "calls") -> list[Reply]:
    """The replies, in the order of the requests; those in `cache` (a SQLite file, made where missing) cost nothing.

    Calls that fail by the server's or the network's fault (429, 5xx, timeouts, lost connections, replies that are no
    JSON) are tried again `max_retries` times after 1, 2, 4 ... seconds and some jitter, or when the server's
    Retry-After says. Proxies and credentials of the environment are not used, redirects not followed. A second process
    with the same cache waits for the first; but a cache in a bucket, where replies are put in the end, is for one.

    Raises:
      UserError: an endpoint that cannot be asked, refuses a request (its own message is given) or stays unavailable; a
        budget that is spent. Calls in flight are finished first and kept, so that the same command goes on.
    """
    check(endpoint)
    names = [request_hash(endpoint, request) for request in requests]
    with _open(cache) as db:
        known = _known(db, names)
        if len(known) < len(set(names)):
            key = key_of(endpoint)
            with nullcontext() if in_bucket(cache) else filelock.FileLock(f"{cache}.lock"):
                known = _known(db, names)
                missing = {n: r for n, r in zip(names, requests, strict=True) if n not in known}
                _ask_missing(_Line(endpoint, key, db), missing, what)
            known = _known(db, names)
    return [known[name] for name in names]


def serves_log_probs(endpoint: Endpoint, request: Request, cache: Path, what: str = "calls") -> bool:
    """Whether replies to such a request have log-probs: some servers leave them out, others refuse to be asked.

    One call or two, which are kept in `cache` like all; with them there, none.

    Raises:
      UserError: as `ask`, and where the request is refused without log-probs too.
    """
    plain = request._replace(top_logprobs=0)
    with _open(cache) as db:
        if _known(db, [request_hash(endpoint, plain)]):
            return False
    try:
        [reply] = ask(endpoint, [request], cache, what)
    except Refused:
        ask(endpoint, [plain], cache, what)
        return False
    return reply.top_logprobs is not None


def spent(endpoint: Endpoint, cache: Path) -> Spent:
    """What the model at this endpoint has cost so far, by this cache."""
    with _open(cache) as db:
        return _spent(db, _account(endpoint))


# Cache and spending.


@contextmanager
def _open(cache: Path) -> Iterator[sqlite3.Connection]:
    try:
        with (
            edited(cache) as file,
            closing(sqlite3.connect(file, timeout=60, isolation_level=None, check_same_thread=False)) as db,
        ):
            db.execute("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT NOT NULL)")
            db.execute("CREATE TABLE IF NOT EXISTS calls (id INTEGER PRIMARY KEY, account TEXT, usd REAL NOT NULL)")
            yield db
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last of SQLite's own messages, quoting the file
        raise UserError(f"{cache}: cannot be used as a cache of replies: {error}") from error


def _known(db: sqlite3.Connection, names: Sequence[str]) -> dict[str, Reply]:
    known = {}
    for name in dict.fromkeys(names):
        row = db.execute("SELECT reply FROM replies WHERE request = ?", (name,)).fetchone()
        if row:
            try:
                known[name] = _kept_reply(row[0])
            except (ValueError, TypeError, AttributeError) as error:
                damaged = f"the reply to {name} is damaged ({error}); delete its row, and it is asked for again"
                raise sqlite3.DatabaseError(damaged) from error
    return known


def _kept_reply(row: str) -> Reply:
    reply = Reply(*parse_json(row))
    log_probs = (reply.top_logprobs or {}).values()
    numbers = (*log_probs, reply.input_tokens, reply.output_tokens)
    if not isinstance(reply.text, str) or not all(isinstance(x, int | float) for x in numbers):
        raise TypeError("it is no reply")
    return reply


def _account(endpoint: Endpoint) -> str:
    return f"{endpoint.model} at {endpoint.base_url.rstrip('/')}"


def _spent(db: sqlite3.Connection, account: str) -> Spent:
    calls, usd = db.execute("SELECT count(*), total(usd) FROM calls WHERE account = ?", (account,)).fetchone()
    return Spent(calls, usd)


class _Line:
    """What the threads of one `ask` share; `changed` guards all of it."""

    def __init__(self, endpoint: Endpoint, key: str, db: sqlite3.Connection) -> None:
        self.endpoint, self.key, self.db = endpoint, key, db
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self.in_flight = 0
        self.next_slot = 0.0  # monotonic time before which no call is sent

    def wait_for_slot(self) -> None:
        gap = 60 / self.endpoint.requests_per_minute if self.endpoint.requests_per_minute else 0.0
        with self.changed:
            slot = max(time.monotonic(), self.next_slot)
            self.next_slot = slot + gap
        if self.stop.wait(max(0.0, slot - time.monotonic())):
            raise _Stopped

    def reserve(self, usd: float) -> int:
        """Writes the call down; the number of its row. Waits while calls in flight may turn out cheaper than feared."""
        account = _account(self.endpoint)
        with self.changed:
            while not self.stop.is_set():
                so_far = _spent(self.db, account)
                if so_far.calls < self.endpoint.max_calls and so_far.usd + usd <= self.endpoint.max_usd:
                    self.in_flight += 1
                    row = self.db.execute("INSERT INTO calls (account, usd) VALUES (?, ?)", (account, usd)).lastrowid
                    assert row is not None
                    return row
                if not self.in_flight:
                    self.stop.set()
                    raise UserError(
                        f"{account}: the budget of {self.endpoint.max_calls} calls and "
                        f"{self.endpoint.max_usd:g} dollars is spent: {so_far.calls} calls and {so_far.usd:.4g} "
                        f"dollars so far, and the next call may cost {usd:.2g}. Raise max_calls or max_usd"
                    )
                self.changed.wait()
            raise _Stopped

    def settle(self, call: int, usd: float, name: str = "", reply: Reply | None = None) -> None:
        """Replaces the bound by the true cost, and keeps the reply."""
        with self.changed:
            self.db.execute("BEGIN IMMEDIATE")
            if reply is not None:
                self.db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (name, json.dumps(reply)))
            self.db.execute("UPDATE calls SET usd = ? WHERE id = ?", (usd, call))
            self.db.execute("COMMIT")

    def landed(self) -> None:
        with self.changed:
            self.in_flight -= 1
            self.changed.notify_all()


# Calls.


def _ask_missing(line: _Line, missing: dict[str, Request], what: str) -> None:
    endpoint = line.endpoint
    headers = {"Authorization": f"Bearer {line.key}"} if line.key else {}
    pool = ThreadPoolExecutor(endpoint.concurrency)
    limits = httpx2.Limits(max_connections=endpoint.concurrency)
    client = httpx2.Client(headers=headers, timeout=endpoint.timeout_s, trust_env=False, limits=limits)
    with client, tqdm(total=len(missing), desc=what, disable=None, leave=False) as bar:
        futures = [pool.submit(_ask_one, line, client, name, request) for name, request in missing.items()]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # on an interrupt too: no new calls, but those in flight are paid for and so are kept
            line.stop.set()
            with line.changed:
                line.changed.notify_all()
            pool.shutdown(wait=True, cancel_futures=True)
    errors = [e for future in futures if not future.cancelled() and (e := future.exception())]
    problems = [e for e in errors if not isinstance(e, _Stopped)]
    if not problems:
        return
    if not isinstance(problems[0], UserError | _Unavailable):
        raise problems[0]
    left = len(missing) - len(_known(line.db, list(missing)))
    after = f"{left} of {len(missing)} requests are left; the same command goes on with them"
    kind = Refused if isinstance(problems[0], Refused) else UserError
    raise kind(f"{problems[0]}. {after}") from None


def _ask_one(line: _Line, client: httpx2.Client, name: str, request: Request) -> None:
    backoff = tenacity.wait_exponential_jitter(multiplier=BACKOFF_S, jitter=BACKOFF_S, max=LONGEST_WAIT_S)

    def pause(state: tenacity.RetryCallState) -> float:
        error = state.outcome and state.outcome.exception()
        asked = error.retry_after if isinstance(error, _Unavailable) else None
        return backoff(state) if asked is None else asked

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_Unavailable),
        stop=tenacity.stop_after_attempt(line.endpoint.max_retries + 1) | tenacity.stop_when_event_set(line.stop),
        wait=pause,
        sleep=tenacity.sleep_using_event(line.stop),
        reraise=True,
    )
    try:
        retrying(_attempt, line, client, name, request)
    except BaseException:
        line.stop.set()  # here, before this thread takes the next request
        raise


def _attempt(line: _Line, client: httpx2.Client, name: str, request: Request) -> None:
    line.wait_for_slot()
    endpoint, bound = line.endpoint, cost_bound(line.endpoint, request)
    call = line.reserve(bound)
    try:
        where = _account(endpoint)
        try:
            response = client.post(f"{endpoint.base_url.rstrip('/')}/chat/completions", json=body_of(endpoint, request))
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            line.settle(call, 0.0)
            raise _Unavailable(f"{where}: no connection: {_clean(str(error), line.key)}") from None
        except httpx2.RequestError as error:  # it may have been answered and billed
            raise _Unavailable(f"{where}: {type(error).__name__} (timeout_s={endpoint.timeout_s:g})") from None
        status = response.status_code
        if status != 200:
            if status < 500:
                line.settle(call, 0.0)
            message = f"{where}: HTTP status {status}: {_server_message(response, line.key)}"
            if status != 429 and status < 500:
                raise (Refused if status in (400, 422) else UserError)(message)
            raise _Unavailable(message, _hold(line, response, message))
        reply = _parse(response, where, line.key)
        told = min(reply.input_tokens, reply.output_tokens) >= 0
        usd = cost(endpoint, reply.input_tokens, reply.output_tokens) if told else bound
        line.settle(call, usd, name, reply)
    finally:
        line.landed()


def _hold(line: _Line, response: httpx2.Response, message: str) -> float | None:
    """Seconds that the server asks to wait, for all calls."""
    text = response.headers.get("retry-after", "").strip()
    try:
        if re.fullmatch(r"\d+(\.\d+)?", text):
            seconds = float(text)
        else:
            seconds = max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
    if seconds > LONGEST_WAIT_S:
        raise UserError(f"{message}; it asks to come back in {seconds:.0f} s")
    with line.changed:
        line.next_slot = max(line.next_slot, time.monotonic() + seconds)
    return seconds


def _parse(response: httpx2.Response, where: str, key: str) -> Reply:
    try:
        content = response.json()
        choice = content["choices"][0]
        message, usage = choice["message"], content.get("usage") or {}
        text = message.get("content") or message.get("refusal") or ""
        if not isinstance(text, str):
            raise TypeError("content is no text")
        first = ((choice.get("logprobs") or {}).get("content") or [None])[0]
        top: dict[str, float] | None = None
        if first is not None and first.get("top_logprobs"):
            top = {}
            for entry in first["top_logprobs"]:  # likeliest first; tokens that are parts of a character look alike
                top.setdefault(str(entry["token"]), float(entry["logprob"]))
        counts = [int(usage.get(name, -1)) for name in ("prompt_tokens", "completion_tokens")]
        if max(counts) > MOST_TOKENS:
            raise ValueError("usage is no number of tokens")
        whole = text.encode("utf-8", "replace").decode()  # half of a surrogate pair would be no text
        return Reply(whole, str(choice.get("finish_reason")), top, counts[0], counts[1])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
        raise _Unavailable(f"{where}: the reply is no chat completion: {_server_message(response, key)}") from None


def _server_message(response: httpx2.Response, key: str) -> str:
    try:
        content = response.json()
        error = content.get("error", content)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        text = response.text
    return _clean(text, key) or response.reason_phrase


def _clean(text: str, key: str) -> str:
    text = text.replace(key, "[key]") if key else text
    return "".join(c if c.isprintable() else " " for c in text)[:500].strip()
