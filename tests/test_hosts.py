"""Several real processes on this machine, with collectives over loopback: what one process does, they do."""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import tiny
from jax._src.clusters import cloud_tpu_cluster
from jax._src.clusters import cluster as jax_cluster
from test_experiment import STAGES, all_params, metrics

from vdjax import cluster, files, runtime, snapshots
from vdjax.cluster import Place
from vdjax.errors import UserError

# Experiments of several processes on the cores of one machine: minutes each.
LIMIT_S = 400  # after which what a test has started is killed


class Ended(NamedTuple):
    status: int
    text: str  # that it printed
    at: float  # time


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_all(
    commands: Sequence[Sequence[str]], folder: Path, *, within: Sequence[Path] = (), **environment: str
) -> list[Ended]:
    """Runs processes side by side to their ends; when one is stopped (SIGSTOP) and the others have ended, kills it.

    Args:
      within: the working directory of each.
    """
    env = tiny.environment() | {"JAX_PLATFORMS": "cpu"} | environment
    logs = [folder / f"{time.time_ns()}-{i}.txt" for i in range(len(commands))]
    running: dict[int, subprocess.Popen] = {}
    ended: dict[int, Ended] = {}
    try:
        for i, command in enumerate(commands):
            with open(logs[i], "w") as out:
                cwd = within[i] if within else None
                running[i] = subprocess.Popen([sys.executable, *command], env=env, cwd=cwd, stdout=out, stderr=out)
        until = time.monotonic() + LIMIT_S
        while running and time.monotonic() < until:
            for i, process in list(running.items()):
                if process.poll() is not None:
                    ended[i] = Ended(process.returncode, logs[i].read_text(), time.monotonic())
                    del running[i]
            if running and all(is_stopped(process.pid) for process in running.values()):
                break
            time.sleep(0.05)
    finally:
        for i, process in running.items():
            process.kill()
            ended[i] = Ended(process.wait(), logs[i].read_text(), time.monotonic())
    return [ended[i] for i in range(len(commands))]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def places(count: int) -> list[list[str]]:
    """Flags of each process of a job of its own."""
    start = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", str(count), "--process_id"]
    return [[*start, str(i)] for i in range(count)] if count > 1 else [[]]


def training(
    count: int, arguments: Sequence[str], folder: Path, *, armed: Mapping[int, str] = {}, **environment: str
) -> list[Ended]:
    """`vdjax.main` in `count` processes; `armed` says which one stops itself, as in stop_at.py."""
    script = str(tiny.HERE / "stop_at.py")
    commands = [
        [script, *armed.get(i, "RUN sft 0").split(), *arguments, *place] for i, place in enumerate(places(count))
    ]
    return run_all(commands, folder, **environment)


def resume_points(workdir: Path, stage: str) -> list[int]:
    return sorted(int(p.name) for p in (workdir / stage / "resume").iterdir() if p.name.isdigit())


