"""An experiment's programs, compiled for devices that are not there, and what they need on each."""

import functools
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from vdjax import runs, sharding
from vdjax.chips import Chip
from vdjax.data.packing import LENGTH_MULTIPLE, Shape
from vdjax.errors import UserError
from vdjax.models.config import ModelConfig
from vdjax.models.functional import make_model, shardings
from vdjax.objectives import OBJECTIVES
from vdjax.planning import hlo, operations
from vdjax.probes import evaluator
from vdjax.sampling.decode import Prompts
from vdjax.sampling.generate import ROWS, Sampling, bucket, trace
from vdjax.train import loop, rollouts, supervised
from vdjax.train.flops import train_flops
from vdjax.train.losses import LossSpec
from vdjax.train.plan import StagePlan
from vdjax.train.stage import PACKED, Stage, abstract_batch, has_reference, trace_step
from vdjax.train.step import make_score_step

PROGRAMS = ("train_step", "reference", "sampler", "evaluator")
GIB = 2**30
LARGEST = 6  # arrays that are named


class Work(NamedTuple):
    """What is planned for: a stage on a mesh, with examples of one size in place of data."""

    config: ConfigDict
    stage: str
    cfg: ModelConfig
    mesh: jax.sharding.Mesh
    chip: Chip
    length: int  # tokens of a prompt with one response
    prompt: int  # of these, tokens of the prompt
    snapshots: int


class Lowered(NamedTuple):
    """A program before it is compiled."""

    lowered: Any
    jaxpr: Any
    parts: dict[str, float]  # bytes a chip of its arguments, by what they are
    needed_flops: float  # on all chips; without what is computed again and what is masked
    trips: int  # of its loops whose end depends on data
    tokens: int  # real ones, worked on in one run
    mesh: jax.sharding.Mesh


class Plan(NamedTuple):
    """What a program needs on each chip."""

    fits: bool
    hbm_gib: float  # arguments, temporaries, outputs that reuse no argument, and code; of one that does not fit, what
    # the compiler says, or the sum of the parts
    mesh: dict[str, int]
    parts: dict[str, float]  # GiB
    largest: list[tuple[float, str]]  # GiB and name of arrays kept from the forward to the backward pass
    collectives: list[hlo.Collective]
    tflops: float  # done a chip, in 1e12
    needed_tflops: float
    hbm_bytes: float  # read and written
    tokens: int
    compile_s: float
    message: str  # the compiler's, where the program does not fit


# Their shapes


