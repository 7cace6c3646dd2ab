"""The evaluator against scoring one snapshot at a time, and against plain logits."""

import functools
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
from vdjax.models import hf, lora
from vdjax.models.functional import Model, make_model
from vdjax.probes import evaluator
from vdjax.probes.readouts import Item

ANSWERS = (2, 1, 3, 3, 1, 2, 3)  # of each item
STARTS = (20, 17)  # tokens that the prompts of each variant begin with alike


def items() -> list[Item]:
    rng = np.random.default_rng(0)
    starts = [rng.integers(0, tiny.VOCAB, size) for size in STARTS]
    out = []
    for number, count in enumerate(ANSWERS):
        branches = np.repeat(range(count + 1), rng.integers(1, 12, count + 1))
        own, variant = rng.integers(0, tiny.VOCAB, len(branches)), number % 2
        tokens = np.concatenate([starts[variant], own]).astype(np.int32)
        branches = np.concatenate([np.zeros(STARTS[variant]), branches]).astype(np.int8)
        rendered = Rendered(tokens, branches > 0, branches)
        out.append(Item(0, variant, "statement", "", ("support",) * count, ("answer",) * count, rendered))
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
    assert names.count("jit(score)") == 1
    want_counts = [[(i.rendered.branches == a + 1).sum() for a in range(3)] for i in ITEMS]
    np.testing.assert_array_equal(counts, want_counts)
    per_token = (sums - expected) / np.maximum(counts, 1)
    np.testing.assert_allclose(per_token, 0, atol=1e-5)
    np.testing.assert_array_equal(sums[:, counts == 0], 0)
    assert np.abs(np.diff(expected, axis=0))[:, counts > 0].min() > 1e-3


def test_one_at_a_time_gives_the_same(llama: tuple[Model, Any], snapshots: list[Any], expected: np.ndarray) -> None:
    together, counts = evaluate(llama[0], snapshots, memory_bytes=3 * size_of(llama[0]))
    for k in range(3):
        alone, _ = evaluate(llama[0], snapshots[k : k + 1])
        np.testing.assert_allclose((together[k] - alone[0]) / np.maximum(counts, 1), 0, atol=1e-5)


def test_by_default_a_cpu_scores_one_snapshot_at_a_time(
    llama: tuple[Model, Any], snapshots: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, held = evaluator.load, []
    monkeypatch.setattr(evaluator, "load", lambda readers, *where: held.append(len(readers)) or load(readers, *where))
    evaluate(llama[0], snapshots)
    evaluate(llama[0], snapshots, memory_bytes=3 * size_of(llama[0]))
    assert held == [1, 1, 1, 3]


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


def test_where_little_is_free_one_snapshot_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "default_memory", lambda: 1.0)
    assert evaluator.groups(3, tiny.model_without_params("qwen"), 0) == [[0], [1], [2]]


def test_layout_holds_every_item_once() -> None:
    plan = evaluator.layout(ITEMS, 2)
    for item, (batch, row, first) in zip(ITEMS, plan.places, strict=True):
        arrays = plan.batches[batch]
        for answer in range(len(item.answers)):
            here = arrays["sequence_ids"][row] == first + answer + 1
            np.testing.assert_array_equal(
                arrays["tokens"][row][here], item.rendered.tokens[item.rendered.branches == answer + 1]
            )
    # Of each row all items but the first stand in it without what they begin with alike.
    rows = [row for batch in plan.batches for row in zip(batch["segment_ids"], batch["prefix"], strict=True)]
    left_out = sum(prefix.sum() * max(0, segments.max() - 1) for segments, prefix in rows)
    assert {int(prefix.sum()) for _, prefix in rows} <= {0, *STARTS} and left_out > 0
    # The last token of each answer stands behind the places that are computed, which predict all that is scored.
    used = sum(int((segments > 0).sum()) for segments, _ in rows) + sum(len(item.answers) for item in ITEMS)
    assert used + left_out == sum(len(item.rendered.tokens) for item in ITEMS)
    for batch in plan.batches:
        sources = batch["sources"][batch["loss_mask"]]
        assert (sources < plan.shape.length).all() and batch["segment_ids"].shape[1] == plan.shape.length
        assert batch["tokens"].shape[1] > plan.shape.length


