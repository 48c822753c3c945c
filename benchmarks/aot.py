"""Compiles a step for an H200 that is not there, and reads what would run on it.

The compiler needs a description of the GPU (`h200.txtpb`), XLA's CUDA plugin and ptxas, but no GPU:
the `aot` extra installs them.
"""

import contextlib
import functools
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

DEVICE = "NVIDIA H200"

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
      kind: "pallas", or XLA's name for the operation ("fusion", "copy", ...).
      bytes: of its operands and results: what it moves if it reads and writes each of them once.
    """

    kind: str
    bytes: int


@dataclass(frozen=True)
class Program:
    """A compiled step.

    Attributes:
      kernels: in order of execution.
      temporary: bytes allocated beside arguments and results.
      cpu_seconds: spent on tracing, lowering and compiling, by all threads and by ptxas.
      seconds: the same by the clock, which whatever else runs on the machine slows down.
    """

    kernels: tuple[Kernel, ...]
    temporary: int
    cpu_seconds: float
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes that the kernels read and write; what some steps skip is counted in full."""
        return sum(kernel.bytes for kernel in self.kernels)

    def of_kind(self, kind: str) -> list[Kernel]:
        """The kernels of one kind."""
        return [kernel for kernel in self.kernels if kernel.kind == kind]


def compile_step(step: Step, params: Any, state: Any) -> Program:
    """Compiles `step(params, state, grads) -> (params, state)`, params and state donated.

    Args:
      step: a function that JAX can trace.
      params: shapes of the parameters, and of the gradients.
      state: shapes of the optimizer's state.
    """
    jax.clear_caches()  # a step must pay for what an earlier one has traced
    with _compiled_anew():
        start, cpu_start = time.perf_counter(), _cpu_seconds()
        compiled = _lower(step, params, state).compile()
        cpu_seconds, seconds = _cpu_seconds() - cpu_start, time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    return Program(tuple(read_kernels(text)), memory.temp_size_in_bytes, cpu_seconds, seconds)


def ptx(step: Step, params: Any, state: Any) -> str:
    """The assembly of the step's kernels; arguments as those of `compile_step`."""
    with tempfile.TemporaryDirectory() as folder, _compiled_anew():
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        _lower(step, params, state).compile(compiler_options=options)
        return "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
    """Without JAX's cache on disk, which would neither take time nor write assembly."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else the first compilation of the process has decided
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _lower(step: Step, params: Any, state: Any) -> jax.stages.Lowered:
    sharding = _sharding()
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, state, params),
    )
    # Since JAX 0.11, lowering for a GPU asks for its kind.
    device = AbstractDevice(device_kind=DEVICE, platform="gpu", num_cores=None)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)


@functools.cache
def _sharding() -> NamedSharding:
    description = resources.files("benchmarks").joinpath("h200.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=description, topology="1x1x1"
    )
    return NamedSharding(Mesh(np.array(topology.devices), ("device",)), PartitionSpec())


def _cpu_seconds() -> float:
    """User time of this process and of the finished processes that it started."""
    times = os.times()
    return times.user + times.children_user


_INSTRUCTION = re.compile(
    r"(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<operands>[^)]*)\)"
)
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\]")

_PALLAS = re.compile('custom_call_target="(__gpu\\$xla.gpu.triton|mosaic_gpu)')

# Operations that launch nothing.
_BOOKKEEPING = frozenset(["bitcast", "constant", "get-tuple-element", "parameter", "tuple"])
# Operations that hide kernels in a computation of their own, where they would not be counted.
_NESTED = frozenset(["call", "conditional", "while", "async-start"])


def read_kernels(program: str) -> Iterator[Kernel]:
    """The launches in the ENTRY computation of a compiled program's text."""
    types: dict[str, str] = {}
    entry = program[program.index("\nENTRY") :].splitlines()
    for match in filter(None, map(_INSTRUCTION.match, map(str.strip, entry))):
        name, type_, operation = match["name"], match["type"], match["op"]
        types[name] = type_
        if operation in _NESTED:
            raise NotImplementedError(f"{operation} in the program: its kernels are not counted")
        if operation in _BOOKKEEPING or operation.endswith("-done"):
            continue
        operands = re.findall(r"%([^\s,]+)", match["operands"])
        pallas = operation == "custom-call" and _PALLAS.search(match.string) is not None
        moved = _bytes(type_) + sum(_bytes(types[operand]) for operand in operands)
        yield Kernel("pallas" if pallas else operation, moved)


def _bytes(type_: str) -> int:
    """Of all arrays in an instruction's type."""
    return sum(
        math.prod(map(int, filter(None, dims.split(",")))) * _itemsize(dtype)
        for dtype, dims in _ARRAY.findall(type_)
    )


def _itemsize(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1
