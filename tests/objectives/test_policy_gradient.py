"""Policy-gradient losses against exact expectations, finite differences in float64 and formulas written out."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdjax.errors import UserError
from vdjax.objectives import policy_gradient as pg

seeds = st.integers(0, 2**31)
kl_estimate = jax.jit(pg.kl_estimate, static_argnames="kind")
clipped_policy_loss = jax.jit(pg.clipped_policy_loss)
clipped_value_loss = jax.jit(pg.clipped_value_loss)

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
# Log-ratios inside the clip, beyond either side of it, and far beyond.
LOG_RATIOS = np.log([0.05, 0.79, 0.81, 0.95, 1.05, 1.27, 1.29, 20.0])


@pytest.fixture
def x64() -> Any:
    with jax.enable_x64(True):
        yield


def differences(fn: Any, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Derivative of an elementwise function, by central differences."""
    return (np.asarray(fn(x + step)) - np.asarray(fn(x - step))) / (2 * step)


def slope(fn: Any, x: Any) -> np.ndarray:
    """Derivative of an elementwise function, by JAX."""
    return np.asarray(jax.jit(jax.grad(lambda x: fn(x).sum()))(x))


def log_softmax(logits: Any) -> jax.Array:
    return jax.nn.log_softmax(jnp.asarray(logits))


def test_kl_estimators_in_expectation(x64: Any) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 6))
    policy, reference = log_softmax(logits[0]), log_softmax(logits[1])
    p = np.exp(policy)
    kl = p @ (policy - reference)
    assert kl > 0.1
    np.testing.assert_allclose(p @ kl_estimate(policy, reference, kind="k1"), kl, rtol=1e-12)
    np.testing.assert_allclose(p @ kl_estimate(policy, reference, kind="k3"), kl, rtol=1e-12)
    assert abs(p @ kl_estimate(policy, reference, kind="k2") - kl) > 0.01 * kl
    # k2 is right to second order: with a policy nearer by 10, the KL shrinks by 100 and the error by 1000.
    errors, kls = [], []
    for near in (1e-2, 1e-3):
        policy = log_softmax(logits[1] + near * logits[0])
        kls.append(np.exp(policy) @ (policy - reference))
        errors.append(abs(np.exp(policy) @ kl_estimate(policy, reference, kind="k2") - kls[-1]))
    np.testing.assert_allclose(kls[0] / kls[1], 100, rtol=0.1)
    np.testing.assert_allclose(errors[0] / errors[1], 1000, rtol=0.1)


