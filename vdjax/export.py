"""Exports a snapshot as a Hugging Face directory: python -m vdjax.export --snapshot W/STAGE/snapshots/STEP --out OUT"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vdjax import runs, runtime, sharding, snapshots
from vdjax.cli import run_cli
from vdjax.errors import UserError
from vdjax.files import absolute, as_path, check_no_model, filling, local_copy
from vdjax.models import config as model_config
from vdjax.models import hf, lora, peft
from vdjax.models.functional import make_model, shardings, trained_part


def export(snapshot: Path, out: Path, dtype: str | None = None) -> None:
    """Writes config.json, safetensors, tokenizer and chat template of a snapshot to `out`.

    Adapters are merged into what they were trained beside. A reward model is written as the
    `...ForSequenceClassification` of its family with one label, which is its reward.

    Args:
      dtype: None keeps that of training. The base model's may be coarser than the updates: bfloat16 would round most
        of a short preference stage away.

    Raises:
      UserError: not a snapshot of a vdjax workdir, or `out` already holds a model.
    """
    _, _, workdir = runs.locate(snapshot)
    opened = runs.open_snapshot(snapshot)
    files, tok, stop_ids = local_copy(workdir / "model"), opened.made.tokenizer, opened.made.template.stop_ids
    hf_config, reward = opened.made.hf_config, "score" in opened.params
    if reward:
        hf_config = model_config.scoring(hf_config, padding_id(tok, stop_ids))
    dtype = dtype or opened.config.model.param_dtype
    check_no_model(out)
    with filling(out, "config.json") as folder:
        hf.save(opened.params, opened.model.cfg, folder, hf_config=hf_config, dtype=dtype, metadata=metadata(snapshot))
        copy_tokenizer(files, folder)
        if reward:
            tok.pad_token = tok.convert_ids_to_tokens(hf_config["pad_token_id"])
            tok.save_pretrained(folder)
        else:
            shutil.copy(files / "generation_config.json", folder)


def export_adapters(snapshot: Path, out: Path) -> str:
    """Writes the adapters of a snapshot to `out` as a PEFT directory, with tokenizer and chat template.

    Returns:
      What the user must know of the model that the adapters lie beside.

    Raises:
      UserError: not a snapshot of a vdjax workdir; one without adapters; a reward model's, or one of a model made from
        a seed, which peft could not find the base of; `out` already holds a model.
    """
    config, name, workdir = runs.locate(snapshot)
    adapters = lora.from_config(config[name].lora, f"config.{name}.lora")
    if not adapters:
        raise UserError(f"--snapshot {snapshot}: stage {name} has no adapters (config.{name}.lora.rank is 0)")
    if runs.stage_head(config, name) == "score":
        raise UserError(f"--snapshot {snapshot}: a reward model's head fits no PEFT directory; leave --adapters out")
    base, revision, about = base_model(config, name, workdir, out)
    cfg = model_config.from_hf(
        hf.read_config(workdir / "model"),
        where=str(workdir / "model" / "config.json"),
        ignore_fields=config.model.ignore_fields,
    )
    model = make_model(cfg, config.model, lora=adapters)
    layout = trained_part(model, shardings(model, sharding.make_mesh(fsdp=-1)))
    params = snapshots.place(snapshots.open_reader(snapshot), trained_part(model, model.params), layout)
    check_no_model(out)
    with filling(out, peft.CONFIG_FILE) as folder:
        peft.save(params, adapters, folder, base=base, revision=revision, metadata=metadata(snapshot))
        copy_tokenizer(local_copy(workdir / "model"), folder)
    return about


def base_model(config: ConfigDict, name: str, workdir: Path, out: Path) -> tuple[str, str | None, str]:
    """Where peft finds the model that a stage's adapters lie beside, its revision, and what to say about it."""
    source = runs.parent(config, name)
    if source:
        base = str(absolute(out)) + "-base"
        last = workdir / source / "snapshots" / str(runs.done(workdir, source)["total_steps"])
        return base, None, f"its base is exported by: python -m vdjax.export --snapshot {last} --out {base}"
    path = config.model.path
    if not path:
        raise UserError(f"--adapters: the base of stage {name} was made from a seed and is no model; leave it out")
    local = as_path(path)
    base = str(absolute(local)) if local.is_dir() else path
    return base, config.model.revision or None, f"its base is {base}"


def padding_id(tok: Any, stop_ids: tuple[int, ...]) -> int:
    """A special token that ends no response: transformers reads the reward at the last token that is not padding."""
    candidates = [tok.pad_token_id, tok.bos_token_id, *tok.all_special_ids]
    for token in candidates:
        if token is not None and token not in stop_ids:
            return token
    raise UserError("the tokenizer has no special token that ends no response, which a reward model is padded with")


def copy_tokenizer(files: Path, out: Path) -> None:
    for file in files.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            shutil.copy(file, out)


def metadata(snapshot: Path) -> dict[str, str]:
    snapshot = absolute(snapshot)
    return {"vdjax_snapshot": f"{snapshot.parents[1].name}/{snapshot.name}"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vdjax.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--snapshot", type=as_path, required=True, metavar="DIR/STAGE/snapshots/STEP")
    parser.add_argument("--out", type=as_path, required=True, help="a directory that does not hold a model yet")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of training")
    parser.add_argument("--adapters", action="store_true", help="adapters alone, as a PEFT directory; default: merged")
    flags = parser.parse_args()
    runtime.start()
    if flags.adapters:
        if flags.dtype:
            raise UserError("--dtype: adapters are written in float32, as they are trained; leave it or --adapters out")
        about = export_adapters(flags.snapshot, flags.out)
        print(f"wrote {flags.out}; {about}")
    else:
        export(flags.snapshot, flags.out, flags.dtype)
        print(f"wrote {flags.out}")


if __name__ == "__main__":
    run_cli(main)
