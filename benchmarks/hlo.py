"""Reads a compiled program: what it launches, moves, holds in memory, and tells other devices.

XLA prints the instructions of a program's ENTRY in order of execution, each with the type of its
result, and in a TPU's types the memory: `S(1)` is on the chip, nothing is the large one beside it.
Only what is read from the large memory, or written to it, counts as moved. A GPU has no other.
"""

import collections
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A part of the program that executes as one.

    Attributes:
      kind: "pallas"; "scalar" for arithmetic that a TPU's scalar unit does; "transfer" for an array
        that a TPU moves between its memories while it computes; else XLA's name for the operation
        ("fusion", "copy", ...).
      bytes: of its operands and results: what it moves if it reads and writes each of them once.
    """

    kind: str
    bytes: int

    @property
    def launched(self) -> bool:
        """On a GPU everything is; on a TPU what takes its turn on the vector unit."""
        return self.kind not in ("scalar", "transfer")


@dataclass(frozen=True)
class Array:
    """A result of an instruction, or one of several.

    Attributes:
      elements: number of them.
      bytes: without the padding of a TPU's layouts.
      on_chip: in a TPU's own memory, next to its units.
    """

    elements: int
    bytes: int
    on_chip: bool


@dataclass(frozen=True)
class Collective:
    """What all devices of a mesh do together.

    Attributes:
      kind: XLA's name for it, "all-reduce" for one.
      arrays: of its result, on each device.
    """

    kind: str
    arrays: tuple[Array, ...]

    @property
    def elements(self) -> int:
        """Numbers that each device is told."""
        return sum(array.elements for array in self.arrays)

    @property
    def bytes(self) -> int:
        """Bytes that each device is told."""
        return sum(array.bytes for array in self.arrays)


@dataclass(frozen=True)
class Instruction:
    """A line of the ENTRY.

    Attributes:
      name: of its result.
      operation: "fusion", "parameter", ...
      results: several if it is a tuple.
      operands: names of instructions before it.
      text: the whole line.
    """

    name: str
    operation: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def moved(self) -> Array | None:
        """The copy that a transfer between a TPU's memories makes, where this begins one."""
        place = {"copy-start": 0, "slice-start": 1}.get(self.operation)
        return None if place is None else self.results[place]


_INSTRUCTION = re.compile(
    r"(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<operands>[^)]*)\)"
)
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
_INDEX = re.compile(r"\bindex=(\d+)")

_PALLAS = re.compile('custom_call_target="(__gpu\\$xla.gpu.triton|mosaic_gpu)')
# Names arrays that lie side by side as one.
_CONCATENATED = 'custom_call_target="ConcatBitcast"'

_COLLECTIVES = re.compile(
    "(all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all"
    "|reduce-scatter)(-start)?"
)

# Operations that launch nothing.
_BOOKKEEPING = frozenset(["bitcast", "constant", "get-tuple-element", "parameter", "tuple"])
# Operations that hide kernels in a computation of their own, where they would not be counted.
_NESTED = frozenset(["call", "conditional", "while", "async-start"])


def read_entry(program: str) -> list[Instruction]:
    """The instructions of a compiled program's text."""
    return list(_read(program[program.index("\nENTRY") :]))


def read_collectives(program: str) -> list[Collective]:
    """What devices tell each other, wherever in the text: a computation may hold it, too."""
    found = []
    for instruction in _read(program):
        if match := _COLLECTIVES.fullmatch(instruction.operation):
            results, operands = instruction.results, len(instruction.operands)
            # One that only begins, but for all-reduce, has its operands among its results, before
            # the true ones.
            begun = match[2] and len(results) > operands
            arrays = results[operands : 2 * operands] if begun else results
            found.append(Collective(match[1], arrays))
    return found


def _read(text: str) -> Iterator[Instruction]:
    for match in filter(None, map(_INSTRUCTION.match, map(str.strip, text.splitlines()))):
        yield Instruction(
            match["name"],
            match["op"],
            tuple(_arrays(match["type"])),
            tuple(re.findall(r"%([^\s,]+)", match["operands"])),
            match.string,
        )


def read_kernels(entry: Sequence[Instruction], *, tpu: bool) -> Iterator[Kernel]:
    """What executes, in order."""
    arrays: dict[str, tuple[Array, ...]] = {}
    for instruction in entry:
        arrays[instruction.name] = instruction.results
        if instruction.operation in _NESTED:
            raise NotImplementedError(
                f"{instruction.operation} in the program: its kernels are not counted"
            )
        if _launches_nothing(instruction):
            continue
        touched = [*instruction.results]
        for operand in instruction.operands:
            touched.extend(arrays[operand])
        if tpu and instruction.moved:
            # A slice's operand is all that it is taken from.
            ends = (
                array.on_chip for array in (*arrays[instruction.operands[0]], instruction.moved)
            )
            yield Kernel("transfer", instruction.moved.bytes * sum(not end for end in ends))
            continue
        scalar = tpu and all(array.elements == 1 for array in touched)
        pallas = instruction.operation == "custom-call" and _PALLAS.search(instruction.text)
        kind = "scalar" if scalar else "pallas" if pallas else instruction.operation
        yield Kernel(kind, sum(array.bytes for array in touched if not array.on_chip))


def live_bytes(entry: Sequence[Instruction]) -> int:
    """The most that lives at any time in the large memory, beside arguments and results.

    An array lives from the instruction that writes it to the last one that reads it.
    """
    changes = collections.Counter[int]()
    for life in _lives(entry):
        changes[life.begin] += life.bytes
        changes[life.end + 1] -= life.bytes
    alive = most = 0
    for time in sorted(changes):
        alive += changes[time]
        most = max(most, alive)
    return most


@dataclass
class _Life:
    """Of an array: from one instruction to another, by their places."""

    bytes: int
    begin: int
    end: int


def _lives(entry: Sequence[Instruction]) -> Iterator[_Life]:
    """Of all arrays but arguments and results."""
    held: dict[str, list[_Life]] = {}  # what each instruction's result is made of
    lives: list[_Life] = []
    for time, instruction in enumerate(entry):
        read = [life for operand in instruction.operands for life in held[operand]]
        for life in read:
            life.end = time
        if instruction.operation in ("parameter", "constant"):
            written = []
        elif instruction.operation == "get-tuple-element":
            (place,) = map(int, _INDEX.findall(instruction.text))
            written = read[place : place + 1]
        elif _launches_nothing(instruction):
            written = read
        else:
            arrays = (instruction.moved,) if instruction.moved else instruction.results
            written = [_Life(0 if x.on_chip else x.bytes, time, time) for x in arrays]
            lives += written
        held[instruction.name] = written
    (results,) = (held[x.name] for x in entry if x.text.startswith("ROOT"))
    return (life for life in lives if not any(life is result for result in results))


def _launches_nothing(instruction: Instruction) -> bool:
    return (
        instruction.operation in _BOOKKEEPING
        or instruction.operation.endswith("-done")
        or _CONCATENATED in instruction.text
    )


def _arrays(type_: str) -> Iterator[Array]:
    for dtype, dims, memory in _ARRAY.findall(type_):
        elements = math.prod(map(int, filter(None, dims.split(","))))
        yield Array(elements, elements * _itemsize(dtype), on_chip=bool(memory))


def _itemsize(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1
