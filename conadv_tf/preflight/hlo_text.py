"""Reads an optimized TPU program as the compiler prints it: cycles, traffic to HBM, calls its cost model cannot see."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*?)\)(?:,|$)(.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\](?:\{([\d,]*)((?::[^}]*)?)\})?")
_TILE = re.compile(r"T\((\d+(?:,\d+)*)\)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'known_trip_count[^\d}]*"n":"(\d+)"')
# They name a value or wait for one; nothing is computed or moved.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "custom-call", "copy-done", "slice-done")


class TextCost(NamedTuple):
    """The cost of one execution of a program.

    Attributes:
      cycles: sum of the compiler's estimate for each instruction.
      hbm_bytes: bytes that instructions read and write in HBM, with the padding of layouts, without on-chip memory.
      custom_calls: instructions that the compiler's cost model counts as −1 second, −1 FLOP and −1 byte.
      timed: instructions that compute or move something.
    """

    cycles: float
    hbm_bytes: float
    custom_calls: int
    timed: int


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str


class _Array(NamedTuple):
    bytes: int
    in_hbm: bool


def without_copies(text: str) -> str:
    """An MLIR program without mhlo.copy, which TensorFlow makes of what it returns unchanged; StableHLO has no copy."""
    return re.sub(r"mhlo\.copy (%\S+) : (tensor<[^>]*>)", r"stablehlo.reshape \1 : (\2) -> \2", text)


def text_cost(text: str) -> TextCost:
    """The cost of a printed HloModule.

    A loop's body counts as often as it runs where the compiler knows that, otherwise once; of a conditional's branches
    the dearest counts. `custom_calls` and `timed` count every instruction once, as the compiler's cost analysis does.
    """
    computations, entry = _parse(text)
    return _computation_cost(entry, computations)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head.group(2)
            computations[name] = []
            entry = name if head.group(1) else entry
        elif match := _INSTRUCTION.match(line):
            instruction, shape, opcode, operands, attributes = match.groups()
            computations[name].append(
                _Instruction(instruction, shape, opcode, re.findall(r"%([\w.\-]+)", operands), attributes)
            )
    if not entry:
        raise ValueError("no ENTRY computation: not the text of an HloModule")
    return computations, entry


def _computation_cost(name: str, computations: dict[str, list[_Instruction]]) -> TextCost:
    arrays: dict[str, list[_Array]] = {}
    cycles, moved, calls, timed = 0.0, 0.0, 0, 0
    for instruction in computations[name]:
        arrays[instruction.name] = list(_arrays(instruction.shape))
        own = _CYCLES.search(instruction.attributes)
        cycles += int(own.group(1)) if own else 0
        calls += instruction.opcode == "custom-call"
        if instruction.opcode in ("while", "conditional", "call"):
            inner = _called_cost(instruction, computations)
            cycles, moved = cycles + inner.cycles, moved + inner.hbm_bytes
            calls, timed = calls + inner.custom_calls, timed + inner.timed
        elif instruction.opcode not in _FREE:
            timed += 1
            moved += _traffic(instruction, arrays)
    return TextCost(cycles, moved, calls, timed)


def _called_cost(instruction: _Instruction, computations: dict[str, list[_Instruction]]) -> TextCost:
    called = [name for name in re.findall(r"%([\w.\-]+)", instruction.attributes) if name in computations]
    costs = [_computation_cost(name, computations) for name in called]
    calls, timed = sum(cost.custom_calls for cost in costs), sum(cost.timed for cost in costs)
    if instruction.opcode == "conditional":
        return TextCost(max(c.cycles for c in costs), max(c.hbm_bytes for c in costs), calls, timed)
    trips = _TRIPS.search(instruction.attributes)
    times = int(trips.group(1)) if trips else 1
    return TextCost(times * sum(c.cycles for c in costs), times * sum(c.hbm_bytes for c in costs), calls, timed)


def _traffic(instruction: _Instruction, arrays: dict[str, list[_Array]]) -> int:
    """Bytes between HBM and the core: operands and results, each whole; of a copy or a slice the part that moves."""
    operands = [array for operand in instruction.operands for array in arrays.get(operand, [])]
    if instruction.opcode in ("copy-start", "slice-start"):
        # copy: (destination, source, context); slice: ((source), destination, context).
        destination = arrays[instruction.name][1 if instruction.opcode == "slice-start" else 0]
        return destination.bytes * (destination.in_hbm + operands[0].in_hbm)
    return sum(array.bytes for array in operands + arrays[instruction.name] if array.in_hbm)


def _arrays(shape: str) -> Iterator[_Array]:
    """The arrays of a shape such as "(f32[64]{0:T(256)}, bf16[8,3]{1,0:T(8,128)(2,1)S(1)})"; S(n) is on the chip."""
    for kind, sizes, minor_to_major, layout in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
        dims = [int(size) for size in sizes.split(",") if size]
        if minor_to_major:
            dims = [dims[int(axis)] for axis in minor_to_major.split(",")]
        tile = _TILE.search(layout)
        sides = [int(side) for side in tile.group(1).split(",")][::-1] if tile else []
        padded = [-(-dim // side) * side for dim, side in zip(dims, sides, strict=False)]
        yield _Array(math.prod(padded + dims[len(padded) :]) * bits // 8, "S(" not in layout)
