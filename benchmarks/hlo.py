"""A parser of compiled programs: their kernels, memory traffic, live memory and communication.

XLA prints the instructions of a program's ENTRY in order of execution, each with the type of its
result. On a TPU, the type also names the memory: `S(1)` is memory on the chip, no mark is HBM. Only
bytes that are read from HBM or written to HBM count as moved. On a GPU, all arrays are in HBM.
"""

import collections
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A part of the program that executes as a unit.

    Attributes:
      kind: "pallas" for a Pallas kernel; "scalar" for arithmetic on a TPU's scalar unit; "transfer"
        for an array that a TPU moves between its memories during computation; otherwise XLA's name
        of the operation ("fusion", "copy", ...).
      bytes: the bytes of its operands and results. It moves them if it reads or writes each once.
    """

    kind: str
    bytes: int

    @property
    def launched(self) -> bool:
        """Return whether this is a launch: always on a GPU, only on the vector unit of a TPU."""
        return self.kind not in ("scalar", "transfer")


@dataclass(frozen=True)
class Array:
    """A result of an instruction, or one of several results.

    Attributes:
      elements: the number of elements.
      bytes: the size without the padding of a TPU's layouts.
      on_chip: whether the array is in a TPU's memory on the chip.
    """

    elements: int
    bytes: int
    on_chip: bool


@dataclass(frozen=True)
class Collective:
    """A collective operation, which all devices of a mesh execute together.

    Attributes:
      kind: XLA's name of the operation, such as "all-reduce".
      arrays: the arrays of its result on each device.
    """

    kind: str
    arrays: tuple[Array, ...]

    @property
    def elements(self) -> int:
        """The number of elements that each device receives."""
        return sum(array.elements for array in self.arrays)

    @property
    def bytes(self) -> int:
        """The number of bytes that each device receives."""
        return sum(array.bytes for array in self.arrays)


@dataclass(frozen=True)
class Instruction:
    """A line of the ENTRY.

    Attributes:
      name: the name of its result.
      operation: XLA's name of the operation, such as "fusion" or "parameter".
      results: its results; a tuple has several.
      operands: the names of the instructions whose results it reads.
      text: the whole line.
    """

    name: str
    operation: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def moved(self) -> Array | None:
        """The copy that this instruction starts between a TPU's memories, or `None`."""
        place = {"copy-start": 0, "slice-start": 1}.get(self.operation)
        return None if place is None else self.results[place]


_INSTRUCTION = re.compile(
    r"(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<operands>[^)]*)\)"
)
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
_INDEX = re.compile(r"\bindex=(\d+)")

_PALLAS = re.compile('custom_call_target="(__gpu\\$xla.gpu.triton|mosaic_gpu)')
# XLA's name for adjacent arrays that are read as one.
_CONCATENATED = 'custom_call_target="ConcatBitcast"'

_COLLECTIVES = re.compile(
    "(all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all"
    "|reduce-scatter)(-start)?"
)

# Operations that launch no kernel.
_BOOKKEEPING = frozenset(["bitcast", "constant", "get-tuple-element", "parameter", "tuple"])
# Operations whose kernels are in another computation, where they would not be counted.
_NESTED = frozenset(["call", "conditional", "while", "async-start"])


def read_entry(program: str) -> list[Instruction]:
    """Return the instructions of a compiled program, from its text."""
    return list(_read(program[program.index("\nENTRY") :]))


def read_collectives(program: str) -> list[Collective]:
    """Return all collectives in the text, also those outside of the ENTRY."""
    found = []
    for instruction in _read(program):
        if match := _COLLECTIVES.fullmatch(instruction.operation):
            results, operands = instruction.results, len(instruction.operands)
            # An asynchronous start, except that of an all-reduce, returns its operands before its
            # results.
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
    """Yield the kernels of a program in order of execution."""
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
            # The operand of a slice is the whole array, so the size of the slice counts.
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
    """Return the peak of live bytes in HBM, without arguments and results.

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
    """The lifetime of an array, from one instruction to another, by their indices."""

    bytes: int
    begin: int
    end: int


def _lives(entry: Sequence[Instruction]) -> Iterator[_Life]:
    """Yield the lifetimes of all arrays except arguments and results."""
    owned: dict[str, list[_Life]] = {}  # the arrays of each instruction's result
    lives: list[_Life] = []
    for time, instruction in enumerate(entry):
        read = [life for operand in instruction.operands for life in owned[operand]]
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
        owned[instruction.name] = written
    (results,) = (owned[x.name] for x in entry if x.text.startswith("ROOT"))
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
