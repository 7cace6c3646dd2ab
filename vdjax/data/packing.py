"""Packing: examples of any length into rows of one static length.

A batch is a dict of [rows, length] arrays: `tokens`, `positions`, `segment_ids`, `loss_mask`, `sequence_ids`.
Token i sees token j iff j <= i, both are in the same segment (0 is padding), and j is shared (sequence id 0) or in
i's own sequence. A preference pair is one segment `[prompt | chosen | rejected]` whose two responses are blind to each
other, with positions that restart after the prompt. Sequence ids count from 1 within a row, so that pair p of a row has
chosen 2p+1 and rejected 2p+2. What all examples of a row begin with may stand in it once, in the first one's segment;
then `prefix` is true there, and all behind it see it.
"""

import bisect
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vdjax.data.chat import Rendered

LENGTH_MULTIPLE = 64  # of the row lengths that are chosen here


class Shape(NamedTuple):
    """The static shape of all batches of a stage."""

    rows: int
    length: int
    sequences: int  # most sequences in a row


def best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Assigns items to as few rows as best-fit-decreasing finds; rows and their items keep a deterministic order.

    Args:
      lengths: tokens of each item; none may exceed row_length.

    Returns:
      rows of indices into `lengths`, fullest rows first.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] > row_length:
            raise ValueError(f"item {item} has {lengths[item]} tokens, a row {row_length}")
        at = bisect.bisect_left(rooms, (lengths[item], -1))
        if at == len(rooms):
            rows.append([])
            room, row = row_length, len(rows) - 1
        else:
            room, row = rooms.pop(at)
        rows[row].append(item)
        bisect.insort(rooms, (room - lengths[item], row))
    return sorted(rows, key=lambda row: (-sum(lengths[i] for i in row), row[0]))


def row_lengths(longest: int) -> list[int]:
    """Row lengths worth trying when the longest item has `longest` tokens: multiples of 64, shortest first."""
    step = LENGTH_MULTIPLE
    shortest = -(-longest // step) * step
    return sorted({-(-int(shortest * factor) // step) * step for factor in (1, 1.25, 1.5, 2, 3, 4)})


def row_cost(length: int) -> float:
    """Relative time of a row: 64 tokens' worth for adding up its gradients, matmuls by its length, attention by its
    square, as much as matmuls at 2,048 tokens (measured on CPU with 64-wide heads; wide models cross later)."""
    return 64 + length * (1 + length / 2048)


def positions_of(branches: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Positions of one example's tokens: the prompt (branch 0) counts from 0, each response goes on where it ended."""
    prompt = int((branches == 0).sum())
    starts = np.flatnonzero(np.diff(branches, prepend=branches[:1] - 1))
    run_start = np.repeat(starts, np.diff(np.append(starts, len(branches))))
    return np.where(branches == 0, np.arange(len(branches)), np.arange(len(branches)) - run_start + prompt)


def shared_start(examples: Sequence[Rendered]) -> int:
    """Tokens that all examples begin with alike: of their prompts, of each of which the last token is left out."""
    prompts = [example.tokens[example.branches == 0].tolist() for example in examples]
    alike = len(os.path.commonprefix(prompts))
    return max(0, min(alike, *(len(prompt) - 1 for prompt in prompts)))


def pack(
    examples: Sequence[Rendered], rows: Sequence[Sequence[int]], shape: Shape, shared: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Lays examples out in rows; `rows` holds indices into `examples`, as `best_fit` returns them.

    Besides the batch's arrays there is `source`: int64 [rows, length, 2] with the example and the token within it
    (-1, -1 at padding), by which values known per example token are brought into the layout (`place`).

    Args:
      shared: of each row, how many tokens its examples begin with alike (`shared_start`); they stand in it once, as its
        first example's, and the batch has `prefix`, true where they are.
    """
    grid = (shape.rows, shape.length)
    tokens, positions, segments, sequences = (np.zeros(grid, np.int32) for _ in range(4))
    mask, source = np.zeros(grid, bool), np.full((*grid, 2), -1, np.int64)
    prefix = np.zeros(grid, bool)
    if len(rows) > shape.rows:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {shape.rows}")
    for r, row in enumerate(rows):
        once = shared[r] if shared else 0
        at = first_sequence = 0
        for segment, index in enumerate(row, start=1):
            example = examples[index]
            start = once if at else 0
            part = slice(at, at + len(example.tokens) - start)
            tokens[r, part] = example.tokens[start:]
            mask[r, part] = example.loss_mask[start:]
            positions[r, part] = positions_of(example.branches)[start:]
            segments[r, part] = segment
            sequences[r, part] = np.where(example.branches == 0, 0, first_sequence + example.branches)[start:]
            places = np.arange(start, len(example.tokens))
            source[r, part] = np.stack([np.full(len(places), index), places], axis=1)
            at, first_sequence = part.stop, first_sequence + int(example.branches.max())
        prefix[r, :once] = True
        if first_sequence > shape.sequences:
            raise ValueError(f"row {r} has {first_sequence} sequences, the batch's shape allows {shape.sequences}")
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segments,
        "loss_mask": mask,
        "sequence_ids": sequences,
        "source": source,
        **({"prefix": prefix} if shared else {}),
    }


def place(values: Sequence[np.ndarray], source: Int[np.ndarray, "rows length 2"]) -> np.ndarray:
    """Brings per-token values of each example into the layout of a packed batch, zeros at padding."""
    starts = np.cumsum([0, *(len(v) for v in values)])
    valid = source[..., 0] >= 0
    out = np.zeros(valid.shape, np.float32)
    if valid.any():
        out[valid] = np.concatenate(values)[starts[source[valid, 0]] + source[valid, 1]]
    return out

