"""Several processes that run one program: waiting for each other, agreeing, writing once, and ending together.

Every process must call `barrier`, `gather`, `by_first` and `agree` in the same order. They say what they wait for, and
name who does not come. They go through JAX's coordinator (a small server in process 0), not through devices, so that
they work before any device is used and can run out of time. One process alone waits for nothing.

A process that fails tells the others, which end with its message and status. Where one is gone without a word (killed,
out of memory, cut off), the others end with the status LOST: by the error of the collective that they were in, or after
HEARTBEAT_S without a sign of life.
"""

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vdjax.errors import UserError
from vdjax.files import write_whole

LOST = 76  # exit status: another process is gone; the same command on all goes on from the newest resume point
TIMEOUT_S = 1800.0  # for processes that should all be about as far
LONG_S = 24 * 3600.0  # for what the first process does alone, such as rendering data or writing a report
PATIENCE_S = 10.0  # before it is said what is waited for; then after twice as long, and so on
HEARTBEAT_S = 30  # without a sign of life from a process, after which it counts as gone
ROLL_CALL_S = 12.0  # for the processes that are left to answer when one ends
GRACE_S = 3.0  # for a process to end by itself, with a message of its own, when another one has
SHARED_S = 20.0  # for a new file to be seen by all on network storage
PART = 2**20  # characters of a value that are handed to the coordinator at once, whose messages are limited

NOTICE, ENDED, BYE = "vdjax/notice", "vdjax/ended", "vdjax/bye"  # keys with the coordinator
FINISHED = "finished"

_names: dict[int, str] = {}  # hosts, by process
_numbers = itertools.count()  # of waits and values
_fresh: list[str] = []  # keys of this process's values, which the others read after the wait that follows ...
_stale: list[str] = []  # ... and have read once the wait after that is over
_ending = threading.Lock()  # held by the thread that ends this process
_status: list[int] = []  # with which it ends, once that is settled
_threads: list[threading.Thread] = []
_on_abort: list[Any] = []  # kept, as C does not


def count() -> int:
    """Processes. Unlike `jax.process_count`, it starts no backend."""
    return distributed.global_state.num_processes


def index() -> int:
    return distributed.global_state.process_id


def listed(processes: Sequence[int]) -> str:
    """Their numbers and hosts, of many the first few."""
    shown = ", ".join(f"process {i} of {count()} ({_names.get(i, '?')})" for i in processes[:5])
    return shown + (f" and {len(processes) - 5} more" if len(processes) > 5 else "")


def _client() -> Any:
    return distributed.global_state.client


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Waiting


def barrier(what: str, timeout: float = TIMEOUT_S) -> None:
    """Waits until all processes are here.

    Args:
      what: what is waited for, in words that are the same on all processes.

    Raises:
      UserError: some did not come within `timeout` seconds; names them, and what they wait for themselves.
    """
    if count() == 1:
        return
    number = next(_numbers)
    _client().key_value_set(f"vdjax/at/{index()}", json.dumps((number, what)), allow_overwrite=True)

    def say(seconds: float) -> None:
        if missing := list(_behind(number, what)):
            _print(f"waiting for {what}, {seconds:.0f} s: {listed(missing)}")

    if error := _wait_at(f"vdjax/barrier/{number}/{what}", timeout, say):
        if "DEADLINE_EXCEEDED" not in str(error):
            raise error
        behind = _behind(number, what)
        without = f"without {listed(list(behind))}" if behind else "others gave up before"
        elsewhere = "".join(f"; process {i} waits for {at}" for i, at in list(behind.items())[:5] if at)
        raise UserError(f"waited {timeout:.0f} s for {what}: {without}{elsewhere}")
    for key in _stale:
        _client().key_value_delete(key)
    _stale[:], _fresh[:] = _fresh, []


def _wait_at(key: str, timeout: float, say: Callable[[float], None]) -> JaxRuntimeError | None:
    """Waits at a barrier of the coordinator in a thread of its own, so that signals are heard meanwhile."""
    over, errors = threading.Event(), []

    def wait() -> None:
        try:
            _client().wait_at_barrier(key, int(1000 * timeout))
        except JaxRuntimeError as error:
            errors.append(error)
        finally:
            over.set()

    threading.Thread(target=wait, daemon=True).start()
    begun, patience = time.monotonic(), PATIENCE_S
    while not over.wait(patience):
        say(time.monotonic() - begun)
        patience *= 2
    return errors[0] if errors else None


