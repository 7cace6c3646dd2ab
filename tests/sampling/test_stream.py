import jax
import numpy as np

from vdjax import sharding
from vdjax.sampling import Sampling, generate
from vdjax.sampling.stream import streamer


def test_one_embedding_is_kept_and_the_tokens_are_those_of_generate(qwen):
    model, params = qwen
    mesh, sampling, prompt = sharding.make_mesh(), Sampling(8, 0.7), [5, 1, 7]

    def embeddings() -> int:
        return sum(array.shape == params["embed"].shape for array in jax.live_arrays())

    with jax.set_mesh(mesh):
        before = embeddings()
        stream = streamer(model, params, sampling, (), mesh)
        assert embeddings() - before == 1
        got = list(stream(prompt, (3,)))
        want = generate(model, params, [prompt], [(3,)], sampling, (), mesh)
    np.testing.assert_array_equal(got, want.tokens[0])
