"""Whole experiments: interrupted equals uninterrupted, finished ones stay, other ones are refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import experiments
import numpy as np
import pandas as pd
import pytest
import tiny

from vdjax import config as configs
from vdjax import experiment, files, runs, snapshots
from vdjax.errors import UserError
from vdjax.models import transformer
from vdjax.models.config import from_hf
from vdjax.models.hf import _leaves
from vdjax.probes import evaluator
from vdjax.setup import setup
from vdjax.train import loop

STAGES = ("sft", "dpo")
SPEEDS = ("tokens_per_s", "examples_per_s", "mfu", "seconds")


def stopped(how: str, stage: str, step: int, *arguments: str) -> subprocess.CompletedProcess:
    """Runs vdjax.main in a process of its own that stops itself there."""
    command = [sys.executable, str(tiny.HERE / "stop_at.py"), how, stage, str(step), *arguments]
    return subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=300)


def all_params(snapshot: Path) -> dict[str, np.ndarray]:
    """Every parameter, bit for bit."""
    _, shapes = transformer.abstract(from_hf(tiny.SHAPES["qwen"], where="qwen"))
    read = snapshots.open_reader(snapshot)
    return {
        ".".join(path): read(path, tuple(slice(0, n) for n in leaf.shape)).view(np.uint32)
        for path, leaf in _leaves(shapes)
    }


def metrics(workdir: Path, stage: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in rows]


@pytest.fixture(scope="module")
def interrupted(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, compiles: Any) -> tuple[Path, list[str]]:
    """The tiny experiment, stopped five times and brought to its end; what the last run compiled. Beside it is "early",
    the workdir before that."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"
    arguments = ["--config", tiny.config_spec(tiny_data), "--workdir", str(workdir)]
    # A step is logged when the next one is under way, so the signal at step 5 of 6 comes during the last one. At step 3
    # held-out evaluation is due, which is left to the run that goes on.
    for how, stage, step, says in (
        ("TERM", "sft", 5, "sft: stopped after its last step; the stage is finished"),
        ("SAVE", "dpo", 2, "dpo: begins at step 0 of 6"),
        ("TERM", "dpo", 2, "dpo: stopped at step 3 of 6; a resume point was written"),
        ("FULL", "dpo", 4, "cannot be written: File too large. What was saved before is whole"),
        ("KILL", "dpo", 5, "dpo: goes on from step 3 of 6"),
    ):
        result = stopped(how, stage, step, *arguments)
        assert says in result.stderr
        if how == "FULL":
            assert result.returncode == 2
            assert result.stderr.splitlines()[-1].startswith(f"error: {workdir / 'dpo'}"), result.stderr
            assert "dpo: goes on from step 3 of 6" in result.stderr
            assert snapshots.kept(workdir / "dpo" / "snapshots") == [0, 2]
        elif how == "TERM":
            assert result.returncode == 75, result.stderr
            assert f"to go on: python -m vdjax.main --config {arguments[1]} --workdir {workdir}" in result.stderr
        else:
            assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (workdir / "dpo" / "done.json").exists()
    assert "3" in [p.name for p in (workdir / "dpo" / "resume").iterdir()]
    shutil.copytree(workdir, workdir.parent / "early")
    with compiles() as names:
        experiments.run(configs.load(tiny.config_spec(tiny_data)), workdir)
    return workdir, names


def test_interrupted_equals_uninterrupted(
    finished: tuple[Path, list[str]], interrupted: tuple[Path, list[str]]
) -> None:
    one, other = finished[0], interrupted[0]
    for stage in STAGES:
        steps = snapshots.kept(one / stage / "snapshots")
        assert steps == [0, 2, 4, 6] == snapshots.kept(other / stage / "snapshots")
        for step in steps:
            a, b = (all_params(workdir / stage / "snapshots" / str(step)) for workdir in (one, other))
            assert len(a) == 13
            for name in a:
                np.testing.assert_array_equal(a[name], b[name], err_msg=f"{stage} {step} {name}")
        assert metrics(one, stage) == metrics(other, stage)
        raw = [pd.read_parquet(workdir / "probes" / f"{stage}.parquet") for workdir in (one, other)]
        pd.testing.assert_frame_equal(*raw)
    for table in ("drift.csv", "stances.csv"):
        assert (one / "drift" / table).read_text() == (other / "drift" / table).read_text()


