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
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_HOST = "S(5)"  # in a layout
_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|calls|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_LENGTH = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ALIAS = re.compile(r"\{([\d, ]*)\}: \(\d+, \{[\d, ]*\}, \w+-alias\)")


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str  # as HLO spells it: bf16, f32, u8
    shape: tuple[int, ...]
    on_host: bool = False

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
    """New arrays that scheduled instructions write to the device's memory, largest first.

    The inside of a fusion is left out, as its values stay in registers and shared memory; so
    is what is written into a donated argument. Of an array that a loop carries and updates in
    place, it is the update.
    """
    table, entry = _parse(hlo)
    donated = _results_in_arguments(hlo, table, entry)
    arrays = [
        array
        for instruction in _scheduled(table, entry)
        if _is_work(instruction) and not instruction.opcode.endswith(("-start", "-update"))
        for n, array in enumerate(_written(instruction, table))
        if (instruction.computation, instruction.name, n) not in donated and not array.on_host
    ]
    return sorted(arrays, key=lambda array: -array.num_bytes)


def num_kernels(hlo: str) -> int:
    """Scheduled instructions that do something; those of a loop's body count once."""
    return sum(map(_is_kernel, _scheduled(*_parse(hlo))))


def num_launches(hlo: str) -> int:
    """The same with a loop of known length counted as often as it runs, and others not at all."""
    table, entry = _parse(hlo)

    def launches(computation: str) -> int:
        count = 0
        for instruction in table.get(computation, ()):
            count += _is_kernel(instruction)
            if length := _LENGTH.search(instruction.text):
                (body,) = re.findall(r"\bbody=%?([\w.\-]+)", instruction.text)
                count += int(length[1]) * launches(body)
        return count

    return launches(entry)


def num_host_loops(hlo: str) -> int:
    """Loops whose end is not known when they start: the host waits for every iteration.

    Branches count, too.
    """
    return sum(
        instruction.opcode == "conditional"
        or (instruction.opcode == "while" and not _LENGTH.search(instruction.text))
        for instruction in _scheduled(*_parse(hlo))
    )


def _written(instruction: _Instruction, table: dict[str, list[_Instruction]]) -> list[Array]:
    """The results of an instruction; of arrays that the loop around it carries, the updates."""
    body = {inner.name: inner for inner in table[instruction.computation]}
    root = next(inner for inner in body.values() if inner.is_root)
    inside, roots, arguments = body, [instruction], {}
    if instruction.opcode == "fusion":
        (called,) = re.findall(r"\bcalls=%?([\w.\-]+)", instruction.text)
        inside = {inner.name: inner for inner in table[called]}
        roots = [inner for inner in inside.values() if inner.is_root]
        for inner in inside.values():
            if inner.opcode == "parameter":
                (number,) = re.findall(r"^parameter\((\d+)\)", inner.text)
                arguments[inner.name] = instruction.operands[int(number)]
    if len(roots) == 1 and roots[0].opcode == "tuple":
        roots = [inside[name] for name in roots[0].operands]
    if len(roots) != len(instruction.results):
        return list(instruction.results)

    def written(n: int) -> Array:
        update = roots[n]
        if update.opcode != "dynamic-update-slice" or root.opcode != "tuple":
            return instruction.results[n]
        old = body.get(arguments.get(update.operands[0], update.operands[0]))
        names = {instruction.name} if len(roots) == 1 else _elements(body, instruction.name, n)
        places = [place for place, name in enumerate(root.operands) if name in names]
        carried = old is not None and any(_is_element(body, old, place) for place in places)
        return inside[update.operands[1]].results[0] if carried else instruction.results[n]

    return [written(n) for n in range(len(instruction.results))]


def _elements(body: dict[str, _Instruction], tuple_name: str, index: int) -> set[str]:
    """Instructions that take this element of a tuple."""
    return {
        name
        for name, inner in body.items()
        if inner.opcode == "get-tuple-element"
        and inner.operands == (tuple_name,)
        and re.search(rf"\bindex={index}\b", inner.text)
    }


def _is_element(body: dict[str, _Instruction], instruction: _Instruction, index: int) -> bool:
    """Whether it takes this element of what the loop carries."""
    if instruction.opcode != "get-tuple-element":
        return False
    (source,) = instruction.operands
    return body[source].opcode == "parameter" and instruction.name in _elements(body, source, index)


def _is_kernel(instruction: _Instruction) -> bool:
    # Only the tests move what they need to host memory, once per program.
    to_host = instruction.opcode == "copy-start" and instruction.results[0].on_host
    return _is_work(instruction) and not instruction.opcode.endswith("-done") and not to_host


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
                Array(dtype, tuple(map(int, filter(None, shape.split(",")))), _HOST in layout)
                for dtype, shape, layout in _ARRAY.findall(kind)
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