def test_gradients_of_kl_estimators_in_expectation(x64: Any) -> None:
    """On the policy's own samples k2 has the gradient of KL(policy || reference), k3 that of the reverse, k1 none."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6)))
    reference, p = log_softmax(logits[1]), np.exp(log_softmax(logits[0]))

    def expected(logits: jax.Array, kind: str) -> jax.Array:
        return p @ pg.kl_estimate(log_softmax(logits), reference, kind)  # p stays: samples are not differentiated

    def forward(logits: jax.Array) -> jax.Array:
        return jnp.exp(log_softmax(logits)) @ (log_softmax(logits) - reference)

    def reverse(logits: jax.Array) -> jax.Array:
        return jnp.exp(reference) @ (reference - log_softmax(logits))

    gradient = partial(jax.grad(expected), logits[0])
    np.testing.assert_allclose(gradient("k1"), 0, atol=1e-14)
    np.testing.assert_allclose(gradient("k2"), jax.grad(forward)(logits[0]), atol=1e-14)
    np.testing.assert_allclose(gradient("k3"), jax.grad(reverse)(logits[0]), atol=1e-14)
    assert np.abs(gradient("k2") - gradient("k3")).max() > 1e-2


@settings(max_examples=30)
@given(seeds, st.sampled_from([1e-8, 1e-3, 1.0, 10.0]))
def test_kl_estimates_of_one_token(seed: int, scale: float) -> None:
    log_probs, reference = -np.abs(np.random.default_rng(seed).normal(size=(2, 50)) * scale).astype(np.float32)
    d = log_probs.astype(np.float64) - reference
    for kind, expected in (("k1", d), ("k2", d**2 / 2), ("k3", np.expm1(-d) + d)):
        estimate = np.asarray(kl_estimate(log_probs, reference, kind=kind))
        np.testing.assert_allclose(estimate, expected, rtol=1e-5, atol=1e-6 * scale)
        assert estimate.dtype == np.float32
        assert kind == "k1" or (estimate >= 0).all()


@pytest.mark.parametrize(("kind", "gradient"), [("k1", 1), ("k2", 0), ("k3", 0)])
def test_kl_of_equal_log_probs_is_exactly_zero(kind: str, gradient: int) -> None:
    log_probs = -np.abs(np.random.default_rng(0).normal(size=20)).astype(np.float32)
    assert not np.asarray(kl_estimate(log_probs, log_probs, kind=kind)).any()
    np.testing.assert_array_equal(slope(lambda x: pg.kl_estimate(x, log_probs, kind), log_probs), gradient)


def test_gradients_of_kl_estimators(x64: Any) -> None:
    log_probs, reference = -np.abs(np.random.default_rng(2).normal(size=(2, 20)))
    for kind in pg.KL_ESTIMATORS:
        estimate = partial(kl_estimate, reference=reference, kind=kind)
        np.testing.assert_allclose(slope(estimate, log_probs), differences(estimate, log_probs), rtol=1e-6, atol=1e-8)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="KL estimator 'k4' is unknown; valid: k1, k2, k3"):
        pg.kl_estimate(jnp.zeros(2), jnp.zeros(2), "k4")
    with pytest.raises(UserError, match="'token_men' are unknown; did you mean 'token_mean'"):
        pg.token_weights(np.array([1, 2]), "token_men", max_new_tokens=4)


@pytest.mark.parametrize("advantage", [1.7, -0.6, 0.0])
def test_clipped_policy_loss_on_every_side(x64: Any, advantage: float) -> None:
    rng = np.random.default_rng(3)
    old = -np.abs(rng.normal(size=LOG_RATIOS.shape))
    advantages = np.full(old.shape, advantage)
    losses, extra = clipped_policy_loss(old + LOG_RATIOS, old, advantages, **CLIP)
    ratio = np.exp(LOG_RATIOS)
    np.testing.assert_allclose(
        losses, -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage), rtol=1e-12
    )
    np.testing.assert_allclose(extra["ratio"], ratio, rtol=1e-12)

    def loss(x: Any) -> Any:
        return clipped_policy_loss(x, old, advantages, **CLIP)[0]

    gradient = slope(loss, old + LOG_RATIOS)
    np.testing.assert_allclose(gradient, differences(loss, old + LOG_RATIOS), rtol=1e-7, atol=1e-9)
    # Only one of the two sides is clipped, the one towards which the advantage pushes.
    clipped = (ratio > 1.28) if advantage > 0 else (ratio < 0.8) & (advantage < 0)
    np.testing.assert_array_equal(extra["clipped"], clipped)
    np.testing.assert_array_equal(gradient == 0, clipped | (advantage == 0))
    np.testing.assert_allclose(gradient[~clipped], (-advantage * ratio)[~clipped], rtol=1e-12)


def test_first_minibatch_is_reinforce() -> None:
    """At the policy that sampled: ratio exactly 1, nothing clipped, gradient exactly -A."""
    rng = np.random.default_rng(4)
    log_probs = (-np.abs(rng.normal(size=(3, 7))) * 5).astype(np.float32)
    advantages = rng.normal(size=(3, 7)).astype(np.float32)
    for clip in ({"clip_low": 0.2, "clip_high": 0.2}, {"clip_low": 0.0, "clip_high": 0.0}):
        losses, extra = clipped_policy_loss(log_probs, log_probs, advantages, **clip)
        np.testing.assert_array_equal(losses, -advantages)
        np.testing.assert_array_equal(extra["ratio"], 1)
        np.testing.assert_array_equal(extra["clipped"], 0)
        assert all(x.dtype == np.float32 for x in (losses, *extra.values()))
        gradient = slope(lambda x, c=clip: pg.clipped_policy_loss(x, log_probs, advantages, **c)[0], log_probs)
        np.testing.assert_array_equal(gradient, -advantages)


def test_huge_ratios_stay_finite() -> None:
    log_probs = jnp.asarray([0.0, 0.0, 0.0, -1000.0, -1000.0, 0.0, 0.0], jnp.float32)
    old = jnp.asarray([-1000.0, -1000.0, -1000.0, 0.0, 0.0, -20.0, -21.0], jnp.float32)
    advantages = jnp.asarray([1.0, -1.0, 0.0, 1.0, -1.0, -1.0, -1.0], jnp.float32)
    losses, extra = clipped_policy_loss(log_probs, old, advantages, **CLIP)
    gradient = slope(lambda x: pg.clipped_policy_loss(x, old, advantages, **CLIP)[0], log_probs)
    top = np.exp(20.0)
    np.testing.assert_allclose(losses, [-1.28, 981 * top, 0, 0, 0.8, top, 2 * top], rtol=1e-5)
    np.testing.assert_allclose(gradient, [0, top, 0, 0, 0, top, top], rtol=1e-5)
    assert np.isfinite(extra["ratio"]).all()


def test_sequence_ratios_are_those_of_summed_log_probs(x64: Any) -> None:
    """RLOO: -min(r A, clip(r) A) with the product of the tokens' ratios; the gradient reaches every token alike."""
    rng = np.random.default_rng(5)
    old = -np.abs(rng.normal(size=(4, 3)))
    log_probs = old + np.array([[0.05], [-0.02], [0.3], [-0.3]])
    advantages = np.array([1.0, -2.0, 3.0, -4.0])

    def loss(x: jax.Array) -> jax.Array:
        return pg.clipped_policy_loss(x.sum(axis=1), old.sum(axis=1), advantages, clip_low=0.2, clip_high=0.2)[0]

    ratio = np.prod(np.exp(log_probs - old), axis=1)
    np.testing.assert_allclose(loss(log_probs), [-ratio[0], 2 * ratio[1], -3 * 1.2, 4 * 0.8], rtol=1e-12)
    expected = np.array([[-ratio[0]], [2 * ratio[1]], [0], [0]])
    np.testing.assert_allclose(slope(loss, log_probs), np.broadcast_to(expected, old.shape), rtol=1e-12)


