"""Writes docs/plans.md: what the paper's models need on TPU slices. Takes two hours on two cores.

    JAX_PLATFORMS=cpu python scripts/make_plans.py --out docs/plans.md [--only llama3.1-8b,sft]

Needs the TPU's compiler (pip install '.[tpu]') and no TPU. Figures are kept in FILE.json beside the table as they come,
so that what is there is not compiled again; --again compiles all.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from vdjax.planning.programs import verdict
from vdjax.studies.tables import to_markdown

MODELS = ("llama3.2-3b", "llama3.1-8b", "llama3.1-70b", "qwen3-4b", "qwen3-8b")
TOPOLOGIES = ("v5e-64", "v5e-256", "v5p-128", "v6e-64")
STAGES = ("sft", "dpo")
SNAPSHOTS = (16, 64, 256)
CONFIG = Path(__file__).parent / "plans_config.py"
XLA_FLAGS = Path(__file__).parents[1] / "tpu" / "xla_flags.txt"
# Chips, by which a row's sequences a step are chosen: a pair a chip, four sequences a chip for SFT, one of 70B.
CHIPS = {"v5e-64": 64, "v5e-256": 256, "v5p-128": 64, "v6e-64": 64}


def rows(only: str) -> list[dict[str, Any]]:
    """What is compiled: arguments of vdjax.plan, and what a row of the table says."""
    out: list[dict[str, Any]] = []
    for model in MODELS:
        for stage in STAGES:
            for topology in TOPOLOGIES:
                each = 1 if model == "llama3.1-70b" or CHIPS[topology] == 256 or stage == "dpo" else 4
                out.append({"model": model, "stage": stage, "topology": topology, "batch": each * CHIPS[topology]})
    out.append({"model": "llama3.1-8b", "stage": "dpo", "topology": "v5e-64", "batch": 128})
    for count in SNAPSHOTS:
        out.append({"model": "llama3.1-8b", "stage": "dpo", "topology": "v5e-256", "snapshots": count})
    words = only.split(",") if only else []
    return [row for row in out if all(word in (*row, *row.values()) for word in words)]


def launch_flags(generation: str) -> str:
    """The compiler flags that a job on such chips is started with."""
    lines = [line.split() for line in XLA_FLAGS.read_text().splitlines() if line and line[0] != "#"]
    return " ".join(flag for of, flag, *_ in lines if of == generation)


def plan(row: dict[str, Any]) -> dict[str, Any]:
    config = f"{CONFIG}:{row['model']},{row['stage']}"
    command = [sys.executable, "-m", "vdjax.plan", "--config", config, "--topology", row["topology"], "--json"]
    if "snapshots" in row:
        command += ["--programs", "evaluator", "--snapshots", str(row["snapshots"])]
    else:
        command += ["--programs", "train_step", f"--config.{row['stage']}.batch_size={row['batch']}"]
        command += [f"--config.{row['stage']}.microbatch_rows={row['batch']}"]
    flags = {"LIBTPU_INIT_ARGS": launch_flags(row["topology"].split("-")[0])}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | flags)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def train_steps(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    lines = []
    for row in found:
        if "snapshots" in row:
            continue
        step = row["plan"]["train_step"]
        parts, seconds = step["parts"], step["roofline_s"]
        moved = sum(each["bytes"] for each in step["collectives"]) / 1e9
        lines.append(
            {
                "model": row["model"],
                "stage": row["stage"],
                "slice (chips)": f"{row['topology']} ({row['plan']['chips']})",
                "sequences a step": f"{row['batch'] * (2 if row['stage'] == 'dpo' else 1):,}",
                "parameters + optimizer": f"{parts['parameters'] + parts['optimizer']:.2f}",
                "temporaries": f"{parts.get('temporaries', 0):.2f}",
                "needed of HBM": of_hbm(row, step),
                "collectives GB": f"{moved:.1f}" if seconds else "",
                "TFLOP done (needed)": f"{step['tflops']:.0f} ({step['needed_tflops']:.0f})",
                "s at peak": f"{max(seconds.values()):.2f} to {sum(seconds.values()):.2f}" if seconds else "",
                "compiled in s": f"{step['compile_s']:.0f}",
                "verdict": verdict(step["fits"], step["message"]),
            }
        )
    return lines


def evaluators(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    lines = []
    for row in found:
        if "snapshots" not in row:
            continue
        one = row["plan"]["evaluator"]
        held = next(name for name in one["parts"] if name.startswith("parameters"))
        across = sum(each["count"] for each in one["collectives"] if "snapshot" in each["over"])
        others = [each for each in one["collectives"] if "snapshot" not in each["over"]]
        lines.append(
            {
                "snapshots": str(row["snapshots"]),
                "at once": held.split()[2],
                "mesh": ", ".join(f"{axis}={n}" for axis, n in one["mesh"].items() if n > 1),
                "parameters": f"{one['parts'][held]:.2f}",
                "temporaries": f"{one['parts'].get('temporaries', 0):.2f}",
                "needed of HBM": of_hbm(row, one),
                "collectives across snapshots": f"{across:.0f}",
                "others": ", ".join(f"{e['count']:,.0f} {e['kind']} ({e['bytes'] / 1e9:.1f} GB)" for e in others),
                "verdict": verdict(one["fits"], one["message"]),
            }
        )
    return lines


def of_hbm(row: dict[str, Any], program: dict[str, Any]) -> str:
    return f"{program['hbm_gib']:.2f} of {row['plan']['hbm_gib_of_chip']}"


def page(known: list[dict[str, Any]]) -> str:
    text = Path(__file__).with_name("plans.md.in").read_text()
    for name, lines in {"train_steps": train_steps(known), "evaluators": evaluators(known)}.items():
        text = text.replace(f"{{{name}}}", to_markdown(pd.DataFrame(lines)).rstrip() if lines else "Not compiled yet.")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", metavar="WORD,...", help="rows with all of these, such as qwen3-8b,sft")
    parser.add_argument("--again", action="store_true")
    flags = parser.parse_args()
    kept = flags.out.with_suffix(".json")
    known = json.loads(kept.read_text()) if kept.exists() and not flags.again else []
    for row in rows(flags.only):
        if any(all(each.get(key) == value for key, value in row.items()) for each in known):
            continue
        known.append({**row, "plan": plan(row)})
        step = next(value for value in known[-1]["plan"].values() if isinstance(value, dict) and "hbm_gib" in value)
        print(" ".join(map(str, row.values())), f"{step['hbm_gib']:.2f} GiB", flush=True)
        kept.write_text(json.dumps(known, indent=1))
    order = {json.dumps(row): at for at, row in enumerate(rows(""))}
    known.sort(key=lambda each: order[json.dumps({key: value for key, value in each.items() if key != "plan"})])
    flags.out.write_text(page(known))


if __name__ == "__main__":
    main()
