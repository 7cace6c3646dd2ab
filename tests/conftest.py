import json
import os
import tempfile

# One compile cache for this session and the processes that its tests start; the user's own is left alone.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vdjax-test-compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Most of the time goes into compiling, which the second flag makes three times as fast. With XLA_FLAGS= in the
# environment tests run what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import experiments
import fake_gcs
import filelock
import hypothesis
import jax
import pytest
import tiny

from vdjax import config as configs
from vdjax.files import as_path
from vdjax.models.functional import Model

hypothesis.settings.register_profile("untimed", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("untimed")


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def qwen() -> tuple[Model, Any]:
    """A tiny Qwen-3 (tied, head_dim 16 of width 32) and parameters whose logits are far from uniform."""
    return tiny.model("qwen")


@pytest.fixture(scope="session")
def llama() -> tuple[Model, Any]:
    """A tiny untied Llama-3, likewise."""
    return tiny.model("llama")


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that this session's workers have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "of_all_workers"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_data(of_all_workers: Path) -> Path:
    """A folder with sft.jsonl, preferences.jsonl and probes.jsonl, which tiny_config.py reads."""
    folder, written = of_all_workers / "data", of_all_workers / "written"
    with filelock.FileLock(of_all_workers / "data.lock"):
        if not written.exists():
            folder.mkdir(exist_ok=True)
            tiny.write_data(folder)
            written.touch()
    return folder


@pytest.fixture(scope="session")
def compiles() -> Callable[[], Any]:
    """`with compiles() as names:` collects the names of all functions that XLA compiles meanwhile."""
    active: list[list[str]] = []

    def on_event(event: str, duration_secs: float, **about: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            for names in active:
                names.append(str(about["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(on_event)

    @contextmanager
    def collect() -> Iterator[list[str]]:
        names: list[str] = []
        active.append(names)
        try:
            yield names
        finally:
            active.remove(names)

    return collect


@pytest.fixture(scope="session")
def finished(tiny_data: Path, of_all_workers: Path, compiles: Any) -> tuple[Path, list[str]]:
    """The workdir of the tiny experiment run without interruption, and the names of what was compiled for it."""
    workdir, compiled = of_all_workers / "run", of_all_workers / "compiled.json"
    with filelock.FileLock(of_all_workers / "run.lock"):
        if not compiled.exists():
            shutil.rmtree(workdir, ignore_errors=True)  # what a worker that failed left
            with compiles() as names:
                experiments.run(configs.load(tiny.config_spec(tiny_data)), workdir)
            compiled.write_text(json.dumps(names))
    return workdir, json.loads(compiled.read_text())


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """gs://bucket, which stands on this machine, for the processes that tests start too."""
    server = fake_gcs.serve()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fake_gcs.environment(f"http://127.0.0.1:{server.server_address[1]}").items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield as_path("gs://bucket")
    server.shutdown()
