"""What an experiment needs of a TPU slice, without the slice: python -m vdjax.plan --config ... --topology v5e:8x8

Compiles the programs of a stage (train step, reference pass, sampler, snapshot evaluator) with the TPU's own compiler
(package libtpu, `pip install 'vdjax[tpu]'`) and prints what each needs on a chip: memory against what the chip has,
collectives, matmul FLOPs, and a roofline. Neither TPU nor data nor weights are read: examples all have the size that
--length and --prompt say, one a row; the shapes of published models are known by their hub ids.

Exit status 0: all fit; 1: one does not.
"""

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vdjax import chips, sharding
from vdjax import config as configs
from vdjax.check_config import CHOICES
from vdjax.cli import run_cli
from vdjax.errors import UserError, nearest
from vdjax.models import config as model_config
from vdjax.models import hf
from vdjax.models.config import ModelConfig
from vdjax.planning import hlo, programs
from vdjax.planning.programs import Plan, Work
from vdjax.progress import say
from vdjax.setup import check_context, check_tensor
from vdjax.snapshots import schedule


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vdjax.plan",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    parser.add_argument("--topology", required=True, metavar="GENERATION:SHAPE", help="such as v5e:8x8 or v5p-128")
    parser.add_argument("--slices", type=int, default=1, help="of that topology, joined by their network")
    parser.add_argument("--mesh", default="", metavar="AXIS=N,...", help="instead of config.mesh; -1: what is left")
    parser.add_argument("--stage", default="", help="default: the last one")
    parser.add_argument("--programs", default="", metavar="NAME,...", help=f"of {', '.join(programs.PROGRAMS)}")
    parser.add_argument("--length", type=int, default=0, help="tokens of a prompt with one response; 0: max_length")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of the prompt; 0: half of them")
    parser.add_argument("--snapshots", type=int, default=0, help="that are evaluated; 0: those of the stage")
    parser.add_argument("--search", action="store_true", help="try meshes (or --mesh), microbatches and remat")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags, overrides = parser.parse_known_args()
    config = configs.load(flags.config, overrides)
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are part of the answer
    work = work_of(flags, config)
    if flags.search:
        return search(work, flags)
    plans = programs.plan(work, flags.programs.split(",") if flags.programs else programs.wanted(work))
    if flags.json:
        print(json.dumps(as_json(flags, work, plans), indent=1))
    else:
        print(describe(flags, work, plans))
    return 0 if all(plan.fits for plan in plans.values()) else 1


def work_of(flags: argparse.Namespace, config: ConfigDict) -> Work:
    """What the flags and the config ask to be planned.

    Raises:
      UserError: no such stage, topology or mesh axis, or sizes that do not fit together.
    """
    name = flags.stage or config.stages[-1]
    if name not in config.stages:
        raise UserError(f"--stage {name}: is no stage of the config{nearest(name, config.stages)}")
    stage = config[name]
    length = flags.length or stage.max_length
    prompt = flags.prompt or length // 2
    if not 0 < prompt < length:
        raise UserError(f"--prompt {prompt}: expected 1 to {length - 1}, as a prompt with its response has {length}")
    if config.model.attention == "auto":
        config.model.attention = "splash"  # as on the TPU itself
    topology = chips.parse(flags.topology)
    devices = chips.devices(topology, flags.slices)
    mesh = sharding.make_mesh(**mesh_of(flags.mesh, config.mesh), devices=devices)
    cfg = shape_of(config)
    check_tensor(cfg, mesh)
    check_context(config, mesh.shape["context"])
    steps = stage.max_steps or 1000
    count = flags.snapshots or len(
        schedule(steps, log_spaced=stage.snapshots.log_spaced, every=stage.snapshots.every)
    )
    return Work(config, name, cfg, mesh, chips.CHIPS[topology.partition(":")[0]], length, prompt, count)


def mesh_of(text: str, default: ConfigDict) -> dict[str, int]:
    """Sizes of the mesh's axes from AXIS=N,...; all others are 1."""
    if not text:
        return default.to_dict()
    sizes = {}
    for part in text.split(","):
        axis, _, number = part.partition("=")
        if axis not in sharding.MESH_AXES:
            raise UserError(f"--mesh {text}: {axis!r} is no axis{nearest(axis, sharding.MESH_AXES)}")
        if not number.lstrip("-").isdecimal():
            raise UserError(f"--mesh {text}: expected AXIS=N, such as fsdp=64")
        sizes[axis] = int(number)
    return sizes


def shape_of(config: ConfigDict) -> ModelConfig:
    """The model's shape; of a published model without a look at the hub, of another from its config.json alone."""
    model = config.model
    if model.path:
        known = model_config.published(model.path)
        if known:
            return known
        fields = hf.fetch_config(model.path, model.revision or None)
        return model_config.from_hf(fields, where=f"{model.path}/config.json", ignore_fields=model.ignore_fields)
    if model.name:
        return model_config.named(model.name)
    return model_config.from_hf({"vocab_size": 512, **model.shape.to_dict()}, where="config.model.shape")


