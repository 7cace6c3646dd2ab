"""Norms, softmax and the gate against JAX's own functions and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vdjax.models.elementwise import gated, rms_norm, row_products, softmax

EPS = 1e-5


def plain_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + EPS) * scale).astype(x.dtype)


def plain_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
    wide = gate.astype(jnp.float32)
    return (wide / (1 + jnp.exp(-wide)) * up.astype(jnp.float32)).astype(gate.dtype)


CASES = {
    "rms_norm": (lambda x, scale: rms_norm(x, scale, EPS), plain_norm, [(2, 5, 16), (16,)]),
    "softmax": (softmax, lambda x: jax.nn.softmax(x, axis=-1), [(3, 4, 9)]),
    "gated": (gated, plain_gate, [(2, 5, 16), (2, 5, 16)]),
}


def inputs(shapes: list[tuple[int, ...]], dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(3 * rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in CASES), ("rms_norm", "bfloat16"), ("gated", "bfloat16")]
)
def test_values_and_gradients_are_those_of_the_plain_formula(name: str, dtype: str) -> None:
    ours, plain, shapes = CASES[name]
    xs = inputs(shapes, dtype)
    out, pull = jax.vjp(ours, *xs)
    want, plain_pull = jax.vjp(plain, *xs)
    assert out.dtype == want.dtype
    close = {"rtol": 2e-6, "atol": 2e-6} if xs[0].dtype == jnp.float32 else {"rtol": 2e-2, "atol": 2e-2}
    np.testing.assert_allclose(np.float32(out), np.float32(want), **close)
    cotangent = inputs([want.shape], want.dtype.name)[0]
    for got, expected in zip(pull(cotangent), plain_pull(cotangent), strict=True):
        assert got.dtype == expected.dtype
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(np.float32(got) / scale, np.float32(expected) / scale, **close)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_differences(name: str) -> None:
    ours, _, shapes = CASES[name]
    check_grads(ours, inputs(shapes), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_masked_scores_have_no_gradient() -> None:
    x = jnp.array([[0.5, -1e30, 1.0], [-1e30, -1e30, -1e30]])
    weights, pull = jax.vjp(softmax, x)
    (slope,) = pull(jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))
    assert weights[0, 1] == slope[0, 1] == 0
    assert np.isfinite(slope).all()


def test_row_products_are_sums_of_products() -> None:
    a, b = inputs([(4, 3, 7), (4, 3, 7)])
    np.testing.assert_allclose(row_products(a, b), (a * b).sum(-1, keepdims=True), rtol=1e-5, atol=1e-5)
