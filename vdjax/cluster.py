"""How the processes of a job find each other: told by flags or the environment, then met at the coordinator's port.

Known are the flags --coordinator, --num_processes and --process_id; the variables JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID (or JOB_COMPLETION_INDEX, which Kubernetes sets in the pods of an indexed job); and
what JAX itself reads: Cloud TPU slices (queued resources, GKE with JobSet), SLURM steps and Open MPI.
"""

import argparse
import json
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import jax
from jax._src import clusters

from vdjax import hosts
from vdjax.errors import UserError

FLAGS = ("coordinator", "num_processes", "process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
INDEX_OF_JOB = "JOB_COMPLETION_INDEX"
JOIN_S = 300.0  # for all processes to be started
HELLO_S = 5.0  # for one that has connected to say who it is
MOST_BYTES = 2**20  # of what is said at the port
OWN_SIZES = {"slurm": "SLURM_NTASKS", "ompi": "OMPI_COMM_WORLD_SIZE"}  # say without any waiting that there are several


class NotThere(UserError):
    """Not all processes came in time. They may yet, as when a slice is given back later than another: started again,
    the same command goes on."""

    status = hosts.LOST


class Place(NamedTuple):
    """A process in its job."""

    coordinator: str  # HOST:PORT, of process 0
    processes: int
    process: int
    devices: list[int] | None = None  # that are this process's own, where the launcher shares them out (GPUs)


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes", "needed only where the environment does not tell (vdjax.cluster)"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; a free port there")
    group.add_argument("--num_processes", type=int, metavar="N")
    group.add_argument("--process_id", type=int, metavar="I", help="from 0 to N - 1")


def find(flags: argparse.Namespace | None, environ: Mapping[str, str]) -> Place | None:
    """Where this process stands in its job; None where it is the only one. Asks nobody where nothing says otherwise.

    Raises:
      UserError: flags or variables that are incomplete or make no sense.
    """
    given = [getattr(flags, name, None) for name in FLAGS]
    if any(value is not None for value in given):
        return _checked(given, [f"--{name}" for name in FLAGS])
    if environ.get(VARIABLES[0]):
        process = environ.get(VARIABLES[2]) or environ.get(INDEX_OF_JOB)
        told: list[Any] = [environ[VARIABLES[0]], environ.get(VARIABLES[1]), process]
        launched = _launched(environ)
        if launched:  # the variable may only say which address and port to use
            told = [told[0], told[1] or launched.processes, told[2] or launched.process]
        place = _checked(told, [*VARIABLES[:2], f"{VARIABLES[2]} (or {INDEX_OF_JOB})"])
        return place._replace(devices=launched.devices) if place and launched else place
    return _launched(environ)


def _checked(values: list[Any], names: list[str]) -> Place | None:
    missing = [name for name, value in zip(names, values, strict=True) if value in (None, "")]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: {', '.join(names)} go together")
    numbers = []
    for name, value in zip(names[1:], values[1:], strict=True):
        if not str(value).isdecimal():
            raise UserError(f"{name}={value}: expected a number")
        numbers.append(int(value))
    host, _, port = str(values[0]).rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{names[0]}={values[0]}: expected HOST:PORT, such as 10.0.0.2:8476")
    processes, process = numbers
    if process >= processes:
        raise UserError(f"{names[2]}={process}: expected 0 to {processes - 1}, as there are {processes} processes")
    return Place(str(values[0]), processes, process) if processes > 1 else None


def _launched(environ: Mapping[str, str]) -> Place | None:
    """What JAX makes of the environment."""
    for kind in clusters.ClusterEnv._cluster_types:
        own_size = environ.get(OWN_SIZES.get(kind.name, ""), "")
        tpus = kind.name in ("gketpu", "gcetpu") and "tpu" in (environ.get("JAX_PLATFORMS") or "tpu")
        if not (tpus or (own_size.isdecimal() and int(own_size) > 1)) or not kind.is_env_present():
            continue
        if kind.get_process_count() == 1:
            return None
        local = None if tpus else kind.get_local_process_id()
        return Place(
            kind.get_coordinator_address(int(JOIN_S), environ.get("JAX_COORDINATOR_PORT")),
            kind.get_process_count(),
            kind.get_process_id(),
            None if local is None else [local],
        )
    return None


def join(place: Place) -> None:
    """Meets the other processes and initializes `jax.distributed`; call it before anything uses a device.

    Raises:
      UserError: processes that do not come within JOIN_S, or do not fit together; names them.
    """
    names = meet(place)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM would stand in the way of ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(JOIN_S),
        heartbeat_timeout_seconds=hosts.HEARTBEAT_S,
        shutdown_timeout_seconds=hosts.HEARTBEAT_S,
    )
    hosts.watch(names)


