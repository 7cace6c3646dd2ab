"""Reads a compiled program's text (HLO): which collectives it runs how often, and what it moves through HBM."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "f64": 8} | {
    f"{kind}{bits}": bits / 8 for kind in "su" for bits in (8, 16, 32, 64)
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Between slices a TPU's programs hand their part of a collective to the hosts, which send it.
MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
BETWEEN_SLICES = ("slices",)
# What takes no HBM traffic of its own: names for values, and what is counted inside.
FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
    | {"partition-id", "copy-done", "slice-done", "async-start", "async-update", "async-done", "optimization-barrier"}
)
ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


class Collective(NamedTuple):
    kind: str
    over: tuple[str, ...]  # axes of the mesh that its groups reach across, or BETWEEN_SLICES
    times: float  # a run of the program
    sent: float  # bytes that a chip sends, in all of them


class Program(NamedTuple):
    collectives: list[Collective]  # most bytes first
    hbm_bytes: float  # read and written, a chip


def read(text: str, mesh_shape: Mapping[str, int], trips: int = 1) -> Program:
    """What one run of a compiled program does on each chip. Branches and loops of which one runs are all counted.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      mesh_shape: of the mesh that it was compiled for, in its order.
      trips: of loops whose end depends on data and has no bound in the program.
    """
    computations, entry = _computations(text)
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    seen: set[str] = set()
    moved = 0.0
    for inside, instruction, times in _walk(computations, entry, trips):
        if instruction.opcode not in FREE and not inside.fused:
            moved += times * _traffic(computations, inside.instructions, instruction)
        if instruction.opcode == "send" and (between := MEGASCALE.search(instruction.rest)):
            total = totals.setdefault((between[1].lower().replace("_", "-"), BETWEEN_SLICES), [0.0, 0.0])
            total[0] += times
            total[1] += times * _size(inside.instructions[_operands(instruction)[0]].shape)
        kind = instruction.opcode.removesuffix("-start")
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        if kind not in COLLECTIVES or (channel and channel[1] in seen):
            continue  # one that is spread over several fusions is written into each
        seen |= {channel[1]} if channel else set()
        if kind == "all-reduce" and inside.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        groups = _groups(instruction.rest, math.prod(mesh_shape.values()))
        sent = _sent(kind, instruction, inside.instructions, groups.shape[1])
        if sent:
            total = totals.setdefault((kind, _axes(groups, mesh_shape)), [0.0, 0.0])
            total[0] += times
            total[1] += times * sent
    found = [Collective(kind, over, *total) for (kind, over), total in totals.items()]
    return Program(sorted(found, key=lambda each: -each.sent), moved)


class Inside(NamedTuple):
    """A computation while it is walked through."""

    name: str
    instructions: Mapping[str, Instruction]
    fused: bool  # into one instruction of another computation


Computations = dict[str, dict[str, Instruction]]


def _computations(text: str) -> tuple[Computations, str]:
    found: Computations = {}
    entry = name = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
            found[name] = {}
            entry = name if line.startswith("ENTRY ") else entry
        elif line.startswith("  ") and " = " in line and name:
            instruction = _instruction(line.strip())
            found[name][instruction.name] = instruction
    return found, entry


def _instruction(line: str) -> Instruction:
    name, _, value = line.removeprefix("ROOT ").lstrip("%").partition(" = ")
    end = _closing(value, 0) + 1 if value.startswith("(") else value.index(" ")
    opcode, _, rest = value[end:].lstrip().partition("(")
    return Instruction(name, value[:end], opcode, rest)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError(f"unbalanced: {text[:80]}")


def _walk(
    computations: Computations, name: str, trips: int, times: float = 1.0, fused: bool = False
) -> Iterator[tuple[Inside, Instruction, float]]:
    inside = Inside(name, computations[name], fused)
    for instruction in inside.instructions.values():
        yield inside, instruction, times
        if instruction.opcode == "while":
            condition, body = (re.search(rf"{key}=%?([^,\s]+)", instruction.rest) for key in ("condition", "body"))
            assert condition and body
            often = times * _trips(computations, condition[1], trips)
            yield from _walk(computations, body[1], trips, often, fused)
        elif instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            names = branches[1].split(",") if branches else re.findall(
                r"(?:true|false)_computation=%?([^,\s]+)", instruction.rest
            )
            for branch in names:
                yield from _walk(computations, branch.strip().lstrip("%"), trips, times, fused)
        elif called := re.search(r"calls=%?([^,\s]+)", instruction.rest):
            # Of what an async-start or a call runs, every instruction is one of the device's.
            inner = fused or instruction.opcode == "fusion"
            yield from _walk(computations, called[1], trips, times, inner)
        elif instruction.opcode == "call" and (called := re.search(r"to_apply=%?([^,\s]+)", instruction.rest)):
            yield from _walk(computations, called[1], trips, times, fused)


def _trips(computations: Computations, condition: str, unknown: int) -> int:
    """The bound that a loop's counter is compared with: the largest whole number in its condition."""
    numbers = [
        int(instruction.rest.partition(")")[0])
        for _, instruction, _ in _walk(computations, condition, unknown)
        if instruction.opcode == "constant" and re.match(r"[su]\d+\[\]", instruction.shape)
    ]
    return max(numbers, default=unknown)


