"""Samples from a tiny model on one device and under layouts of eight simulated ones; prints JSON.

Run by test_generate.py in a process of its own, since the number of devices is fixed when JAX starts.
"""

import functools
import json
from typing import Any

import jax
import numpy as np
import tiny

from vdjax import sharding
from vdjax.models.functional import shardings
from vdjax.sampling import Sampling, generate
from vdjax.sampling.decode import prefill, unstacked
from vdjax.sampling.generate import layout, put

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, tiny.VOCAB, n).tolist() for n in (5, 1, 40, 17, 3, 9, 30, 20, 2, 11)]
STOPS = tuple(range(0, tiny.VOCAB, 17))


def sample(made: Any, start: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x, s: sharding.put_global(np.asarray(x), s), start, shardings(made, mesh))
        out = generate(made, params, PROMPTS, list(range(10)), Sampling(10, 0.9, 0.95), STOPS, mesh)
        batch = put(layout(PROMPTS[:8], np.arange(8)[:, None], (8, 48), sharding.batch_shards(mesh)), mesh)

        def caches(params: Any) -> Any:
            return prefill(made.graphdef, unstacked(made.graphdef, params), batch, 5)[0].cache

        keys = jax.jit(functools.partial(caches))(params)[0][0]
    rows, tensor = sharding.batch_shards(mesh), mesh.shape["tensor"]
    return {
        "tokens": out.tokens.tolist(),
        "lengths": out.lengths.tolist(),
        "log_probs": out.log_probs.tolist(),
        "cache_part": list(keys.addressable_shards[0].data.shape),
        "wanted_part": [8 // rows, 2 // tensor, 16, 64],
    }


def main() -> None:
    assert len(jax.devices()) == 8
    made, start = tiny.model("qwen")
    out = {"one": sample(made, start, sharding.make_mesh(devices=jax.devices()[:1]))}
    layouts = (
        {"fsdp": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 4, "tensor": 2},
        {"data": 2, "context": 2, "tensor": 2},
    )
    for sizes in layouts:
        out[str(sizes)] = sample(made, start, sharding.make_mesh(**sizes))
    print(json.dumps(out))


if __name__ == "__main__":
    main()
