"""Makes a random sharded checkpoint of a published model's shape, loads it on simulated devices, prints one JSON line.

    python scripts/bench/loading.py --model meta-llama/Llama-3.2-3B --dir runs/loading --devices 8

`peak_gib` is the most memory that the loading process took for itself (anonymous pages; with pages of the files, which
the system can drop at any time, `peak_with_files_gib`). `ratio` is that to the bytes of the parameters, which the host
must hold: all simulated devices are its own memory.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from vdjax import config as configs
from vdjax import sharding
from vdjax.models import config as model_config
from vdjax.models import hf
from vdjax.models.functional import make_model, shardings

FILE_BYTES = 5e9  # as hub checkpoints are sharded


def make(directory: Path, name: str) -> None:
    """A checkpoint in the hub's layout, bfloat16, made one layer at a time."""
    cfg = model_config.published(name)
    if not cfg:
        raise SystemExit(f"--model {name}: is no published model that vdjax knows")
    directory.mkdir(parents=True, exist_ok=True)
    rng, index, part, size, number = np.random.default_rng(0), {}, {}, 0, 1

    def write() -> None:
        nonlocal part, size, number
        file = f"model-{number:05d}.safetensors"
        safetensors.numpy.save_file(part, directory / file)
        index.update(dict.fromkeys(part, file))
        part, size, number = {}, 0, number + 1

    for tensor, shape in hf.tensor_shapes(cfg).items():
        values = rng.integers(0x3C00, 0x3D00, shape, np.uint16).view(ml_dtypes.bfloat16)  # between 0.008 and 0.03
        part[tensor], size = values, size + values.nbytes
        if size > FILE_BYTES:
            write()
    write()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    fields = model_config.to_hf(cfg, dtype="bfloat16", bos_token_id=0, eos_token_id=1)
    (directory / "config.json").write_text(json.dumps(fields))


def memory() -> dict[str, int]:
    """Bytes by kind, of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
    return {kind[3:-1]: int(kib) * 1024 for kind, kib, _ in lines}


def load(directory: Path, dtype: str) -> None:
    cfg = model_config.from_hf(hf.read_config(directory), where=str(directory))
    config = configs.experiment()
    config.model.param_dtype = dtype
    model, mesh = make_model(cfg, config.model), sharding.make_mesh(fsdp=-1)
    before, seen, done = memory(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    params = jax.block_until_ready(hf.place(hf.open_reader(directory, cfg), model.params, shardings(model, mesh)))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    anonymous = max(each["Anon"] for each in seen) - before["Anon"]
    whole = max(sum(each.values()) for each in seen) - sum(before.values())
    figures = {"parameters_gib": held, "peak_gib": anonymous, "peak_with_files_gib": whole}
    print(
        json.dumps(
            {"bench": "loading", "devices": len(mesh.devices.flat), "dtype": dtype, "seconds": round(seconds, 1)}
            | {name: round(value / 2**30, 2) for name, value in figures.items()}
            | {"ratio": round(anonymous / held, 3)}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Llama-3.2-3B")
    parser.add_argument("--dir", type=Path, required=True, help="of the checkpoint, made where it is missing")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="that parameters are kept in")
    parser.add_argument("--loads", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.loads:
        return load(flags.dir, flags.dtype)
    if not (flags.dir / "config.json").exists():
        make(flags.dir, flags.model)
    devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={flags.devices}", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, *sys.argv, "--loads"], env=os.environ | devices, check=True)
    return None


if __name__ == "__main__":
    main()