# What is printed


def roofline(plan: Plan, work: Work) -> dict[str, float]:
    """Seconds a chip needs at its peaks for each kind of work of a program."""
    chip = work.chip
    sent = sum(each.sent for each in plan.collectives if each.over != hlo.BETWEEN_SLICES)
    return {
        "matmuls": plan.tflops * 1e12 / chip.flops,
        "memory": plan.hbm_bytes / chip.hbm_bandwidth,
        "collectives": sent / chip.ici_bandwidth,
    }


def describe(flags: argparse.Namespace, work: Work, plans: Mapping[str, Plan]) -> str:
    chip, sizes = work.chip, {axis: n for axis, n in work.mesh.shape.items() if n > 1}
    shape, model = programs.shape_of(work), work.config.model
    lines = [
        f"{model.path or model.name or 'model'}: {model_config.num_params(work.cfg):,} parameters in "
        f"{model.param_dtype}, products in {model.compute_dtype}, remat {model.remat}",
        f"stage {work.stage} ({work.config[work.stage].objective}): {shape.rows} rows of {shape.length} tokens a step, "
        f"{programs.microbatch_rows(work)} at a time",
        f"{flags.topology}: {work.mesh.size} chips of {chip.hbm_gib} GiB, mesh {sizes or 1}",
    ]
    for name, plan in plans.items():
        lines += ["", *of_program(name, plan, work)]
    lines += [
        "",
        f"Roofline: {chip.flops / 1e12:.0f} TFLOP/s in bfloat16, {chip.hbm_bandwidth / 1e9:.0f} GB/s to HBM and "
        f"{chip.ici_bandwidth / 1e9:.0f} GB/s to other chips",
        "(cloud.google.com/tpu/docs). Each kind of work is taken to run at its peak; kinds overlap at best, and follow",
        "each other at worst. Input, host and the network between slices are not in it.",
    ]
    return "\n".join(lines)


def of_program(name: str, plan: Plan, work: Work) -> Iterator[str]:
    verdict = programs.verdict(plan.fits, plan.message)
    shown = verdict if plan.fits else verdict.upper()
    parts = ", ".join(f"{part} {size:.2f}" for part, size in plan.parts.items() if size >= 0.005)
    yield f"{name}: {plan.hbm_gib:.2f} of {work.chip.hbm_gib} GiB a chip, {shown}; compiled in {plan.compile_s:.1f} s"
    yield f"  GiB: {parts}"
    why = "kept for the backward pass" if name == "train_step" else "kept from the turns of a loop"
    yield from (f"  {why}: {size:.2f} GiB {what}" for size, what in plan.largest if size >= 0.005)
    if not plan.fits:
        yield f"  {plan.message}" if plan.message else "  the compiler took it, but it needs more than the chip has"
        flags = ["LIBTPU_INIT_ARGS with the flags of tpu/xla_flags.txt for this chip, as the launcher does"]
        yield from (f"  try {advice}" for advice in (flags if verdict == "not compiled" else advices(name, work)))
        return
    for each in plan.collectives:
        where = " and ".join(each.over) or "no axis"
        yield f"  {each.kind} over {where}: {each.times:,.0f} times, {each.sent / 1e9:.3g} GB sent"
    yield f"  matmuls: {plan.tflops:.3g} TFLOP a chip, of which {plan.needed_tflops:.3g} are needed"
    times = roofline(plan, work)
    best, worst = max(times.values()), sum(times.values())
    yield "  seconds at peak: " + ", ".join(f"{kind} {seconds:.3g}" for kind, seconds in times.items())
    rate, use = plan.tokens / best, plan.needed_tflops * 1e12 / work.chip.flops / best
    yield f"  a run takes {best:.3g} to {worst:.3g} s; at best {rate:,.0f} tokens/s, {use:.0%} of the peak"


def advices(name: str, work: Work) -> list[str]:
    """What would make a program smaller, the cheapest first."""
    model, rows = work.config.model, programs.microbatch_rows(work)
    shards = sharding.batch_shards(work.mesh)
    found = []
    if name in ("train_step", "reference") and rows > shards:
        found.append(f"--config.{work.stage}.microbatch_rows={max(shards, rows // 2)} (now {rows})")
    if name == "train_step" and model.remat != "full":
        found.append(f"--config.model.remat={'full' if model.remat == 'dots' else 'dots'} (now {model.remat})")
    if model.compute_dtype != "bfloat16":
        found.append("--config.model.compute_dtype=bfloat16")
    if name == "evaluator":
        found.append("a smaller --config.probes.memory_gb or --config.probes.rows")
    if work.mesh.shape["data"] > 1:
        found.append("fsdp in place of data: parameters and optimizer are then spread over more chips")
    return [*found, "--search, or more chips"]


