"""Loads a model over eight simulated devices and prints, as JSON, what was read and whether it is the model.

Run by test_hf.py in a process of its own, since the number of devices is fixed when JAX starts.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from vdjax import models
from vdjax.models import hf
from vdjax.sharding import make_mesh, param_shardings


def main() -> None:
    directory = Path(sys.argv[1])
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    single, sharded = models.load_pretrained(directory), models.load_pretrained(directory, mesh=mesh)
    cfg, expected = single.cfg, models.split(single)[1]
    reader, reads = hf.open_reader(directory, cfg), []

    def counted(path: tuple[str, ...], index: tuple[slice, ...]) -> np.ndarray:
        part = reader(path, index)
        reads.append(part.nbytes)
        return part

    _, shapes = models.abstract(cfg)
    shardings = param_shardings(models.param_axes(cfg), shapes, mesh)
    params = hf.place(counted, shapes, shardings)
    snapshots = make_mesh(snapshot=4, fsdp=2)
    stacked_shardings = jax.tree.map(
        lambda leaf, axis: jax.sharding.NamedSharding(
            snapshots, jax.sharding.PartitionSpec(*[None] * axis, "snapshot", *["fsdp"] * (leaf.shape[axis] % 2 == 0))
        ),
        shapes,
        hf.snapshot_axes(shapes),
    )
    stacked = hf.stack_place([reader] * 4, shapes, stacked_shardings)
    leaves = jax.tree.leaves(params)
    tokens = np.arange(24).reshape(2, 12)
    result = {
        "equal": all(jax.tree.leaves(jax.tree.map(np.array_equal, params, expected))),
        "stacked_equal": all(
            jax.tree.leaves(
                jax.tree.map(
                    lambda leaf, axis, own: np.array_equal(leaf, np.stack([own] * 4, axis)),
                    stacked,
                    hf.snapshot_axes(shapes),
                    expected,
                )
            )
        ),
        "logit_error": float(np.abs(np.asarray(sharded.logits(tokens)) - np.asarray(single.logits(tokens))).max()),
        "bytes_read": sum(reads),
        "bytes_of_model": 2 * models.num_params(cfg),  # the file is bfloat16
        "largest_read": max(reads),
        "largest_part": max(leaf.addressable_shards[0].data.nbytes for leaf in leaves) // 2,
        "largest_leaf": max(leaf.nbytes for leaf in leaves) // 2,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
