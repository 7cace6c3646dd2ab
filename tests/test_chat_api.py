import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from fake_chat_server import Answer, completion, endpoint, serve

from vdjax import chat_api
from vdjax.chat_api import Reply, Request, ask, cost_bound, spent
from vdjax.errors import UserError

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDJAX_TEST_KEY", KEY)
    monkeypatch.setattr(chat_api, "BACKOFF_S", 0.01)


def question(text: str, **fields: Any) -> Request:
    return Request((("system", "Be short."), ("user", text)), 0.0, 5, **fields)


def echo(body: dict[str, Any], _: int) -> Answer:
    return completion("re: " + body["messages"][-1]["content"])


def test_replies_come_in_order_and_only_once_over_the_wire(tmp_path: Path) -> None:
    requests = [question(f"q{i % 7}") for i in range(20)]
    expected = [f"re: q{i % 7}" for i in range(20)]
    with serve(lambda body, n: echo(body, n)._replace(delay=0.02 * (n % 3))) as server:
        replies = ask(endpoint(server.url + "/"), requests, tmp_path / "deep" / "cache.sqlite")
        assert [r.text for r in replies] == expected
        assert len(server.seen) == 7
        assert replies[0] == Reply("re: q0", "stop", None, 10, 1)
        again = ask(endpoint(server.url, max_calls=0), requests, tmp_path / "deep" / "cache.sqlite")
        assert again == replies and len(server.seen) == 7
    assert {s["path"] for s in server.seen} == {"/v1/chat/completions"}
    assert {s["headers"]["Authorization"] for s in server.seen} == {f"Bearer {KEY}"}


def test_what_is_sent(tmp_path: Path) -> None:
    with serve(lambda body, n: completion("A", {"A": -0.1, "B": -2.5})) as server:
        plain, full = question("x"), question("x", top_logprobs=20, seed=7)
        replies = ask(endpoint(server.url, concurrency=1), [plain, full], tmp_path / "c")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "x"}]
    body = {"model": "model-1", "messages": messages, "temperature": 0.0, "max_tokens": 5}
    assert server.seen[0]["body"] == body
    assert server.seen[1]["body"] == {**body, "logprobs": True, "top_logprobs": 20, "seed": 7}
    assert replies[1].top_logprobs == {"A": -0.1, "B": -2.5}


def test_each_model_and_field_has_its_own_reply(tmp_path: Path) -> None:
    with serve(lambda body, n: completion(str(n))) as server:
        one = endpoint(server.url)
        asked = [question("x"), question("x", seed=1), question("x")._replace(temperature=1.0)]
        asked += [question("x")._replace(max_tokens=6), question("x", top_logprobs=1)]
        texts = {r.text for request in asked for r in ask(one, [request], tmp_path / "c")}
        texts |= {ask(one._replace(model="model-2"), [question("x")], tmp_path / "c")[0].text}
        texts |= {ask(endpoint(f"{server.url}/2"), [question("x")], tmp_path / "c")[0].text}
        assert len(texts) == 7
        # What does not change the answer does not ask again.
        ask(one._replace(concurrency=1, timeout_s=9.0, key_env="ANOTHER"), asked, tmp_path / "c")
        assert len(server.seen) == 7


FAULTS = {
    "429": Answer({"error": {"message": "slow down"}}, 429),
    "500": Answer(b"<html>oops</html>", 500),
    "503": Answer({"error": "busy"}, 503),
    "timeout": completion("late")._replace(delay=1.5),
    "malformed": Answer(b'{"choices": [{"mess'),
    "no choices": Answer({"error": {"message": "upstream failed"}}),
    "empty choices": Answer({"choices": []}),
    "not an object": Answer([1, 2]),
}
TIMEOUT = {"timeout": 0.5}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_are_tried_again(fault: str, tmp_path: Path) -> None:
    with serve(lambda body, n: FAULTS[fault] if n < 2 else echo(body, n)) as server:
        [reply] = ask(endpoint(server.url, timeout_s=TIMEOUT.get(fault, 5.0)), [question("x")], tmp_path / "c")
    assert reply.text == "re: x" and len(server.seen) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_stay_are_said_after_the_last_try(fault: str, tmp_path: Path) -> None:
    with serve(lambda body, n: FAULTS[fault]) as server, pytest.raises(UserError) as error:
        ask(endpoint(server.url, timeout_s=TIMEOUT.get(fault, 5.0), max_retries=1), [question("x")], tmp_path / "c")
    assert len(server.seen) == 2
    words = {"429": "slow down", "500": "oops", "503": "busy", "timeout": "ReadTimeout"}
    assert words.get(fault, "no chat completion") in str(error.value)
    assert "1 of 1 requests are left" in str(error.value)


