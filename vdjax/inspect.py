"""Shows the first batches as text: python -m vdjax.inspect --config configs/NAME.py [--batches N] [--rows N]

Scored tokens stand in [brackets] (green on a terminal); |segment|, |prompt| and |response k| mark where parts begin.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vdjax.cli import run_cli


def describe(batch: dict[str, np.ndarray], tokenizer: Any, rows: int) -> str:
    """The first non-empty rows of a batch of arrays [microbatches, rows, length]."""
    flat = {k: batch[k].reshape(-1, batch[k].shape[2]) for k in ("tokens", "segment_ids", "sequence_ids", "loss_mask")}
    out = []
    for r in range(min(rows, len(flat["tokens"]))):
        segments, sequences, mask = flat["segment_ids"][r], flat["sequence_ids"][r], flat["loss_mask"][r]
        used = int((segments > 0).sum())
        out.append(f"row {r}: {used} of {len(segments)} slots used, {int(mask.sum())} tokens scored")
        first = 0
        for segment in range(1, int(segments.max()) + 1):
            here = np.flatnonzero(segments == segment)
            first = int(sequences[: here[0]].max(initial=0))
            out.append(f"|segment {segment}|")
            for sequence in dict.fromkeys(sequences[here].tolist()):
                part = here[sequences[here] == sequence]
                label = f"response {sequence - first}" if sequence else "prompt"
                out.append(f"  |{label}: {len(part)} tokens| " + marked(flat["tokens"][r][part], mask[part], tokenizer))
    return "\n".join(out)


def marked(tokens: np.ndarray, mask: np.ndarray, tokenizer: Any) -> str:
    """Text in which runs of scored tokens are marked; control characters are shown escaped."""
    begin, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[", "]")
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(tokens)]
    parts = []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        text = tokenizer.decode(tokens[start:stop].tolist(), skip_special_tokens=False)
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        parts.append(f"{begin}{text}{end}" if mask[start] else text)
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vdjax.inspect", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    parser.add_argument("--batches", type=int, default=1, help="batches of each stage")
    parser.add_argument("--rows", type=int, default=2, help="rows of each batch")
    flags, overrides = parser.parse_known_args()

    from vdjax import config as configs
    from vdjax import experiment
    from vdjax.runtime import start
    from vdjax.setup import setup
    from vdjax.train.plan import data_batches

    config = configs.load(flags.config, overrides)
    start()
    made = setup(config)
    with tempfile.TemporaryDirectory(prefix="vdjax-") as folder:
        for name in config.stages:
            plan = experiment.plan(config, name, made, Path(folder))
            batches = data_batches(plan)
            for step in range(min(flags.batches, plan.total_steps)):
                print(
                    f"\n{name}, batch {step + 1} of {plan.total_steps}, examples "
                    + ", ".join(plan.train.ids[i] for i in batches[step]["indices"][:8])
                )
                print(describe(batches[step], made.tokenizer, flags.rows))


if __name__ == "__main__":
    run_cli(main)
