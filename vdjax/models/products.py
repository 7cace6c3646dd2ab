"""Matrix products in the compute dtype, with sums in float32, forward and backward."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Options = Callable[[], dict[str, str | bool]]  # a compiler's, for the backend

FEW_ROWS = 64  # up to which `matmul_by_rows` exchanges its operands: with more it is no faster


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    a: Float[Array, "*batch rows inner"], b: Float[Array, "*#batch inner outer"], dtype: DTypeLike | None = None
) -> Float[Array, "*batch rows outer"]:
    """a @ b in `dtype` (default: that of `a`); operands of one dtype, sums in float32; `b` may have no batch.

    The backward pass takes the cotangent in the operands' dtype. Left to itself JAX multiplies a float32 cotangent with
    bfloat16 operands wherever the result was float32, which runs at the speed of float32.
    """
    return _dot(a, b, [a.ndim - 1], [b.ndim - 2], dtype or a.dtype)


def _forward(a: Array, b: Array, dtype: DTypeLike | None) -> tuple[Array, tuple[Array, Array]]:
    return matmul(a, b, dtype), (a, b)


def _backward(_: DTypeLike | None, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    a, b = operands
    g = cotangent.astype(a.dtype)
    d_a = _dot(g, b, [g.ndim - 1], [b.ndim - 1], a.dtype)
    if b.ndim == a.ndim:
        return d_a, transposed_matmul(a, g, b.dtype)
    rows = range(a.ndim - 1)
    return d_a, _dot(a, g, rows, rows, b.dtype)


matmul.defvjp(_forward, _backward)


def _dot(a: Array, b: Array, a_axes: Sequence[int], b_axes: Sequence[int], dtype: DTypeLike) -> Array:
    batch = range(b.ndim - 1 - len(b_axes))

    def product(a: Array, b: Array, result: DTypeLike) -> Array:
        dims = ((a_axes, b_axes), (batch, batch))
        return jax.lax.dot_general(a, b, dims, preferred_element_type=result).astype(dtype)

    # XLA on CPU has fast bfloat16 products (AMX) only for float32 results. A TPU sums in float32 in any case; asked for
    # a float32 result, it would also reduce it between chips, and keep it, in float32.
    in_float32 = functools.partial(product, result=jnp.float32)
    if np.dtype(dtype) == np.dtype(jnp.float32):
        return in_float32(a, b)
    return jax.lax.platform_dependent(a, b, cpu=in_float32, default=functools.partial(product, result=dtype))


def matmul_by_rows(
    x: Float[Array, "*rows inner"], kernel: Float[Array, "outer inner"], dtype: DTypeLike | None = None
) -> Float[Array, "*rows outer"]:
    """x @ kernel.T for a kernel that is kept with its outputs as rows; sums in float32. No backward pass.

    XLA on CPU lays the right operand out anew at every product: a whole kernel, where a sampler has few rows. With the
    operands exchanged these products take half the time.
    """

    def direct(x: Array, kernel: Array) -> Array:
        return _dot(x, kernel, [x.ndim - 1], [1], dtype or x.dtype)

    def exchanged(x: Array, kernel: Array) -> Array:
        # Without the barrier XLA would exchange them again.
        return jax.lax.optimization_barrier(_dot(kernel, x, [1], [1], dtype or x.dtype)).T

    if x.ndim > 2 or len(x) > FEW_ROWS:
        return direct(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=exchanged, default=direct)


def transposed_matmul(
    a: Float[Array, "*batch inner rows"], g: Float[Array, "*batch inner outer"], dtype: DTypeLike
) -> Float[Array, "*batch rows outer"]:
    """The transpose of `a` times `g`, sums in float32; for backward passes, it has none itself."""

    def direct(a: Array, g: Array) -> Array:
        return _dot(a, g, [a.ndim - 2], [g.ndim - 2], dtype)

    def by_a_copy(a: Array, g: Array) -> Array:
        # In two parts, since XLA would fold one transpose into the product again.
        middle = a.shape[-2] // 2
        parts = [jnp.swapaxes(part, -1, -2) for part in jnp.split(a, [middle], axis=-2)]
        return _dot(jnp.concatenate(parts, axis=-1), g, [a.ndim - 1], [g.ndim - 2], dtype)

    # XLA on CPU leaves bfloat16 products that sum over the rows to a slow kernel.
    if a.dtype == np.dtype(jnp.float32):
        return direct(a, g)
    return jax.lax.platform_dependent(a, g, cpu=by_a_copy, default=direct)


def compiler_options() -> dict[str, str | bool]:
    """For programs that write into arrays in loops: layers' results in training, the caches of a sampler.

    Two passes are left out on CPU. XLA's float normalization makes of each write of bfloat16 values a pass over the
    whole array, to float32 and back, so that a layer's results are converted once for every layer there is. And what
    a loop does not change is taken out of it, zeros too that it writes over: they were kept, and copied at each turn.
    """
    passes = "float-normalization-bf16,while-loop-invariant-code-motion"
    return {"xla_disable_hlo_passes": passes} if jax.default_backend() == "cpu" else {}


def few_rows_options() -> dict[str, str | bool]:
    """For samplers of few rows: on CPU the library that multiplies gets products alone.

    With what is around them, softmax and sums too, 64 tokens of 16 rows take 7% longer; those of 160 rows do not, nor
    does training. The flag is an experimental one of XLA: look at it when jaxlib is upgraded.
    """
    alone = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    return compiler_options() | (alone if jax.default_backend() == "cpu" else {})


def jit(function: Callable[..., Any], options: Options = compiler_options, **how: Any) -> Callable[..., Any]:
    """`jax.jit` with compiler options for the backend, which is asked for at the first call."""
    compiled = functools.cache(lambda: jax.jit(function, compiler_options=options(), **how))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
