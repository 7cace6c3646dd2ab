from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from vdjax.data import packing
from vdjax.data.chat import Rendered
from vdjax.data.packing import Shape
from vdjax.models.attention import visible

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=25)


@st.composite
def examples(draw: Any) -> list[Rendered]:
    """Documents (all branch 1) and prompts with one to three responses, of at most 30 tokens."""
    out = []
    for _ in range(draw(st.integers(1, 8))):
        parts = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
        branches = np.ones(parts[0], int) if len(parts) == 1 else np.repeat(np.arange(len(parts)), parts)
        tokens = draw(st.lists(st.integers(1, 99), min_size=len(branches), max_size=len(branches)))
        mask = draw(st.lists(st.booleans(), min_size=len(branches), max_size=len(branches)))
        out.append(Rendered(np.array(tokens, np.int32), np.array(mask), branches.astype(np.int8)))
    return out


def packed(items: list[Rendered], length: int, spare_rows: int = 1) -> dict[str, np.ndarray]:
    rows = packing.best_fit([len(e.tokens) for e in items], length)
    return packing.pack(items, rows, Shape(len(rows) + spare_rows, length, sum(int(e.branches.max()) for e in items)))


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(30, 64))
def test_best_fit_loses_no_item_and_overfills_no_row(lengths: list[int], row_length: int) -> None:
    rows = packing.best_fit(lengths, row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= row_length and used == sorted(used, reverse=True)
    assert rows == packing.best_fit(lengths, row_length)
    # Best fit decreasing needs at most 11/9 of the rows that are needed, plus one.
    assert len(rows) <= 11 / 9 * np.ceil(sum(lengths) / row_length) * 2 + 1
    # No two rows could have been one.
    assert len(used) < 2 or used[-1] + used[-2] > row_length


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    # 6 and 5 open rows with 4 and 5 left; 4 goes where it fits exactly, 3 where there is room.
    assert packing.best_fit([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]


def test_an_item_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="item 1 has 11 tokens"):
        packing.best_fit([3, 11], 10)


@settings(max_examples=30, deadline=None)
@given(examples(), st.integers(30, 70))
def test_pack_place_collect_round_trip(items: list[Rendered], length: int) -> None:
    batch = packed(items, length)
    sizes = [len(e.tokens) for e in items]
    values = [np.random.default_rng(i).normal(size=n).astype(np.float32) for i, n in enumerate(sizes)]
    grid = packing.place(values, batch["source"])
    for got, want in zip(tiny.collect(grid, batch["source"], sizes), values, strict=True):
        np.testing.assert_array_equal(got, want)
    assert (grid[batch["segment_ids"] == 0] == 0).all()
    for name, field in (("tokens", "tokens"), ("loss_mask", "loss_mask")):
        for got, item in zip(tiny.collect(batch[name], batch["source"], sizes), items, strict=True):
            np.testing.assert_array_equal(got, getattr(item, field))
    assert int((batch["segment_ids"] > 0).sum()) == sum(sizes) == int((batch["source"][..., 0] >= 0).sum())
    assert not batch["loss_mask"][batch["segment_ids"] == 0].any()


@settings(max_examples=30, deadline=None)
@given(examples())
def test_a_packed_token_stands_and_sees_as_it_would_alone(items: list[Rendered]) -> None:
    """The prompt's positions count from 0, a response goes on behind the prompt; it sees the prompt and itself."""
    length = 50
    batch = packed(items, length)
    rows, segments, sequences = (jnp.asarray(batch[k]) for k in ("source", "segment_ids", "sequence_ids"))
    sees = np.asarray(visible(jnp.arange(length), segments, sequences, segments, sequences))
    for r in range(rows.shape[0]):
        for t in range(length):
            index, token = batch["source"][r, t]
            if index < 0:
                assert not sees[r, t].any()
                continue
            branches = items[index].branches
            alone = [u for u in range(token + 1) if branches[u] in (0, branches[token])]
            assert batch["positions"][r, t] == len(alone) - 1
            seen = {tuple(batch["source"][r, u]) for u in np.flatnonzero(sees[r, t])}
            assert seen == {(index, u) for u in alone}


@settings(max_examples=30, deadline=None)
@given(examples(), st.lists(st.integers(1, 99), max_size=6))
def test_what_all_begin_with_stands_once_and_all_see_it(items: list[Rendered], start: list[int]) -> None:
    """Every token sees what it would alone, by tokens: those at the start are the first example's."""
    length, begun = 60, np.zeros(len(start), np.int8)
    items = [
        Rendered(
            np.append(np.int32(start), e.tokens).astype(np.int32),
            np.append(begun > 0, e.loss_mask),
            np.append(begun, e.branches),
        )
        for e in items
    ]
    once = packing.shared_start(items)
    prompts = [e.tokens[e.branches == 0].tolist() for e in items]
    assert all(p[:once] == prompts[0][:once] and len(p) > once for p in prompts) or once == 0
    assert once >= len(start) - 1 or once == min(map(len, prompts)) - 1 or not start
    rows = packing.best_fit([len(e.tokens) - once for e in items], length - once)
    shape = Shape(len(rows), length, sum(int(e.branches.max()) for e in items))
    batch = packing.pack(items, rows, shape, [once] * len(rows))
    ids = [jnp.asarray(batch[k]) for k in ("segment_ids", "sequence_ids")]
    sees = np.asarray(visible(jnp.arange(length), *ids, *ids, jnp.asarray(batch["prefix"])))
    assert (batch["prefix"].sum(axis=1) == once).all()
    standing = {(int(i), int(t)) for i, t in batch["source"][batch["source"][..., 0] >= 0]}
    firsts = {row[0] for row in rows}
    assert standing == {(i, t) for i, e in enumerate(items) for t in range(len(e.tokens)) if t >= once or i in firsts}
    for r, t in zip(*np.nonzero(batch["segment_ids"]), strict=True):
        index, token = batch["source"][r, t]
        alone = [u for u in range(token + 1) if items[index].branches[u] in (0, items[index].branches[token])]
        assert batch["positions"][r, t] == len(alone) - 1
        assert batch["tokens"][r][sees[r, t]].tolist() == items[index].tokens[alone].tolist()


@settings(max_examples=40, deadline=None)
@given(examples())
def test_sequence_ids_count_from_one_in_a_row(items: list[Rendered]) -> None:
    batch = packed(items, 60)
    for ids, segments in zip(batch["sequence_ids"], batch["segment_ids"], strict=True):
        found = list(dict.fromkeys(ids[ids > 0].tolist()))
        assert found == list(range(1, len(found) + 1))
        assert list(dict.fromkeys(segments[segments > 0].tolist())) == list(range(1, int(segments.max()) + 1))


def test_a_shape_that_is_too_small_is_refused() -> None:
    pair = Rendered(np.ones(3, np.int32), np.array([False, True, True]), np.array([0, 1, 2], np.int8))
    with pytest.raises(ValueError, match="2 rows do not fit a batch of 1"):
        packing.pack([pair, pair], [[0], [1]], Shape(1, 4, 2))
    with pytest.raises(ValueError, match="row 0 has 4 sequences, the batch's shape allows 3"):
        packing.pack([pair, pair], [[0, 1]], Shape(1, 6, 3))


@pytest.mark.parametrize("longest", [1, 64, 65, 300, 1000])
def test_row_lengths_hold_the_longest_item(longest: int) -> None:
    lengths = packing.row_lengths(longest)
    assert longest <= lengths[0] < longest + 64 and lengths == sorted(set(lengths))
    assert all(n % 64 == 0 for n in lengths)
