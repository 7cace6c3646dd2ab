"""The splash kernels, run by Pallas' interpreter, against the attention of every other platform."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdjax.models import splash
from vdjax.models.attention import attention

LENGTH = 128
SEGMENTS = np.zeros((2, LENGTH), np.int32)
SEQUENCES = np.zeros((2, LENGTH), np.int32)
SEGMENTS[0, :70], SEGMENTS[0, 70:120] = 1, 2
SEQUENCES[0, 30:50], SEQUENCES[0, 50:70], SEQUENCES[0, 90:100], SEQUENCES[0, 100:120] = 1, 2, 3, 4
SEGMENTS[1, :] = 1  # a row that is full, and without a branch up to its middle
SEQUENCES[1, 64:] = 1
REAL = SEGMENTS > 0
PREFIX = np.zeros((2, LENGTH), bool)
PREFIX[0, :20] = True


@pytest.mark.parametrize(
    ("shared", "prefix", "length", "dtype", "tolerance"),
    [
        (True, False, LENGTH, jnp.float32, 1e-5),
        (True, False, LENGTH, jnp.bfloat16, 2e-3),
        (True, False, LENGTH - 27, jnp.float32, 1e-5),
        (False, False, LENGTH, jnp.float32, 1e-5),
        (True, True, LENGTH, jnp.float32, 1e-5),
    ],
)
def test_the_kernels_are_equal_to_the_plain_path(
    shared: bool, prefix: bool, length: int, dtype: Any, tolerance: float
) -> None:
    """Root mean square of the difference over that of the plain path in float32; without `sequence_ids` a segment is
    one sequence. To round a number to bfloat16 costs 1.6e-3 alone, and gradients are rounded once more on their way:
    those of the plain path in bfloat16 are 2.8e-3 to 3.3e-3 off."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, n, 64)), dtype) for n in (4, 2, 2))
    segments, real = jnp.asarray(SEGMENTS[:, :length]), REAL[:, :length]
    ids = (segments, jnp.asarray(SEQUENCES[:, :length]) if shared else None, jnp.asarray(PREFIX) if prefix else None)
    cotangent = jnp.asarray(rng.normal(size=q.shape) * real[..., None, None], dtype)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]  # what bfloat16 rounds on the way is the kernels' alone
    want, pull = jax.vjp(lambda *x: attention(*x, *ids, query_chunk=48), *wide)
    wanted = (want, *pull(cotangent.astype(jnp.float32)))
    out, pull = jax.vjp(lambda *x: splash.attention(*x, *ids, interpret=True), q, k, v)
    bounds = [tolerance, *[tolerance if dtype == jnp.float32 else 3e-3] * 3]
    for x, y, bound in zip((out, *pull(cotangent)), wanted, bounds, strict=True):
        x, y = (np.where(real[..., None, None], np.asarray(z, np.float32), 0) for z in (x, y))
        assert np.isfinite(x).all() and x.dtype == np.float32
        size = np.sqrt(np.mean(y[real] ** 2))
        assert np.sqrt(np.mean((x - y) ** 2)) <= bound * size


def test_kernels_are_used_where_they_are_asked_for() -> None:
    for length, kernels, found in ((LENGTH, True, True), (LENGTH, False, False), (LENGTH + 1, True, True)):
        x, ids = jnp.zeros((1, length, 2, 64), jnp.bfloat16), jnp.ones((1, length), jnp.int32)
        traced = jax.jit(functools.partial(attention, kernels=kernels)).trace(x, x, x, ids, ids)
        assert ("tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()) == found