def arrays(shape: str) -> list[tuple[float, bool]]:
    """Bytes of each array of a shape, and whether it lies in HBM."""
    found = []
    for kind, sizes, layout in ARRAY.findall(shape):
        if kind in BYTES:
            count = math.prod(int(n) for n in sizes.split(",") if n)
            found.append((BYTES[kind] * count, "S(1)" not in layout))  # S(1) is the chip's fast memory
    return found


def in_hbm(shape: str) -> float:
    return sum(size for size, hbm in arrays(shape) if hbm)


def _size(shape: str) -> float:
    return sum(size for size, _ in arrays(shape))


def _operands(instruction: Instruction) -> list[str]:
    inner = instruction.rest[: _closing("(" + instruction.rest, 0) - 1]
    return re.findall(r"%([^\s,)]+)", inner)


def _traffic(computations: Computations, around: Mapping[str, Instruction], instruction: Instruction) -> float:
    """Bytes that an instruction reads from HBM and writes to it: of a slice, the slice alone."""
    if instruction.opcode == "fusion" and (called := re.search(r"calls=%?([^,\s]+)", instruction.rest)):
        return _fusion_traffic(computations[called[1]], around, instruction)
    operands = [around[name].shape for name in _operands(instruction) if name in around]
    if instruction.opcode == "dynamic-update-slice":
        return 2 * in_hbm(operands[1])
    if instruction.opcode in ("dynamic-slice", "slice"):
        return 2 * in_hbm(instruction.shape)
    return in_hbm(instruction.shape) + sum(map(in_hbm, operands))


def _fusion_traffic(
    inner: Mapping[str, Instruction], around: Mapping[str, Instruction], fusion: Instruction
) -> float:
    users: dict[str, list[tuple[Instruction, int]]] = {}  # and which operand of theirs it is
    for instruction in inner.values():
        for at, name in enumerate(_operands(instruction) if instruction.opcode != "parameter" else ()):
            users.setdefault(name, []).append((instruction, at))
    total, updated = 0.0, 0.0
    outer = _operands(fusion)
    for instruction in inner.values():
        if instruction.opcode != "parameter":
            continue
        at = int(instruction.rest.partition(")")[0])
        shape = around[outer[at]].shape if at < len(outer) and outer[at] in around else instruction.shape
        uses = users.get(instruction.name, [])
        if not in_hbm(shape):
            continue
        if uses and all(use.opcode in ("dynamic-slice", "slice") and operand == 0 for use, operand in uses):
            total += sum(_size(use.shape) for use, _ in uses)
        elif uses and all(use.opcode == "dynamic-update-slice" and operand == 0 for use, operand in uses):
            updated += sum(in_hbm(use.shape) for use, _ in uses)
            total += sum(_size(inner[_operands(use)[1]].shape) for use, _ in uses)
        else:
            total += in_hbm(shape)
    return total + max(in_hbm(fusion.shape) - updated, 0.0)


def _sent(kind: str, instruction: Instruction, around: Mapping[str, Instruction], group: int) -> float:
    """Bytes that a chip sends in one collective, by the ring's count."""
    if group < 2 and kind != "collective-permute":
        return 0.0
    operands = [around[name].shape for name in _operands(instruction) if name in around]
    given = sum(map(_size, operands))
    share = (group - 1) / group
    if kind == "all-gather":
        return given * (group - 1)
    return given * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def _groups(rest: str, devices: int) -> np.ndarray:
    """Which devices a collective joins: [groups, devices of one]."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return np.array([[int(n) for n in pair] for pair in re.findall(r"(\d+),(\d+)", pairs[1])]).reshape(-1, 2)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = {name: int(number) for name, number in re.findall(r"'([^']+)'=(\d+)", named[1])}
        joined = re.findall(r"'([^']+)'", named[2])
        if set(joined) <= set(sizes) and ":" not in named[2]:
            names = list(sizes)
            order = [names.index(name) for name in names if name not in joined] + [names.index(n) for n in joined]
            grid = np.arange(math.prod(sizes.values())).reshape([*sizes.values()]).transpose(order)
            return grid.reshape(-1, math.prod(sizes[name] for name in joined))
        raise ValueError(f"a collective's groups are written in an unknown way: {named[0]}")
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, over = ([int(n) for n in part.split(",")] for part in tiled.group(1, 2))
        grid = np.arange(math.prod(over)).reshape(over)
        return (grid.transpose([int(n) for n in tiled[3].split(",")]) if tiled[3] else grid).reshape(shape)
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])])
    return np.arange(devices)[None]


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of a group differ."""
    names: Sequence[str] = list(mesh_shape)
    places = np.stack(np.unravel_index(groups, [*mesh_shape.values()]))
    return tuple(name for name, at in zip(names, places, strict=True) if (at != at[:, :1]).any())
