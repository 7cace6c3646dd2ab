"""Whole experiments as tests run them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from vdjax import experiment
from vdjax.drift import report
from vdjax.train import loop


def leave_out(put: Callable[[Any, str, Any], None]) -> None:
    """What takes seconds and has its own tests: figures, many resamples, a matmul's rate. `put` is `setattr`."""
    put(loop, "peak_flops", lambda: 1e9)
    put(report, "RESAMPLES", 99)
    put(report, "PERMUTATIONS", 99)
    put(report.figures, "draw", lambda *_: {})


def run(config: ConfigDict, workdir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch.setattr)
        experiment.run(config, workdir, "COMMAND")
