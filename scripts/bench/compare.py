"""Runs vdjax and its peers in turns on the same rows, and writes docs/benchmarks.md with its figure.

    python scripts/bench/compare.py --work runs/bench --peers PEERS --peer_python P/bin/python \
        --tunix_python T/bin/python --model models/smollm2-135m --data harmless-base.jsonl.gz --rounds 3
    python scripts/bench/compare.py --work runs/bench --out docs/benchmarks.md

PEERS is a folder of the peers' scripts (its README.md says what they do), each of which prints one JSON line as those
here do. What is kept in --work is not run again; --only REGEX runs the labels that match. The second command writes the
tables of what is kept; one is of --work's folder huge_pages, for what was run there with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from vdjax.studies.tables import to_markdown

HERE = Path(__file__).parent
CHECKPOINTS = 8
SAMPLES = 5  # of each open-ended question
DPO = "{here}/train.py --model {model} --objective dpo --batch 4"
SFT = "{here}/train.py --model {model} --objective sft --batch 8"
BF16 = " --config.model.compute_dtype=bfloat16"

# Label, whose Python, script and arguments; {name} is filled in. Peers and ours take turns in this order.
RUNS: dict[str, tuple[str, str]] = {
    "dpo-trl": ("peer", "{peers}/trl_dpo.py --model {model} --data {data}"),
    "dpo-vdjax": ("own", DPO + " --rows {rows}"),
    "dpo-trl-precompute": ("peer", "{peers}/trl_dpo.py --model {model} --data {data} --precompute"),
    "dpo-hf": ("peer", "{peers}/hf_dpo.py --model {model} --data {data}"),
    "dpo-hf-precompute": ("peer", "{peers}/hf_dpo.py --model {model} --data {data} --precompute"),
    "dpo-trl-bf16": ("peer", "{peers}/trl_dpo.py --model {model} --data {data} --bf16"),
    "dpo-vdjax-bf16": ("own", DPO + " --rows {rows}" + BF16),
    "sft-trl": ("peer", "{peers}/trl_sft.py --model {model} --data {data}"),
    "sft-vdjax": ("own", SFT + " --rows {rows}"),
    "sft-hf": ("peer", "{peers}/trl_sft.py --model {model} --data {data} --trainer hf"),
    "sft-trl-bfd": ("peer", "{peers}/trl_sft.py --model {model} --data {data} --mode bfd --steps 4"),
    "sft-trl-wrapped": ("peer", "{peers}/trl_sft.py --model {model} --data {data} --mode wrapped --steps 4"),
    "sft-hf-bf16": ("peer", "{peers}/trl_sft.py --model {model} --data {data} --trainer hf --bf16"),
    "sft-vdjax-bf16": ("own", SFT + " --rows {rows}" + BF16),
    "dpo-tunix": ("tunix", "{peers}/tunix_dpo.py --weights {model} --rows {rows} --steps 6"),
    "sft-tunix": ("tunix", "{peers}/tunix_sft.py --weights {model} --rows {rows} --steps 6"),
    "dpo-tunix-full": ("tunix", "{peers}/tunix_dpo.py --weights {model} --rows {full} --steps 6"),
    "dpo-vdjax-full": ("own", DPO + " --rows {full}"),
    "sft-tunix-full": ("tunix", "{peers}/tunix_sft.py --weights {model} --rows {full} --steps 6"),
    "sft-vdjax-full": ("own", SFT + " --rows {full}"),
    "probe-hf": ("peer", "{peers}/hf_probe.py --model {model} --ckpts {checkpoints}"),
    "probe-vdjax": (
        "own",
        "{here}/probes.py --checkpoints {each_checkpoint} --questions {peers}/stance_items.json --repeats 1",
    ),
    "generate-hf": ("peer", "{peers}/hf_generate.py --model {model} --data {data}"),
    "generate-vdjax": ("own", "{here}/sample.py --model {model} --rows {rows}"),
    "open-ended-hf-40": ("peer", "{peers}/hf_generate.py --model {model} --data {asked} --batch 40 --steps 1"),
    "open-ended-hf-160": ("peer", "{peers}/hf_generate.py --model {model} --data {asked} --batch 160 --steps 1"),
    "open-ended-vdjax": ("own", "{here}/open_ended.py --model {model} --rows {asked_rows} --snapshots 2 --repeats 1"),
    "growth": ("own", "{here}/growth.py"),
}
OURS = [name for name in RUNS if "vdjax" in name]


class Line(NamedTuple):
    """One comparison; a figure that is better when lower has a `-` in front."""

    work: str
    ours: str
    figure: str
    peer: str
    peer_figure: str
    unit: str
    goal: float


LINES = [
    Line(
        "DPO, reference included", "dpo-vdjax", "examples_per_s_with_reference", "dpo-trl", "pairs_per_s", "pairs/s", 3
    ),
    Line(
        "DPO, reference included", "dpo-vdjax", "examples_per_s_with_reference", "dpo-hf", "pairs_per_s", "pairs/s", 2.5
    ),
    Line(
        "DPO, reference precomputed", "dpo-vdjax", "examples_per_s", "dpo-trl-precompute", "pairs_per_s", "pairs/s", 2.5
    ),
    Line(
        "DPO, reference precomputed", "dpo-vdjax", "examples_per_s", "dpo-hf-precompute", "pairs_per_s", "pairs/s", 2.5
    ),
    Line(
        "DPO, bfloat16", "dpo-vdjax-bf16", "examples_per_s_with_reference", "dpo-trl-bf16", "pairs_per_s", "pairs/s", 1
    ),
    Line("DPO, peak memory", "dpo-vdjax", "-peak_rss_mb", "dpo-trl", "-peak_rss_train_mb", "MB", 2),
    Line("SFT", "sft-vdjax", "real_tokens_per_s", "sft-trl", "real_tokens_per_s", "real tokens/s", 1.8),
    Line("SFT", "sft-vdjax", "real_tokens_per_s", "sft-hf", "real_tokens_per_s", "real tokens/s", 1.5),
    Line(
        "SFT, TRL packs by best fit",
        "sft-vdjax",
        "real_tokens_per_s",
        "sft-trl-bfd",
        "real_tokens_per_s",
        "real tokens/s",
        1.2,
    ),
    Line(
        "SFT, TRL cuts and joins",
        "sft-vdjax",
        "real_tokens_per_s",
        "sft-trl-wrapped",
        "real_tokens_per_s",
        "real tokens/s",
        1.2,
    ),
    Line(
        "SFT, bfloat16", "sft-vdjax-bf16", "real_tokens_per_s", "sft-hf-bf16", "real_tokens_per_s", "real tokens/s", 1
    ),
    Line("DPO, real rows", "dpo-vdjax", "real_tokens_per_s", "dpo-tunix", "real_tokens_per_s", "real tokens/s", 3),
    Line("SFT, real rows", "sft-vdjax", "real_tokens_per_s", "sft-tunix", "real_tokens_per_s", "real tokens/s", 3),
    Line(
        "DPO, rows without padding",
        "dpo-vdjax-full",
        "real_tokens_per_s",
        "dpo-tunix-full",
        "real_tokens_per_s",
        "real tokens/s",
        1.3,
    ),
    Line(
        "SFT, rows without padding",
        "sft-vdjax-full",
        "real_tokens_per_s",
        "sft-tunix-full",
        "real_tokens_per_s",
        "real tokens/s",
        1.3,
    ),
    Line("8 checkpoints x 64 questions x 3 answers", "probe-vdjax", "-wall_s", "probe-hf", "-wall_s", "s", 4),
    Line(
        "Sampling, batch 16, 64 new tokens",
        "generate-vdjax",
        "new_tokens_per_s",
        "generate-hf",
        "new_tokens_per_s",
        "tokens/s",
        2,
    ),
    *(
        Line(
            "Open-ended probes, 64 questions x 5",
            "open-ended-vdjax",
            "new_tokens_per_s.together",
            f"open-ended-hf-{batch}",
            "new_tokens_per_s",
            "tokens/s",
            3,
        )
        for batch in (40, 160)
    ),
]


def full_rows(count: int, vocab: int) -> list[dict[str, Any]]:
    """Rows of 128 prompt tokens and responses of 128: nothing to pad."""
    rng = np.random.default_rng(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: rng.integers(100, vocab, 128).tolist() for name in names} for _ in range(count)]


def questions(file: Path) -> str:
    """The peers' stance questions as pairs of HH-RLHF have their prompts, each as often as it is sampled."""
    lines = []
    for item in json.loads(file.read_text())["items"]:
        asked = f"\n\nHuman: {item['question']}\n\nAssistant:"
        lines += SAMPLES * [json.dumps({"chosen": asked + " Yes.", "rejected": asked + " No."}) + "\n"]
    return "".join(lines)