def _behind(number: int, what: str) -> dict[int, str]:
    """The processes that have not come to a wait, and what each waited for last."""
    found = {i: (-1, "") for i in range(count())}
    for key, value in _client().key_value_dir_get("vdjax/at/"):
        found[int(key.rpartition("/")[2])] = tuple(json.loads(value))
    # At another wait with the same number is who has gone another way through the program.
    return {i: at for i, (n, at) in found.items() if n < number or (n == number and at != what)}


# Agreeing


def gather(what: str, value: Any) -> list[Any]:
    """The values of all processes, in their order. They must have a form in JSON.

    Raises:
      UserError: as `barrier`.
    """
    if count() == 1:
        return [value]
    folder = _put(value)
    barrier(what)
    return [_get(f"{folder}/{i}") for i in range(count())]


def by_first(what: str, function: Callable[[], Any], timeout: float = LONG_S) -> Any:
    """What the first process gets from `function`, on all: they wait for it. It must have a form in JSON.

    For what is to be done once, such as writing a file, and for decisions that must be the same on all.

    Raises:
      UserError: as `barrier`.
    """
    if count() == 1:
        return function()
    folder = _put(function()) if index() == 0 else _folder()
    barrier(what, timeout)
    return _get(f"{folder}/0")


def _folder() -> str:
    """Where the coordinator keeps the processes' next values."""
    return f"vdjax/value/{next(_numbers)}"


def _put(value: Any) -> str:
    """Hands this process's value to the coordinator."""
    folder, text = _folder(), json.dumps(value)
    parts = [text[i : i + PART] for i in range(0, len(text), PART)]
    content = {f"{folder}/{index()}/{k}": part for k, part in enumerate(parts)}
    for key, part in (content | {f"{folder}/{index()}": str(len(parts))}).items():
        _client().key_value_set(key, part)
        _fresh.append(key)
    return folder


