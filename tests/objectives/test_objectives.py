"""Objectives against closed-form losses and gradients in float64, and against TRL's own code."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime

from vdjax.objectives import OBJECTIVES, Pairs, dpo, sft, simpo

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "goldens" / "trl_losses.json").read_text())
seeds = st.integers(0, 2**31)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x) in float64, without overflow."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-softplus(-x))


def random_pairs(seed: int, scale: float) -> np.ndarray:
    """Rows: chosen, rejected, their lengths, reference chosen, reference rejected, for 5 pairs; exact in float32."""
    rng = np.random.default_rng(seed)
    values = -np.abs(rng.normal(size=(6, 5))) * scale
    values[2:4] = rng.integers(1, 50, (2, 5))
    return values.astype(np.float32).astype(np.float64)


def loss_and_gradient(fn: Any, pairs: np.ndarray, **hyper: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses, and the gradient of their sum by chosen and rejected log-probs."""

    def total(values: jax.Array) -> jax.Array:
        return fn(Pairs(values[0], values[1], *jnp.asarray(pairs[2:], jnp.float32)), **hyper)[0].sum()

    values = jnp.asarray(pairs[:2], jnp.float32)
    losses, _ = fn(Pairs(values[0], values[1], *jnp.asarray(pairs[2:], jnp.float32)), **hyper)
    return np.asarray(losses), np.asarray(jax.grad(total)(values))


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([0.05, 0.1, 0.5]), st.sampled_from([1.0, 20.0]))
def test_dpo(seed: int, beta: float, scale: float) -> None:
    pairs = random_pairs(seed, scale)
    margin = beta * ((pairs[0] - pairs[4]) - (pairs[1] - pairs[5]))
    slope = -beta * sigmoid(-margin)
    losses, gradient = loss_and_gradient(dpo, pairs, beta=beta)
    np.testing.assert_allclose(losses, softplus(-margin), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, [slope, -slope], rtol=1e-6, atol=1e-6)
    _, metrics = dpo(Pairs(*pairs.astype(np.float32)), beta=beta)
    np.testing.assert_allclose(metrics["reward_chosen"], beta * (pairs[0] - pairs[4]), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(metrics["reward_rejected"], beta * (pairs[1] - pairs[5]), rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([(2.0, 1.0), (2.5, 0.0), (10.0, 5.0)]), st.sampled_from([1.0, 20.0]))
def test_simpo(seed: int, hyper: tuple[float, float], scale: float) -> None:
    pairs, (beta, gamma) = random_pairs(seed, scale), hyper
    rewards = beta * pairs[:2] / pairs[2:4]
    margin = rewards[0] - rewards[1] - gamma
    slopes = -sigmoid(-margin) * beta / pairs[2:4] * np.array([[1], [-1]])
    losses, gradient = loss_and_gradient(simpo, pairs, beta=beta, gamma=gamma)
    # Rewards of up to 400 carry float32 rounding of 3e-5 into the margin.
    tolerance = 1e-6 * max(1, np.abs(rewards).max())
    np.testing.assert_allclose(losses, softplus(-margin), rtol=1e-6, atol=tolerance)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=tolerance)
    _, metrics = simpo(Pairs(*pairs.astype(np.float32)), beta=beta, gamma=gamma)
    np.testing.assert_allclose([metrics["reward_chosen"], metrics["reward_rejected"]], rewards, rtol=1e-6)


def test_closed_forms_agree_with_finite_differences() -> None:
    """The derivatives used above, themselves checked."""
    pairs = random_pairs(0, 3.0)

    def dpo_loss(x: np.ndarray) -> float:
        return float(softplus(-0.3 * ((x[0] - pairs[4, 0]) - (x[1] - pairs[5, 0]))))

    def simpo_loss(x: np.ndarray) -> float:
        return float(softplus(-(2 * x[0] / pairs[2, 0] - 2 * x[1] / pairs[3, 0] - 0.7)))

    for fn, loss, hyper in ((dpo, dpo_loss, {"beta": 0.3}), (simpo, simpo_loss, {"beta": 2.0, "gamma": 0.7})):
        gradient = loss_and_gradient(fn, pairs, **hyper)[1][:, 0]
        np.testing.assert_allclose(gradient, approx_fprime(pairs[:2, 0], loss, 1e-7), atol=1e-6)


def test_sft() -> None:
    log_probs = jnp.asarray([-0.5, -3.0, 0.0, -80.0])
    np.testing.assert_array_equal(sft(log_probs), -log_probs)
    np.testing.assert_array_equal(jax.grad(lambda x: sft(x).sum())(log_probs), -np.ones(4))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['objective']}-{c['hyper']}")
def test_loss_and_gradient_of_trl(case: dict[str, Any]) -> None:
    columns = np.array([GOLDEN["log_probs"], GOLDEN["lengths"], GOLDEN["reference"]]).reshape(3, 2, -1)
    pairs = columns.reshape(6, -1)
    losses, gradient = loss_and_gradient(OBJECTIVES[case["objective"]].fn, pairs, **case["hyper"])
    np.testing.assert_allclose(losses.mean(), case["loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient.ravel() / losses.size, case["gradient"], rtol=1e-5, atol=1e-5)
    assert np.abs(case["gradient"]).max() > 1e-3


def test_far_apart_pairs_stay_finite() -> None:
    pairs = random_pairs(1, 1.0)
    pairs[0], pairs[1] = [-1e4] * 5, [0.0] * 5
    for fn, hyper in ((dpo, {"beta": 0.5}), (simpo, {"beta": 10.0, "gamma": 1.0})):
        for values in (pairs, pairs[[1, 0, 2, 3, 4, 5]]):
            losses, gradient = loss_and_gradient(fn, values, **hyper)
            assert np.isfinite(losses).all() and np.isfinite(gradient).all()


def test_objectives_name_their_data_and_defaults() -> None:
    assert {name: o.kind for name, o in OBJECTIVES.items()} == {
        "pretrain": "text", "sft": "sft", "dpo": "preference", "simpo": "preference",
    }  # fmt: skip
    assert [name for name, o in OBJECTIVES.items() if o.needs_reference] == ["dpo"]
    for objective in OBJECTIVES.values():
        if objective.kind == "preference":
            objective.fn(Pairs(*random_pairs(0, 1.0).astype(np.float32)), **objective.hyper)
