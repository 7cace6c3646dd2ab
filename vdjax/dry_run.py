"""What an experiment would do: python -m vdjax.main --config ... --dry_run"""

import math
import tempfile
from pathlib import Path

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax import experiment, inspect, sharding
from vdjax.data import pipeline
from vdjax.models.config import num_params
from vdjax.probes import sets
from vdjax.train import loop
from vdjax.train.optimizer import make_optimizer
from vdjax.train.step import TrainState, make_train_step


def show(config: ConfigDict) -> None:
    """Prints the resolved config, sizes, steps, tokens, probes and one decoded batch; trains nothing."""
    print(configs.to_json(config))
    made = experiment.setup(config)
    with tempfile.TemporaryDirectory(prefix="vdjax-") as folder, jax.set_mesh(made.mesh):
        print(f"\nmodel: {num_params(made.model.cfg):,} parameters, mesh {dict(made.mesh.shape)}")
        print(parameter_overview.get_parameter_overview(made.model.params, include_stats=False))
        for name in config.stages:
            show_stage(config, name, made, Path(folder))
        probes = experiment.load_probes(config)
        items = experiment.render_probes(config, made, probes)
        print(f"\nprobes: {sets.describe(probes)}")
        print(f"  {len(items)} prompts, {sum(len(i.rendered.tokens) for i in items):,} tokens a snapshot")
        first = config.stages[0]
        planned = experiment.plan(config, first, made, Path(folder))
        batch = pipeline.batches(planned.train, planned.steps, planned.shape, planned.microbatch_rows)[0]
        print(f"\nfirst batch of {first} (first rows):")
        print(inspect.describe(batch, made.tokenizer, rows=2))


def show_stage(config: ConfigDict, name: str, made: experiment.Setup, folder: Path) -> None:
    stage = config[name]
    planned = experiment.plan(config, name, made, folder)
    model, mesh = made.model, made.mesh
    optimizer = make_optimizer(stage.optimizer, planned.total_steps)
    layout = loop.state_shardings(optimizer, model, mesh)
    state = jax.eval_shape(lambda p: TrainState(jax.numpy.int32(0), p, optimizer.init(p)), model.params)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)
    batch = pipeline.batches(planned.train, planned.steps, planned.shape, planned.microbatch_rows)[0]
    rows = sharding.rows_sharding(mesh, 3, row_axis=1)
    arrays = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=rows) for k, v in batch.items() if k in loop.PACKED}
    spec = loop.loss_spec(model, stage, planned.shape, mesh)
    if loop.OBJECTIVES[stage.objective].needs_reference:
        arrays["reference_log_probs"] = jax.ShapeDtypeStruct(arrays["tokens"].shape, "float32", sharding=rows)
    step = jax.jit(make_train_step(spec, optimizer), donate_argnums=0, out_shardings=(layout, None))
    memory = step.lower(state, arrays).compile().memory_analysis()
    temporaries = size(memory.temp_size_in_bytes) if memory else "unknown on this backend"
    seen = min(planned.total_steps * stage.batch_size, stage.epochs * len(planned.train))
    tokens, epochs = len(planned.train.tokens), seen / len(planned.train)
    print(f"\nstage {name}: {stage.objective}")
    print(f"  {experiment.data_line(planned.train.counts)}")
    print(f"  {len(planned.train):,} training examples, {len(planned.held_out or ()):,} held out")
    print(f"  {planned.total_steps:,} steps, {tokens * epochs:,.0f} tokens ({epochs:.2f} epochs)")
    print(
        f"  batches: up to {planned.shape.rows} rows of {planned.shape.length} tokens, "
        f"{planned.microbatch_rows} at a time"
    )
    params = tree_bytes(state.params)
    print(f"  bytes on all devices: parameters {size(params)}, optimizer {size(tree_bytes(state.opt_state))}")
    print(f"  bytes a device for activations, gradients and other temporaries: {temporaries}")
    count = len(planned.snapshot_steps)
    print(f"  {count} snapshots at steps {planned.snapshot_steps}: {size(count * params)} on disk")


def tree_bytes(tree: object) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