def prepare(flags: argparse.Namespace) -> dict[str, str]:
    flags.work.mkdir(parents=True, exist_ok=True)
    rows, full, asked, asked_rows = (flags.work / f"{name}.jsonl" for name in ("rows", "full", "asked", "asked_rows"))
    checkpoints = flags.work / "checkpoints"
    if not asked_rows.exists():
        asked.write_text(questions(flags.peers / "stance_items.json"))
        for data, number, out in ((flags.data, 64, rows), (asked, 64 * SAMPLES, asked_rows)):
            command = [flags.peer_python, flags.peers / "common.py", "rows", "--model", flags.model, "--data", data]
            made = subprocess.run([*command, "--n", str(number)], capture_output=True, text=True, check=True)
            out.write_text(made.stdout)
        full.write_text("".join(json.dumps(row) + "\n" for row in full_rows(64, 49000)))
    if not (checkpoints / f"ck{CHECKPOINTS - 1}").exists():
        script = flags.peers / "hf_probe.py"
        command = [flags.peer_python, script, "--model", flags.model, "--ckpts", checkpoints, "--make_only"]
        subprocess.run(command, check=True)
    return {
        "here": str(HERE),
        "peers": str(flags.peers),
        "model": str(flags.model),
        "data": str(flags.data),
        "rows": str(rows),
        "full": str(full),
        "asked": str(asked),
        "asked_rows": str(asked_rows),
        "checkpoints": str(checkpoints),
        "each_checkpoint": " ".join(str(checkpoints / f"ck{k}") for k in range(CHECKPOINTS)),
    }


