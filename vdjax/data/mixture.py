"""Data sets mixed of parts: by fraction, by count (k examples injected into others), in turn or one after the other.

A stage's `data.parts` is a sequence of dicts: the fields of a data set (PART_FIELDS, as in the stage's own `data`) and
at most one of `fraction` (of `data.max_examples`) and `count`. One part may have neither: it fills the rest. Numbers
are of examples that can be used once rendered, exactly; a part that has fewer is an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from vdjax.errors import UserError, nearest

PART_FIELDS = ("source", "path", "name", "revision", "split", "max_examples", "skip_examples", "options")
SHARE_FIELDS = ("fraction", "count")
ORDERS = ("shuffled", "parts")  # of `data.order`; parts: each epoch one part after the other


def check(data: Mapping[str, Any], where: str) -> None:
    """Raises UserError unless `data` (of a stage) has either a path or parts that make sense."""
    parts = data.get("parts") or ()
    if not parts:
        if data.get("order", "shuffled") != "shuffled":
            raise UserError(f"{where}.order={data['order']!r}, but there are no {where}.parts")
        return
    if taken := [name for name in PART_FIELDS if name != "max_examples" and _given(name, data.get(name))]:
        raise UserError(f"{where}.{taken[0]}={data[taken[0]]!r}: give it in {where}.parts, which say what is read")
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping):
            raise UserError(f"{where}.parts[{i}]: expected a dict such as {{'path': ..., 'count': 50}}, found {part!r}")
        for name in part:
            if name not in PART_FIELDS + SHARE_FIELDS:
                raise UserError(f"{where}.parts[{i}].{name} is no field{nearest(name, PART_FIELDS + SHARE_FIELDS)}")
        if not part.get("path"):
            raise UserError(f"{where}.parts[{i}].path is empty; expected a file, directory or hub id")
        if not isinstance(part["path"], str):
            raise UserError(f"{where}.parts[{i}].path: expected a file, directory or hub id, found {part['path']!r}")
        if all(name in part for name in SHARE_FIELDS):
            raise UserError(f"{where}.parts[{i}]: give either fraction or count")
        fraction, count = part.get("fraction", 1.0), part.get("count", 1)
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise UserError(f"{where}.parts[{i}].fraction={fraction!r}, expected a number above 0 and at most 1")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"{where}.parts[{i}].count={count!r}, expected a whole number, at least 1")
    try:
        shares(parts, data.get("max_examples", 0))
    except UserError as error:
        raise UserError(f"{where}.parts: {error}") from None


def _given(name: str, value: Any) -> bool:
    return bool(value) and (name, value) != ("source", "auto")


def shares(parts: Sequence[Mapping[str, Any]], total: int) -> list[int | None]:
    """Examples of each part; None: all that it has (of the part without fraction and count, where `total` is 0).

    Fractions of `total` are rounded so that the numbers sum to it (largest remainder; the first of equal ones).

    Raises:
      UserError: numbers that do not sum to `total`, or fractions of nothing.
    """
    rest = [i for i, part in enumerate(parts) if not any(name in part for name in SHARE_FIELDS)]
    fractions = np.array([part.get("fraction", 0.0) for part in parts], float)
    counts = [part.get("count", 0) for part in parts]
    if len(rest) > 1:
        raise UserError(f"parts {', '.join(map(str, rest))} have neither fraction nor count; one may fill the rest")
    if not total:
        if fractions.any():
            raise UserError("a fraction needs data.max_examples, the number of examples in all")
        return [None if i in rest else count for i, count in enumerate(counts)]
    left = total - sum(counts)
    exact = fractions * total
    if rest:
        exact[rest] = left - exact.sum()
    if exact.min() < -1e-6 or abs(exact.sum() - left) > 1e-6 * total:
        raise UserError(
            f"counts of {sum(counts)} and fractions of {fractions.sum():g} do not make up max_examples={total}"
            + (", or leave nothing for the part without either" if rest else "; one part without either fills the rest")
        )
    whole = np.floor(exact + 1e-9).astype(int)
    missing = int(round(left - whole.sum()))
    for i in sorted(range(len(parts)), key=lambda i: (-round(exact[i] - whole[i], 9), i))[:missing]:
        whole[i] += 1
    return [int(n) + count for n, count in zip(whole, counts, strict=True)]


def spread(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(part, number in the part) in an order in which every stretch holds the parts in proportion, to one example each.

    So the end of a mixture, where held-out examples come from, is a mixture too.
    """
    places = [((j + 0.5) / n, part, j) for part, n in enumerate(counts) for j in range(n)]
    return [(part, j) for _, part, j in sorted(places)]


def label(part: int, id: str) -> str:
    return f"part{part}/{id}"


def part_numbers(ids: Sequence[str]) -> Int[np.ndarray, " examples"]:
    """Which part each example of a mixture came from."""
    return np.array([int(id.partition("/")[0].removeprefix("part")) for id in ids], np.int64)
