"""What the launch scripts read, against what it speaks of: pyproject.toml, libtpu, the scripts' guide."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import readme
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
GENERATIONS = ("v4", "v5e", "v5p", "v6e")
COMPILES = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

slices = int(sys.argv[2])
devices = topologies.get_topology_desc(sys.argv[1], platform="tpu", num_slices=slices).devices
mesh = Mesh(np.array(sorted(devices, key=lambda d: (d.slice_index, d.id))).reshape(slices, -1), ("data", "fsdp"))
w = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
x = jax.ShapeDtypeStruct((len(devices) * 8, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
step = jax.jit(jax.grad(lambda w, x: jnp.square(x @ w).astype(jnp.float32).mean()), out_shardings=w.sharding)
text = step.lower(w, x).compile().as_text()
assert "all-gather" in text
"""


def table(name: str) -> list[list[str]]:
    lines = (ROOT / "tpu" / name).read_text(encoding="utf-8").splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def with_libtpu(code: str, *arguments: str, flags: str = "") -> subprocess.CompletedProcess:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it only compiles, so others may too
        "LIBTPU_INIT_ARGS": flags,
        "XLA_FLAGS": "",  # those of the tests are for CPU, and refused
    }
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True)


def test_pins_are_exact_and_satisfy_pyproject() -> None:
    pins = {}
    for (line,) in table("constraints.txt"):
        name, version = re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9A-Za-z.]*)", line).groups()
        pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["tpu"]
    for requirement in map(Requirement, wanted + project["build-system"]["requires"] + ["uv"]):
        version = pins[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version), f"{requirement}: pinned to {version}"


def test_topologies_are_those_of_libtpu() -> None:
    rows = table("topologies.txt")
    assert tuple(row[0] for row in rows) == GENERATIONS
    code = """
import sys
from jax.experimental import topologies
for name in sys.argv[1:]:
    print(name, len({d.process_index for d in topologies.get_topology_desc(name, platform="tpu").devices}))
"""
    shapes = [(row[0], shape) for row in rows for shape in row[6:]]
    done = with_libtpu(code, *(f"{generation}:{shape}" for generation, shape in shapes))
    assert done.returncode == 0, done.stderr[-2000:]
    hosts = dict(line.split() for line in done.stdout.splitlines())
    for generation, shape in shapes:
        chips = eval(shape.replace("x", "*"))
        assert int(hosts[f"{generation}:{shape}"]) == max(1, chips // 4), (generation, shape)  # as common.sh counts


def test_every_xla_flag_has_a_reason() -> None:
    for generation, flag, *reason in table("xla_flags.txt"):
        assert generation in GENERATIONS
        assert re.fullmatch(r"--xla_[a-z0-9_]+=[a-z0-9]+", flag)
        assert len(reason) > 5


@pytest.mark.parametrize("generation", GENERATIONS)
def test_libtpu_takes_the_flags(generation: str) -> None:
    """It refuses a flag that it does not know, and one that it knows but not for this generation."""
    flags = " ".join(flag for of, flag, *_ in table("xla_flags.txt") if of == generation)
    smallest = "2x2x1" if generation in ("v4", "v5p") else "2x2"
    done = with_libtpu(COMPILES, f"{generation}:{smallest}", "2", flags=flags)
    assert done.returncode == 0, done.stderr[-2000:]


def test_libtpu_refuses_an_unknown_flag() -> None:
    """Else the test above could not fail."""
    done = with_libtpu(COMPILES, "v5e:2x2", "1", flags="--xla_tpu_no_such_flag=true")
    assert done.returncode != 0 and "Unknown command line flag 'xla_tpu_no_such_flag'" in done.stderr


def test_the_guide_s_launches_are_accepted() -> None:
    text = (ROOT / "tpu" / "README.md").read_text(encoding="utf-8")
    names = "PROJECT=my-project ZONE=us-east5-b BUCKET=bucket"
    rest = "--project my-project --zone us-east5-b --topology v5e:8x8"
    commands = [
        command.replace(" ... ", f" {rest} ", 1)
        for block in readme.blocks(text)
        for command in block.text.replace("\\\n", " ").splitlines()
        if command.startswith("tpu/")
    ]
    assert len(commands) == 3
    for command in commands:
        script, arguments = command.split(maxsplit=1)
        shell = f"{names}; bash {script} --print {arguments}"
        done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
