"""Reads optimized HLO: which arrays a program writes to memory, and how often it stops."""

import dataclasses
import math
import re
from collections.abc import Iterator

# These hand on buffers that exist, or begin an operation that is reported where it ends.
_NO_NEW_BUFFER = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "opt-barrier", "partition-id", "replica-id"),
}
_SCHEDULES = {"while", "conditional", "call", "async-start", "call-start"}
_HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|calls|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_ALIAS = re.compile(r"\{([\d, ]*)\}: \(\d+, \{[\d, ]*\}, \w+-alias\)")


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str  # as HLO spells it: bf16, f32, u8
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        if self.dtype in ("token", "opaque"):
            return 0
        width = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(width[0]) if width else 8) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class _Instruction:
    computation: str
    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    is_root: bool
    text: str


def written_arrays(hlo: str) -> list[Array]:
    """New arrays that scheduled instructions write, largest first.

    The inside of a fusion is left out, as its values stay in registers and shared memory; so
    is what is written into a donated argument. An in-place update of an array that a loop
    carries does count.
    """
    table, entry = _parse(hlo)
    donated = _results_in_arguments(hlo, table, entry)
    arrays = [
        array
        for instruction in _scheduled(table, entry)
        if _is_work(instruction) and not instruction.opcode.endswith(("-start", "-update"))
        for n, array in enumerate(instruction.results)
        if (instruction.computation, instruction.name, n) not in donated
    ]
    return sorted(arrays, key=lambda array: -array.num_bytes)


def num_kernels(hlo: str) -> int:
    """Scheduled instructions that do something; those of a loop's body count once."""
    return sum(_is_work(i) and not i.opcode.endswith("-done") for i in _scheduled(*_parse(hlo)))


def num_host_loops(hlo: str) -> int:
    """Loops whose end is not known when they start: the host waits for every iteration."""
    return sum(
        instruction.opcode == "while" and "known_trip_count" not in instruction.text
        for instruction in _scheduled(*_parse(hlo))
    )


def _is_work(instruction: _Instruction) -> bool:
    return instruction.opcode not in _NO_NEW_BUFFER


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions by computation, and the name of the entry computation."""
    table: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            current = head[2]
            table[current] = []
            entry = current if head[1] else entry
        elif current and (match := _LINE.match(line)):
            kind, operation = _split_type(match[3])
            opcode, _, rest = operation.partition("(")
            arrays = tuple(
                Array(dtype, tuple(int(size) for size in shape.split(",") if size))
                for dtype, shape in _ARRAY.findall(kind)
            )
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
            table[current].append(
                _Instruction(current, match[2], opcode, arrays, operands, bool(match[1]), operation)
            )
    return table, entry


def _split_type(text: str) -> tuple[str, str]:
    """Splits 'TYPE opcode(...)...', where TYPE may be a tuple."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character == " ":
            return text[:i], text[i + 1 :]
    raise AssertionError(f"no instruction: {text[:80]}")


def _scheduled(table: dict[str, list[_Instruction]], entry: str) -> Iterator[_Instruction]:
    """Instructions of the entry computation, and of loops, branches and calls from there."""
    todo, seen = [entry], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for instruction in table.get(name, ()):
            yield instruction
            if instruction.opcode in _SCHEDULES:
                for group in _CALLED.findall(instruction.text):
                    todo += [called.strip(" %") for called in group.strip("{}").split(",")]


def _results_in_arguments(
    hlo: str, table: dict[str, list[_Instruction]], entry: str
) -> set[tuple[str, str, int]]:
    """(computation, instruction, result) of what is written into a donated argument."""
    by_name = {instruction.name: instruction for instruction in table[entry]}
    root = next(instruction for instruction in table[entry] if instruction.is_root)
    found = set()
    for path in _ALIAS.findall(hlo.partition("\n")[0]):
        instruction, index = root, 0
        if path:
            index = int(path.split(",")[0])
        while instruction.opcode in ("tuple", "bitcast", "get-tuple-element"):
            operand = 0
            if instruction.opcode == "tuple":
                operand, index = index, 0
            elif element := re.search(r"\bindex=(\d+)", instruction.text):
                index = int(element[1])
            instruction = by_name[instruction.operands[operand]]
        found.add((entry, instruction.name, index))
    return found
