import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from vdjax import models
from vdjax.errors import UserError
from vdjax.models.attention import attention, visible
from vdjax.models.config import ModelConfig
from vdjax.models.transformer import init_params

CFG = ModelConfig("qwen3", 31, 24, 40, 2, 4, 2, 16, 1e-6, 1e4, None, 64, False, True)
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 0], [5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 2]])
SEQUENCES = np.array([[0, 0, 1, 1, 2, 2, 2, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3]])


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """The visibility rule and softmax attention, token by token, in float64."""
    out = np.zeros(q.shape)
    batch, length, heads, dim = q.shape
    for b, i, h in np.ndindex(batch, length, heads):
        kv = h // (heads // k.shape[2])
        seen = [
            j for j in range(i + 1) if segments[b, i] == segments[b, j] != 0 and sequences[b, j] in (0, sequences[b, i])
        ]
        if seen:
            scores = np.array([q[b, i, h] @ k[b, j, kv] for j in seen]) / dim**0.5
            weights = np.exp(scores - scores.max())
            out[b, i, h] = weights / weights.sum() @ v[b, seen, kv]
    return out


@pytest.mark.parametrize("query_chunk", [0, 3, 4, 11, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 3), (5, 1)])
def test_attention_follows_the_rule(heads: int, kv_heads: int, query_chunk: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 11, n, 8)).astype(np.float32) * 2 for n in (heads, kv_heads, kv_heads))
    run = jax.jit(functools.partial(attention, query_chunk=query_chunk))
    out = run(q, k, v, jnp.asarray(SEGMENTS), jnp.asarray(SEQUENCES))
    real = SEGMENTS != 0
    np.testing.assert_allclose(out[real], reference(q, k, v, SEGMENTS, SEQUENCES)[real], atol=2e-6)
    assert np.isfinite(out).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12))
def test_visible_is_the_written_rule(tokens: list[tuple[int, int]]) -> None:
    segments, sequences = (jnp.asarray([row]) for row in zip(*tokens, strict=True))
    mask = visible(jnp.arange(len(tokens)), segments, sequences, segments, sequences)[0]
    for i, (segment, sequence) in enumerate(tokens):
        for j, (other_segment, other_sequence) in enumerate(tokens):
            rule = j <= i and segment == other_segment != 0 and other_sequence in (0, sequence)
            assert bool(mask[i, j]) == rule


def test_gradients_do_not_depend_on_chunks_remat_or_unrolling() -> None:
    params = init_params(CFG, seed=1)
    params = jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, SEGMENTS.shape))
    positions = jnp.arange(SEGMENTS.shape[1]) + jnp.zeros_like(tokens)

    def gradients(**options: object) -> object:
        graphdef, _ = models.abstract(CFG, **options)

        def loss(params: object) -> jax.Array:
            model = nnx.merge(graphdef, params)
            hidden = model(tokens, positions, jnp.asarray(SEGMENTS), jnp.asarray(SEQUENCES))
            return jnp.sum(jnp.where(SEGMENTS[..., None] != 0, model.project(hidden), 0) ** 2)

        return jax.jit(jax.grad(loss))(params)

    expected = gradients()
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(expected))
    for options in ({"remat": "dots", "query_chunk": 4}, {"remat": "full", "unroll": True, "query_chunk": 5}):
        got = gradients(**options)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, expected)


def test_responses_that_share_a_prompt_score_as_if_alone() -> None:
    params = init_params(CFG, seed=0)
    run = jax.jit(lambda params, *batch: nnx.merge(models.abstract(CFG)[0], params)(*batch))
    rng = np.random.default_rng(0)
    prompt, first, second = (rng.integers(0, 31, n) for n in (5, 4, 3))
    tokens = np.concatenate([prompt, first, second])[None]
    positions = np.concatenate([np.arange(9), np.arange(5, 8)])[None]
    sequences = np.repeat([0, 1, 2], [5, 4, 3])[None]
    shared = run(params, tokens, positions, np.ones_like(tokens), sequences)[0]
    for response, place in ((first, slice(5, 9)), (second, slice(9, 12))):
        alone = np.concatenate([prompt, response])[None]
        expected = run(params, alone, np.arange(alone.shape[1])[None], np.ones_like(alone))[0]
        np.testing.assert_allclose(shared[place], expected[5:], atol=1e-5)
        np.testing.assert_allclose(shared[:5], expected[:5], atol=1e-5)


def test_what_padding_holds_changes_nothing_and_stays_finite() -> None:
    model = models.Transformer(CFG, rngs=nnx.Rngs(0), query_chunk=4)
    rng = np.random.default_rng(0)
    segments = jnp.asarray([[1] * 6 + [0] * 5])
    positions = jnp.arange(11)[None]
    rows = [np.concatenate([np.arange(6), rng.integers(0, 31, 5)])[None] for _ in range(2)]
    first, second = (model(jnp.asarray(row), positions, segments) for row in rows)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first[:, :6], second[:, :6])


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    model = models.Transformer(CFG, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"\[0, 31\)"):
        model.logits(np.array([[0, 31]]))
    with pytest.raises(UserError, match="batch, length"):
        model.logits(np.array([0, 1]))
    with pytest.raises(UserError, match="remat"):
        models.abstract(CFG, remat="some")


def test_seeded_initial_values() -> None:
    params = init_params(CFG, seed=3)
    same, other = init_params(CFG, seed=3), init_params(CFG, seed=4)
    np.testing.assert_array_equal(params["layers"]["q_proj"], same["layers"]["q_proj"])
    kernels = [leaf for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 3] + [params["embed"]]
    for kernel, different in zip(kernels, [x for x in jax.tree.leaves(other["layers"]) if x.ndim == 3], strict=False):
        assert abs(float(kernel.std()) - 0.02) < 0.002 and abs(float(kernel.mean())) < 0.002
        assert not np.array_equal(kernel, different)
    assert not np.array_equal(params["layers"]["q_proj"][0], params["layers"]["q_proj"][1])
    np.testing.assert_array_equal(params["layers"]["q_norm"], np.ones((2, 16)))
    assert models.num_params(CFG) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_abstract_model_is_the_real_one_without_arrays() -> None:
    graphdef, shapes = models.abstract(CFG)
    real_graphdef, params = models.split(models.Transformer(CFG, rngs=nnx.Rngs(0)))
    assert graphdef == real_graphdef and hash(graphdef) == hash(real_graphdef)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    axes = models.param_axes(CFG)
    assert axes["layers"]["o_proj"] == ("layer", "heads", "embed") and axes["lm_head"] == ("vocab", "embed")
    jax.tree.map(lambda leaf, names: None if leaf.ndim == len(names) else pytest.fail(str(names)), shapes, axes)
