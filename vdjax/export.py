"""Exports a snapshot as a Hugging Face directory: python -m vdjax.export --snapshot W/STAGE/snapshots/STEP --out OUT"""

import argparse
import json
import shutil
from pathlib import Path

from vdjax import runtime, sharding, snapshots
from vdjax.cli import run_cli
from vdjax.errors import UserError
from vdjax.models import config as model_config
from vdjax.models import hf, transformer


def export(snapshot: Path, out: Path, dtype: str | None = None) -> None:
    """Writes config.json, safetensors, tokenizer and chat template of a snapshot to `out`.

    Args:
      dtype: None keeps that of training. The base model's may be coarser than the updates: bfloat16 would round most
        of a short preference stage away.

    Raises:
      UserError: not a snapshot of a vdjax workdir, or `out` already holds a model.
    """
    snapshot = snapshot.resolve()
    if len(snapshot.parts) < 4 or snapshot.parent.name != "snapshots":
        raise UserError(f"--snapshot {snapshot}: expected WORKDIR/STAGE/snapshots/STEP")
    reader, workdir = snapshots.open_reader(snapshot), snapshot.parents[2]
    files = workdir / "model"
    hf_config = hf.read_config(files)
    trained = json.loads((workdir / "config.json").read_text())["config"]["model"]
    cfg = model_config.from_hf(hf_config, where=str(files / "config.json"), ignore_fields=trained["ignore_fields"])
    dtype = dtype or trained["param_dtype"]
    _, params = transformer.abstract(cfg)
    mesh = sharding.make_mesh(fsdp=-1)
    layout = sharding.param_shardings(transformer.param_axes(cfg), params, mesh)
    metadata = {"vdjax_snapshot": f"{snapshot.parents[1].name}/{snapshot.name}"}
    hf.save(hf.place(reader, params, layout), cfg, out, hf_config=hf_config, dtype=dtype, metadata=metadata)
    for file in files.iterdir():
        if file.name != "config.json":
            shutil.copy(file, out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vdjax.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--snapshot", type=Path, required=True, metavar="DIR/STAGE/snapshots/STEP")
    parser.add_argument("--out", type=Path, required=True, help="a directory that does not hold a model yet")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of training")
    flags = parser.parse_args()
    runtime.start()
    export(flags.snapshot, flags.out, flags.dtype)
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    run_cli(main)
