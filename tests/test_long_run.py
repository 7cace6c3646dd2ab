"""Memory over 2,000 steps with snapshots, held-out evaluation, and the probing of every snapshot."""

import re
import statistics
import sys
import time
from pathlib import Path

import pytest
import tiny

STEPS = 2000


def resident(pid: int) -> int:
    """KiB."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def phase_of(said: str, run: Path) -> str:
    """Empty while programs are compiled, in the first hundred steps and for the first snapshots that are probed."""
    if re.search(r"^dpo probes: ", said, re.MULTILINE):
        return "" if (run / "probes" / "dpo.parquet").exists() else "probing"
    if re.search(r"^dpo: \d+ probes,", said, re.MULTILINE):
        return ""
    return "training" if re.search(r"^dpo \d{3,4}/", said, re.MULTILINE) else ""


@tiny.SLOW
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_data(tmp_path)
    how = {"stages": '("dpo",)', "log_every": 20, "resume_every": 100, "dpo.epochs": 10**4, "dpo.max_steps": STEPS}
    how |= {"dpo.eval_every": 100, "dpo.snapshots.every": 50, "probes.memory_gb": 1e-3}
    flags = [f"--config.{name}={value}" for name, value in how.items()]
    config = f"{Path(__file__).parent}/tiny_config.py:{tmp_path}"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    process, said = tiny.load_script("torture.py").launch(["--config", config, *flags], tmp_path / "run")
    sizes: dict[str, list[int]] = {"training": [], "probing": []}
    while process.poll() is None:
        if phase := phase_of("\n".join(said), tmp_path / "run"):
            sizes[phase].append(resident(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, said[-20:]
    for phase, kib in sizes.items():
        fifth = len(kib) // 5
        assert fifth > 10, phase
        early, late = statistics.median(kib[:fifth]), statistics.median(kib[-fifth:])
        print(f"{phase}: {early} KiB in the first fifth of its time, {late} KiB in the last")
        assert late < 1.05 * early