def assert_close(one: Path, other: Path) -> None:
    """Metrics, parameters and DPO's answers to 1e-5. Prints what they differ by."""
    apart = {"metrics": 0.0, "parameters": 0.0}
    for stage in STAGES:
        for row, same in zip(metrics(one, stage), metrics(other, stage), strict=True):
            assert row.keys() == same.keys()
            for key, value in row.items():
                if key.endswith("accuracy") and row["step"] in (0, 1):
                    continue  # all margins are zero there, up to rounding
                assert same[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (stage, row["step"], key)
                apart["metrics"] = max(apart["metrics"], abs(same[key] - value) / max(1, abs(value)))
        for step in snapshots.kept(one / stage / "snapshots"):
            a, b = (all_params(workdir / stage / "snapshots" / str(step)) for workdir in (one, other))
            for name in a:
                values = (a[name].view(np.float32), b[name].view(np.float32))
                np.testing.assert_allclose(*values, rtol=0, atol=1e-5, err_msg=f"{stage} {step} {name}")
                apart["parameters"] = max(apart["parameters"], float(np.abs(np.subtract(*values)).max()))
    keys = ["step", "probe_id", "stance", "answer"]
    first, second = (pd.read_parquet(workdir / "probes" / "dpo.parquet") for workdir in (one, other))
    first, second = (table[table["readout"] == "statement"].sort_values(keys) for table in (first, second))
    assert first[keys].to_numpy().tolist() == second[keys].to_numpy().tolist() and len(first) > 0
    np.testing.assert_allclose(first["log_prob"], second["log_prob"], rtol=1e-5, atol=1e-5)
    apart["log-probs of answers"] = float(np.abs(first["log_prob"].to_numpy() - second["log_prob"].to_numpy()).max())
    print(*(f"{name} differ by at most {value:.1e}" for name, value in apart.items()), sep="; ")


@pytest.fixture(scope="module")
def plain(tiny_data: Path) -> list[str]:
    """The arguments of an experiment with forced choices alone."""
    return ["--config", f"{tiny.HERE / 'tiny_hosts_config.py'}:{tiny_data}"]


@pytest.fixture(scope="module")
def alone(plain: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process with one device makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    (one,) = training(1, [*plain, "--workdir", str(folder / "run")], folder)
    assert one.status == 0, one.text
    return folder / "run"


@pytest.fixture(scope="module")
def arguments(plain: list[str], alone: Path) -> list[str]:
    """Those of the same experiment, with responses and a judge as well."""
    return [plain[0], f"{plain[1]},{alone / 'sft' / 'snapshots' / '6'}"]


@pytest.fixture(scope="module")
def uninterrupted(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment in two processes."""
    folder = tmp_path_factory.mktemp("two")
    for one in training(2, [*arguments, "--workdir", str(folder / "run")], folder):
        assert one.status == 0, one.text
    return folder / "run"


def test_two_processes_do_what_one_does(uninterrupted: Path, alone: Path) -> None:
    assert_close(alone, uninterrupted)
    said = pd.read_parquet(uninterrupted / "responses" / "dpo.parquet")
    judged = pd.read_parquet(uninterrupted / "judgements" / "tiny" / "dpo.parquet")
    assert len(said) == 6 * 2 * 4 and len(judged) == (said["degenerate"] == "").sum() > 0
    assert (uninterrupted / "report.html").exists()
    assert not list(uninterrupted.glob(".seen*"))


@tiny.SLOW
def test_a_killed_process_ends_the_others_and_the_job_goes_on_bit_for_bit(
    uninterrupted: Path, arguments: list[str], tmp_path: Path
) -> None:
    run = [*arguments, "--workdir", str(tmp_path / "run")]
    # Process 0 holds the coordinator, without which JAX's client aborts the others.
    for victim, where in ((1, "sft 3"), (0, "sft 5")):
        ended = training(2, run, tmp_path, armed={victim: f"KILL {where}"})
        dead, left = ended[victim], ended[1 - victim]
        assert dead.status == -signal.SIGKILL, dead.text
        assert left.status == 76, left.text
        assert f"lost process {victim} of 2" in left.text and "goes on from the newest resume point" in left.text
        assert left.at - dead.at < 60
        print(f"process {victim} killed: the other one ended after {left.at - dead.at:.1f} s")
        assert not (tmp_path / "run" / "sft" / "done.json").exists()
    for one in training(2, run, tmp_path):
        assert one.status == 0, one.text
    for stage in STAGES:
        assert metrics(uninterrupted, stage) == metrics(tmp_path / "run", stage)
        for step in snapshots.kept(uninterrupted / stage / "snapshots"):
            a, b = (all_params(w / stage / "snapshots" / str(step)) for w in (uninterrupted, tmp_path / "run"))
            for name in a:
                np.testing.assert_array_equal(a[name], b[name], err_msg=f"{stage} {step} {name}")
    for folder in ("probes", "responses", "judgements/tiny"):
        tables = [pd.read_parquet(workdir / folder / "dpo.parquet") for workdir in (uninterrupted, tmp_path / "run")]
        pd.testing.assert_frame_equal(*tables)


@pytest.fixture(scope="module")
def stopped(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment in two processes, of which one was told to stop."""
    folder = tmp_path_factory.mktemp("stopped")
    run = [*arguments, "--workdir", str(folder / "run")]
    for one in training(2, run, folder, armed={1: "TERM dpo 1"}):
        assert one.status == 75, one.text
        assert "dpo: stopped at step 3 of 6; a resume point was written" in one.text
    return folder / "run"


@tiny.SLOW
def test_a_signal_to_one_process_stops_all_at_the_same_step(stopped: Path) -> None:
    assert resume_points(stopped, "dpo")[-1] == 3


@tiny.SLOW
def test_four_processes_go_on_where_two_stopped(
    stopped: Path, alone: Path, plain: list[str], tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    run = [*plain, "--workdir", str(tmp_path / "run"), "--config.mesh.data=2", "--config.mesh.fsdp=2"]
    for one in training(4, run, tmp_path):
        assert one.status == 0, one.text
    assert_close(alone, tmp_path / "run")


@tiny.SLOW
def test_one_process_goes_on_on_another_mesh(
    stopped: Path, uninterrupted: Path, alone: Path, arguments: list[str], tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    run = [*arguments, "--workdir", str(tmp_path / "run"), "--config.mesh.fsdp=1", "--config.mesh.tensor=2"]
    (one,) = training(1, run, tmp_path, XLA_FLAGS=flags)
    assert one.status == 0, one.text
    assert_close(alone, tmp_path / "run")
    said = [pd.read_parquet(w / "responses" / "dpo.parquet")["response"] for w in (uninterrupted, tmp_path / "run")]
    assert (said[0] == said[1]).mean() > 0.95


@tiny.SLOW
def test_a_process_that_hangs_ends_the_others(plain: list[str], tmp_path: Path) -> None:
    run = [*plain, "--workdir", str(tmp_path / "run")]
    left, hung = training(2, run, tmp_path, armed={1: "STOP sft 1"}, HEARTBEAT_S="5")
    assert hung.status == -signal.SIGKILL  # by the test
    assert left.status == 76, left.text
    assert "lost process 1 of 2" in left.text


@tiny.SLOW
def test_an_error_on_one_process_ends_all_with_its_message(plain: list[str], tmp_path: Path) -> None:
    run = [*plain, "--workdir", str(tmp_path / "run")]
    for one in training(2, run, tmp_path, armed={1: "FAIL sft 1"}):
        assert one.status == 2, one.text
        assert "the disk is full" in one.text
        assert "Traceback" not in one.text


def test_another_config_on_one_process_is_named(plain: list[str], tmp_path: Path) -> None:
    run = ["-m", "vdjax.main", *plain, "--workdir", str(tmp_path / "run")]
    commands = [[*run, f"--config.seed={i}", *place] for i, place in enumerate(places(2))]
    host = socket.gethostname()
    for one in run_all(commands, tmp_path):
        assert one.status == 2, one.text
        assert "the processes differ in the config" in one.text
        assert f"config.seed: 1 on process 1 of 2 ({host}); 0 on process 0 of 2 ({host})" in one.text
    assert not (tmp_path / "run").exists()


def test_other_code_and_other_data_on_one_process_are_named(tiny_data: Path, tmp_path: Path) -> None:
    """Each has a package and a file of data of its own, at the same place below the directory that it works in."""
    homes = [tmp_path / name for name in ("zero", "one")]
    for home in homes:
        shutil.copytree(Path(runtime.__file__).parent, home / "vdjax")
        shutil.copytree(tiny_data, home / "data")
        os.utime(home / "data" / "sft.jsonl", (1, homes.index(home)))  # which makes no difference
    run = ["-m", "vdjax.main", "--config", f"{tiny.HERE / 'tiny_hosts_config.py'}:data", "--workdir"]
    version, rows = homes[1] / "vdjax" / "__init__.py", homes[1] / "data" / "preferences.jsonl"
    for file, differ, both in (
        (version, "the code", "files of vdjax: "),
        (rows, "what the data of data/preferences.jsonl depend on", "files: "),
    ):
        was = file.read_text()
        file.write_text(was + "\n")
        commands = [[*run, str(tmp_path / "run"), *place] for place in places(2)]
        for one in run_all(commands, tmp_path, within=homes, PYTHONSAFEPATH=""):
            assert one.status == 2, one.text
            assert f"the processes differ in {differ}" in one.text and f"  {both}" in one.text
            assert f"on process 1 of 2 ({socket.gethostname()})" in one.text
        file.write_text(was)


@tiny.SLOW
def test_two_processes_share_a_bucket(bucket: Path, plain: list[str], alone: Path, tmp_path: Path) -> None:
    """One is killed while both save there."""
    workdir = bucket / "two"
    run = [*plain, "--workdir", str(workdir)]
    left, dead = training(2, run, tmp_path, armed={1: "SAVE dpo 4"})
    assert dead.status == -signal.SIGKILL, dead.text
    assert left.status == 76, left.text
    assert 2 in resume_points(workdir, "dpo")
    for one in training(2, run, tmp_path):
        assert one.status == 0, one.text
    copy = files.local_copy(workdir)
    assert_close(alone, copy)
    assert (copy / "report.html").exists()


def test_waiting_agreeing_and_sharing(tmp_path: Path) -> None:
    command = [str(tiny.HERE / "hosts_script.py"), str(free_port()), "3"]
    ended = run_all([[*command, str(i), str(tmp_path)] for i in range(3)], tmp_path)
    for one in ended:
        assert one.status == 0, one.text
    results = [json.loads(one.text.splitlines()[-1]) for one in ended]
    host = socket.gethostname()
    zero, first, second = (f"process {i} of 3 ({host})" for i in range(3))
    for result in results:
        assert result["gathered"] == [0.0, 1.1, 2.2] and result["first"] == [0, 0.1 + 0.2, None] and result["big"]
        assert result["same"] == result["shared"] == ""
        assert result["odd"].splitlines()[1] == f'  b: "x" on {first}; "y" on {zero}, {second}'
        assert result["missing"].splitlines()[1] == f"  c: 2 on {first}; None on {zero}, {second}"
        assert result["not_shared"].startswith(f"{tmp_path / '0'} of process 0 is not that of {first}, {second};")
        assert result["after"] == [0, 1, 2]
    assert results[0]["late"] == results[2]["late"] == (
        f"waited 2 s for one that never comes: without {first}; process 1 waits for something else"
    )
    assert results[1]["late"].startswith("waited 5 s for something else: ")
    assert f"waiting for a slow one, 1 s: {first}" in ended[0].text


# How processes find each other


def found(arguments: Sequence[str] = (), **environ: str) -> Place | None:
    parser = argparse.ArgumentParser()
    cluster.add_flags(parser)
    return cluster.find(parser.parse_args(arguments), environ)


def test_flags_and_variables_place_a_process() -> None:
    flags = ["--coordinator", "a:1", "--num_processes", "4", "--process_id", "3"]
    assert found(flags) == Place("a:1", 4, 3)
    assert found([*flags[:2], "--num_processes", "1", "--process_id", "0"]) is None
    variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}
    assert found(**variables, JAX_PROCESS_ID="2") == found(**variables, JOB_COMPLETION_INDEX="2") == Place("a:1", 4, 2)
    for wrong, match in (
        (flags[:2], "--num_processes and --process_id missing: --coordinator, --num_processes, --process_id go to"),
        (["--coordinator", "a", *flags[2:]], "--coordinator=a: expected HOST:PORT"),
        ([*flags[:4], "--process_id", "4"], "--process_id=4: expected 0 to 3"),
    ):
        with pytest.raises(UserError, match=match):
            found(wrong)
    with pytest.raises(UserError, match=r"JAX_PROCESS_ID \(or JOB_COMPLETION_INDEX\) missing"):
        found(**variables)


def test_slurm_places_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(SLURM_JOB_ID="7", SLURM_NTASKS="1") is None
    environ = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-9]", "SLURM_NTASKS": "14", "SLURM_PROCID": "5"}
    environ |= {"SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "7"}
    for key, value in environ.items():
        monkeypatch.setenv(key, value)  # JAX reads os.environ
    assert found(**environ) == Place("node3:61447", 14, 5, [1])
    assert found(["--coordinator", "a:1", "--num_processes", "2", "--process_id", "0"], **environ) == Place("a:1", 2, 0)


def test_a_tpu_slice_places_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GKE's JobSet sets the environment of a pod: two slices of two hosts each."""
    environ = {"TPU_WORKER_HOSTNAMES": "localhost,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2"}
    environ |= {"MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080"}
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    assert found(**environ) is None  # no TPU is here
    for module in (cloud_tpu_cluster, jax_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    assert found(**environ) == Place("localhost:8482", 4, 3)
    assert found(**environ, JAX_PLATFORMS="cpu") is None


def test_alone_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "join", None)
    monkeypatch.setattr(socket, "create_connection", None)
    assert found() is None


def meeting(places: Sequence[Place], timeout: float) -> tuple[list[Any], list[str]]:
    """What `cluster.meet` gives each place, each in a thread of its own; and what is said meanwhile."""
    results: list[Any] = [None] * len(places)
    said: list[str] = []

    def visit(i: int) -> None:
        try:
            results[i] = cluster.meet(places[i], timeout, said.append)
        except UserError as error:
            results[i] = f"{error.status}: {error}"

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results, said


def test_processes_meet_or_are_told_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    host, where = socket.gethostname(), [f"localhost:{free_port()}" for _ in range(5)]
    monkeypatch.setattr(cluster.hosts, "PATIENCE_S", 0.2)
    monkeypatch.setattr(cluster, "HELLO_S", 1.0)
    results, _ = meeting([Place(where[0], 3, i) for i in (2, 0, 1)], 30)
    assert results == [[host] * 3] * 3
    results, said = meeting([Place(where[1], 4, i) for i in (0, 2)], 2)
    assert results == ["76: waited 2 s for all 4 processes to start; not there: 1, 3"] * 2
    assert any(line.startswith("waiting for processes 1, 3 of 4 to start, ") for line in said)
    results, _ = meeting([Place(where[2], 2, 0), Place(where[2], 3, 1)], 30)
    assert results == [f"2: {host} is process 1 of 3, but {host} process 0 of 2"] * 2
    results, _ = meeting([Place(where[3], 3, 0), *[Place(where[3], 3, 1)] * 2], 30)
    assert results == [f"2: process 1 is there twice, on {host} and {host}"] * 3
    results, said = meeting([Place(where[4], 2, 1)], 0.5)
    assert results[0].startswith("76: waited ") and f"for process 0 at {where[4]}" in results[0]


def test_a_process_that_gave_up_while_others_were_waited_for_may_come_again() -> None:
    where, results = f"127.0.0.1:{free_port()}", list[Any]()
    hello = b'{"process": 1, "processes": 3, "host": "x"}\n'
    thread = threading.Thread(target=lambda: results.append(cluster.meet(Place(where, 3, 0), 30)))
    thread.start()
    for text in (hello, b"GET / HTTP/1.0\r\n\r\n", b"[]\n", b"[" * 100_000 + b"\n", b""):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", int(where.split(":")[1])), timeout=1) as door:
                    door.sendall(text)
                    break
            except OSError:
                time.sleep(0.1)
    results += meeting([Place(where, 3, i) for i in (1, 2)], 30)[0]
    thread.join(60)
    assert results == [[socket.gethostname()] * 3] * 3


def test_the_code_version_changes_with_every_file(tmp_path: Path) -> None:
    package = shutil.copytree(Path(runtime.__file__).parent, tmp_path / "vdjax")
    assert runtime.files_hash(package) == runtime.files_hash(Path(runtime.__file__).parent)
    seen = {runtime.files_hash(package)}
    (package / "judges" / "templates" / "trained-v1.toml").open("a").write("\n")
    seen.add(runtime.files_hash(package))
    os.rename(package / "probe.py", package / "probes.py")
    assert len(seen | {runtime.files_hash(package)}) == 3
