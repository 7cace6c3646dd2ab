"""Temperature, top-k, top-p and the draw, against brute force by sorting and against the exact distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vdjax.sampling.choose import choose, draw, kept

RNG = np.random.default_rng(0)
LOGITS = np.concatenate([RNG.normal(0, scale, (4, 700)) for scale in (0.1, 1, 3, 30)]).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def brute_force(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution of one row by transformers' rule: temperature, the k best, then the fewest that reach p."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    best = order[: top_k or None]
    probabilities = softmax(scaled[best])
    count = len(best) if top_p == 1 else int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
    out = np.zeros(len(logits))
    out[best[:count]] = softmax(scaled[best[:count]])
    return out


@pytest.mark.parametrize("top_k", [0, 1, 5, 699, 5000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_the_tokens_left_are_those_of_sorting(top_k: int, top_p: float) -> None:
    weights = np.exp(LOGITS - LOGITS.max(axis=1, keepdims=True))
    left = np.asarray(jax.jit(kept)(weights, top_k, top_p))
    got = left > 0
    np.testing.assert_array_equal(left[got], weights[got])
    want = np.stack([brute_force(row, 1, top_k, top_p) > 0 for row in LOGITS])
    assert got.any(axis=1).all()
    # Probabilities below float32's are 0 here; and where the sum reaches top_p within rounding, a token more or less.
    visible = softmax(LOGITS) > 1e-30
    assert ((got != want) & visible).sum() <= (0 if top_p in (1e-6, 1.0) else 1)


def test_tokens_equal_to_the_last_one_left_are_left() -> None:
    weights = jnp.array([[1.0, 3.0, 2.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0, 0.0]])
    want = [[0, 3, 2, 2, 0], [1, 1, 1, 1, 0]]
    np.testing.assert_array_equal(kept(weights, 2, 1.0), want)
    np.testing.assert_array_equal(kept(weights, 0, 0.5), want)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1, 0, 1), (0.7, 0, 1), (1.5, 40, 1), (0.8, 30, 0.8)])
def test_frequencies_are_those_of_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits, count = LOGITS[5], 40_000
    uniforms = jax.random.uniform(jax.random.key(3), (count, 2))
    how = (jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k))

    def one(pair: jax.Array) -> jax.Array:
        return choose(jnp.array(logits)[None], pair[None], *how, filtered=top_k > 0 or top_p < 1)[0]

    tokens = jax.jit(lambda u: jax.lax.map(one, u, batch_size=2000))(uniforms)
    exact = brute_force(logits, temperature, top_k, top_p)
    found = np.bincount(tokens, minlength=len(logits))
    assert found[exact == 0].sum() == 0
    rare = exact * count < 8
    merge = [np.append(x[~rare], x[rare].sum()) for x in (found, exact * count)]
    keep = merge[1] > 0
    assert scipy.stats.chisquare(merge[0][keep], merge[1][keep]).pvalue > 0.01


def test_every_uniform_number_gives_the_token_of_the_exact_inverse() -> None:
    weights = jnp.array([[0, 2, 0, 1, 5, 0, 0]], jnp.float32)
    edges = {0.0: 1, 0.2499: 1, 0.25: 3, 0.37: 3, 0.375: 4, 1 - 2**-23: 4}
    for uniform, token in edges.items():
        assert int(draw(weights, jnp.array([[0.5, uniform]], jnp.float32))[0]) == token
    blocks = jnp.zeros((1, 1000)).at[0, 600].set(1).at[0, 999].set(3)
    for uniform, token in {0.0: 600, 0.2499: 600, 0.25: 999, 1 - 2**-23: 999}.items():
        assert int(draw(blocks, jnp.array([[uniform, 0.9]], jnp.float32))[0]) == token


def test_temperature_zero_takes_the_largest_logit_and_a_tiny_one_nearly() -> None:
    uniforms = jnp.full((len(LOGITS), 2), 0.77)
    for temperature in (0.0, 1e-30, 1e-6):
        got = choose(LOGITS, uniforms, jnp.float32(temperature), jnp.float32(1), jnp.int32(0), filtered=False)
        np.testing.assert_array_equal(got, LOGITS.argmax(axis=1))