@pytest.mark.parametrize(
    "lost, says",
    [
        ("sft/done.json", "training got to step 6 of 6, but neither done.json nor a point in resume/ is there"),
        ("sft/snapshots/0", "sft/snapshots: 0 not there, of 4 snapshots. Put back"),
        ("dpo/snapshots/6", "dpo/snapshots: 6 not there, of 4 snapshots. Put back"),
        ("config.json", "config.json: is not there, so that nothing says with which config"),
    ],
)
def test_what_is_lost_is_named_and_nothing_begins_anew(
    finished: tuple[Path, list[str]], tiny_data: Path, tmp_path: Path, lost: str, says: str
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    for kept in ("probes", "responses", "drift"):
        shutil.rmtree(tmp_path / "run" / kept, ignore_errors=True)
    subprocess.run(["rm", "-r", tmp_path / "run" / lost], check=True)
    with pytest.raises(UserError, match=re.escape(says)):
        experiments.run(configs.load(tiny.config_spec(tiny_data)), tmp_path / "run")


def test_lost_resume_points_of_a_stage_half_way_are_named(
    interrupted: tuple[Path, list[str]], tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(interrupted[0].parent / "early", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "dpo" / "resume")
    with pytest.raises(UserError, match="dpo: training got to step 5 of 6, but neither done.json nor a point"):
        experiments.run(configs.load(tiny.config_spec(tiny_data)), tmp_path / "run")


def test_a_log_that_is_lost_is_named(tmp_path: Path) -> None:
    stage: Any = SimpleNamespace(workdir=tmp_path, name="dpo")
    log = tmp_path / "dpo" / "metrics.jsonl"
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read back: .*; put back a copy of it"):
        loop.check_log(stage, 2)
    files.write_whole(log, '{"step": 1}\n{"step": 2}\n{"st')
    loop.check_log(stage, 2)
    with pytest.raises(UserError, match="metrics.jsonl: 2 rows are left of the 3 that were written; put back a copy"):
        loop.check_log(stage, 3)


def test_a_stage_that_begins_anew_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Killed before its first resume point was whole; later ones are not to be missed."""
    stage: Any = SimpleNamespace(workdir=tmp_path, name="dpo", resume_every=2, plan=SimpleNamespace(total_steps=6))
    log = tmp_path / "dpo" / "metrics.jsonl"
    loop.check_nothing_is_lost(stage)
    assert capsys.readouterr().err == ""
    files.write_whole(log, "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    loop.check_nothing_is_lost(stage)
    assert "dpo: got to step 3 before, and left no whole resume point; it is trained anew" in capsys.readouterr().err
    files.write_whole(log, "".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    with pytest.raises(UserError, match="training got to step 5 of 6"):
        loop.check_nothing_is_lost(stage)


def test_training_moves_and_its_log_is_complete(finished: tuple[Path, list[str]]) -> None:
    workdir = finished[0]
    first, last = (all_params(workdir / "dpo" / "snapshots" / str(step)) for step in (0, 6))
    assert all((first[name] != last[name]).any() for name in first)
    begun, ended = all_params(workdir / "dpo" / "snapshots" / "0"), all_params(workdir / "sft" / "snapshots" / "6")
    assert all((begun[name] == ended[name]).all() for name in begun)
    for stage in STAGES:
        rows = metrics(workdir, stage)
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
        assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6]
    at_start = next(row for row in metrics(workdir, "dpo") if row["step"] == 1)
    assert abs(at_start["loss"] - np.log(2)) < 1e-5


def test_the_train_step_compiles_once_a_stage(
    finished: tuple[Path, list[str]], interrupted: tuple[Path, list[str]]
) -> None:
    assert finished[1].count("jit(train_step)") == 2
    assert interrupted[1].count("jit(train_step)") == 1  # only the last stage was left
    # Nothing of a stage is compiled again and again: evaluation once a held-out set, the scorer once a probing.
    assert finished[1].count("jit(eval_step)") == 2
    assert finished[1].count("jit(score)") <= 2  # none where another run of this process had the same shapes


def test_a_finished_workdir_trains_and_probes_nothing(
    finished: tuple[Path, list[str]], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    before = {f: f.stat().st_mtime_ns for stage in STAGES for f in (workdir / stage).rglob("*") if f.is_file()}
    report = (workdir / "drift" / "drift.csv").read_text()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(loop, "train_stage", never)
    monkeypatch.setattr(evaluator, "evaluate", never)
    experiments.run(configs.load(tiny.config_spec(tiny_data)), workdir)
    assert before == {f: f.stat().st_mtime_ns for stage in STAGES for f in (workdir / stage).rglob("*") if f.is_file()}
    assert (workdir / "drift" / "drift.csv").read_text() == report


def test_training_examples_that_ask_the_probes_questions_are_counted(
    finished: tuple[Path, list[str]], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Said in the output, in the table of data of the report and in its caveats; held-out examples do not count."""
    assert "word for word" not in (finished[0] / "report.html").read_text()
    rows = [json.loads(line) for line in (tiny_data / "probes.jsonl").read_text().splitlines()]
    for row, text in zip(rows, ("is tea GOOD", "Is a cat good?", "Is salt good?"), strict=False):
        row["input"] = text  # the last is held out
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(finished[0], tmp_path / "run")
    flags = [f"--config.probes.path={tmp_path / 'probes.jsonl'}", "--config.probes.readouts=('statement',)"]
    experiments.run(configs.load(tiny.config_spec(tiny_data), flags), tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if "word for word" in line]
    assert len(said) == 1 and "sft data: 2 of 9 training examples ask" in said[0] and "sft.jsonl:0" in said[0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Trained on questions of the probes word for word: sft (2 examples)." in page
    assert "asks_a_probe_word_for_word: 2" in page


def test_another_config_in_the_same_workdir_is_refused(finished: tuple[Path, list[str]], tiny_data: Path) -> None:
    config = configs.load(tiny.config_spec(tiny_data), ["--config.dpo.hyper.beta=0.2"])
    with pytest.raises(UserError, match=r"dpo\.hyper\.beta: 0\.1 there, 0\.2 now"):
        experiments.run(config, finished[0])


def test_how_the_work_is_laid_out_may_change(tiny_data: Path, tmp_path: Path) -> None:
    runs.claim(configs.load(tiny.config_spec(tiny_data)), tmp_path, "COMMAND")
    config = configs.load(tiny.config_spec(tiny_data), ["--config.mesh.data=8", "--config.resume_every=7"])
    config.judge_path = "a field of the config's own"
    config.judges.other = configs.judge("local", path=config.get_ref("judge_path"))
    runs.claim(config, tmp_path, "COMMAND")


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_examples(tiny_data: Path, tmp_path: Path) -> None:
    config = configs.load(tiny.config_spec(tiny_data), ["--config.sft.optimizer.learning_rate=1e30"])
    with pytest.raises(UserError) as stop:
        experiments.run(config, tmp_path / "run")
    plan = experiment.plan(config, "sft", setup(config), tmp_path / "run")
    examples = ", ".join(plan.train.ids[i] for i in plan.steps[1])
    assert re.search(r"sft: step 2: loss \S+, gradient norm \S+; nothing of it was kept", str(stop.value))
    assert examples in str(stop.value)
    # Step 2 is one for a snapshot and a resume point; neither was taken.
    assert snapshots.kept(tmp_path / "run" / "sft" / "snapshots") == [0]
    assert not list((tmp_path / "run" / "sft" / "resume").glob("[0-9]*"))
    assert [row["step"] for row in metrics(tmp_path / "run", "sft")] == [0, 1]


def test_going_on_with_other_data_is_refused(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while steps are long, so that none waits behind the one that is logged."""
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    config = configs.load(tiny.config_spec(folder))
    log_step = loop.MetricsLog.step
    monkeypatch.setattr(loop, "LONG_STEP", 0.0)

    def stop_after_four(self: loop.MetricsLog, step: int, values: dict[str, float]) -> None:
        log_step(self, step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.MetricsLog, "step", stop_after_four)
    with pytest.raises(loop.Interrupted, match="sft: stopped at step 4 of 6"):
        experiments.run(config, tmp_path / "run")
    lines = (folder / "sft.jsonl").read_text().splitlines()
    (folder / "sft.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    with pytest.raises(UserError, match=r"sft: the data changed since .* was written"):
        experiments.run(config, tmp_path / "run")


@tiny.SLOW
def test_adapters_through_a_whole_experiment(tiny_data: Path, tmp_path: Path) -> None:
    """Snapshots hold adapters alone; a stage starts from what the one before it merges to, which is its reference."""
    overrides = [f"--config.{stage}.{field}" for stage in STAGES for field in ("lora.rank=2", "epochs=1")]
    config = configs.load(tiny.config_spec(tiny_data), [*overrides, "--config.dpo.objective=kto"])
    experiments.run(config, tmp_path / "run")
    last = max(snapshots.kept(tmp_path / "run" / "sft" / "snapshots"))
    after_sft, before_dpo, after_dpo = (
        runs.open_snapshot(tmp_path / "run" / stage / "snapshots" / str(step)).params
        for stage, step in (("sft", last), ("dpo", 0), ("dpo", max(snapshots.kept(tmp_path / "run/dpo/snapshots"))))
    )
    for name, kernel in after_sft["layers"].items():
        np.testing.assert_array_equal(kernel, before_dpo["layers"][name], err_msg=name)
        assert (np.asarray(kernel) != after_dpo["layers"][name]).any() == name.endswith("_proj")
    read = snapshots.open_reader(tmp_path / "run" / "dpo" / "snapshots" / "0")
    assert read(("layers", "q_proj_lora_a"), (slice(0, 2), slice(0, 32), slice(0, 2))).shape == (2, 32, 2)
    with pytest.raises(UserError, match="parameter layers.q_proj cannot be read"):
        read(("layers", "q_proj"), (slice(0, 1),) * 3)
    first = next(row for row in metrics(tmp_path / "run", "dpo") if "loss" in row)
    assert first["loss"] == pytest.approx(0.5, abs=1e-5) and first["kl_to_reference"] == pytest.approx(0, abs=1e-6)
    assert first["examples"] == 3 and first["desirable"] + first["undesirable"] == 3
    drift = pd.read_csv(tmp_path / "run" / "drift" / "drift.csv")
    assert set(drift["stage"]) == set(STAGES) and drift["magnitude"].abs().max() > 0


def test_a_reference_free_objective_logs_its_kl_when_asked(tiny_data: Path, tmp_path: Path) -> None:
    overrides = ["--config.dpo.objective=simpo", "--config.dpo.log_kl=True", "--config.dpo.snapshots.probe=False"]
    config = configs.load(tiny.config_spec(tiny_data), [*overrides, "--config.sft.snapshots.probe=False"])
    experiments.run(config, tmp_path / "run")
    rows = [row for row in metrics(tmp_path / "run", "dpo") if "loss" in row]
    assert abs(rows[0]["kl_to_reference"]) < 1e-6 < rows[-1]["kl_to_reference"]
