"""The launch scripts against stubs of gcloud and kubectl: what they run, in which order, and how they end.

The workers' side is real: the stub of `gcloud ... ssh` runs the command in a folder of its own for each worker.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
QUEUED, GKE = "tpu/queued_resource.sh", "tpu/gke_jobset.sh"
OPTIONS = {
    "--project": "my-project",
    "--zone": "us-east5-b",
    "--topology": "v5e:4x4",
    "--config": "configs/smoke.py",
    "--workdir": "gs://bucket/runs/Smoke_1",
}
AWKWARD = [
    "--config.a=it's \"so\"",
    "--config.b=two  spaces and a\nline",
    "--config.c=$HOME `id` $(id) & ; | \\ * ~ %s",
    "--config.d=('x',)",
]


class Launch(NamedTuple):
    status: int
    out: str
    err: str
    calls: list[list[str]]  # of gcloud, kubectl and tensorboard on the launching machine and on workers
    folder: Path

    def of(self, *words: str) -> list[list[str]]:
        return [call for call in self.calls if all(word in call for word in words)]

    def jobs(self) -> list[dict]:
        file = self.folder / "jobs.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with these scripts, and no more of the project than they look at."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "tpu", folder / "tpu")
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(folder)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.fixture
def launch(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launch]:
    """Runs a script with OPTIONS (a value of None leaves one out) in a scenario (tests/tpu/stub.py)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(f"#!{sys.executable}\n{(Path(__file__).parent / 'stub.py').read_text()}")
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    for name in ("kubectl", "tensorboard", "python3"):
        (tmp_path / "bin" / name).symlink_to("gcloud")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}", prepend=os.pathsep)
    monkeypatch.setenv("STUB", str(tmp_path))

    def run(script: str, *arguments: str, scenario: dict[str, list] | None = None, **changes: str | None) -> Launch:
        for name, lines in (scenario or {}).items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        options = OPTIONS | {"--poll": "0"} | {f"--{name}": value for name, value in changes.items()}
        words = [word for name, value in options.items() if value is not None for word in (name, value)]
        done = subprocess.run(
            ["bash", checkout / script, *words, *arguments], capture_output=True, text=True, timeout=600
        )
        file = tmp_path / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        calls = [call for call in calls if call[0] in ("gcloud", "kubectl", "tensorboard")]
        return Launch(done.returncode, done.stdout, done.stderr, calls, tmp_path)

    return run


def verbs(run: Launch) -> list[str]:
    """What was asked of queued resources, without the looks at their state."""
    asked = [call[4] for call in run.calls if call[3:4] == ["queued-resources"]]
    return [verb for verb in asked if verb != "list"]


def test_a_job_that_is_interrupted_runs_again_to_its_end(launch: Callable[..., Launch]) -> None:
    run = launch(
        QUEUED,
        "--spot",
        *AWKWARD,
        "--",
        "--dry_run",
        scenario={"states": ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], "exits": [75, 0]},
    )
    assert run.status == 0, run.err
    assert verbs(run) == ["create", *["ssh"] * 6, "delete"]  # start, follow, status; twice
    (create,) = run.of("create")
    assert create[5:] == [
        *("smoke-1", "--project", "my-project", "--zone", "us-east5-b", "--accelerator-type", "v5litepod-16"),
        *("--runtime-version", "v2-alpha-tpuv5-lite", "--node-id", "smoke-1", "--spot"),
    ]
    place = ["--project", "my-project", "--zone", "us-east5-b"]
    assert run.of("delete")[0][5:] == ["smoke-1", *place, "--force", "--quiet"]
    assert len(run.jobs()) == 4  # two workers, two starts
    for job in run.jobs():
        # Word for word through the shell at the other end of ssh.
        wanted = ["-m", "vdjax.main", "--config", "configs/smoke.py", "--workdir", "gs://bucket/runs/Smoke_1"]
        assert job["argv"] == [*wanted, *AWKWARD, "--dry_run"]
        assert job["env"].get("LIBTPU_INIT_ARGS", "").split() == flags("v5e")
        assert "configs" in job["files"]
    assert run.out.splitlines() == ["step 1", "\tstep 2"] * 2  # the first worker's log alone
    assert "WAITING_FOR_RESOURCES" in run.err and "interrupted" in run.err and "finished" in run.err
    logs = list((run.folder / "bucket" / "bucket" / "runs" / "Smoke_1" / "launch" / "logs").iterdir())
    assert logs and logs[0].read_text() == "step 1\n\tstep 2\n"
    assert run.of("tensorboard")[0][1:] == ["--logdir", "gs://bucket/runs/Smoke_1", "--port", "6006"]