def test_items_that_begin_differently_have_no_prefix() -> None:
    items = [ITEMS[0], ITEMS[1]._replace(variant=0)]
    assert all("prefix" not in batch for batch in evaluator.layout(items, 2).batches)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_batch_has_fewer_empty_rows_than_shards(shards: int) -> None:
    rng, branches = np.random.default_rng(0), (np.arange(60) > 0).astype(np.int8)
    nine = [Rendered(rng.integers(0, 99, 60).astype(np.int32), branches > 0, branches) for _ in range(9)]
    plan = evaluator.layout([ITEMS[0]._replace(rendered=rendered) for rendered in nine], 4, shards)
    assert plan.shape.rows % shards == 0
    for batch in plan.batches:
        assert (batch["segment_ids"].max(axis=1) == 0).sum() < shards


@pytest.fixture(scope="module")
def adapted(llama: tuple[Model, Any]) -> tuple[Model, list[Any]]:
    """The tiny Llama-3 with adapters, and five sets of adapters that change what it says."""
    made = make_model(llama[0].cfg, tiny.MODEL, lora=lora.Lora(4, 8.0, ("q_proj", "o_proj", "up_proj", "down_proj")))
    rng = np.random.default_rng(2)
    shapes = lora.adapters_of(made.params)
    return made, [
        jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes) for _ in range(5)
    ]


@pytest.mark.parametrize("fits", [5, 2.5, 1])
def test_adapters_over_one_base_score_as_each_merged_alone(
    llama: tuple[Model, Any], adapted: tuple[Model, list[Any]], compiles: Any, fits: float
) -> None:
    made, adapters = adapted
    one = evaluator.size_in_bytes(adapters[0])
    with compiles() as names:
        sums, counts = evaluate(made, adapters, base=llama[1], memory_bytes=size_of(llama[0]) + fits * one)
    assert names.count("jit(score)") == 1
    merged = [jax.tree.map(np.asarray, lora.merge(lora.join(llama[1], a), made.lora)) for a in adapters]
    alone = np.concatenate([evaluate(llama[0], [params])[0] for params in merged])
    np.testing.assert_allclose((sums - alone) / np.maximum(counts, 1), 0, atol=1e-5)
    assert np.abs(np.diff(alone, axis=0))[:, counts > 0].min() > 1e-3


def test_the_base_is_held_once(llama: tuple[Model, Any], adapted: tuple[Model, list[Any]]) -> None:
    """What the program takes and what it makes meanwhile, as XLA counts them, for five snapshots and for one."""
    made, adapters = adapted
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    plan = evaluator.layout(ITEMS, 4)

    def memory(snapshots: int) -> Any:
        stacked = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct((*x.shape[:at], snapshots, *x.shape[at:]), x.dtype),
            adapters[0],
            hf.snapshot_axes(adapters[0]),
        )
        with jax.set_mesh(mesh):
            how = {"sequences": plan.shape.sequences, "chunk": made.head_chunk}
            score = jax.jit(functools.partial(evaluator.score, made.graphdef, **how))
            return score.lower(stacked, llama[1], plan.batches[0]).compile().memory_analysis()

    one = evaluator.size_in_bytes(adapters[0])
    held = [memory(n).argument_size_in_bytes for n in (1, 5)]
    assert held[1] - held[0] == 4 * one
    batch = sum(x.nbytes for x in plan.batches[0].values())
    assert held[0] <= size_of(llama[0]) + one + batch + 256
    # Once, not five times, is the base counted where groups are made; with two copies of all, twice.
    for copies in (1, 2):
        assert len(evaluator.groups(5, made, copies * (size_of(llama[0]) + 5 * one), copies)) == 1
        assert len(evaluator.groups(5, made, copies * (size_of(llama[0]) + 5 * one) - 1, copies)) == 2
        with pytest.raises(UserError, match="beside the"):
            evaluator.groups(5, made, copies * (size_of(llama[0]) + one) - 1, copies)
    assert [len(part) for part in evaluator.groups(40, made, 1e12)] == [14, 14, 14]
