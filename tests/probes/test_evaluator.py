"""The evaluator against scoring one snapshot at a time, and against plain logits."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from vdjax import sharding
from vdjax.data.chat import Rendered
from vdjax.errors import UserError
from vdjax.models.functional import Model
from vdjax.probes import evaluator
from vdjax.probes.readouts import Item

ANSWERS = (2, 1, 3, 3, 1, 2, 3)  # of each item


def items() -> list[Item]:
    rng = np.random.default_rng(0)
    out = []
    for count in ANSWERS:
        branches = np.repeat(range(count + 1), rng.integers(1, 12, count + 1)).astype(np.int8)
        rendered = Rendered(rng.integers(0, tiny.VOCAB, len(branches)).astype(np.int32), branches > 0, branches)
        out.append(Item(0, "statement", "", ("support",) * count, ("answer",) * count, rendered))
    return out


ITEMS = items()


@pytest.fixture(scope="module")
def snapshots(llama: tuple[Model, Any]) -> list[Any]:
    """Three sets of parameters."""
    rng = np.random.default_rng(1)
    return [
        jax.tree.map(lambda x: np.asarray(x) * (1 + 0.3 * rng.normal(size=x.shape).astype(np.float32)), llama[1])
        for _ in range(3)
    ]


def reader(params: Any) -> Callable[..., np.ndarray]:
    def read(path: tuple[str, ...], index: tuple[slice, ...]) -> np.ndarray:
        leaf = params
        for name in path:
            leaf = leaf[name]
        return leaf[index]

    return read


def size_of(made: Model) -> int:
    return sum(x.size * 4 for x in jax.tree.leaves(made.params))


@pytest.fixture(scope="module")
def expected(llama: tuple[Model, Any], snapshots: list[Any]) -> np.ndarray:
    """Sums over each response scored alone: [snapshots, items, answers]."""
    out = np.zeros((3, len(ITEMS), 3))
    for k, params in enumerate(snapshots):
        for i, values in enumerate(tiny.brute_force(llama[0], params, [item.rendered for item in ITEMS])):
            for a in range(ANSWERS[i]):
                out[k, i, a] = values[ITEMS[i].rendered.branches == a + 1].astype(np.float64).sum()
    return out


def evaluate(made: Model, params: list[Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return evaluator.evaluate(made, [reader(p) for p in params], ITEMS, mesh, **options)


@pytest.mark.parametrize(("rows", "fits"), [(0, 3), (2, 2.5), (3, 1)])
def test_groups_of_any_size_give_the_brute_force_sums(
    llama: tuple[Model, Any], snapshots: list[Any], expected: np.ndarray, compiles: Any, rows: int, fits: float
) -> None:
    """2.5 snapshots of memory hold groups of two, the last one padded; 1 holds each alone."""
    with compiles() as names:
        sums, counts = evaluate(llama[0], snapshots, rows=rows, memory_bytes=fits * size_of(llama[0]))
    assert names.count("jit(one)") == 1
    want_counts = [[(i.rendered.branches == a + 1).sum() for a in range(3)] for i in ITEMS]
    np.testing.assert_array_equal(counts, want_counts)
    per_token = (sums - expected) / np.maximum(counts, 1)
    np.testing.assert_allclose(per_token, 0, atol=1e-5)
    np.testing.assert_array_equal(sums[:, counts == 0], 0)
    assert np.abs(np.diff(expected, axis=0))[:, counts > 0].min() > 1e-3


def test_one_at_a_time_gives_the_same(llama: tuple[Model, Any], snapshots: list[Any], expected: np.ndarray) -> None:
    together, counts = evaluate(llama[0], snapshots)
    for k in range(3):
        alone, _ = evaluate(llama[0], snapshots[k : k + 1])
        np.testing.assert_allclose((together[k] - alone[0]) / np.maximum(counts, 1), 0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(1, 50))
def test_groups_hold_every_snapshot_within_the_budget(snapshots: int, fits: float) -> None:
    made = tiny.model_without_params("qwen")
    parts = evaluator.groups(snapshots, made, fits * size_of(made))
    assert {i for part in parts for i in part} == set(range(snapshots))
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) <= fits
    assert len(parts) == -(-snapshots // int(fits))  # no more groups than needed


def test_memory_for_no_snapshot_is_an_error() -> None:
    made = tiny.model_without_params("qwen")
    with pytest.raises(UserError, match="probes.memory_gb"):
        evaluator.groups(3, made, size_of(made) - 1)


def test_layout_holds_every_item_once() -> None:
    plan = evaluator.layout(ITEMS, 2)
    for item, (batch, row, first) in zip(ITEMS, plan.places, strict=True):
        arrays = plan.batches[batch]
        for answer in range(len(item.answers)):
            here = arrays["sequence_ids"][row] == first + answer + 1
            np.testing.assert_array_equal(
                arrays["tokens"][row][here], item.rendered.tokens[item.rendered.branches == answer + 1]
            )
    assert sum(int((b["segment_ids"] > 0).sum()) for b in plan.batches) == sum(len(i.rendered.tokens) for i in ITEMS)