def run(flags: argparse.Namespace) -> None:
    pythons = {"own": sys.executable, "peer": flags.peer_python, "tunix": flags.tunix_python}
    names = prepare(flags)
    for number in range(1, flags.rounds + 1):
        for label, (whose, arguments) in RUNS.items():
            kept = flags.work / f"{label}.jsonl"
            done = len(kept.read_text().splitlines()) if kept.exists() else 0
            if done >= number or not pythons[whose] or not re.search(flags.only, label):
                continue
            command = [pythons[whose], *arguments.format(**names).split()]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                print(f"{label}: failed\n{result.stderr[-2000:]}", file=sys.stderr, flush=True)
                continue
            line = json.loads(result.stdout.splitlines()[-1])
            with kept.open("a") as out:
                out.write(json.dumps(line) + "\n")
            print(f"{number} {label}", file=sys.stderr, flush=True)


def figures(work: Path, label: str, name: str, *, optional: bool = False) -> list[float]:
    """A figure of all runs of a label; where it is optional, of those that have it."""
    kept = work / f"{label}.jsonl"
    out = []
    for text in kept.read_text().splitlines() if kept.exists() else []:
        value = json.loads(text)
        if optional and name not in value:
            continue
        for part in name.removeprefix("-").split("."):
            value = value[part]
        out.append(float(value))
    return out