def test_backoff_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_api, "BACKOFF_S", 0.05)
    with serve(lambda body, n: FAULTS["500"] if n < 4 else echo(body, n)) as server:
        ask(endpoint(server.url, max_retries=4), [question("x")], tmp_path / "c")
    times = [s["time"] for s in server.seen]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert all(gap >= 0.05 * 2**i for i, gap in enumerate(gaps))


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_all_calls(form: str, tmp_path: Path) -> None:
    def answer(body: dict[str, Any], n: int) -> Answer:
        if n:
            return echo(body, n)._replace(delay=0.2 * (n == 1))
        # A date has whole seconds: 2 from now is at least 1 away.
        value = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        return Answer({"error": {"message": "slow down"}}, 429, (("Retry-After", value),))

    with serve(answer) as server:
        ask(endpoint(server.url, concurrency=2), [question(x) for x in "xyz"], tmp_path / "c")
    times = [s["time"] for s in server.seen]
    assert len(times) == 4
    assert min(times[2:]) - times[0] >= 0.9  # x again, and z, which was not refused itself


def test_retry_after_an_hour_is_an_error(tmp_path: Path) -> None:
    answer = Answer({"error": {"message": "quota"}}, 429, (("Retry-After", "3600"),))
    with serve(lambda body, n: answer) as server, pytest.raises(UserError, match="quota; it asks to come back in 3600"):
        ask(endpoint(server.url), [question("x")], tmp_path / "c")
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_refusals_are_said_at_once(status: int, tmp_path: Path) -> None:
    answer = Answer({"error": {"message": f"no such thing, {KEY}"}}, status, (("Location", "http://127.0.0.1:1/"),))
    with serve(lambda body, n: answer) as server, pytest.raises(UserError, match=rf"{status}: no such thing, \[key\]"):
        ask(endpoint(server.url, concurrency=1), [question("x"), question("y")], tmp_path / "c")
    assert len(server.seen) == 1


def test_no_server_is_said(tmp_path: Path) -> None:
    with serve(echo) as server:
        pass
    one = endpoint(server.url, max_retries=1, max_usd=0.1, usd_per_million_input=1.0, usd_per_million_output=1.0)
    with pytest.raises(UserError, match="no connection"):
        ask(one, [question("x")], tmp_path / "c")
    assert spent(one, tmp_path / "c") == (2, 0.0)


def test_rate_limit(tmp_path: Path) -> None:
    with serve(echo) as server:
        start = time.monotonic()
        ask(endpoint(server.url, requests_per_minute=600), [question(str(i)) for i in range(6)], tmp_path / "c")
        assert time.monotonic() - start >= 5 * 0.1


def test_concurrency_is_used_and_bounded(tmp_path: Path) -> None:
    now, most, lock, three = [0], [0], threading.Lock(), threading.Barrier(3, timeout=20)

    def answer(body: dict[str, Any], n: int) -> Answer:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        three.wait()  # fails where three do not come together
        with lock:
            now[0] -= 1
        return echo(body, n)

    with serve(answer) as server:
        ask(endpoint(server.url, concurrency=3), [question(str(i)) for i in range(12)], tmp_path / "c")
    assert most[0] == 3


