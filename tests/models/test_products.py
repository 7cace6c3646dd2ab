import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdjax.models.products import FEW_ROWS, compiler_options, matmul, matmul_by_rows


@pytest.mark.parametrize(("batch", "rows", "inner", "outer"), [((), 6, 5, 4), ((2, 3), 4, 7, 2), ((), 1, 3, 2)])
def test_values_and_gradients_are_those_of_the_plain_product(
    batch: tuple[int, ...], rows: int, inner: int, outer: int
) -> None:
    """bfloat16 operands against float64 arithmetic on the same numbers: only results are rounded to bfloat16."""
    rng = np.random.default_rng(0)
    a, b, g = (rng.normal(size=(*batch, *shape)) for shape in ((rows, inner), (inner, outer), (rows, outer)))
    a, b, g = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (a, b, g))
    wanted = (a @ b, g @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ g)
    for dtype, tolerance in ((jnp.bfloat16, 2**-8), (jnp.float32, 1e-6)):
        arrays = [jnp.asarray(x, dtype) for x in (a, b)]
        out, pull = jax.vjp(matmul, *arrays)
        assert {x.dtype for x in (out, *pull(out))} == {jnp.dtype(dtype)}
        for got, want in zip((out, *pull(jnp.asarray(g, dtype))), wanted, strict=True):
            np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max(), rtol=0)


def test_one_matrix_for_all_of_a_batch() -> None:
    """As the product of all rows in one axis, with which it shares gradients."""
    rng = np.random.default_rng(2)
    a, b, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4, 5), (5, 2), (3, 4, 2)))
    out, pull = jax.vjp(matmul, a, b)
    want, flat = jax.vjp(lambda a, b: matmul(a.reshape(12, 5), b).reshape(3, 4, 2), a, b)
    for got, wanted in zip((out, *pull(g)), (want, *flat(g)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (FEW_ROWS,), (FEW_ROWS + 1,), (2, 3)])
def test_a_kernel_kept_by_rows_has_the_product_of_its_transpose(shape: tuple[int, ...], dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), dtype) for s in ((*shape, 7), (5, 7)))
    want = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    for result, tolerance in ((None, 2**-8 if dtype == jnp.bfloat16 else 1e-6), (jnp.float32, 1e-6)):
        out = jax.jit(lambda x, kernel, result=result: matmul_by_rows(x, kernel, result))(x, kernel)
        assert out.dtype == (result or dtype)
        np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=tolerance * np.abs(want).max(), rtol=0)


def test_the_few_rows_stay_at_the_right_of_their_product() -> None:
    """XLA would exchange the operands of a transposed product again, which takes twice the time."""
    few, many = (
        jax.jit(matmul_by_rows).lower(jnp.ones((rows, 32)), jnp.ones((48, 32))).compile().as_text()
        for rows in (FEW_ROWS, FEW_ROWS + 1)
    )
    assert re.search(rf"f32\[48,{FEW_ROWS}\]\S* dot\(", few) and re.search(rf"f32\[{FEW_ROWS + 1},48\]\S* dot\(", many)


def test_a_float32_result_is_pulled_back_by_products_in_bfloat16() -> None:
    """XLA multiplies mixed operands as float32, which is several times slower."""

    def both(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda a, b: matmul(a, b, jnp.float32), a, b)
        return out, *pull(out)

    text = jax.jit(both).lower(jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 2), jnp.bfloat16)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all(line.count("xbf16>") == 2 and line.rstrip().endswith("xf32>") for line in products)


def test_a_vmapped_product_has_the_gradients_of_each() -> None:
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4, 5), (3, 5, 2)))
    one = jax.grad(lambda a, b: jnp.sum(matmul(a, b) ** 2), argnums=(0, 1))
    each = [one(*pair) for pair in zip(a, b, strict=True)]
    for got, want in zip(jax.vmap(one)(a, b), zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-6)


def test_bfloat16_stacks_are_written_a_layer_at_a_time() -> None:
    def stacked(xs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda _, x: (None, (2 * x).astype(jnp.bfloat16)), None, xs)[1]

    lowered = jax.jit(stacked).lower(jax.ShapeDtypeStruct((30, 64, 64), jnp.float32))
    written = re.compile(r"= (\w+)\[30,64,64\]\S* dynamic-update-slice")
    assert set(written.findall(lowered.compile(compiler_options()).as_text())) == {"bf16"}
    assert set(written.findall(lowered.compile().as_text())) == {"f32"}  # else the option is not needed any more


def test_zeros_that_a_loop_writes_over_stay_in_it() -> None:
    """XLA takes them out of loops of one turn or none, so that those of all are in memory at once."""

    def summed(xs: jax.Array) -> jax.Array:
        def one(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            for rows in (16, 32, 64):

                def turn(_: Any, total: jax.Array, rows: int = rows) -> jax.Array:
                    stack = jax.lax.scan(lambda x, _: (jnp.sin(x @ xs[0]), x), x[:rows], None, length=30)[1]
                    return total + stack.sum()

                total = jax.lax.fori_loop(0, jnp.int32(x.sum() > rows), turn, total)
            return total, None

        return jax.lax.scan(one, jnp.float32(0), xs)[0]

    lowered, largest = jax.jit(summed).lower(jax.ShapeDtypeStruct((4, 64, 64), jnp.float32)), 30 * 64 * 64 * 4
    stay, taken_out = (
        lowered.compile(options).memory_analysis().temp_size_in_bytes for options in (compiler_options(), None)
    )
    assert stay < 1.3 * largest
    assert taken_out > 1.6 * largest  # else the option is not needed any more