def shown(values: list[float]) -> str:
    def one(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    middle, smallest, largest = one(statistics.median(values)), one(min(values)), one(max(values))
    return middle if smallest == largest else f"{middle} [{smallest}, {largest}]"


def comparisons(work: Path) -> tuple[pd.DataFrame, list[tuple[str, list[float], float]]]:
    """The table, and of each line its name, the ratio of each round, and the goal."""
    lines, ratios = [], []
    for line in LINES:
        ours, theirs = figures(work, line.ours, line.figure), figures(work, line.peer, line.peer_figure)
        rounds = min(len(ours), len(theirs)) or None  # that both ran; where one did not run at all, the other's
        ours, theirs = ours[:rounds], theirs[:rounds]
        row = {
            "work": line.work,
            "peer": line.peer,
            "unit": line.unit,
            "vdjax": shown(ours) if ours else "not run",
            "peer's": shown(theirs) if theirs else "not run",
            "ratio": "",
            "goal": f"{line.goal:g}",
            "goal needs": "",
        }
        lines.append(row)
        if not ours or not theirs:
            continue
        better = [a / b if line.figure[0] != "-" else b / a for a, b in zip(ours, theirs, strict=True)]
        middle = statistics.median(better)
        row["ratio"] = f"{middle:.2f}" + (f" [{min(better):.2f}, {max(better):.2f}]" if len(better) > 1 else "")
        row["goal"] += "" if middle >= line.goal else " (missed)"
        if line.unit != "MB":
            utilisation = statistics.median(figures(work, line.ours, "utilisation")[:rounds])
            row["goal needs"] = f"{utilisation * line.goal / middle:.0%}"
        ratios.append((f"{line.work}: {line.peer}", better, line.goal))
    return pd.DataFrame(lines), ratios


def profiles(work: Path) -> pd.DataFrame:
    """Where the time of what is ours goes: what is needed, done and moved, what that takes at the machine's rates, and
    what was measured."""
    names = ("needed_gflop", "done_gflop", "padding", "moved_gb", "calls", "bound_s", "done_s", "moved_s", "wall_s")
    names += ("utilisation", "matmul_gflops", "copy_gb_per_s", "peak_rss_mb")
    lines = []
    for label in OURS:
        if (work / f"{label}.jsonl").exists():
            found = {name: figures(work, label, name, optional=True) for name in names}
            lines.append({"run": label} | {name: shown(values) if values else "" for name, values in found.items()})
    return pd.DataFrame(lines)


def draw(ratios: list[tuple[str, list[float], float]], file: Path) -> None:
    drawn, axes = plt.subplots(figsize=(9, 0.36 * len(ratios) + 1.2), layout="constrained")
    for i, (_, values, goal) in enumerate(ratios):
        axes.barh(i, statistics.median(values), color="0.75")
        axes.plot(values, [i] * len(values), "o", color="black", markersize=4)
        axes.plot([goal, goal], [i - 0.4, i + 0.4], color="black", linestyle=":")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ratios)), [name for name, _, _ in ratios])
    axes.invert_yaxis()
    axes.set_xlabel("times better: median (bar), rounds (points), goal (dotted)")
    drawn.savefig(file, dpi=150)


def growth(work: Path) -> pd.DataFrame:
    """Seconds and MB by size, of the last run, and the exponents with which they grew since the size before."""
    found = pd.DataFrame(json.loads((work / "growth.jsonl").read_text().splitlines()[-1])["points"])
    before = found.groupby("what", sort=False).shift()
    for name in ("s", "MB"):
        found[f"growth of {name}"] = np.log(found[name] / before[name]) / np.log(found["size"] / before["size"])
    return found


def draw_growth(found: pd.DataFrame, file: Path) -> None:
    kinds = list(found.groupby("what", sort=False))
    drawn, panels = plt.subplots(2, len(kinds), figsize=(12, 5), layout="constrained", sharex="col")
    for column, (what, part) in enumerate(kinds):
        for row, unit in enumerate(("s", "MB")):
            axes = panels[row, column]
            axes.loglog(part["size"], part[unit], "o-", color="black", markersize=4)
            axes.loglog(part["size"], part[unit].iloc[-1] * part["size"] / part["size"].iloc[-1], ":", color="0.5")
            axes.set_ylabel(unit)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            axes.set_xticks(part["size"], [str(size) for size in part["size"]], fontsize=8)
        panels[1, column].set_xlabel(str(what))
    drawn.suptitle("Time and memory by size; dotted: proportional, through the last point")
    drawn.savefig(file, dpi=120)


def write(work: Path, out: Path) -> None:
    table, ratios = comparisons(work)
    figures_of = out.parent / "figures"
    draw(ratios, figures_of / "benchmarks.png")
    grown = growth(work)
    draw_growth(grown, figures_of / "growth.png")
    page = (HERE / "benchmarks.md.in").read_text()
    numbers = [name for name in grown if name not in ("what", "size")]
    written = grown.assign(**{name: [shown([x]) if x == x else "" for x in grown[name]] for name in numbers})
    huge_pages = comparisons(work / "huge_pages")[0]
    huge_pages = huge_pages[huge_pages["ratio"] != ""]
    tables = {"comparisons": table, "huge_pages": huge_pages, "profiles": profiles(work), "growth": written}
    parts = {name: to_markdown(table) for name, table in tables.items()}
    out.write_text(page.format(**parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--peer_python")
    parser.add_argument("--tunix_python")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    flags = parser.parse_args()
    if flags.peers:
        run(flags)
    if flags.out:
        write(flags.work, flags.out)


if __name__ == "__main__":
    main()
