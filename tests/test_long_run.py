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


@tiny.SLOW
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_data(tmp_path)
    sizes = {"stages": '("dpo",)', "log_every": 20, "resume_every": 100, "dpo.epochs": 10**4, "dpo.max_steps": STEPS}
    sizes |= {"dpo.eval_every": 100, "dpo.snapshots.every": 50, "probes.memory_gb": 1e-3}
    flags = [f"--config.{name}={value}" for name, value in sizes.items()]
    config = f"{Path(__file__).parent}/tiny_config.py:{tmp_path}"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    process, said = tiny.load_script("torture.py").launch(["--config", config, *flags], tmp_path / "run")
    at_step: dict[int, int] = {}
    while process.poll() is None:
        steps = [re.match(rf"dpo (\d+)/{STEPS}  loss", line) for line in said[-3:]]
        if found := [int(match[1]) for match in steps if match]:
            at_step.setdefault(found[-1], resident(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, said[-20:]
    early = statistics.median(kib for step, kib in at_step.items() if 200 <= step < 600)
    late = statistics.median(kib for step, kib in at_step.items() if step >= STEPS - 400)
    print(f"{early} KiB in steps 200 to 600, {late} KiB in the last 400")
    assert late < 1.05 * early
