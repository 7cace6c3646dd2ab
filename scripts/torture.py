"""Kills an experiment at random moments, goes on each time, and compares what it comes to with an uninterrupted run.

    python scripts/torture.py --config configs/smoke.py --workdir runs/torture --kills 50

Moments take turns: any time, a step under way, a save, the end of a stage, probes being asked, the report being made;
each a random time after its first, second, ... sign, a random one of them. A run that reaches its end is compared, bit
for bit, and another is begun, until there were enough kills and the last run has ended. What happened is in
WORKDIR/log.jsonl, with what was left half written. Exit status 1 where something differs or a command fails.
"""

import argparse
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from vdjax import runs, snapshots

SPEEDS = ("tokens_per_s", "examples_per_s", "mfu", "seconds")
PARTS = ("*/snapshots/*tmp*", "*/resume/*tmp*")  # what is being saved


class Moment(NamedTuple):
    """What it is known by, and the seconds after a sign of it within which the kill comes."""

    line: str  # of the output
    files: tuple[str, ...]  # in the workdir, newer than the process
    within: float
    signs: int  # the most of which one is chosen


MOMENTS = {
    "any time": Moment("", (), 0.0, 1),
    "a step": Moment(r" \d+/\d+  loss ", (), 0.5, 8),
    "a save": Moment("", PARTS, 0.02, 8),
    "the end of a stage": Moment("", ("*/done.json",), 0.02, 2),
    "probing": Moment(r"\d+ probes, \d+ prompts", (), 0.5, 2),
    "the report": Moment("", ("drift/*", "figures/*"), 0.5, 8),
}
BEGINS = "begins at step|goes on from step|trained anew"  # in the line that says where a stage begins


def launch(arguments: list[str], workdir: Path) -> tuple[subprocess.Popen, list[str]]:
    """The process, and the lines that it prints as they come."""
    command = [sys.executable, "-m", "vdjax.main", *arguments, "--workdir", str(workdir)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True).start()
    return process, said


def written(patterns: Sequence[str], workdir: Path, since: float) -> list[str]:
    """What is there and newer than `since`."""
    out = []
    for pattern in patterns:
        with suppress(FileNotFoundError):  # folders go while they are read
            for file in workdir.glob(pattern):
                if file.stat().st_mtime > since:
                    out.append(str(file.relative_to(workdir)))
    return out


def signs(moment: Moment, workdir: Path, said: list[str], since: float) -> set[str]:
    """Of it that are to be seen now."""
    lines = {str(i) for i, text in enumerate(list(said)) if moment.line and re.search(moment.line, text)}
    return lines | set(written(moment.files, workdir, since))


def kill_in(moment: str, arguments: list[str], workdir: Path, longest: float, rng: random.Random) -> dict[str, Any]:
    """Starts or goes on with a run and kills it; `status` is None where it was killed, else its exit status."""
    begun, since = time.perf_counter(), time.time()
    process, said = launch(arguments, workdir)
    until = begun + rng.uniform(0, longest) if moment == "any time" else float("inf")
    kind, seen = MOMENTS[moment], set[str]()
    wanted = rng.randint(1, kind.signs)
    while process.poll() is None and time.perf_counter() < until:
        seen |= signs(kind, workdir, said, since)
        if until == float("inf") and len(seen) >= wanted:
            until = time.perf_counter() + rng.uniform(0, kind.within)
        time.sleep(0.001)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    status = process.wait()
    time.sleep(0.1)  # for what it said last
    killed = killed and status == -signal.SIGKILL
    return {
        "moment": moment,
        "seconds": round(time.perf_counter() - begun, 2),
        "status": None if killed else status,
        "half_written": written(PARTS, workdir, since),
        "begun": [text.rstrip() for text in said if re.search(BEGINS, text)],
        "said": [text.rstrip() for text in said][-3 if killed or not status else -30 :],
    }


def metrics(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in SPEEDS} for row in rows]


COMPARED: dict[str, Callable[[Path], Any]] = {
    "*/metrics.jsonl": metrics,
    "*/done.json": Path.read_bytes,
    "probes/*.parquet": pq.read_table,
    "responses/*.parquet": pq.read_table,
    "judgements/*/*.parquet": pq.read_table,
    "drift/*.csv": Path.read_bytes,
}


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished workdirs differ, of snapshots and what COMPARED names; also what is in one alone."""
    import jax

    out = []
    for stage in sorted({folder.parent.name for workdir in (one, other) for folder in workdir.glob("*/snapshots")}):
        kept = [snapshots.kept(workdir / stage / "snapshots") for workdir in (one, other)]
        if kept[0] != kept[1]:
            out.append(f"{stage}: snapshots {kept[0]} and {kept[1]}")
            continue
        for step in kept[0]:
            trees = [runs.open_snapshot(workdir / stage / "snapshots" / str(step)).params for workdir in (one, other)]
            same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), *trees)
            out += [f"{stage} step {step}: parameters"] * (not all(jax.tree.leaves(same)))
    for pattern, read in COMPARED.items():
        for name in sorted({str(f.relative_to(workdir)) for workdir in (one, other) for f in workdir.glob(pattern)}):
            files = (one / name, other / name)
            if not all(file.exists() for file in files) or read(files[0]) != read(files[1]):
                out.append(name)
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
    finished, failed, saving, resumed = 0, 0, 0, 0
    with open(flags.workdir / "log.jsonl", "w", encoding="utf-8") as log:

        def note(**event: Any) -> None:
            print(event, flush=True)
            log.write(json.dumps(event) + "\n")
            log.flush()

        def compare(workdir: Path) -> int:
            found = differences(whole, workdir)
            note(finished=workdir.name, after_kills=kills.total(), differences=found)
            return len(found)

        moments = itertools.cycle(MOMENTS)
        while kills.total() < flags.kills and not failed:
            workdir = flags.workdir / f"run-{finished}"
            event = kill_in(next(moments), arguments, workdir, longest, rng)
            resumed += any("goes on from" in line for line in event["begun"])
            if event["status"] is None:
                kills[event["moment"]] += 1
                saving += bool(event["half_written"])
                note(kill=kills.total(), **event)
            elif event["status"] == 0:
                finished, failed = finished + 1, failed + compare(workdir)
            else:
                note(**event)
                failed += 1
        if not failed and (flags.workdir / f"run-{finished}").exists():
            end(flags.workdir / f"run-{finished}")
            finished, failed = finished + 1, compare(flags.workdir / f"run-{finished}")
    print(f"{kills.total()} kills ({dict(kills)}), of which {saving} left a save half written")
    print(f"{resumed} went on from a resume point; {finished} runs finished, {failed} differences or failures")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
