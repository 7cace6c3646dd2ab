"""Advantages against loops and brute force in float64, and in float32 to its precision."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdjax.objectives import advantages as adv

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([np.float32, np.float64])
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}

gae = jax.jit(adv.gae)
whiten = jax.jit(adv.whiten, static_argnames="shift_mean")
leave_one_out = jax.jit(adv.leave_one_out)
group_relative = jax.jit(adv.group_relative, static_argnames="scale")
per_token_rewards = jax.jit(adv.per_token_rewards)
adapt_kl_coef = jax.jit(adv.adapt_kl_coef)


def run(fn: Any, dtype: Any, *arrays: np.ndarray, **hyper: Any) -> Any:
    """`fn` on the arrays in one dtype (a mask stays a mask); its results must have that dtype."""
    with jax.enable_x64(dtype == np.float64):
        out = fn(*(a if a.dtype == bool else a.astype(dtype) for a in arrays), **hyper)
        assert all(x.dtype == dtype for x in jax.tree.leaves(out))
        return jax.tree.map(np.asarray, out)


def ragged(seed: int, rows: int = 4, tokens: int = 7) -> tuple[np.random.Generator, np.ndarray]:
    """A generator, and a mask of responses of any length, none and all included, each beginning where it likes."""
    rng = np.random.default_rng(seed)
    start, length = rng.integers(0, 3, (rows, 1)), rng.integers(0, tokens + 1, (rows, 1))
    at = np.arange(tokens)
    return rng, (at >= start) & (at < start + length)


def float32_normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal variates that float32 holds exactly."""
    return rng.normal(size=shape).astype(np.float32).astype(np.float64)


