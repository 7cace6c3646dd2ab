"""The README says what is so: its snippets run, its commands parse, its tables match the code."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import readme
import tiny

from vdjax import config as configs
from vdjax import snapshots
from vdjax.drift.statistics import DRIFT_COLUMNS, STANCE_COLUMNS
from vdjax.objectives import OBJECTIVES
from vdjax.probes.readouts import READOUTS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = readme.blocks(TEXT)
COMMANDS = [
    command.strip()
    for block in BLOCKS
    if block.language == "bash"
    for line in block.text.splitlines()
    for command in line.split("&&")
]


@tiny.SLOW  # .ci/run runs them from the wheel
def test_snippets_run(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """On the tiny experiment's workdir in the place of the smoke run's, its last snapshot under the number of that."""
    workdir = tmp_path / "runs" / "smoke"
    shutil.copytree(finished[0], workdir)
    folder = workdir / "dpo" / "snapshots"
    (last,) = set(re.findall(r"runs/smoke/dpo/snapshots/(\d+)", TEXT))
    (folder / str(snapshots.kept(folder)[-1])).rename(folder / last)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    readme.run(ROOT / "README.md")
    out = capfd.readouterr().out
    assert out.count("README line") == sum(block.language == "python" or block.run for block in BLOCKS) >= 6
    assert "(1, 24, 260)" in out  # logits: one token a byte of the question
    assert "Yes, it saves trees." in out
    assert "drift time" in out


def help_of(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    if command[1] != "-m":
        done = subprocess.run([sys.executable, ROOT / command[1], "--help"], capture_output=True, text=True, check=True)
        return done.stdout
    monkeypatch.setattr(sys, "argv", [command[2], "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(command[2]).main()
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ") and "venv" not in c])
def test_command_is_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = shlex.split(command)
    text = help_of(words, monkeypatch, capsys)
    flags = [word for word in words if word.startswith("--")]
    overrides = [flag for flag in flags if flag.startswith("--config.")]
    for flag in set(flags) - set(overrides):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"{flag} is no flag of {' '.join(words[:3])}"
    if "--config" in words:
        file = words[words.index("--config") + 1]
        assert configs.load(str(ROOT / file), overrides).stages


def test_commands_of_every_entry_point_are_shown() -> None:
    shown = {shlex.split(c)[2] for c in COMMANDS if c.startswith("python -m vdjax")}
    entry_points = {f"vdjax.{f.stem}" for f in (ROOT / "vdjax").glob("*.py") if "__main__" in f.read_text()}
    assert shown == entry_points


def test_ci_runs_the_test_command() -> None:
    assert "pip install '.[dev]' && pytest" in TEXT
    script = (ROOT / ".ci" / "run").read_text()
    assert '"${wheel}[dev]"' in script
    assert script.rstrip().splitlines()[-1] == "pytest"


def test_table_of_files_is_that_of_the_tree() -> None:
    table = TEXT[TEXT.index("| file | holds |") : TEXT.index("Imports point one way")]
    listed = set()
    for line in table.strip().splitlines()[2:]:
        folder = ""
        for name in re.findall(r"`([\w/]+\.py)`", line.split("|")[1]):
            folder = name.rpartition("/")[0] or folder
            listed.add(f"{folder}/{name.rpartition('/')[2]}")
    files = {str(f.relative_to(ROOT)) for f in (ROOT / "vdjax").rglob("*.py") if f.name != "__init__.py"}
    assert listed == files


def test_columns_of_tables_are_listed() -> None:
    layout = next(b.text for b in BLOCKS if "drift/stances.csv" in b.text)
    for file, columns in (("drift/stances.csv", STANCE_COLUMNS), ("drift/drift.csv", DRIFT_COLUMNS)):
        said = re.split(r"\n(?=\S)", layout[layout.index(file) :])[0].removeprefix(file)
        assert tuple(re.split(r"[\s,]+", said.strip())) == columns


def test_objectives_and_readouts_are_named() -> None:
    for name in (*OBJECTIVES, *READOUTS):
        assert f"`{name}`" in TEXT


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    named = re.findall(r"`((?:configs|scripts|tpu|vdjax)/[\w/.*]+)`", TEXT)
    assert len(named) > 20
    for pattern in named:
        assert list(ROOT.glob(pattern)), pattern