def as_json(flags: argparse.Namespace, work: Work, plans: Mapping[str, Plan]) -> dict[str, Any]:
    out: dict[str, Any] = {"topology": flags.topology, "mesh": dict(work.mesh.shape), "stage": work.stage}
    out |= {"chips": work.mesh.size, "hbm_gib_of_chip": work.chip.hbm_gib}
    for name, plan in plans.items():
        fields = plan._asdict()
        fields["collectives"] = [
            {"kind": each.kind, "over": each.over, "count": each.times, "bytes": each.sent} for each in plan.collectives
        ]
        fields["largest"] = [{"gib": size, "array": what} for size, what in plan.largest]
        out[name] = fields | {"roofline_s": roofline(plan, work) if plan.fits else None}
    return out


# Searching


def meshes(work: Work) -> Iterator[dict[str, int]]:
    """Meshes worth a try."""
    size, slices = work.mesh.size, sharding.slice_count(list(work.mesh.devices.flat))
    rows, lengths = programs.examples_of(work), [work.config[name].row_length for name in work.config.stages]
    for tensor, context in itertools.product((1, 2, 4, 8), repeat=2):
        if size % (tensor * context) or work.cfg.num_kv_heads % tensor or work.cfg.intermediate_size % tensor:
            continue
        if context > 1 and (rows >= size // tensor or any(length % context for length in lengths)):
            continue  # there are rows for all chips, or they cannot be shared out
        for data in (slices, 2 * slices, 4 * slices):  # slices lie along the data axis
            if size // (tensor * context) % data == 0:
                yield {"data": data, "fsdp": size // (tensor * context) // data, "context": context, "tensor": tensor}


def candidates(work: Work, wanted: Iterable[Mapping[str, int]]) -> Iterator[tuple[dict[str, int], str, int]]:
    """Of each mesh, the remat policies and microbatches worth a try."""
    rows = programs.examples_of(work)
    for sizes in wanted:
        shards = sizes["data"] * sizes["fsdp"]
        for remat in CHOICES["remat"]:
            for together in sorted({-(-rows // (shards * parts)) * shards for parts in (1, 2, 4, 8)}, reverse=True):
                yield dict(sizes), remat, together


def search(work: Work, flags: argparse.Namespace) -> int:
    """Tries candidates for the train step and ranks those that fit by their roofline."""
    tried: list[dict[str, Any]] = []
    fitting: set[tuple[str, str]] = set()
    wanted = [dict(work.mesh.shape)] if flags.mesh else meshes(work)
    for sizes, remat, rows in candidates(work, wanted):
        key = (str(sizes), remat)
        if key in fitting:
            continue  # smaller microbatches only do the same in more steps
        config = work.config.copy_and_resolve_references()
        config.model.remat, config[work.stage].microbatch_rows = remat, rows
        mesh = sharding.make_mesh(**sizes, devices=list(work.mesh.devices.flat))
        one = work._replace(config=config, mesh=mesh)
        plan = programs.compiled(programs.train_step(one), work.chip)
        found = {"mesh": sizes, "remat": remat, "microbatch_rows": rows, "fits": plan.fits, "hbm_gib": plan.hbm_gib}
        found["verdict"] = programs.verdict(plan.fits, plan.message)
        found |= {"compile_s": plan.compile_s, "best_s": None, "worst_s": None}
        if plan.fits:
            times = roofline(plan, one)
            found |= {"best_s": max(times.values()), "worst_s": sum(times.values())}
        tried.append(found)
        fitting |= {key} if plan.fits else set()
        say(line_of(found))
    ranked = sorted((each for each in tried if each["fits"]), key=lambda each: each["worst_s"])
    if flags.json:
        print(json.dumps({"topology": flags.topology, "ranked": ranked, "tried": tried}, indent=1))
    else:
        print("\n".join(["fits, fastest first:", *map(line_of, ranked)]) if ranked else "nothing of this fits")
    return 0 if ranked else 1


def line_of(found: Mapping[str, Any]) -> str:
    mesh = ",".join(f"{axis}={n}" for axis, n in found["mesh"].items() if n > 1)
    start = f"--mesh {mesh} remat {found['remat']}, {found['microbatch_rows']} rows at a time"
    if not found["fits"]:
        return f"{start}: {found['verdict']} ({found['hbm_gib']:.1f} GiB)"
    return f"{start}: {found['hbm_gib']:.2f} GiB, {found['best_s']:.3g} to {found['worst_s']:.3g} s a step"


if __name__ == "__main__":
    run_cli(main)