def _get(key: str) -> Any:
    parts = int(_client().key_value_try_get(key))
    return json.loads("".join(_client().key_value_try_get(f"{key}/{k}") for k in range(parts)))


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Checks that all processes have the same facts.

    Raises:
      UserError: on all processes: the facts that differ, and which processes have which.
    """
    if count() == 1:
        return
    own = {key: json.dumps(value, sort_keys=True, default=str) for key, value in facts.items()}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if len(set(gather(f"all to compare {what}", digest))) == 1:
        return
    first = by_first(f"{what} of process 0", lambda: own)
    others = {key: own.get(key) for key in first.keys() | own.keys() if own.get(key) != first.get(key)}
    found = gather(f"the differences in {what}", others)
    lines = []
    for key in sorted(set().union(*found))[:20]:
        values = [different[key] if key in different else first.get(key) for different in found]
        usual = Counter(values).most_common(1)[0][0]
        odd = {value: [i for i, v in enumerate(values) if v == value] for value in values if value != usual}
        rest = [i for i, v in enumerate(values) if v == usual]
        parts = [f"{value} on {listed(where)}" for value, where in odd.items()]
        lines.append(f"  {key}: {'; '.join(parts)}; {usual} on {listed(rest)}")
    raise UserError("\n".join([f"the processes differ in {what}, and must all be started alike:", *lines]))


def check_shared(folder: Path) -> None:
    """Checks that `folder` is one and the same on all processes.

    Raises:
      UserError: names those that do not see a file which the first process has written there.
    """

    def write() -> list[str]:
        token = f".seen-by-all-{uuid.uuid4().hex}"
        write_whole(folder / token, "")
        return [str(folder), token]

    if count() == 1:
        return
    where, token = by_first("a first file in the workdir", write)
    file = folder / token
    until = time.monotonic() + SHARED_S
    while not (seen := file.exists()) and time.monotonic() < until:
        time.sleep(0.5)
    all_seen = gather("all to see a first file in the workdir", seen)
    by_first("its removal", file.unlink)
    blind = [i for i, saw in enumerate(all_seen) if not saw]
    if blind:
        raise UserError(f"{where} of process 0 is not that of {listed(blind)}; give a directory that all share")


def stop_vote(mesh: Mesh) -> Callable[[bool], bool]:
    """A function that all processes call once a step with whether they were asked to stop, and that says to stop.

    It says so on all processes at the same step if any was asked; where there are several, one step later, so that no
    process waits for its devices.
    """
    if count() == 1:
        return lambda asked: asked
    split, whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())
    any_of = jax.jit(jnp.any, out_shardings=whole)

    def ask(asked: bool) -> jax.Array:
        return any_of(jax.make_array_from_callback((mesh.size,), split, lambda _: np.array([asked])))

    votes = [ask(False)]

    def vote(asked: bool) -> bool:
        votes.append(ask(asked))
        return bool(votes.pop(0))

    return vote


# Ending


def watch(names: Sequence[str]) -> None:
    """To be called once, when `jax.distributed` is initialized: this process ends when another one does.

    Args:
      names: hosts, by process.
    """
    _names.update(enumerate(names))
    for target in (_hear_notice, _hear_death):
        _threads.append(threading.Thread(target=target, daemon=True))
        _threads[-1].start()

    # JAX's client aborts the process when the coordinator is gone or says that a process is, often before a thread of
    # ours has heard. A signal handler of Python's would not get to run any more; one of C's does.
    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(_: int) -> None:
        ctypes.CDLL(None).signal(signal.SIGABRT, None)
        if not _status:
            _print(_lost("a process that is named above" if index() == 0 else listed([0])))
        os._exit(_status[0] if _status else LOST)

    _on_abort.append(on_abort)
    ctypes.CDLL(None).signal(signal.SIGABRT, on_abort)


def _lost(who: str) -> str:
    return (
        f"error: lost {who}: killed, out of memory, or cut off. This process ends with status {LOST}; the same command "
        "on all hosts goes on from the newest resume point"
    )


def _hear_notice() -> None:
    """Ends this process when another one says that it ends."""
    while True:
        try:
            text = _client().blocking_key_value_get(NOTICE, 600_000)
            break
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return _lose([0])
    if text == FINISHED:
        return
    process, status, message = json.loads(text)
    if process != index():
        time.sleep(GRACE_S)
        end(status, message, f"error: {listed([process])}: {message}")


def _hear_death() -> None:
    """Ends this process when the coordinator hears no more of another one: a wait that nobody else comes to fails."""
    try:
        _client().wait_at_barrier(f"vdjax/alive/{index()}", 10**11)
    except JaxRuntimeError as error:
        found = re.search(r"\b[Tt]ask (\d+)", str(error))
        _lose([int(found[1])] if found else [])


def _lose(processes: Sequence[int]) -> None:
    if _ending.acquire(blocking=False):
        _print(_lost(listed(processes) if processes else "a process"))
        _exit(LOST)


def _exit(status: int) -> None:
    """Without the clean-up of Python and its libraries, which would wait for the other processes."""
    _status.append(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end(status: int, message: str, details: str = "") -> None:
    """Ends this process with `status`, and has the others end; alone it does nothing.

    Where others do not answer, they are the cause: they are named, and the status is LOST.

    Args:
      message: the reason, for the others.
      details: printed where all others answer.
    """
    if count() == 1:
        return
    while not _ending.acquire(blocking=False):  # another thread is at it
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    with contextlib.suppress(JaxRuntimeError):  # another process may have been first
        _client().key_value_set(NOTICE, json.dumps((index(), status, message)))
    missing = _roll_call(status)
    if missing:
        _print(f"{_lost(listed(missing))}\n({message})")
    elif details:
        _print(details)
    _exit(LOST if missing else status)


def _roll_call(status: int) -> list[int]:
    """The processes that do not come to the end, which has `status` where all do."""
    try:
        _client().key_value_set(f"{ENDED}/{index()}", "")
        if _wait_at(ENDED, ROLL_CALL_S, lambda _: None):
            here = {int(key.rpartition("/")[2]) for key, _ in _client().key_value_dir_get(f"{ENDED}/")}
            return [i for i in range(count()) if i not in here]
        _status.append(status)  # whoever is gone from here on is not lost
        # The coordinator goes last, for without it the others would be told that it is lost.
        _client().key_value_set(f"{BYE}/{index()}", "")
        for _ in range(200 if index() == 0 else 0):
            if len(_client().key_value_dir_get(f"{BYE}/")) == count():
                break
            time.sleep(0.1)
    except JaxRuntimeError:
        return [0] if index() and not _status else []
    return []


def leave() -> None:
    """Waits for the others at the end of a program that went well."""
    if count() == 1:
        return
    barrier("all processes to finish", LONG_S)
    with _ending:
        _status.append(0)
        if index() == 0:
            _client().key_value_set(NOTICE, FINISHED)
        for thread in _threads[:1]:
            thread.join(GRACE_S)
        jax.distributed.shutdown()
        ctypes.CDLL(None).signal(signal.SIGABRT, None)
        for thread in _threads:
            thread.join(GRACE_S)
        # Python would crash at its end on a thread that comes back from C only then.
        if any(thread.is_alive() for thread in _threads):
            _exit(0)