@settings(max_examples=30)
@given(seeds, st.sampled_from([0.0, 0.2, 5.0]))
def test_clipped_value_loss(seed: int, clip: float) -> None:
    with jax.enable_x64(True):
        values, old, returns = np.random.default_rng(seed).normal(size=(3, 40))
        loss = partial(clipped_value_loss, old_values=old, returns=returns, clip=clip)
        squares = (values - returns) ** 2
        if clip:
            squares = np.maximum(squares, (np.clip(values, old - clip, old + clip) - returns) ** 2)
        np.testing.assert_allclose(loss(values), squares / 2, rtol=1e-12)
        gradient = slope(loss, values)
        if clip == 0:
            np.testing.assert_allclose(gradient, values - returns, rtol=1e-12)
        # Next to a corner (a bound, or where the two squares cross) differences say nothing.
        bounds = np.abs(np.abs(values - old) - (clip or np.inf))
        crossing = np.abs((np.clip(values, old - clip, old + clip) - returns) ** 2 - (values - returns) ** 2)
        smooth = (bounds > 1e-4) & ((crossing > 1e-4) | (np.abs(values - old) < (clip or np.inf)))
        assert smooth.sum() > 30
        np.testing.assert_allclose(gradient[smooth], differences(loss, values)[smooth], rtol=1e-6, atol=1e-8)


def test_value_loss_by_hand() -> None:
    """Inside; beyond the range and nearer the return (no gradient); beyond the range and away from it."""
    values, old, returns = jnp.asarray([1.1, 2.0, 0.0]), jnp.ones(3), jnp.asarray([3.0, 3.0, 3.0])
    loss = partial(clipped_value_loss, old_values=old, returns=returns, clip=0.2)
    np.testing.assert_allclose(loss(values), [1.9**2 / 2, 1.8**2 / 2, 3.0**2 / 2], rtol=1e-6)
    np.testing.assert_allclose(slope(loss, values), [-1.9, 0.0, -3.0], rtol=1e-6)
    assert loss(values).dtype == jnp.float32


@settings(max_examples=30)
@given(seeds, st.integers(1, 6))
def test_token_weights(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, n)
    losses = [rng.normal(size=length) for length in lengths]
    total = sum(x.sum() for x in losses)
    expected = {
        "sequence_mean": sum(x.mean() for x in losses if len(x)) / n,
        "token_mean": total / max(lengths.sum(), 1),
        "constant": total / (n * 16),
    }
    sums = {
        "sequence_mean": (lengths > 0).mean(),
        "token_mean": float(lengths.any()),
        "constant": lengths.mean() / 16,
    }
    assert set(expected) == set(pg.TOKEN_WEIGHTS)
    for how in pg.TOKEN_WEIGHTS:
        weights = pg.token_weights(lengths, how, max_new_tokens=16)
        assert weights.shape == (n,) and weights.dtype == np.float64 and not weights[lengths == 0].any()
        np.testing.assert_allclose(sum(w * x.sum() for w, x in zip(weights, losses, strict=True)), expected[how])
        np.testing.assert_allclose((weights * lengths).sum(), sums[how])