def test_call_budget_stops_keeps_and_goes_on(tmp_path: Path) -> None:
    requests = [question(str(i)) for i in range(10)]
    with serve(echo) as server:
        with pytest.raises(UserError) as error:
            ask(endpoint(server.url, max_calls=4), requests, tmp_path / "c")
        assert "4 calls" in str(error.value) and "6 of 10 requests are left" in str(error.value)
        assert len(server.seen) == 4
        with pytest.raises(UserError, match="6 of 6 requests are left"):  # what is spent is not forgotten
            ask(endpoint(server.url, max_calls=4), requests, tmp_path / "c")
        assert len(server.seen) == 4
        replies = ask(endpoint(server.url, max_calls=10), requests, tmp_path / "c")
    assert [r.text for r in replies] == [f"re: {i}" for i in range(10)]
    assert len(server.seen) == 10


PRICES = {"usd_per_million_input": 1000.0, "usd_per_million_output": 5000.0}


def test_dollars_are_never_exceeded_and_are_used_up(tmp_path: Path) -> None:
    """Each call costs 10 x 1000 / 1e6 + 5000 / 1e6 = 0.015 dollars, an upper bound of it much more."""
    requests = [question(str(i)) for i in range(40)]
    with serve(lambda body, n: echo(body, n)._replace(delay=0.01)) as server:
        one = endpoint(server.url, concurrency=8, max_usd=0.4, **PRICES)
        bound = cost_bound(one, requests[0])
        assert 0.1 < bound < 0.15
        with pytest.raises(UserError, match="budget of 1000 calls and 0.4 dollars is spent"):
            ask(one, requests, tmp_path / "c")
        calls, usd = spent(one, tmp_path / "c")
    assert calls == len(server.seen) and usd == pytest.approx(0.015 * calls)
    # One more could have broken the budget, and only one more.
    assert usd <= 0.4 < usd + bound and calls >= 10


def test_what_may_have_been_billed_counts_as_the_bound(tmp_path: Path) -> None:
    with serve(lambda body, n: FAULTS["timeout"]) as server:
        one = endpoint(server.url, timeout_s=0.3, max_retries=0, **PRICES)
        with pytest.raises(UserError, match="ReadTimeout"):
            ask(one, [question("x")], tmp_path / "c")
    assert spent(one, tmp_path / "c") == (1, cost_bound(one, question("x")))
    with serve(lambda body, n: completion("x", usage=None)) as server:
        one = endpoint(server.url, **PRICES)
        ask(one, [question("x")], tmp_path / "d")
    assert spent(one, tmp_path / "d") == (1, cost_bound(one, question("x")))
    with serve(lambda body, n: FAULTS["429"]) as server:
        one = endpoint(server.url, max_retries=0, **PRICES)
        with pytest.raises(UserError, match="slow down"):
            ask(one, [question("x")], tmp_path / "e")
    assert spent(one, tmp_path / "e") == (1, 0.0)


def test_the_bound_holds_for_text_of_many_tokens() -> None:
    one = endpoint("http://h/v1", usd_per_million_input=1.0, usd_per_million_output=2.0)
    request = Request((("user", "\U0001f9ff" * 100),), 0.0, 7)
    assert cost_bound(one, request) * 1e6 >= 400 + 2 * 7  # four tokens an emoji in a vocabulary of bytes


def test_a_failure_keeps_what_is_in_flight(tmp_path: Path) -> None:
    other = threading.Event()

    def answer(body: dict[str, Any], n: int) -> Answer:
        if body["messages"][-1]["content"] == "1":
            other.wait(20)
            return Answer({"error": "bad"}, 400)
        other.set()
        return echo(body, n)._replace(delay=0.6)

    with serve(answer) as server:
        with pytest.raises(UserError, match="bad. 7 of 8 requests are left"):
            ask(endpoint(server.url, concurrency=2), [question(str(i)) for i in range(8)], tmp_path / "c")
        assert len(server.seen) == 2


