"""Whole experiments in the process of a test."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from vdjax import experiment
from vdjax.drift import report
from vdjax.train import loop


def run(config: ConfigDict, workdir: Path) -> None:
    """`experiment.run` without what takes seconds and has its own tests: figures, many resamples, a matmul's rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", lambda: 1e9)
        patch.setattr(report, "RESAMPLES", 99)
        patch.setattr(report, "PERMUTATIONS", 99)
        patch.setattr(report.figures, "draw", lambda *_: {})
        experiment.run(config, workdir, "COMMAND")
