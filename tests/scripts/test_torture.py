"""What the torture test compares: it must not overlook what an interruption could change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import tiny

torture = tiny.load_script("torture.py")


def other_parameters(run: Path) -> None:
    shutil.rmtree(run / "dpo" / "snapshots" / "4")
    shutil.copytree(run / "dpo" / "snapshots" / "2", run / "dpo" / "snapshots" / "4")


def no_snapshot(run: Path) -> None:
    shutil.rmtree(run / "sft" / "snapshots" / "2")


def another_loss(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "dpo" / "metrics.jsonl").read_text().splitlines()]
    rows[-1] = {name: value + 1e-6 if name.endswith("loss") else value for name, value in rows[-1].items()}
    (run / "dpo" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def another_answer(run: Path) -> None:
    table = pd.read_parquet(run / "probes" / "dpo.parquet")
    table.loc[3, "log_prob"] += 1e-3
    table.to_parquet(run / "probes" / "dpo.parquet", index=False)


def no_answers(run: Path) -> None:
    (run / "probes" / "sft.parquet").unlink()


def another_drift(run: Path) -> None:
    with (run / "drift" / "drift.csv").open("a") as table:
        table.write(",\n")


def other_tables(run: Path) -> None:
    for folder in ("probes", "responses", "judgements/a"):
        (run / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(run / "probes" / "sft.parquet", run / folder / "more.parquet")


def other_counts(run: Path) -> None:
    done = json.loads((run / "sft" / "done.json").read_text())
    (run / "sft" / "done.json").write_text(json.dumps(done | {"train_examples": 1}))


def no_stage(run: Path) -> None:
    shutil.rmtree(run / "dpo")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda run: None, []),
        (other_parameters, ["dpo step 4: parameters"]),
        (no_snapshot, ["sft: snapshots [0, 2, 4, 6] and [0, 4, 6]"]),
        (another_loss, ["dpo/metrics.jsonl"]),
        (another_answer, ["probes/dpo.parquet"]),
        (no_answers, ["probes/sft.parquet"]),
        (other_tables, ["probes/more.parquet", "responses/more.parquet", "judgements/a/more.parquet"]),
        (other_counts, ["sft/done.json"]),
        (another_drift, ["drift/drift.csv"]),
        (no_stage, ["dpo: snapshots [0, 2, 4, 6] and []", "dpo/metrics.jsonl", "dpo/done.json"]),
    ],
)
def test_differences_are_found(
    change: Callable[[Path], None], found: list[str], finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("tb", "figures"))
    change(run)
    assert torture.differences(finished[0], run) == found