def test_the_source_of_the_commit_is_what_workers_get(launch: Callable[..., Launch], checkout: Path) -> None:
    run = launch(QUEUED, scenario={"states": ["ACTIVE"], "exits": [0]})
    assert run.status == 0, run.err
    (source,) = (run.folder / "bucket" / "bucket" / "runs" / "Smoke_1" / "launch").glob("source-*.tar.gz")
    with tarfile.open(source) as tar:
        names = tar.getnames()
    assert "configs/smoke.py" in names and "tpu/worker.sh" in names and "tpu/constraints.txt" in names
    calls = [json.loads(line) for line in (run.folder / "calls.jsonl").read_text().splitlines()]
    (install, *_) = [call for call in calls if call[:3] == ["uv", "pip", "install"]]
    assert install[install.index("--constraint") + 1].endswith("tpu/constraints.txt")
    assert len([call for call in calls if call[:3] == ["uv", "pip", "install"]]) == 2  # once a worker


def test_a_preempted_slice_is_deleted_and_requested_again(launch: Callable[..., Launch]) -> None:
    run = launch(
        QUEUED,
        # The job fails, as a worker vanished; only then does the state say why.
        scenario={"states": ["", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"], "exits": ["1 134", 0]},
    )
    assert run.status == 0, run.err
    assert verbs(run) == ["create", *["ssh"] * 3, "delete", "create", *["ssh"] * 3, "delete"]
    assert "taken away" in run.err


def test_a_lost_process_is_no_failure(launch: Callable[..., Launch]) -> None:
    run = launch(QUEUED, scenario={"states": ["ACTIVE"], "exits": ["76 75", "0 76", 0]})
    assert run.status == 0, run.err
    assert verbs(run) == [*["ssh"] * 9, "delete"]


@pytest.mark.parametrize("statuses", ["75 3", "3 76"])
def test_a_failing_job_ends_with_its_status(launch: Callable[..., Launch], statuses: str) -> None:
    run = launch(QUEUED, scenario={"states": ["", "ACTIVE"], "exits": [statuses]})
    assert run.status == 3
    assert verbs(run) == ["create", *["ssh"] * 3, "delete"]


def test_keep_leaves_the_slice(launch: Callable[..., Launch]) -> None:
    run = launch(QUEUED, "--keep", scenario={"states": ["ACTIVE"], "exits": [0]})
    assert run.status == 0
    assert verbs(run) == ["ssh"] * 3
    assert "gcloud compute tpus queued-resources delete smoke-1 --project my-project" in run.err


def test_a_worker_that_was_restarted_starts_again(launch: Callable[..., Launch]) -> None:
    run = launch(QUEUED, scenario={"states": ["ACTIVE"], "exits": ["1 lost", 0]})
    assert run.status == 0, run.err
    assert verbs(run) == [*["ssh"] * 6, "delete"]


def test_broken_connections_are_taken_up_again(launch: Callable[..., Launch]) -> None:
    run = launch(QUEUED, scenario={"states": ["ACTIVE"], "exits": [0], "ssh_fails": [2]})
    assert run.status == 0, run.err
    run = launch(QUEUED, scenario={"states": ["ACTIVE"], "exits": [0], "ssh_fails": [9]})
    assert run.status == 255 and run.calls[-1][4] == "delete"


def test_a_request_that_fails(launch: Callable[..., Launch]) -> None:
    run = launch(QUEUED, scenario={"states": ["", "FAILED"], "exits": [0]})
    assert run.status == 1
    assert verbs(run) == ["create", "describe", "delete"]


def test_no_quota(launch: Callable[..., Launch]) -> None:
    run = launch(QUEUED, scenario={"states": [""], "quota": []})
    assert run.status == 1 and "quota exceeded" in run.err
    assert verbs(run) == ["create"]


def test_another_job_on_the_slice_is_left_alone(launch: Callable[..., Launch], tmp_path: Path) -> None:
    job = tmp_path / "worker-0" / "vdjax" / "job"
    job.mkdir(parents=True)
    (job / "command").write_text("'python' 'other'\n")
    with subprocess.Popen(["flock", job / "lock", "sleep", "60"], start_new_session=True) as holder:
        try:
            run = launch(QUEUED, scenario={"states": ["ACTIVE"], "exits": [0]})
        finally:
            os.killpg(holder.pid, signal.SIGKILL)
    assert run.status == 64 and "is running another command: 'python' 'other'" in run.err
    assert verbs(run) == ["ssh"]


def test_several_slices_and_what_gcloud_is_told(launch: Callable[..., Launch]) -> None:
    run = launch(
        QUEUED,
        "--create_flag=--reserved",
        "--create_flag",
        "--network=mine",
        "--ssh_flag=--internal-ip",
        "--module=vdjax.study",
        scenario={"states": ["", "ACTIVE"], "exits": [0]},
        slices="2",
        topology="v5p:4x4x4",
        hf_secret="hf-token",
        name="two",
        runtime="my-runtime",
    )
    assert run.status == 0, run.err
    assert run.of("create")[0][10:] == [
        *("--accelerator-type", "v5p-128", "--runtime-version", "my-runtime"),
        *("--node-count", "2", "--node-prefix", "two", "--reserved", "--network=mine"),
    ]
    assert all("--internal-ip" in call for call in run.of("ssh"))
    assert all("hf_secret_value" not in " ".join(call) for call in run.calls)
    for job in run.jobs():
        assert job["argv"][:2] == ["-m", "vdjax.study"] and job["env"]["HF_TOKEN"] == "hf_secret_value"
        assert job["env"].get("LIBTPU_INIT_ARGS", "").split() == flags("v5p")


def test_jobset(launch: Callable[..., Launch]) -> None:
    run = launch(
        GKE,
        "--spot",
        *AWKWARD,
        scenario={"states": ["", "smoke-1 ", "smoke-1 ", "smoke-1 Completed"]},
        cluster="pods",
        slices="2",
        hf_secret="hf-token",
    )
    assert run.status == 0, run.err
    assert run.of("get-credentials")[0][4:] == ["pods", "--project", "my-project", "--location", "us-east5-b"]
    context = ["kubectl", "--context", "gke_my-project_us-east5-b_pods"]
    assert all(call[:3] == context for call in run.calls if call[0] == "kubectl")
    assert run.out.splitlines() == ["step 1", "step 2"]  # read in three turns, printed once

    jobset = yaml.safe_load((run.folder / "manifest.yaml").read_text())
    assert jobset["metadata"]["name"] == "smoke-1"
    (slices,) = jobset["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "hf-token", "key": "token"}
    words = [word.replace("$$", "$") for word in container["args"]]  # as Kubernetes reads them
    assert all("$" not in word.replace("$$", "") for word in container["args"])
    assert words[words.index("python") + 1 :] == [
        *("-m", "vdjax.main", "--config", "configs/smoke.py", "--workdir", "gs://bucket/runs/Smoke_1"),
        *AWKWARD,
    ]


def test_jobset_starts_again_after_75_and_76_and_nothing_else(launch: Callable[..., Launch]) -> None:
    run = launch(GKE, scenario={"states": ["", "smoke-1 Completed"]}, cluster="pods")
    spec = yaml.safe_load((run.folder / "manifest.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert spec["failurePolicy"] == {
        "maxRestarts": 0,
        "rules": [
            {
                "name": "interrupted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            },
            {"name": "failed", "action": "FailJobSet"},
        ],
    }
    # A Job fails for the reason PodFailurePolicy through these rules alone, otherwise as its backoff limit is 0.
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": "vdjax", "operator": "In", "values": [75, 76]}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # which podFailurePolicy needs
    assert job["template"]["spec"]["containers"][0]["name"] == "vdjax"


def test_a_failed_jobset_ends_with_its_status_and_can_be_replaced(launch: Callable[..., Launch]) -> None:
    run = launch(GKE, scenario={"states": ["", "smoke-1 ", "smoke-1 Failed"], "exits": ["75 76  7 1"]}, cluster="pods")
    assert run.status == 7
    assert not run.of("delete")
    run = launch(GKE, scenario={"states": ["smoke-1 Failed", "smoke-1 Completed"]}, cluster="pods")
    assert run.status == 0 and len(run.of("delete", "jobset")) == 1 and len(run.of("apply")) == 2
    run = launch(GKE, scenario={"states": ["smoke-1 ", "smoke-1 Completed"]}, cluster="pods")
    assert run.status == 0 and len(run.of("apply")) == 2  # it was running: followed, not applied


@pytest.mark.parametrize("script", [QUEUED, GKE])
def test_print_shows_everything_and_runs_nothing(launch: Callable[..., Launch], script: str) -> None:
    cluster = {"cluster": "pods"} if script == GKE else {}
    run = launch(script, "--print", *AWKWARD, **cluster)
    assert run.status == 0, run.err
    assert not run.calls
    shown = ["git -C", "gcloud storage cp", "tensorboard --logdir gs://bucket/runs/Smoke_1"]
    if script == QUEUED:
        shown += [f"queued-resources {verb}" for verb in ("create", "list", "ssh", "delete")]
    else:
        shown += ["get-credentials", "apply --filename -", "kind: JobSet", "logs --follow", "delete jobset"]
    for words in shown:
        assert words in run.out, words


@pytest.mark.parametrize("script", [QUEUED, GKE])
def test_what_is_printed_can_be_pasted(launch: Callable[..., Launch], script: str) -> None:
    """The printed commands, run by a shell, call what the script itself calls."""
    cluster = {"cluster": "pods"} if script == GKE else {}
    printed = launch(script, "--print", *AWKWARD, **cluster).out
    started = {"states": ["", "ACTIVE"], "exits": [0]} if script == QUEUED else {"states": ["", "x Completed"]}
    own = launch(script, *AWKWARD, scenario=started, **cluster)
    assert own.status == 0, own.err
    (own.folder / "calls.jsonl").unlink()
    subprocess.run(["bash", "-c", printed], check=True, capture_output=True)
    pasted = [json.loads(line) for line in (own.folder / "calls.jsonl").read_text().splitlines()]
    for call in own.calls:
        if call[0] != "tensorboard" and "--quiet" not in call[3:4] and "logs" not in call:
            assert call in pasted, call


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"project": None}, [], "--project is missing: expected the id of a Google Cloud project"),
        ({}, ["--topolgy", "v5e:4x4"], "--topolgy: no such option; did you mean topology?"),
        ({}, ["--slices"], "--slices has no value: expected a number from 1 on"),
        ({}, ["--spot=1"], "--spot=1: --spot takes no value"),
        ({"topology": "v5x:4x4"}, [], "--topology v5x:4x4: no generation v5x; did you mean v5e?"),
        ({"topology": "v5e:4x5"}, [], "--topology v5e:4x5: v5e has no slice 4x5; did you mean 4x4?"),
        ({"topology": "v5litepod-16"}, [], "--topology v5litepod-16: expected GENERATION:SHAPE, such as v5e:8x8"),
        ({"zone": "useast5"}, [], "--zone useast5: expected a zone, such as us-east5-b"),
        ({"workdir": "runs/x"}, [], "--workdir runs/x: expected gs://BUCKET/DIRECTORY, of letters, digits and ._=/-"),
        ({"workdir": "gs://bucket"}, [], "--workdir gs://bucket: expected gs://BUCKET/DIRECTORY, of letters"),
        ({"slices": "0"}, [], "--slices 0: expected a number from 1 on"),
        ({"module": "vdjax.probe"}, [], "--module vdjax.probe: expected vdjax.main or vdjax.study"),
        ({"config": "configs/smok.py"}, [], "has no file configs/smok.py; did you mean configs/smoke.py?"),
        ({"config": "smoke"}, [], "--config smoke: expected FILE.py[:ARG], a file of this repository"),
        ({"commit": "abc"}, [], "--commit abc: expected a commit of this repository"),
        ({"name": "Run_1"}, [], "--name Run_1: expected at most 40 lower-case letters, digits and -, a letter first"),
        ({}, ["--config.seed", "1"], "--config.seed: expected --config.KEY=VALUE in one word"),
        ({}, ["configs/smoke.py"], "configs/smoke.py: expected --OPTION VALUE, --config.KEY=VALUE, or --"),
        ({}, ["--create_flag=network"], "--create_flag network: expected --FLAG"),
    ],
)
def test_errors(launch: Callable[..., Launch], changes: dict, arguments: list[str], message: str) -> None:
    run = launch(QUEUED, *arguments, **changes)
    assert run.status == 2 and not run.calls and not run.out
    (line,) = run.err.splitlines()
    assert line.startswith("error: ") and message in line


def test_errors_of_gke(launch: Callable[..., Launch]) -> None:
    assert "--cluster is missing: expected the name of a GKE cluster" in launch(GKE).err
    run = launch(GKE, cluster="pods", topology="v5e:2x2", slices="2")
    assert run.status == 2 and "several slices on GKE need more than one host each; v5e:2x2 has one" in run.err
    assert launch(GKE, "--print", cluster="pods", zone="us-east5").status == 0  # a regional cluster


def test_help(launch: Callable[..., Launch]) -> None:
    for script in (QUEUED, GKE):
        done = launch(script, "--help")
        assert done.status == 0 and "--print " in done.out and "shellcheck" not in done.out
        # Every option of the script, and none that it lacks.
        named = {word.strip("[],`:") for word in done.out.split() if word.startswith(("--", "[--"))}
        code = f'set -- --help; sed() {{ printf "%s\\n" "${{!option[@]}}"; }}; . {ROOT / script}'
        known = subprocess.run(["bash", "-c", code], capture_output=True, text=True).stdout.split()
        others = {"--config.KEY", "--FLAG", "--tunnel-through-iap", "--"}
        assert known and {f"--{name}" for name in known} == {name.split("=")[0] for name in named} - others


def test_uncommitted_changes_are_said(launch: Callable[..., Launch], checkout: Path) -> None:
    file = checkout / "configs" / "smoke.py"
    text = file.read_text()
    try:
        file.write_text(text + "\n")
        assert "there are uncommitted changes" in launch(QUEUED, "--print").err
    finally:
        file.write_text(text)


def flags(generation: str) -> list[str]:
    lines = [line.split(maxsplit=2) for line in (ROOT / "tpu" / "xla_flags.txt").read_text().splitlines()]
    return [line[1] for line in lines if line[:1] == [generation]]


def test_shellcheck() -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install '.[dev]'")
    scripts = sorted((ROOT / "tpu").glob("*.sh"))
    assert len(scripts) >= 4
    done = subprocess.run([program, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
