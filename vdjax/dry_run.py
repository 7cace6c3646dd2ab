"""What an experiment would do: python -m vdjax.main --config ... --dry_run"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax import experiment, inspect, measure
from vdjax.data import pipeline
from vdjax.models.config import num_params
from vdjax.models.functional import policy_part
from vdjax.planning.programs import step_spec
from vdjax.probes import sets
from vdjax.setup import Setup, setup
from vdjax.train import loop
from vdjax.train.plan import data_batches
from vdjax.train.stage import compile_step


def show(config: ConfigDict) -> None:
    """Prints the resolved config, sizes, steps, tokens, probes and one decoded batch; trains nothing."""
    print(configs.to_json(config))
    made = setup(config)
    with tempfile.TemporaryDirectory(prefix="vdjax-") as folder, jax.set_mesh(made.mesh):
        print(f"\nmodel: {num_params(made.model.cfg):,} parameters, mesh {dict(made.mesh.shape)}")
        print(parameter_overview.get_parameter_overview(made.model.params, include_stats=False))
        asked = measure.questions(config, made)
        for name in config.stages:
            show_stage(config, name, made, asked.probes, Path(folder))
        print(f"\nprobes: {sets.describe(asked.probes)}")
        tokens = sum(len(item.rendered.tokens) for item in asked.items)
        print(f"  {len(asked.items)} prompts, {tokens:,} tokens a snapshot")
        if asked.prompts:
            each = len(asked.prompts) * config.probes.samples
            print(f"  {each} responses of up to {config.probes.max_new_tokens} tokens a snapshot")
        first = config.stages[0]
        planned = experiment.plan(config, first, made, Path(folder))
        batch = data_batches(planned)[0]
        print(f"\nfirst batch of {first} (first rows):")
        print(inspect.describe(batch, made.tokenizer, rows=2))


def show_stage(config: ConfigDict, name: str, made: Setup, probes: Sequence[sets.Probe], folder: Path) -> None:
    planned = experiment.plan(config, name, made, folder)
    rewarder = experiment.rewarder_of(config, name, made, folder)
    work = experiment.stage_of(config, name, planned, rewarder, made, folder)
    update, state = loop.abstract_update(work)
    memory = compile_step(work, step_spec(work), update, state).memory_analysis()
    temporaries = size(memory.temp_size_in_bytes) if memory else "unknown on this backend"
    stage = config[name]
    seen = min(planned.total_steps * stage.batch_size, stage.epochs * len(planned.train))
    tokens, epochs = len(planned.train.tokens), seen / len(planned.train)
    print(f"\nstage {name}: {stage.objective}")
    print(f"  {experiment.data_line(planned.train.counts)}")
    if overlap := pipeline.asking(planned.train, [probe.input for probe in probes]):
        print(f"  {experiment.overlap_line(overlap, len(planned.train))}")
    print(f"  {len(planned.train):,} training examples, {len(planned.held_out or ()):,} held out")
    print(f"  {planned.total_steps:,} steps, {tokens * epochs:,.0f} tokens ({epochs:.2f} epochs)")
    print(
        f"  batches: up to {planned.shape.rows} rows of {planned.shape.length} tokens, "
        f"{planned.microbatch_rows} at a time"
    )
    params, frozen = tree_bytes(state.params), tree_bytes(update.frozen)
    print(
        f"  bytes on all devices: trained parameters {size(params)}, frozen ones {size(frozen)}, "
        f"optimizer {size(tree_bytes(state.opt_state))}"
    )
    print(f"  bytes a device for activations, gradients and other temporaries: {temporaries}")
    count = len(planned.snapshot_steps)
    kept = count * tree_bytes(policy_part(state.params))
    print(f"  {count} snapshots at steps {planned.snapshot_steps}: {size(kept)} on disk")


def tree_bytes(tree: object) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
