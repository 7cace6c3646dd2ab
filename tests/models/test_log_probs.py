import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from vdjax.data import packing
from vdjax.data.chat import Rendered
from vdjax.models.functional import Model
from vdjax.models.log_probs import predecessors, sequence_sums, token_log_probs

EXAMPLES = tiny.preference_examples(0, 5) + tiny.sft_examples(1, 3)


@pytest.fixture(scope="module")
def expected(qwen: tuple[Model, Any]) -> list[np.ndarray]:
    return tiny.brute_force(*qwen, EXAMPLES)


def score(made: Model, params: Any, batch: dict[str, np.ndarray], chunk: int) -> jax.Array:
    arrays = {k: jnp.asarray(v) for k, v in batch.items() if k != "source"}
    return token_log_probs(nnx.merge(made.graphdef, params), arrays, chunk=chunk)


@pytest.mark.parametrize(("length", "rows", "chunk"), [(64, 4, 7), (36, 8, 16), (36, 8, 10_000)])
def test_packed_rows_score_as_every_response_alone(
    qwen: tuple[Model, Any], expected: list[np.ndarray], length: int, rows: int, chunk: int
) -> None:
    batch = tiny.pack(EXAMPLES, length, rows)
    if length == 64:  # several pairs stand in one row
        assert batch["sequence_ids"].max() >= 4 and batch["segment_ids"].max() >= 2
    grid = np.asarray(jax.jit(score, static_argnums=(0, 3))(Static(qwen[0]), qwen[1], batch, chunk))
    found = tiny.collect(grid, batch["source"], [len(e.tokens) for e in EXAMPLES])
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    assert (grid[~batch["loss_mask"]] == 0).all()
    assert np.concatenate(expected).min() < -6.5  # log 260 = 5.6: the model is not just uniform


def test_padded_and_one_by_one_score_as_every_response_alone(
    qwen: tuple[Model, Any], expected: list[np.ndarray]
) -> None:
    run = jax.jit(score, static_argnums=(0, 3))
    for example, want in zip(EXAMPLES, expected, strict=True):
        one_row = packing.pack([example], [[0]], packing.Shape(1, 40, 2))
        got = run(Static(qwen[0]), qwen[1], one_row, 8)[0][: len(want)]
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    padded = packing.pack(EXAMPLES, [[i] for i in range(len(EXAMPLES))], packing.Shape(len(EXAMPLES), 40, 2))
    grid = run(Static(qwen[0]), qwen[1], padded, 8)
    for row, want in zip(grid, expected, strict=True):
        np.testing.assert_allclose(row[: len(want)], want, atol=1e-5, rtol=0)


def test_no_array_holds_more_logits_than_those_of_a_chunk(qwen: tuple[Model, Any]) -> None:
    made, params = qwen
    vocab, width = made.params["embed"].shape
    assert vocab not in (64, 4, width)
    batch = tiny.pack(EXAMPLES, 64, 4)

    def held(chunk: int) -> int:
        """The most rows that an array beside the vocabulary has in the program of a loss and its gradient."""
        run = jax.jit(jax.value_and_grad(lambda params: score(made, params, batch, chunk).sum()))
        text = run.lower(params).compile().as_text()
        shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
        return max(math.prod(shape) // vocab for shape in shapes if vocab in shape)

    assert held(7) == width  # the table and its gradient; the logits of seven tokens are fewer
    assert held(48) == 48


def test_gradient_is_that_of_the_naive_computation(llama: tuple[Model, Any]) -> None:
    made, params = llama  # untied; for a tied model see tests/train/test_step.py
    rng = np.random.default_rng(5)
    weights = [rng.normal(size=len(e.tokens)).astype(np.float32) for e in EXAMPLES]
    batch = tiny.pack(EXAMPLES, 64, 4)
    placed = packing.place(weights, batch["source"])

    parts = tiny.each_alone(EXAMPLES)
    example, token = np.moveaxis(parts.source, -1, 0)
    longest = max(map(len, weights))
    grid = np.stack([np.pad(w, (0, longest - len(w))) for w in weights])[example, token] * parts.scored

    def naive(params: Any) -> jax.Array:
        return jnp.sum(grid * tiny.naive_log_probs(made, params, parts.rows))

    def packed(params: Any) -> jax.Array:
        return jnp.sum(placed * score(made, params, batch, 16))

    want, got = jax.jit(jax.grad(naive))(params), jax.jit(jax.grad(packed))(params)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    assert largest > 0.1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=0)


class Static:
    """A model as a static argument: it holds unhashable parts."""

    def __init__(self, made: Model) -> None:
        self.graphdef = made.graphdef

    def __hash__(self) -> int:
        return hash(self.graphdef)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.graphdef == other.graphdef


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3)), min_size=1, max_size=4
    )
)
def test_predecessors_by_brute_force(segments: list[tuple[int, list[int]]]) -> None:
    """A row of segments: prompts with responses, or (an empty prompt) documents. Only scored tokens need one."""
    examples = []
    for prompt, responses in segments:
        sizes = [prompt, *(responses if prompt else responses[:1])]
        branches = np.repeat(np.arange(len(sizes)), sizes).astype(np.int8)
        examples.append(Rendered(np.zeros(len(branches), np.int32), branches > 0, branches))
    batch = packing.pack(examples, [list(range(len(examples)))], packing.Shape(1, 64, 12))
    found = np.asarray(predecessors(jnp.asarray(batch["sequence_ids"])))[0]
    position = {tuple(map(int, s)): i for i, s in enumerate(batch["source"][0]) if s[0] >= 0}
    for e, example in enumerate(examples):
        for at in tiny.alone(example):
            for before, token in zip(at[:-1], at[1:], strict=True):
                if example.branches[token] > 0:
                    assert found[position[e, int(token)]] == position[e, int(before)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_sequence_sums(seed: int, sequences: int) -> None:
    rng = np.random.default_rng(seed)
    values, ids = rng.normal(size=(3, 9)).astype(np.float32), rng.integers(0, sequences + 1, (3, 9))
    want = [[values[r][ids[r] == s].sum() for s in range(1, sequences + 1)] for r in range(3)]
    got = sequence_sums(jnp.asarray(values), jnp.asarray(ids), sequences)
    np.testing.assert_allclose(got, want, atol=1e-5)
