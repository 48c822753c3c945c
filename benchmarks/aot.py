"""Compiles a step for devices that are not there: an H200 or a chip of a TPU v5e, or many of them.

The compilers need no device, only its description: the H200's is `h200.txtpb`, the TPU's comes with
libtpu. XLA's CUDA plugin, ptxas and libtpu are what the `aot` extra installs.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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

from benchmarks.hlo import (
    Collective,
    Kernel,
    live_bytes,
    read_collectives,
    read_entry,
    read_kernels,
)

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Target:
    """What is compiled for.

    Attributes:
      one: in a sentence.
      several: in a sentence, after their number.
      platform: JAX's name for it.
      kind: JAX's name for the device.
      plugin: the package that compiles for it.
      topology: the compiler's name for how many there are, and how they are connected.
      find: the devices of a topology.
    """

    one: str
    several: str
    platform: str
    kind: str
    plugin: str
    topology: str
    find: Callable[[str], Sequence[Any]]

    @property
    def name(self) -> str:
        """In a sentence."""
        number = len(self.devices())
        return self.one if number == 1 else f"{number} {self.several}"

    def devices(self) -> Sequence[Any]:
        """All of them; `RuntimeError` if the compiler knows no such topology."""
        return self.find(self.topology)

    def missing(self) -> bool:
        """Whether the compiler is not installed."""
        return importlib.util.find_spec(self.plugin) is None

    def on(self, topology: str) -> "Target":
        """Another number of these devices."""
        return dataclasses.replace(self, topology=topology)

    def sharding(self) -> NamedSharding:
        """Everything on every device."""
        return NamedSharding(Mesh(np.array(self.devices()), ("device",)), PartitionSpec())


@functools.cache
def _h200(topology: str) -> Sequence[Any]:
    description = resources.files("benchmarks").joinpath("h200.txtpb").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=description, topology=topology
    ).devices


# Libtpu asks a machine in the cloud for these, and complains where there is none.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    # It takes a lock, as if it took the chips.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@functools.cache
def _v5e(topology: str) -> Sequence[Any]:
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    # By default a host has 2 × 2 chips, and older versions insist on whole hosts.
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=(1, 1, 1)
    ).devices


H200 = Target(
    one="an NVIDIA H200",
    several="NVIDIA H200",
    platform="gpu",
    kind="NVIDIA H200",
    plugin="jax_cuda13_plugin",
    topology="1x1x1",
    find=_h200,
)
V5E = Target(
    one="one chip of a TPU v5e",
    several="chips of a TPU v5e",
    platform="tpu",
    kind="TPU v5 lite",
    plugin="libtpu",
    topology="v5e:1x1",
    find=_v5e,
)


@dataclass(frozen=True)
class Program:
    """A compiled step, of one device of several.

    Attributes:
      kernels: in order of execution.
      collectives: what the devices tell each other.
      arguments: bytes of parameters, state and gradients, as the device lays them out.
      temporary: bytes allocated beside arguments and results; a result that can't take the memory
        of a donated argument is allocated too.
      reserved: bytes that libtpu's allocator takes for all these in the large memory; `None` for
        other devices and older versions of JAX.
      code: bytes of the program itself.
      cpu_seconds: spent on tracing, lowering and compiling, by all threads and by ptxas.
      seconds: the same by the clock, which whatever else runs on the machine slows down.
    """

    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    arguments: int
    temporary: int
    reserved: int | None
    code: int
    cpu_seconds: float
    seconds: float

    @property
    def launches(self) -> int:
        """Number of kernels that are launched."""
        return sum(kernel.launched for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Bytes that the kernels read and write; what some steps skip is counted in full."""
        return sum(kernel.bytes for kernel in self.kernels)

    def of_kind(self, kind: str) -> list[Kernel]:
        """The kernels of one kind."""
        return [kernel for kernel in self.kernels if kernel.kind == kind]


def compile_step(step: Step, params: Any, state: Any, target: Target = H200) -> Program:
    """Compiles `step(params, state, grads) -> (params, state)`, params and state donated.

    Args:
      step: a function that JAX can trace.
      params: shapes of the parameters, and of the gradients; what has no sharding is whole on every
        device.
      state: shapes of the optimizer's state.
      target: the device, or devices.
    """
    jax.clear_caches()  # a step must pay for what an earlier one has traced
    with compiled_anew():
        start, cpu_start = time.perf_counter(), _cpu_seconds()
        compiled = lower(step, params, state, target).compile()
        cpu_seconds, seconds = _cpu_seconds() - cpu_start, time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    entry, tpu = read_entry(text), target.platform == "tpu"
    # Libtpu reserves memory for what it then keeps on the chip, more or less with every version.
    beside = live_bytes(entry) if tpu else memory.temp_size_in_bytes
    moved_out = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        kernels=tuple(read_kernels(entry, tpu=tpu)),
        collectives=tuple(read_collectives(text)),
        arguments=memory.argument_size_in_bytes,
        temporary=beside + moved_out,
        reserved=getattr(memory, "total_allocation_bytes", None) if tpu else None,
        code=memory.generated_code_size_in_bytes,
        cpu_seconds=cpu_seconds,
        seconds=seconds,
    )


def ptx(step: Step, params: Any, state: Any) -> str:
    """The H200's assembly of the step's kernels; arguments as those of `compile_step`."""
    with tempfile.TemporaryDirectory() as folder, compiled_anew():
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        lower(step, params, state, H200).compile(compiler_options=options)
        return "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Without JAX's cache on disk, which would neither take time nor write assembly."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else the first compilation of the process has decided
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def lower(step: Step, params: Any, state: Any, target: Target) -> jax.stages.Lowered:
    """The step as its target's compiler gets it; arguments as those of `compile_step`."""
    whole = target.sharding()
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or whole),
        (params, state, params),
    )
    # Since JAX 0.11, lowering for a GPU asks for its kind.
    device = AbstractDevice(device_kind=target.kind, platform=target.platform, num_cores=None)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)


def _cpu_seconds() -> float:
    """User time of this process and of the finished processes that it started."""
    times = os.times()
    return times.user + times.children_user