CHILD = """
import sys
from pathlib import Path
from fake_chat_server import endpoint
from vdjax.chat_api import Request, ask
replies = ask(endpoint(sys.argv[1], concurrency=2), [Request((("user", str(i)),), 0.0, 5) for i in range(12)],
              Path(sys.argv[2]))
print([r.text for r in replies])
"""


def child(url: str, cache: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command, pipe = [sys.executable, "-c", CHILD, url, str(cache)], subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, text=True, stdout=pipe, stderr=pipe)


def test_a_killed_process_goes_on_where_it_stopped(tmp_path: Path) -> None:
    expected = str([f"re: {i}" for i in range(12)])
    with serve(lambda body, n: echo(body, n)._replace(delay=0.1 if n < 6 else 30.0 if n < 8 else 0.0)) as server:
        first = child(server.url, tmp_path / "c")
        while len(server.seen) < 8:
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        out, err = child(server.url, tmp_path / "c").communicate()
        assert spent(endpoint(server.url), tmp_path / "c").calls == 14
    assert out.strip() == expected, err
    texts = [s["body"]["messages"][-1]["content"] for s in server.seen]
    # Six were answered and are not asked again; the two that were in flight and the rest are.
    assert len(texts) == 14 and not set(texts[:6]) & set(texts[8:])


def test_two_processes_pay_once(tmp_path: Path) -> None:
    with serve(lambda body, n: echo(body, n)._replace(delay=0.03)) as server:
        children = [child(server.url, tmp_path / "c") for _ in range(2)]
        outs = [c.communicate() for c in children]
    assert [out.strip() for out, _ in outs] == [str([f"re: {i}" for i in range(12)])] * 2, outs
    assert len(server.seen) == 12


def test_an_interrupt_keeps_what_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = chat_api.wait
    requests = [question(str(i)) for i in range(6)]
    with serve(lambda body, n: echo(body, n)._replace(delay=0.6)) as server:

        def interrupted(*_: Any, **__: Any) -> Any:
            while len(server.seen) < 2:
                time.sleep(0.01)
            raise KeyboardInterrupt

        monkeypatch.setattr(chat_api, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(endpoint(server.url, concurrency=2), requests, tmp_path / "c")
        assert len(server.seen) == 2
        monkeypatch.setattr(chat_api, "wait", real)
        ask(endpoint(server.url, concurrency=6), requests, tmp_path / "c")
        assert len(server.seen) == 6


def test_the_key_is_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    answers = [echo, lambda b, n: FAULTS["500"], lambda b, n: Answer({"error": KEY}, 401), lambda b, n: Answer(KEY)]
    texts = []
    for i, answer in enumerate(answers):
        with serve(answer) as server:
            assert KEY not in repr(endpoint(server.url))
            try:
                ask(endpoint(server.url, max_retries=1), [question(f"{i}")], tmp_path / "c")
            except UserError as error:
                chain: BaseException | None = error
                while chain is not None:
                    texts.append(repr(chain))
                    chain = chain.__cause__ or chain.__context__
    assert len(texts) >= 3 and caplog.text  # the loggers of the HTTP library speak at this level
    texts += [caplog.text, *capfd.readouterr()]
    assert not any(KEY in text for text in texts)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert files and not any(KEY.encode() in f.read_bytes() for f in files)
    for wrong in (KEY + "\u00e9", KEY + "\n" + KEY):
        monkeypatch.setenv("VDJAX_TEST_KEY", wrong)
        with pytest.raises(UserError, match="VDJAX_TEST_KEY holds characters") as bad:
            ask(endpoint("http://127.0.0.1:1/v1"), [question("x")], tmp_path / "c")
        assert KEY not in str(bad.value)


def test_no_key_no_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VDJAX_TEST_KEY")
    with serve(echo) as server:
        with pytest.raises(UserError, match="VDJAX_TEST_KEY is not set"):
            ask(endpoint(server.url), [question("x")], tmp_path / "c")
        ask(endpoint(server.url, key_env=""), [question("x")], tmp_path / "c")
        assert "Authorization" not in server.seen[0]["headers"]
        ask(endpoint(server.url), [question("x")], tmp_path / "c")  # all in the cache: no key is needed
        assert len(server.seen) == 1


def test_proxies_of_the_environment_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serve(echo) as server:
        assert ask(endpoint(server.url), [question("x")], tmp_path / "c")[0].text == "re: x"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "ftp://h/v1"}, "expected http"),
        ({"base_url": "file:///etc/passwd"}, "expected http"),
        ({"base_url": "h/v1"}, "expected http"),
        ({"base_url": "http://h:99x/v1"}, "expected http"),
        ({"base_url": "https://me:secret@h/v1"}, "no user, password"),
        ({"base_url": "https://h/v1?key=secret"}, "no user, password, query"),
        ({"model": ""}, "model is empty"),
        ({"usd_per_million_input": -1.0}, "usd_per_million_input is not given"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
        ({"max_usd": float("nan")}, "max_usd=nan"),
    ],
)
def test_endpoints_that_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        ask(endpoint("http://127.0.0.1:1/v1")._replace(**fields), [question("x")], tmp_path / "c")
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_cache_is_said(tmp_path: Path) -> None:
    where, file = endpoint("http://127.0.0.1:1/v1"), tmp_path / "c"
    file.write_text("not a database " * 100)
    with pytest.raises(UserError, match="cannot be used as a cache"):
        ask(where, [question("x")], file)
    file.unlink()
    assert chat_api.spent(where, file).calls == 0
    file.write_bytes(file.read_bytes().replace(b"CREATE TABLE replies", b"CREATE \xffABLE replies"))
    with pytest.raises(UserError, match="cannot be used as a cache of replies: .*invalid start byte"):
        ask(where, [question("x")], file)


