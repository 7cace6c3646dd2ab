"""Norms, softmax and the MLP's gate, in float32, with backward passes of their own.

They keep one or two arrays where JAX by itself keeps several, and sum products of rows by dots, which takes XLA on CPU
a tenth of the time: JAX's own backward pass of a softmax took nine times as long as the softmax.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def row_products(a: Float[Array, "*rows width"], b: Float[Array, "*rows width"]) -> Float[Array, "*rows 1"]:
    """Inner products of rows, float32."""
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: jnp.einsum("...i,...i->...", a, b)[..., None],
        default=lambda a, b: jnp.sum(a * b, axis=-1, keepdims=True),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*batch width"], scale: Float[Array, "width"], eps: float) -> Float[Array, "*batch width"]:
    """x / rms(x) * scale, computed in float32 (Zhang and Sennrich, arXiv 1910.07467, equation 4)."""
    return (_normed(x, eps)[0] * scale.astype(jnp.float32)).astype(x.dtype)


def _normed(x: Array, eps: float) -> tuple[Float[Array, "*batch width"], Float[Array, "*batch 1"]]:
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * inverse, inverse


def _rms_norm_forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return rms_norm(x, scale, eps), (x, scale)


def _rms_norm_backward(eps: float, inputs: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, scale = inputs
    (normed, inverse), g = _normed(x, eps), cotangent.astype(jnp.float32)
    d_normed = g * scale.astype(jnp.float32)
    d_x = inverse * (d_normed - normed * row_products(d_normed, normed) / x.shape[-1])
    d_scale = jnp.sum(g * normed, axis=range(x.ndim - 1))
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def softmax(x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
    """Over the last axis."""
    return jax.nn.softmax(x, axis=-1)


def _softmax_forward(x: Array) -> tuple[Array, Array]:
    weights = softmax(x)
    return weights, weights


def _softmax_backward(weights: Array, g: Array) -> tuple[Array]:
    return (weights * (g - row_products(weights, g)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


@jax.custom_vjp
def gated(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """silu(gate) * up (SwiGLU: Shazeer, arXiv 2002.05202, equation 6), computed in float32."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _gated_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return gated(gate, up), (gate, up)


def _gated_backward(inputs: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    gate, up, g = (x.astype(jnp.float32) for x in (*inputs, cotangent))
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d_gate.astype(inputs[0].dtype), (g * gate * sigmoid).astype(inputs[1].dtype)


gated.defvjp(_gated_forward, _gated_backward)
