"""Plans on eight simulated devices, as JSON; run in a process of its own."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from vdjax import chips, config, plan, sharding
from vdjax.models.config import from_hf
from vdjax.planning import hlo, programs
from vdjax.planning.programs import Work

LAYERS, WIDTH, ROWS = 3, 64, 16


def gathered() -> dict[str, Any]:
    """A loop over layers whose weights are spread over all devices, as the rows are."""
    mesh = sharding.make_mesh(fsdp=8)

    def run(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def spread(shape: tuple[int, ...], *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    arguments = spread((LAYERS, WIDTH, WIDTH), None, "fsdp"), spread((ROWS, WIDTH), "fsdp")
    text = jax.jit(run, out_shardings=arguments[1].sharding).lower(*arguments).compile().as_text()
    return {"collectives": [each._asdict() for each in hlo.read(text, dict(mesh.shape)).collectives]}


def planned(names: Sequence[str], **sizes: int) -> dict[str, Any]:
    """Plans as JSON, and as text for a chip that they fit and one that they do not."""
    c = config.experiment()
    c.stages = ("dpo",)
    c.dpo = config.stage("dpo", batch_size=16, max_length=96, microbatch_rows=8)
    c.probes.max_length, c.probes.max_new_tokens = 128, 4
    mesh = sharding.make_mesh(**sizes)
    cfg = from_hf(tiny.SHAPES["llama"], where="tiny")
    work = Work(c, "dpo", cfg, mesh, chips.CHIPS["v5e"], 96, 64, 8)
    plans = programs.plan(work, names)
    flags = argparse.Namespace(topology="v5e:2x4")
    small = {name: one._replace(fits=False) for name, one in plans.items()}
    texts = {"text": plan.describe(flags, work, plans), "too_large": plan.describe(flags, work, small)}
    return plan.as_json(flags, work, plans) | texts


if __name__ == "__main__":
    found = {"gathered": gathered(), "fsdp": planned(["train_step"], fsdp=8)}
    print(json.dumps(found | {"tensor": planned(programs.PROGRAMS, fsdp=4, tensor=2)}))