def meet(place: Place, timeout: float = JOIN_S, say: Callable[[str], None] | None = None) -> list[str]:
    """The hosts of all processes, once all are there.

    JAX's own start aborts a process when another one does not come, and does not say which. So they first meet at the
    port that JAX's coordinator will have: each tells process 0 who it is, and is told who the others are.

    Raises:
      UserError: as `join`, on all processes that are there.
    """
    return (_receive if place.process == 0 else _visit)(place, timeout, say or hosts._print)


def _receive(place: Place, timeout: float, say: Callable[[str], None]) -> list[str]:
    found = {0: socket.gethostname()}
    begun, patience = time.monotonic(), hosts.PATIENCE_S
    with ExitStack() as stack:
        port = int(place.coordinator.rpartition(":")[2])
        try:
            server = stack.enter_context(_listen(port, place.processes))
        except OSError as error:
            raise UserError(f"process 0 cannot listen at {place.coordinator}: {error}; choose another port") from error
        guests: dict[int, socket.socket] = {}
        problem, late = "", False
        while len(found) < place.processes and not problem:
            for process in [i for i, guest in guests.items() if _gone(guest)]:  # to be started anew, perhaps
                guests.pop(process).close()
                found.pop(process)
            waited = time.monotonic() - begun
            missing = [i for i in range(place.processes) if i not in found]
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            if late := waited > timeout:
                problem = f"waited {timeout:.0f} s for all {place.processes} processes to start; not there: {shown}"
                break
            if waited > patience:
                say(f"waiting for processes {shown} of {place.processes} to start, {waited:.0f} s")
                patience *= 2
            server.settimeout(0.2)
            try:
                guest = stack.enter_context(server.accept()[0])
                guest.settimeout(HELLO_S)
                hello = _read(guest)
                process, processes, host = int(hello["process"]), int(hello["processes"]), str(hello["host"])
            except (OSError, ValueError, KeyError, TypeError):  # nobody came, or somebody else
                continue
            if processes != place.processes:
                problem = f"{host} is process {process} of {processes}, but {found[0]} process 0 of {place.processes}"
            elif process in found:
                problem = f"process {process} is there twice, on {found[process]} and {host}"
            # The second of two is told as well.
            guests[process if process not in guests else -1] = guest
            found.setdefault(process, host)
        names = [found.get(i) for i in range(place.processes)]
        answer = {"problem": problem, "late": late} if problem else {"hosts": names}
        for guest in guests.values():
            with suppress(OSError):
                guest.sendall(json.dumps(answer).encode() + b"\n")
    if problem:
        raise (NotThere if late else UserError)(problem)
    return [found[i] for i in range(place.processes)]


def _gone(guest: socket.socket) -> bool:
    """Whether the other side has closed its end."""
    guest.setblocking(False)
    try:
        return not guest.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        guest.settimeout(HELLO_S)


def _listen(port: int, guests: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=guests, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=guests)


def _visit(place: Place, timeout: float, say: Callable[[str], None]) -> list[str]:
    hello = {"process": place.process, "processes": place.processes, "host": socket.gethostname()}
    host, _, port = place.coordinator.rpartition(":")
    begun, patience = time.monotonic(), hosts.PATIENCE_S
    while True:
        waited = time.monotonic() - begun
        if waited > timeout + HELLO_S:  # process 0, if it is there, knows who is missing
            raise NotThere(
                f"waited {waited:.0f} s for process 0 at {place.coordinator}; is it started, and does its host let "
                "others reach this port?"
            )
        if waited > patience:
            say(f"waiting for process 0 at {place.coordinator}, {waited:.0f} s")
            patience *= 2
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=HELLO_S) as door:
                door.sendall(json.dumps(hello).encode() + b"\n")
                door.settimeout(max(timeout + HELLO_S - waited, HELLO_S))
                answer = _read(door)
        except (OSError, ValueError):  # not there yet, or the one of an earlier job, which is about to end
            time.sleep(0.3)
            continue
        if answer.get("problem"):
            raise (NotThere if answer.get("late") else UserError)(str(answer["problem"]))
        return list(map(str, answer["hosts"]))


def _read(door: socket.socket) -> dict[str, Any]:
    """One line of JSON."""
    with door.makefile("rb") as lines:
        try:
            value = json.loads(lines.readline(MOST_BYTES) or b"null")
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value
