"""vdjax.plan as a command, with the TPU's own compiler."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from vdjax.planning.programs import PROGRAMS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def planned(config: Path | str, *arguments: str) -> subprocess.CompletedProcess:
    env = tiny.environment() | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # libtpu refuses flags of the CPU's compiler
    command = [sys.executable, "-m", "vdjax.plan", "--config", str(config), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)


def read(done: subprocess.CompletedProcess) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_four_programs_are_one_json_object(tiny_data: Path) -> None:
    found = read(planned(tiny.config_spec(tiny_data), "--topology", "v5e:2x2", "--config.dpo.batch_size=4", "--json"))
    assert (found["topology"], found["mesh"]["fsdp"], found["chips"]) == ("v5e:2x2", 4, 4)
    for name in PROGRAMS:
        program = found[name]
        assert program["fits"] and program["tflops"] > 0 and program["compile_s"] > 0
        assert program["hbm_gib"] == pytest.approx(sum(program["parts"].values()), rel=0.02)
        assert all({"kind", "over", "count", "bytes"} == set(each) for each in program["collectives"])
    assert any("fsdp" in each["over"] for each in found["train_step"]["collectives"])


@pytest.mark.parametrize(
    "arguments, axes",
    [
        (["--topology", "v5p:2x2x1"], {"fsdp"}),
        (["--topology", "v6e:2x2"], {"fsdp"}),
        (["--topology", "v5e:2x2", "--slices", "2", "--mesh", "data=2,fsdp=4"], {"slices", "fsdp"}),
    ],
)
def test_collectives_are_known_of_every_chip_and_between_slices(
    tiny_data: Path, arguments: list[str], axes: set[str]
) -> None:
    more = ["--programs", "train_step", "--config.dpo.batch_size=8", "--json"]
    found = read(planned(tiny.config_spec(tiny_data), *arguments, *more))
    assert set().union(*(each["over"] for each in found["train_step"]["collectives"])) == axes


def test_what_does_not_fit_ends_with_1_and_says_what_to_change() -> None:
    done = planned("configs/llama3_dpo.py", "--topology", "v5e:1x2", "--programs", "train_step")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "DOES NOT FIT" in done.stdout and "kept for the backward pass" in done.stdout
    assert "try --search, or more chips" in done.stdout