def gae_by_sums(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> np.ndarray:
    """Equation 16 as it stands: A_t is the sum over k of (gamma lam)^k delta_t+k."""
    result = np.zeros(mask.shape)
    for i in range(len(mask)):
        where = np.flatnonzero(mask[i])
        r, v = rewards[i, where], [*values[i, where], 0.0]
        for t in range(len(where)):
            for k in range(len(where) - t):
                delta = r[t + k] + gamma * v[t + k + 1] - v[t + k]
                result[i, where[t]] += (gamma * lam) ** k * delta
    return result


@settings(max_examples=60)
@given(seeds, dtypes, st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_is_equation_16(seed: int, dtype: Any, gamma: float, lam: float) -> None:
    rng, mask = ragged(seed)
    rewards, values = float32_normal(rng, *mask.shape), float32_normal(rng, *mask.shape)
    expected = gae_by_sums(rewards, values, mask, gamma, lam)
    advantages, returns = run(gae, dtype, rewards, values, mask, gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages, expected, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), atol=TOLERANCE[dtype])
    assert not advantages[~mask].any() and not returns[~mask].any()
    if gamma == lam == 1:
        to_go = np.cumsum(np.where(mask, rewards, 0)[:, ::-1], axis=1)[:, ::-1]
        np.testing.assert_allclose(returns, np.where(mask, to_go, 0), atol=TOLERANCE[dtype])
    # What stands outside the mask has no say.
    noise = run(gae, dtype, np.where(mask, rewards, np.nan), np.where(mask, values, np.inf), mask, gamma=gamma, lam=lam)
    np.testing.assert_array_equal(noise, (advantages, returns))


def test_gae_by_hand() -> None:
    """Two tokens, the score at the last: delta = (0 + 0.5*2 - 1, 4 - 2) = (0, 2); A = (0 + 0.5*0.5*2, 2)."""
    rewards, values, mask = np.array([[0.0, 4.0, 9.0]]), np.array([[1.0, 2.0, 9.0]]), np.array([[True, True, False]])
    advantages, returns = run(gae, np.float32, rewards, values, mask, gamma=0.5, lam=0.5)
    np.testing.assert_array_equal(advantages, [[0.5, 2.0, 0.0]])
    np.testing.assert_array_equal(returns, [[1.5, 4.0, 0.0]])


@settings(max_examples=40)
@given(seeds, dtypes, st.booleans())
def test_whiten(seed: int, dtype: Any, shift_mean: bool) -> None:
    rng, mask = ragged(seed)
    x = float32_normal(rng, *mask.shape) * 3 + 5
    inside = x[mask]
    whitened = run(whiten, dtype, np.where(mask, x, np.nan), mask, shift_mean=shift_mean)
    assert not whitened[~mask].any() and np.isfinite(whitened).all()
    if len(inside) < 2:
        np.testing.assert_allclose(whitened[mask], inside * (not shift_mean), rtol=1e-6)
        return
    mean = inside.mean()
    expected = (inside - mean) / np.sqrt(inside.var(ddof=1) + 1e-8) + mean * (not shift_mean)
    np.testing.assert_allclose(whitened[mask], expected, atol=10 * TOLERANCE[dtype])
    if shift_mean:
        np.testing.assert_allclose(whitened[mask].mean(), 0, atol=TOLERANCE[dtype])
        np.testing.assert_allclose(whitened[mask].var(ddof=1), 1, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_rewards_teach_nothing(dtype: Any) -> None:
    """Exactly 0: the rounding error of a mean, divided by almost nothing, would be an advantage."""
    for value in (0.1, -7.3, 1000.1):
        for size in (1, 3, 7, 50):
            x = np.full((6, size), value)
            mask = np.ones(x.shape, bool)
            mask[1:, -1] = False
            assert not run(whiten, dtype, x, mask).any()
            np.testing.assert_allclose(run(whiten, dtype, x, mask, shift_mean=False), value * mask, rtol=1e-6)
            assert not run(leave_one_out, dtype, x).any()
            assert not run(group_relative, dtype, x, scale=True).any()
    nothing = np.zeros((2, 3), bool)
    assert not run(whiten, dtype, np.full((2, 3), 4.0), nothing).any()
    assert not run(whiten, dtype, np.full((2, 3), 4.0), nothing, shift_mean=False).any()


@settings(max_examples=30)
@given(seeds, dtypes, st.sampled_from([2, 5]))
def test_leave_one_out(seed: int, dtype: Any, size: int) -> None:
    rewards = float32_normal(np.random.default_rng(seed), 3, size) * 4
    expected = [[row[i] - np.delete(row, i).mean() for i in range(size)] for row in rewards]
    advantages = run(leave_one_out, dtype, rewards)
    np.testing.assert_allclose(advantages, expected, atol=5 * TOLERANCE[dtype])
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=10 * TOLERANCE[dtype])


def test_leave_one_out_gradient_is_unbiased() -> None:
    """The expectation over all pairs of samples of a three-armed bandit is the gradient of the expected reward."""
    rewards = np.array([1.0, -2.0, 0.5])
    p = np.array([0.2, 0.5, 0.3])
    score = np.eye(3) - p  # gradient of log p of each arm by the logits
    expected = p * (rewards - p @ rewards)
    total = np.zeros(3)
    for i in range(3):
        for j in range(3):
            a = run(leave_one_out, np.float64, rewards[None, [i, j]])[0]
            total += p[i] * p[j] * (a[0] * score[i] + a[1] * score[j]) / 2
    np.testing.assert_allclose(total, expected, atol=1e-14)


@settings(max_examples=30)
@given(seeds, dtypes, st.booleans(), st.sampled_from([2, 5]))
def test_group_relative(seed: int, dtype: Any, scale: bool, size: int) -> None:
    rewards = float32_normal(np.random.default_rng(seed), 3, size) * 4
    expected = [(row - row.mean()) / (row.std(ddof=1) + 1e-4 if scale else 1) for row in rewards]
    advantages = run(group_relative, dtype, rewards, scale=scale)
    np.testing.assert_allclose(advantages, expected, atol=10 * TOLERANCE[dtype])


@settings(max_examples=30)
@given(seeds, dtypes, st.sampled_from([0.0, 0.05, 2.0]))
def test_per_token_rewards(seed: int, dtype: Any, kl_coef: float) -> None:
    rng, mask = ragged(seed)
    kl, scores = float32_normal(rng, *mask.shape), float32_normal(rng, len(mask))
    expected = np.zeros(mask.shape)
    for i in range(len(mask)):
        for t in np.flatnonzero(mask[i]):
            expected[i, t] = -kl_coef * kl[i, t]
        if mask[i].any():
            expected[i, np.flatnonzero(mask[i])[-1]] += scores[i]
    empty = ~mask.any(axis=1)
    arrays = np.where(empty, np.nan, scores), np.where(mask, kl, np.nan), mask
    np.testing.assert_allclose(
        run(per_token_rewards, dtype, *arrays, kl_coef=kl_coef), expected, atol=TOLERANCE[dtype]
    )


def test_kl_coef_seeks_its_target() -> None:
    adapt = partial(adapt_kl_coef, target=6.0, horizon=100.0, episodes=10)
    # The error counts as it is within +-0.2 and no further; at the target the coefficient rests.
    for kl, factor in ((6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)):
        np.testing.assert_allclose(adapt(jnp.float32(0.1), jnp.float32(kl)), 0.1 * factor, rtol=1e-6)
    # A policy whose KL falls as the coefficient rises ends at the target, from either side.
    for start in (0.01, 5.0):
        coef = jnp.float32(start)
        for _ in range(600):
            coef = adapt(coef, 3.0 / coef)
        np.testing.assert_allclose(coef, 0.5, rtol=1e-4)
