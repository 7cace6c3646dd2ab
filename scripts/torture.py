"""Kills an experiment at random moments, goes on each time, and compares what it comes to with an uninterrupted run.

    python scripts/torture.py --config configs/smoke.py --workdir runs/torture --kills 50

Moments take turns: any time, a step under way, a save, the end of a stage, probes being asked, the report being made;
each a random part of a second after the first sign of it. A run that reaches its end is compared, bit for bit, and
another is begun, until there were enough kills and the last run has ended. What happened is in WORKDIR/log.jsonl. Exit
status 1 where something differs or a command fails.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vdjax import runs, snapshots

SPEEDS = ("tokens_per_s", "examples_per_s", "mfu", "seconds")
WITHIN_S = 0.5  # of its sign, a kill comes
# What a moment is known by: a line of the output, or files in the workdir newer than the process.
MOMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "any time": ("", ()),
    "a step": (r" \d+/\d+  loss ", ()),
    "a save": ("", ("*/snapshots/*tmp*", "*/resume/*tmp*")),
    "the end of a stage": ("", ("*/done.json",)),
    "probing": (r"\d+ probes, \d+ prompts", ()),
    "the report": ("", ("drift/*", "figures/*")),
}


def launch(arguments: list[str], workdir: Path) -> tuple[subprocess.Popen, list[str]]:
    """The process, and the lines that it prints as they come."""
    command = [sys.executable, "-m", "vdjax.main", *arguments, "--workdir", str(workdir)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True).start()
    return process, said


def has_come(moment: str, workdir: Path, said: list[str], since: float) -> bool:
    line, patterns = MOMENTS[moment]
    if line and any(re.search(line, text) for text in list(said)):
        return True
    for pattern in patterns:
        for file in workdir.glob(pattern):
            try:
                if file.stat().st_mtime > since:
                    return True
            except FileNotFoundError:
                continue
    return False


def kill_in(moment: str, arguments: list[str], workdir: Path, longest: float, rng: random.Random) -> dict[str, Any]:
    """Starts or goes on with a run and kills it; `status` is None where it was killed, else its exit status."""
    begun, since = time.perf_counter(), time.time()
    process, said = launch(arguments, workdir)
    until = begun + rng.uniform(0, longest) if moment == "any time" else float("inf")
    while process.poll() is None and time.perf_counter() < until:
        if until == float("inf") and has_come(moment, workdir, said, since):
            until = time.perf_counter() + rng.uniform(0, WITHIN_S)
        time.sleep(0.002)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    status = process.wait()
    time.sleep(0.1)  # for what it said last
    killed = killed and status == -signal.SIGKILL
    return {
        "moment": moment,
        "seconds": round(time.perf_counter() - begun, 2),
        "status": None if killed else status,
        "said": [text.rstrip() for text in said][-3 if killed or not status else -30 :],
    }


def metrics(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in SPEEDS} for row in rows]


def differences(one: Path, other: Path) -> list[str]:
    """Everything in which two finished workdirs differ; also what is in one alone."""
    import jax

    out = []
    for folder in sorted(one.glob("*/snapshots")):
        stage = folder.parent.name
        steps = snapshots.kept(folder)
        if steps != snapshots.kept(other / stage / "snapshots"):
            out.append(f"{stage}: snapshots {steps} and {snapshots.kept(other / stage / 'snapshots')}")
            continue
        for step in steps:
            trees = [runs.open_snapshot(workdir / stage / "snapshots" / str(step)).params for workdir in (one, other)]
            same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), *trees)
            out += [f"{stage} step {step}: parameters"] * (not all(jax.tree.leaves(same)))
        if metrics(one / stage / "metrics.jsonl") != metrics(other / stage / "metrics.jsonl"):
            out.append(f"{stage}: metrics")
    for file in sorted(one.glob("probes/*.parquet")):
        if not pd.read_parquet(file).equals(pd.read_parquet(other / "probes" / file.name)):
            out.append(f"probes/{file.name}")
    out += [
        f"drift/{f.name}" for f in one.glob("drift/*.csv") if f.read_bytes() != (other / "drift" / f.name).read_bytes()
    ]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    flags, overrides = parser.parse_known_args()
    if flags.workdir.exists():
        parser.error(f"--workdir {flags.workdir} is there; give a new one")
    flags.workdir.mkdir(parents=True)
    arguments, rng = ["--config", flags.config, *overrides], random.Random(flags.seed)

    def end(workdir: Path) -> float:
        start = time.perf_counter()
        process, said = launch(arguments, workdir)
        if status := process.wait():
            raise SystemExit(f"{workdir}: status {status}\n{''.join(said[-30:])}")
        return time.perf_counter() - start

    whole = flags.workdir / "whole"
    longest = end(whole)
    kills: Counter[str] = Counter()
    finished, failed = 0, 0
    with open(flags.workdir / "log.jsonl", "w", encoding="utf-8") as log:

        def note(**event: Any) -> None:
            print(event, flush=True)
            log.write(json.dumps(event) + "\n")
            log.flush()

        def compare(workdir: Path) -> int:
            found = differences(whole, workdir)
            note(finished=workdir.name, after_kills=kills.total(), differences=found)
            return len(found)

        moments = list(MOMENTS)
        while kills.total() < flags.kills and not failed:
            workdir = flags.workdir / f"run-{finished}"
            event = kill_in(moments[kills.total() % len(moments)], arguments, workdir, longest, rng)
            if event["status"] is None:
                kills[event["moment"]] += 1
                note(kill=kills.total(), **event)
            elif event["status"] == 0:
                finished, failed = finished + 1, failed + compare(workdir)
            else:
                note(**event)
                failed += 1
        if not failed and (flags.workdir / f"run-{finished}").exists():
            end(flags.workdir / f"run-{finished}")
            finished, failed = finished + 1, compare(flags.workdir / f"run-{finished}")
    print(f"{kills.total()} kills ({dict(kills)}), {finished} runs finished, {failed} differences or failures")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