@pytest.mark.parametrize(
    "reply", ["[1, 2, 3, 4, 5]", '["A", "stop", {"A": "x"}, 1, 1]', '["A", "stop", null, "1", 1]', "[" * 10**5, "{}"]
)
def test_a_kept_reply_that_is_none_is_named(reply: str, tmp_path: Path) -> None:
    where, file = endpoint("http://127.0.0.1:1/v1"), tmp_path / "c"
    chat_api.spent(where, file)
    with sqlite3.connect(file) as db:
        db.execute("INSERT INTO replies VALUES (?, ?)", (chat_api.request_hash(where, question("x")), reply))
    with pytest.raises(UserError, match="the reply to .* is damaged .*; delete its row, and it is asked for again"):
        ask(where, [question("x")], file)


def test_null_content_and_refusals_are_text(tmp_path: Path) -> None:
    refusal = {"choices": [{"message": {"content": None, "refusal": "I will not."}, "finish_reason": "stop"}]}
    with serve(lambda body, n: [completion(None), Answer(refusal)][n]) as server:
        texts = [
            r.text for r in ask(endpoint(server.url, concurrency=1), [question("x"), question("y")], tmp_path / "c")
        ]
    assert texts == ["", "I will not."]
    with sqlite3.connect(tmp_path / "c") as db:
        kept = [json.loads(row[0]) for row in db.execute("SELECT reply FROM replies")]
    assert ["", "stop", None, 10, 1] in kept


def test_the_bound_of_a_cost_is_that_of_what_is_sent() -> None:
    """Thoughts are paid for: the limit that is sent counts, and the text of the extra fields."""
    priced = endpoint("http://h/v1", usd_per_million_input=1.0, usd_per_million_output=1000.0)
    request = chat_api.Request((("user", "hello"),), 0.0, 1)
    bound = chat_api.cost_bound(priced, request)
    extra = {"max_tokens": None, "max_completion_tokens": 2000}
    more = chat_api.cost_bound(priced._replace(extra=extra), request)
    assert more - bound == pytest.approx(1999 * 1e-3 + len(json.dumps(extra)) * 1e-6)
    assert chat_api.cost_bound(priced._replace(extra={"max_completion_tokens": 9}), request) > 9e-3
    assert chat_api.request_hash(priced, request) != chat_api.request_hash(priced._replace(extra=extra), request)
