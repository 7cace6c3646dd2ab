"""What people see of a run while it goes: lines, progress, metrics.jsonl, TensorBoard, and how it is stopped."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vdjax import hosts
from vdjax.drift import tensorboard
from vdjax.files import Growing, kept_lines
from vdjax.progress import say


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request that is honoured between two steps; a second one is not held."""
    seen: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        seen.append(number)
        for other, handler in before.items():
            signal.signal(other, handler)
        tqdm.write("stopping after this step and writing a resume point; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class MetricsLog:
    """metrics.jsonl, TensorBoard and the progress line of a stage; on a resume, what lies beyond `step` is dropped.

    Raises:
      UserError: on a resume, where metrics.jsonl is missing or damaged.
    """

    def __init__(self, file: Path, tb: Path, name: str, step: int, total: int, log_every: int) -> None:
        self.name, self.total, self.every = name, total, log_every
        rows: list[dict[str, Any]] = []
        self.first = hosts.index() == 0

        def evaluated() -> list[int]:
            if step:
                rows.extend(row for row in kept_lines(file, "step") if row["step"] <= step)
            return [row["step"] for row in rows if any(k.startswith("eval_") for k in row)]

        # All processes evaluate or none does, whatever the others see of a file that the first one is writing.
        self.evaluated = set(hosts.by_first(f"the log of {name}", evaluated))
        self.rows = len(rows)  # of the first process
        if self.first:
            self.file = Growing(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
            self.tb = tensorboard.open_writer(tb, start_step=step + 1 if step else 0)
        self.bar = tqdm(
            total=total,
            initial=step,
            desc=name,
            unit="step",
            disable=not (self.first and sys.stderr.isatty()),
            file=sys.stderr,
        )
        self.last_line = 0.0

    def _write(self, row: dict[str, Any]) -> None:
        if self.first:
            self.rows += 1
            self.file.write((json.dumps(row) + "\n").encode())
            self.file.flush()
            scalars = {f"{self.name}/{k}": v for k, v in row.items() if k != "step"}
            tensorboard.scalars(self.tb, row["step"], scalars)

    def step(self, step: int, values: dict[str, float]) -> None:
        if step % self.every == 0 or step == self.total:
            self._write({"step": step, **values})
        names = ("loss", "reward_accuracy", "reward", "kl", "tokens_per_s")
        shown = {k: f"{values[k]:.4g}" for k in names if k in values}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and self.first and (now - self.last_line > 10 or step == self.total):
            self.last_line = now
            left = (self.total - step) * values["seconds"]
            text = "  ".join(f"{k} {v}" for k, v in shown.items())
            say(f"{self.name} {step}/{self.total}  {text}  about {left:.0f} s left")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.evaluated.add(step)
        self._write({"step": step, **values})
        shown = ("eval_loss", "eval_reward_accuracy", "eval_reward_margin", "eval_reward", "eval_kl")
        text = "  ".join(f"{k} {values[k]:.4f}" for k in shown if k in values)
        say(f"{self.name} {step}/{self.total} held out: {text}")

    def sync(self) -> None:
        """Before a resume point: a run that goes on from there finds all rows up to it."""
        if self.first:
            self.file.sync()
            self.tb.sync()

    def close(self) -> None:
        self.bar.close()
        if self.first:
            self.file.close()
            self.tb.close()
