"""Stands in for gcloud, kubectl, tensorboard and a worker's python3: notes every call, and plays a test's scenario.

Lies under these names in a folder that comes first on PATH. STUB names the folder of the scenario:

    calls.jsonl     written: one [program, argument, ...] a call
    states          one a line: what the queued resource or JobSet is in at each look; the last one stays
    exits           one a line: exit statuses of a start of the job, by worker ("75", or "1 134"); the last line stays
    ssh_fails       a number: so many of the next ssh calls fail as a broken connection does
    bucket/         what is under gs://
    worker-N/       the home of worker N; `gcloud ... ssh` runs its command there, as the real one would
    jobs.jsonl      written: one {"argv", "env", "files" where it ran} a job
"""

import json
import os
import subprocess
import sys
from pathlib import Path

STUB = Path(os.environ["STUB"])
WORKERS = int(os.environ.get("STUB_WORKERS", "2"))


def next_line(name: str) -> str:
    """The first line of the file, which is taken out unless it is the last."""
    file = STUB / name
    lines = file.read_text().splitlines() if file.exists() else []
    if len(lines) > 1:
        file.write_text("\n".join(lines[1:]) + "\n")
    return lines[0] if lines else ""


def value(args: list[str], flag: str) -> str:
    return args[args.index(flag) + 1]


def bucket(url: str) -> Path:
    return STUB / "bucket" / url.removeprefix("gs://")


def ssh(args: list[str]) -> int:
    left = int(next_line("ssh_fails") or 0)
    if left:
        (STUB / "ssh_fails").write_text(f"{left - 1}\n")
        return 255
    command = " ".join(value(args, "--command").split(" "))  # as gcloud does it
    workers = range(WORKERS) if value(args, "--worker") == "all" else [int(value(args, "--worker"))]
    status = 0
    for worker in workers:
        home = STUB / f"worker-{worker}"
        home.mkdir(exist_ok=True)
        env = os.environ | {"HOME": str(home), "WORKER": str(worker)}
        done = subprocess.run(["bash", "-c", command], cwd=home, env=env)
        status = status or done.returncode
    return status


def storage(args: list[str]) -> int:
    source, target = [a for a in args if a == "-" or not a.startswith("-")][:2]
    if target == "-":
        sys.stdout.buffer.write(bucket(source).read_bytes())
        return 0
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    bucket(target).parent.mkdir(parents=True, exist_ok=True)
    bucket(target).write_bytes(data)
    return 0


def gcloud(args: list[str]) -> int:
    match args[:4]:
        case ["storage", "cp", *_]:
            return storage(args[2:])
        case ["compute", "tpus", "queued-resources", "list"]:
            print(next_line("states"))
        case ["compute", "tpus", "queued-resources", "ssh"]:
            return ssh(args)
        case ["compute", "tpus", "queued-resources", "create"] if (STUB / "quota").exists():
            print("ERROR: quota exceeded", file=sys.stderr)
            return 1
        case ["compute", "tpus", "queued-resources", "delete"]:
            for worker in STUB.glob("worker-*"):
                worker.rename(STUB / f"gone-{len(list(STUB.glob('gone-*')))}")
        case ["secrets", "versions", "access", *_]:
            print("hf_secret_value")
    return 0


def kubectl(args: list[str]) -> int:
    if "apply" in args:
        (STUB / "manifest.yaml").write_text(sys.stdin.read())
    elif "jobset" in args and "get" in args:
        print(next_line("states"), end="")
    elif "logs" in args:
        print("step 1\nstep 2")
    elif "pods" in args and "name" in args:
        print("pod/run-slice-0-0-abcde")
    elif "pods" in args:
        print("\n".join(next_line("exits").split(" ")))
    return 0


def python3(args: list[str]) -> int:
    """`pip install --target DIR uv` leaves a uv; `uv venv` an environment whose python is the job."""
    if args[:2] == ["-m", "pip"]:
        folder = Path(value(args, "--target")) / "bin"
        folder.mkdir(parents=True)
        (folder / "uv").symlink_to(STUB / "bin" / "gcloud")
    return 0


def uv(args: list[str]) -> int:
    if args[0] == "venv":
        folder = Path(args[-1]) / "bin"
        folder.mkdir(parents=True)
        (folder / "python").symlink_to(STUB / "bin" / "gcloud")
    return 0


def python(args: list[str]) -> int:
    """The job."""
    worker = int(os.environ["WORKER"])
    started = STUB / f"starts-{worker}"
    earlier = len(started.read_text()) if started.exists() else 0
    started.write_text("x" * (earlier + 1))
    starts = (STUB / "exits").read_text().splitlines()
    exits = starts[min(earlier, len(starts) - 1)].split()
    kept = {name: text for name, text in os.environ.items() if name in ("LIBTPU_INIT_ARGS", "HF_TOKEN")}
    with (STUB / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"argv": args, "env": kept, "files": os.listdir()}) + "\n")
    print("step 1\n\tstep 2", flush=True)
    status = exits[min(worker, len(exits) - 1)]
    if status == "lost":
        os.kill(os.getppid(), 9)  # the machine went down, and what would have written the status
        return 1
    return int(status)


if __name__ == "__main__":
    program = Path(sys.argv[0]).name
    with (STUB / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([program, *sys.argv[1:]]) + "\n")
    sys.exit(globals()[program](sys.argv[1:]) if program in globals() else 0)
