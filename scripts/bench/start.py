"""Times vdjax from the command to the beginning of the first step, and prints one JSON line.

    python scripts/bench/start.py --model DIR --data harmless-base.jsonl.gz

It is SFT with configs/smollm2_hh_dpo.py, in new workdirs: `cold_s` with an empty compile cache, `warm_s` with what that
left there. The first step begins where the output says so: weights are read, data rendered and the step compiled.
`import_s` is of `import vdjax`, `import_experiment_s` of all that the main command imports, interpreter included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
BEGINS = "begins at step 0"


def seconds_to_begin(command: list[str], cache: Path) -> float:
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if BEGINS in line:
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise SystemExit(f"{' '.join(command)}: ended before it began\n{''.join(said[-20:])}")


def seconds_to_import(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    flags, overrides = parser.parse_known_args()
    config = HERE.parents[1] / "configs" / "smollm2_hh_dpo.py"
    command = [sys.executable, "-m", "vdjax.main", "--config", str(config), f"--config.model.path={flags.model}"]
    command += [f"--config.hh={flags.data}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "compiled"
        seconds = [
            seconds_to_begin([*command, "--workdir", f"{folder}/run-{i}"], cache) for i in range(1 + flags.repeats)
        ]
    found = {"bench": "start", "trainer": "vdjax", "cold_s": round(seconds[0], 2)}
    found["warm_s"] = [round(s, 2) for s in seconds[1:]]
    found["import_s"] = round(seconds_to_import("vdjax"), 3)
    found["import_experiment_s"] = round(seconds_to_import("vdjax.experiment"), 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
