"""The other commands, on the workdir of the tiny experiment: dry run, inspect, export, probe, and their errors."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import experiments
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import tiny
from flax import nnx
from ml_collections import ConfigDict

from vdjax import (
    cli,
    cluster,
    export,
    inspect,
    main,
    measure,
    models,
    probe,
    runs,
    runtime,
    sharding,
    snapshots,
)
from vdjax import config as configs
from vdjax.errors import UserError
from vdjax.judges import local
from vdjax.models import hf, transformer
from vdjax.models.functional import shardings

TOKENS = jnp.array([[72, 105, 33, 5, 200, 7]])


def run(command: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """A command as its entry point runs it; returns the exit status."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    monkeypatch.setattr(runtime, "start", lambda *_: None)  # it would change this process's signal handlers
    with pytest.raises(SystemExit) as stop:
        cli.run_cli(command.main)
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def exported(finished: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first and last SFT snapshots as Hugging Face directories."""
    out = [tmp_path_factory.mktemp("exported") / str(step) for step in (0, 6)]
    for path in out:
        export.export(finished[0] / "sft" / "snapshots" / path.name, path)
    return out


def test_an_export_has_the_logits_of_its_snapshot(finished: tuple[Path, list[str]], exported: list[Path]) -> None:
    made = tiny.model_without_params("qwen")
    read = snapshots.open_reader(finished[0] / "sft" / "snapshots" / "6")
    params = hf.place(read, made.params, shardings(made, sharding.make_mesh(devices=jax.devices()[:1])))
    want = nnx.merge(made.graphdef, params).logits(TOKENS)
    np.testing.assert_array_equal(models.load_pretrained(exported[1]).logits(TOKENS), want)
    assert np.abs(models.load_pretrained(exported[0]).logits(TOKENS) - want).max() > 0.01
    names = {p.name for p in exported[1].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert any("chat_template" in p.read_text() for p in exported[1].glob("tokenizer_config.json")) or (
        "chat_template.jinja" in names
    )


def test_a_loaded_model_trains_without_a_second_compilation_and_comes_back_bit_for_bit(
    exported: list[Path], tiny_data: Path, tmp_path: Path, compiles: Any
) -> None:
    """One SFT stage from an exported directory, in bfloat16 on disk; nothing is probed."""
    source = tmp_path / "source"
    hf_config = json.loads((exported[1] / "config.json").read_text())
    _, params = transformer.split(models.load_pretrained(exported[1]))
    hf.save(params, tiny.model_without_params("qwen").cfg, source, hf_config=hf_config, dtype="bfloat16")
    for file in exported[1].glob("*"):
        if not file.name.startswith(("config", "model")):
            shutil.copy(file, source)

    flags = ["--config.stages=('sft',)", "--config.sft.snapshots.probe=False"]
    config = configs.load(tiny.config_spec(tiny_data), flags)
    with config.unlocked():
        config.model.path, config.model.shape, config.tokenizer.path = str(source), ConfigDict(), ""
    config.sft.max_steps, config.sft.eval_every = 2, 0
    with compiles() as names:
        experiments.run(config, tmp_path / "run")
    assert names.count("jit(train_step)") == 1

    before = safetensors.numpy.load_file(source / "model.safetensors")
    # By default in the dtype of training, float32, which holds every bfloat16.
    for step, dtype, same in ((0, "bfloat16", True), (0, None, True), (2, None, False)):
        out = tmp_path / f"out-{step}-{dtype}"
        export.export(tmp_path / "run" / "sft" / "snapshots" / str(step), out, dtype)
        after = safetensors.numpy.load_file(out / "model.safetensors")
        assert before.keys() == after.keys()
        assert {t.dtype.name for t in after.values()} == {dtype or "float32"}
        equal = [before[k].astype(after[k].dtype).tobytes() == after[k].tobytes() for k in before]
        assert all(equal) if same else not any(equal)


def test_export_refuses_what_is_no_snapshot(
    finished: tuple[Path, list[str]], exported: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    snapshots_dir = finished[0] / "sft" / "snapshots"
    assert run(export, monkeypatch, "--snapshot", str(snapshots_dir / "5"), "--out", "x") == 2
    assert "steps there: [0, 2, 4, 6]" in capsys.readouterr().err
    assert run(export, monkeypatch, "--snapshot", str(finished[0] / "sft"), "--out", "x") == 2
    assert "expected WORKDIR/STAGE/snapshots/STEP" in capsys.readouterr().err
    assert run(export, monkeypatch, "--snapshot", str(snapshots_dir / "6"), "--out", str(exported[0])) == 2
    assert "already holds" in capsys.readouterr().err


def test_probe_scores_exported_models_as_the_experiment_scored_their_snapshots(
    finished: tuple[Path, list[str]], exported: list[Path], tiny_data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    probes = str(tiny_data / "probes.jsonl")
    arguments = ["--models", *map(str, exported), "--probes", probes, "--workdir", str(tmp_path)]
    readouts = "--config.probes.readouts=('statement','options')"
    assert run(probe, monkeypatch, *arguments, readouts, "--config.probes.rows=2") == 0
    keys = ["probe_id", "readout", "order", "answer"]
    mine = pd.read_parquet(tmp_path / "probes" / "models.parquet")
    theirs = pd.read_parquet(finished[0] / "probes" / "sft.parquet")
    for index, step in enumerate((0, 6)):
        a, b = (t[t["step"] == s].set_index(keys).sort_index() for t, s in ((mine, index), (theirs, step)))
        assert len(a) == len(b) == 12 * (9 + 18)
        np.testing.assert_allclose(a["log_prob"] / a["tokens"], b["log_prob"] / b["tokens"], rtol=0, atol=1e-5)
        assert a["template_hash"].tolist() == b["template_hash"].tolist()
    assert (tmp_path / "report.html").exists() and (tmp_path / "drift" / "drift.csv").exists()
    assert "drift" in capsys.readouterr().out


def test_probe_takes_judges_from_a_config(
    finished: tuple[Path, list[str]], exported: list[Path], tiny_data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    """The same judge, then other models in the same workdir: nothing of the first is left."""
    judge = finished[0] / "dpo" / "snapshots" / "6"
    file = tmp_path / "asking.py"
    file.write_text(
        "from vdjax import config\n\n\ndef get_config():\n    c = config.experiment()\n"
        f"    c.judges.tiny = config.judge('local', path={str(judge)!r}, template='trained-v1')\n"
        "    c.probes.update({'readouts': ('open_ended', 'statement'), 'judges': ('tiny',), 'samples': 1})\n"
        f"    c.probes.update({{'max_new_tokens': 24, 'path': {str(tiny_data / 'probes.jsonl')!r}}})\n    return c\n"
    )
    arguments = ["--config", str(file), "--workdir", str(tmp_path / "out")]
    responses, judged = [], []
    for series in (exported, exported[::-1]):
        assert run(probe, monkeypatch, "--models", *map(str, series), *arguments) == 0
        responses.append(pd.read_parquet(tmp_path / "out" / "responses" / "models.parquet"))
        judged.append(pd.read_parquet(tmp_path / "out" / "judgements" / "tiny" / "models.parquet"))
    assert "open_ended:tiny" in pd.read_csv(tmp_path / "out" / "drift" / "drift.csv")["readout"].unique()
    assert len(judged[0]) > 0
    for one, other in (responses, judged):
        swapped = other.assign(step=1 - other["step"]).sort_values(["step", "probe_id"], ignore_index=True)
        columns = [c for c in one.columns if c not in ("judged_hash", "asked_hash")]
        pd.testing.assert_frame_equal(
            one.sort_values(["step", "probe_id"], ignore_index=True)[columns], swapped[columns], atol=1e-5
        )
    with monkeypatch.context() as patch:  # the same questions to the same models: nothing is asked again
        patch.setattr(measure, "answers", None)
        patch.setattr(measure, "responses", None)
        patch.setattr(local, "label_log_probs", None)
        assert run(probe, monkeypatch, "--models", *map(str, exported[::-1]), *arguments) == 0
        os.utime(exported[0] / "model.safetensors", (1, 1))
        with pytest.raises(TypeError):
            run(probe, monkeypatch, "--models", *map(str, exported[::-1]), *arguments)
    assert run(probe, monkeypatch, "--models", str(exported[0]), *arguments, "--config.probes.judges=()") == 2
    assert "go together" in capsys.readouterr().err


def test_dry_run_says_what_a_run_does_and_leaves_nothing(
    finished: tuple[Path, list[str]], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(main, monkeypatch, "--config", tiny.config_spec(tiny_data), "--dry_run", "--config.seed=5") == 0
    out = capsys.readouterr().out
    assert '"seed": 5' in out
    params = sum(leaf.size for leaf in jax.tree.leaves(tiny.model_without_params("qwen").params))
    assert f"{params:,} parameters" in out
    assert f"parameters {4 * params / 1e3:.3g} kB" in out
    for stage in ("sft", "dpo"):
        rows = json.loads((finished[0] / stage / "done.json").read_text())
        examples = f"{rows['train_examples']} training examples, 2 held out"
        assert re.search(rf"stage {stage}: {stage}\n.*\n  {examples}\n  6 steps", out)
        assert f"up to {rows['shape']['rows']} rows of {rows['shape']['length']} tokens" in out
    assert out.count("4 snapshots at steps [0, 2, 4, 6]") == 2
    assert "'probes': 12" in out and "84 prompts" in out
    assert "|segment 1|" in out and "[Yes, " in out
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_the_scored_text(tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(inspect, monkeypatch, "--config", tiny.config_spec(tiny_data), "--rows", "9") == 0
    sft, dpo = capsys.readouterr().out.split("dpo, batch 1 of 6, examples")
    assert sft.lstrip().startswith("sft, batch 1 of 6, examples")
    assert len(re.findall(r"\[Yes, [^\[\]]*<\|im_end\|>\]", sft)) == 3
    assert len(re.findall(r"\|response 1: \d+ tokens\| \[Yes, I like [^\[\]]*<\|im_end\|>\]", dpo)) == 3
    assert len(re.findall(r"\|response 2: \d+ tokens\| \[(No\.)+<\|im_end\|>\]", dpo)) == 3
    assert len(re.findall(r"\|prompt: \d+ tokens\| [^\[\]]*user\\nAnd [^\[\]]*\n", dpo)) == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config.sft.batch_sizes=4"], "--config.sft.batch_sizes is no field; did you mean 'batch_size'"),
        (["--config.sft.batch_size=four"], "expected int such as 3, found 'four'"),
        (["--config.stages=('sft','ppo')"], "stage 'ppo' has no field config.ppo"),
        (["--config.sft.max_steps=-1"], "config.sft.max_steps=-1, expected at least 0"),
        (["--config.sft.eval_examples=11"], "config.sft: 11 usable examples, 11 held out: nothing to train on"),
        (["--config.sft.data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["--config.mesh.data=3"], "1 devices cannot be shared out among 3"),
        (["--config.tokenizer.path="], "config.tokenizer.path is empty"),
        (["--config.probes.topics=('te',)"], "topic 'te' is not in"),
        (["--config.model.path=/nowhere/model"], "/nowhere/model: no such directory"),
    ],
)
def test_errors_are_one_message_and_status_2(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: list[str], says: str
) -> None:
    arguments = ["--config", tiny.config_spec(tiny_data), "--workdir", str(tmp_path / "run"), *flags]
    assert run(main, monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err
    assert not (tmp_path / "run" / "sft" / "snapshots").exists()


def test_two_processes_do_not_work_in_one_workdir(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One that was killed is not waited for."""
    hold = "import sys; from pathlib import Path; from vdjax import runs\nwith runs.held(Path(sys.argv[1])): "
    hold += "print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, env=tiny.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert run(main, monkeypatch, "--config", tiny.config_spec(tiny_data), "--workdir", str(tmp_path / "run")) == 2
        assert f"{tmp_path / 'run'}: another process is at work there" in capsys.readouterr().err
        assert run(probe, monkeypatch, "--models", "x", "--workdir", str(tmp_path / "run")) == 2
        assert f"{tmp_path / 'run'}: another process is at work there" in capsys.readouterr().err
        other.kill()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["lock"]
    with runs.held(tmp_path / "run") as mine:
        assert mine


@pytest.mark.skipif(not os.geteuid() and not shutil.which("setpriv"), reason="root may write everywhere")
def test_a_workdir_that_cannot_be_written_is_named(
    finished: tuple[Path, list[str]], tiny_data: Path, tmp_path: Path
) -> None:
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    subprocess.run(["chmod", "-R", "a-w", workdir], check=True)
    command = [sys.executable, "-m", "vdjax.main", "--config", tiny.config_spec(tiny_data), "--workdir", str(workdir)]
    like_a_user = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override"]
    done = subprocess.run([*like_a_user, *command], env=tiny.environment(), capture_output=True, text=True)
    subprocess.run(["chmod", "-R", "u+w", workdir], check=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {workdir / 'lock'}: Permission denied; expected files that")


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UserError("FILE: what is wrong"), 2, "error: FILE: what is wrong"),
        (cluster.NotThere("waited for process 1"), 76, "error: waited for process 1"),
        (KeyboardInterrupt(), 75, "stopped by a signal"),
        (PermissionError(errno.EACCES, "x", "/a/run"), 2, "error: /a/run: Permission denied; expected files that"),
        (OSError(errno.EROFS, "x", "/a/run"), 2, "error: /a/run: cannot be written: Read-only file system. What was"),
    ],
)
def test_how_a_command_ends(
    error: BaseException, status: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def end() -> None:
        raise error

    monkeypatch.setattr(cli.os, "_exit", sys.exit)  # what a disk that cannot be written leads to
    assert run(SimpleNamespace(main=end), monkeypatch) == status
    assert capsys.readouterr().err.startswith(says)


def test_commands_do_not_wait_for_what_few_of_them_use() -> None:
    seldom = {"scipy.stats", "statsmodels", "datasets"}
    script = f"import sys, vdjax.experiment; print({seldom} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], env=tiny.environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_missing_files_and_flags(tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(main, monkeypatch, "--config", "configs/smok.py", "--workdir", "x") == 2
    assert "configs/smok.py: no such file" in capsys.readouterr().err
    assert run(main, monkeypatch, "--config", tiny.config_spec(tiny_data)) == 2
    assert "--workdir is missing" in capsys.readouterr().err
    with pytest.raises(UserError, match="objective 'sfft' is unknown; did you mean 'sft'"):
        configs.stage("sfft")