def examples_of(work: Work) -> int:
    """Of one update: a step's, but where sampled responses serve several updates."""
    stage = work.config[work.stage]
    if OBJECTIVES[stage.objective].kind == "rollout":
        return -(-stage.batch_size // stage.rollout.minibatches)
    return stage.batch_size


def shape_of(work: Work) -> Shape:
    """The batch of an update whose examples all have the planned size, one a row."""
    stage, response = work.config[work.stage], work.length - work.prompt
    kind = OBJECTIVES[stage.objective].kind
    if kind in ("text", "sft"):
        length, sequences = work.length, 1
    elif kind == "rollout":
        samples = stage.rollout.samples
        length, sequences = work.prompt + samples * stage.rollout.max_new_tokens, samples + samples % 2
    else:
        length, sequences = work.prompt + 2 * response, 2
    rows = microbatch_rows(work)
    length = stage.row_length or -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return Shape(-(-examples_of(work) // rows) * rows, length, sequences)


def microbatch_rows(work: Work) -> int:
    return work.config[work.stage].microbatch_rows or sharding.batch_shards(work.mesh)


def stage_of(work: Work) -> Stage:
    """The stage, with nothing in place of data, parameters and workdir."""
    nothing: Any = None
    stage = work.config[work.stage]
    plain = make_model(work.cfg, work.config.model)
    model = runs.stage_model(work.config, work.stage, work.cfg)
    values = runs.value_model(work.config, work.stage, work.cfg)
    updates = stage.rollout.epochs * stage.rollout.minibatches if OBJECTIVES[stage.objective].kind == "rollout" else 1
    plan = StagePlan(nothing, nothing, nothing, 1000, updates, shape_of(work), microbatch_rows(work), [])
    return Stage(work.stage, stage, plan, model, plain, values, nothing, nothing, work.mesh, nothing, 0, 0, 0)


def step_spec(stage: Stage) -> LossSpec:
    """The loss of a stage's train step."""
    if OBJECTIVES[stage.config.objective].kind == "rollout":
        return rollouts.update_spec(stage)
    return supervised.loss_spec(stage.model, stage.config, stage.plan.shape)


# The programs. Each is lowered under `jax.set_mesh` of its mesh.


def train_step(work: Work) -> Lowered:
    stage = stage_of(work)
    update, state = loop.abstract_update(stage)
    with jax.set_mesh(work.mesh):
        traced = trace_step(stage, step_spec(stage), update, state)
        lowered = traced.lower()
    parts = {
        "parameters": bytes_a_chip((state.params, update.frozen)),
        "optimizer": bytes_a_chip(state.opt_state),
        "batch": bytes_a_chip(abstract_batch(stage)),
    }
    shape = stage.plan.shape
    flops = train_flops(work.cfg, *amounts(work))
    return Lowered(lowered, traced.jaxpr.jaxpr, parts, flops, 1, shape.rows * shape.length, work.mesh)


def reference(work: Work) -> Lowered:
    """The pass that keeps the reference's log-probs."""
    stage = stage_of(work)
    model = stage.plain
    params = loop.placed(model.params, shardings(model, work.mesh))
    batch = {name: value for name, value in abstract_batch(stage).items() if name in PACKED}
    score = make_score_step(supervised.loss_spec(model, stage.config, stage.plan.shape))
    with jax.set_mesh(work.mesh):
        traced = jax.jit(score).trace(params, batch)
        lowered = traced.lower()
    parts = {"parameters": bytes_a_chip(params), "batch": bytes_a_chip(batch)}
    shape = stage.plan.shape
    flops = train_flops(work.cfg, *amounts(work)) / 3
    return Lowered(lowered, traced.jaxpr.jaxpr, parts, flops, 1, shape.rows * shape.length, work.mesh)


def sampler(work: Work) -> Lowered:
    """A batch of responses, as rollouts and open-ended probes sample it."""
    stage = work.config[work.stage]
    rollout = OBJECTIVES[stage.objective].kind == "rollout"
    how = stage.rollout if rollout else work.config.probes
    model, shards = make_model(work.cfg, work.config.model), sharding.batch_shards(work.mesh)
    rows = (stage.rollout.rows if rollout else 0) or ROWS * shards
    width = bucket(work.prompt if rollout else work.config.probes.max_length)
    each = rows // shards

    def array(shape: tuple[int, ...], dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows_sharding(work.mesh, len(shape)))

    packed = array((shards, each, width))
    prompts = Prompts(packed, packed, packed, packed, array((rows,)), array((rows, 3), np.uint32))
    params = loop.placed(model.params, shardings(model, work.mesh))
    sampling = Sampling(how.max_new_tokens, how.temperature, how.top_p, how.top_k)
    with jax.set_mesh(work.mesh):
        traced = trace(model, params, prompts, sampling, stop_ids=(0,))
        lowered = traced.lower()
    parts = {"parameters": bytes_a_chip(params), "batch": bytes_a_chip(prompts)}
    new = rows * how.max_new_tokens
    pairs = rows * (width * width / 2 + how.max_new_tokens * (width + how.max_new_tokens / 2))
    flops = train_flops(work.cfg, rows * width + new, new, pairs) / 3
    return Lowered(lowered, traced.jaxpr.jaxpr, parts, flops, how.max_new_tokens, new, work.mesh)


def snapshot_evaluator(work: Work) -> Lowered:
    """As many of the snapshots as are held at once, under one batch of probes."""
    model = make_model(work.cfg, work.config.model)
    memory = work.config.probes.memory_gb * 1e9 or 0.5 * work.chip.hbm_gib * GIB * work.mesh.size
    together = len(evaluator.groups(work.snapshots, model, memory)[0])
    mesh = evaluator.evaluator_mesh(work.mesh, together)
    shards = sharding.batch_shards(mesh)
    rows = -(-(work.config.probes.rows or 4 * shards) // shards) * shards
    shape = Shape(rows, -(-work.config.probes.max_length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, 16)
    stacked = loop.placed(evaluator.stacked_shapes(model.params, together), evaluator.stacked_shardings(model, mesh))
    behind = (rows, shape.length + LENGTH_MULTIPLE)
    batch = {
        name: jax.ShapeDtypeStruct(
            shape[:2] if name in evaluator.COMPUTED_ALONE else behind,
            bool if name in ("loss_mask", "prefix") else np.int32,
        )
        for name in (*evaluator.COMPUTED_ALONE, "tokens", "loss_mask", "sequence_ids", "sources")
    }
    batch = loop.placed(batch, dict.fromkeys(batch, sharding.rows_sharding(mesh, 2)))
    with jax.set_mesh(mesh):
        how: dict[str, Any] = {"sequences": shape.sequences, "chunk": model.head_chunk}
        score = jax.jit(functools.partial(evaluator.score, model.graphdef, **how))
        traced = score.trace(stacked, {}, batch)
        lowered = traced.lower()
    parts = {f"parameters of {together} snapshots": bytes_a_chip(stacked), "batch": bytes_a_chip(batch)}
    tokens = rows * shape.length
    flops = together * train_flops(work.cfg, tokens, tokens / 4, tokens * shape.length / 2) / 3
    return Lowered(lowered, traced.jaxpr.jaxpr, parts, flops, 1, together * tokens, mesh)


BUILDERS: Mapping[str, Callable[[Work], Lowered]] = {
    "train_step": train_step,
    "reference": reference,
    "sampler": sampler,
    "evaluator": snapshot_evaluator,
}


def wanted(work: Work) -> list[str]:
    """The programs of an experiment; a reference pass where the stage has a reference."""
    return [name for name in PROGRAMS if name != "reference" or has_reference(stage_of(work))]


def amounts(work: Work) -> tuple[float, float, float]:
    """Tokens, scored tokens and attended pairs of a step, for `train_flops`."""
    shape, response = shape_of(work), work.length - work.prompt
    kind = OBJECTIVES[work.config[work.stage].objective].kind
    if kind in ("text", "sft"):
        scored = work.length if kind == "text" else response
        return shape.rows * work.length, shape.rows * scored, shape.rows * work.length**2 / 2
    rollout = work.config[work.stage].rollout
    count, response = (rollout.samples, rollout.max_new_tokens) if kind == "rollout" else (2, response)
    pairs = work.prompt**2 / 2 + count * response * (work.prompt + response / 2)
    return shape.rows * (work.prompt + count * response), shape.rows * count * response, shape.rows * pairs


# Compiling


def compiled(lowered: Lowered, chip: Chip) -> Plan:
    """Compiles for the devices of the mesh."""
    start = time.perf_counter()
    parts = {name: size / GIB for name, size in lowered.parts.items()}
    chips, shards = lowered.mesh.size, sharding.batch_shards(lowered.mesh)
    done = operations.matmul_flops(lowered.jaxpr, lowered.trips) / chips / 1e12
    largest = [(size / shards / GIB, name) for size, name in operations.kept(lowered.jaxpr)[:LARGEST]]
    needed = lowered.needed_flops / chips / 1e12
    mesh = dict(lowered.mesh.shape)
    found = Plan(False, 0.0, mesh, parts, largest, [], done, needed, 0.0, lowered.tokens, 0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = lowered.lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = re.sub(r"\s+", " ", str(error)).partition(" HLO module")[0].removeprefix("RESOURCE_EXHAUSTED: ")
            temporaries = re.search(r"temporaries \(([\d.]+)G\)", message)
            parts["temporaries"] = float(temporaries[1]) if temporaries else sum(size for size, _ in largest)
            return found._replace(hbm_gib=sum(parts.values()), compile_s=time.perf_counter() - start, message=message)
        seconds = time.perf_counter() - start
        # The compiler's own text: what libtpu makes for v5p and v6e XLA of this JAX cannot always read back.
        dumps = list(Path(folder).glob("*.after_codegen.txt"))
        text = dumps[0].read_text() if dumps else program.as_text()
    memory = program.memory_analysis()
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts |= {
        "temporaries": memory.temp_size_in_bytes / GIB,
        "output": output / GIB,
        "code": memory.generated_code_size_in_bytes / GIB,
    }
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output + memory.generated_code_size_in_bytes
    found = found._replace(fits=total / GIB <= chip.hbm_gib, hbm_gib=total / GIB, parts=parts, compile_s=seconds)
    ran = hlo.read(text, mesh, lowered.trips)
    return found._replace(collectives=ran.collectives, hbm_bytes=ran.hbm_bytes)


def verdict(fits: bool, message: str) -> str:
    """What a compilation came to; where memory on the chip itself runs out, it is XLA's fault and no size of ours."""
    return "fits" if fits else "not compiled" if "memory space vmem" in message else "does not fit"


def bytes_a_chip(tree: Any) -> float:
    """Bytes on each device of arrays with shardings."""
    return sum(
        float(np.prod(x.sharding.shard_shape(x.shape))) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
    )


def plan(work: Work, names: Sequence[str]) -> dict[str, Plan]:
    """Compiles the named programs.

    Raises:
      UserError: a name that is none of PROGRAMS.
    """
    for name in names:
        if name not in PROGRAMS:
            raise UserError(f"program {name!r} is unknown; valid: {', '.join(PROGRAMS)}")
    return {name: compiled(BUILDERS[name](work), work.chip) for name in names}
