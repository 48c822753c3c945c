"""Ahead-of-time compilation of a step for H200 GPUs or TPU v5e chips that this machine lacks.

The compilers need no device, only a description of it. `h200.txtpb` describes the H200; libtpu
contains the description of the TPU. The extra `aot` installs XLA's CUDA plugin, ptxas and libtpu.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
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
    """The device, or devices, that a step is compiled for.

    Attributes:
      one: words for one device, for use in a sentence.
      several: words for several devices, to follow their number in a sentence.
      platform: JAX's name of the platform.
      kind: JAX's name of the device.
      plugin: the package that contains the compiler.
      topology: the compiler's name for the number of devices and their connections.
      find: returns the devices of a topology.
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
        """The words for the devices, for use in a sentence."""
        number = len(self.devices())
        return self.one if number == 1 else f"{number} {self.several}"

    def devices(self) -> Sequence[Any]:
        """Return all devices; raise `RuntimeError` if the compiler does not know the topology."""
        return self.find(self.topology)

    def missing(self) -> bool:
        """Return whether the compiler is not installed."""
        return importlib.util.find_spec(self.plugin) is None

    def on(self, topology: str) -> "Target":
        """Return the target with another topology of the same devices."""
        return dataclasses.replace(self, topology=topology)

    def sharding(self) -> NamedSharding:
        """Return the sharding that replicates an array on every device."""
        return NamedSharding(Mesh(np.array(self.devices()), ("device",)), PartitionSpec())


@functools.cache
def _h200(topology: str) -> Sequence[Any]:
    description = resources.files("benchmarks").joinpath("h200.txtpb").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=description, topology=topology
    ).devices


# Libtpu would query a cloud server for these values, and warn if it finds none.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    # Libtpu takes a lock on the chips, even if it only compiles.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@functools.cache
def _v5e(topology: str) -> Sequence[Any]:
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    # The default is 2 × 2 chips for each host, and older versions accept whole hosts only.
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
    """A compiled step; all numbers are per device.

    Attributes:
      kernels: the kernels in order of execution.
      collectives: the communication between devices.
      arguments: bytes of parameters, state and gradients, in the layouts of the device.
      temporary: bytes allocated in addition to arguments and results. This includes results that
        can't reuse the memory of a donated argument.
      reserved: bytes that libtpu's allocator reserves for all of these in HBM; `None` for other
        devices and for older versions of JAX.
      code: bytes of the program itself.
      cpu_seconds: CPU time to trace, lower and compile, in all threads and in ptxas.
      seconds: wall-clock time of the same work. Other load on the machine makes it longer.
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
        """The number of kernel launches."""
        return sum(kernel.launched for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """The bytes that the kernels read and write, including those that some steps skip."""
        return sum(kernel.bytes for kernel in self.kernels)

    def of_kind(self, kind: str) -> list[Kernel]:
        """Return the kernels of one kind."""
        return [kernel for kernel in self.kernels if kernel.kind == kind]


def compile_step(step: Step, params: Any, state: Any, target: Target = H200) -> Program:
    """Compile `step(params, state, grads) -> (params, state)` with donated params and state.

    Args:
      step: a function that JAX can trace.
      params: shapes of the parameters, and of the gradients. An array without a sharding is
        replicated on every device.
      state: shapes of the optimizer's state.
      target: the device, or devices.
    """
    jax.clear_caches()  # else an earlier trace could make this one faster
    with compiled_anew():
        start, cpu_start = time.perf_counter(), _cpu_seconds()
        compiled = lower(step, params, state, target).compile()
        cpu_seconds, seconds = _cpu_seconds() - cpu_start, time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    entry, tpu = read_entry(text), target.platform == "tpu"
    # Libtpu also reserves HBM for arrays that it then keeps on the chip. The amount depends on the
    # version.
    temporary = live_bytes(entry) if tpu else memory.temp_size_in_bytes
    not_aliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        kernels=tuple(read_kernels(entry, tpu=tpu)),
        collectives=tuple(read_collectives(text)),
        arguments=memory.argument_size_in_bytes,
        temporary=temporary + not_aliased,
        reserved=getattr(memory, "total_allocation_bytes", None) if tpu else None,
        code=memory.generated_code_size_in_bytes,
        cpu_seconds=cpu_seconds,
        seconds=seconds,
    )


def ptx(step: Step, params: Any, state: Any) -> str:
    """Return the PTX of the step's kernels on an H200; see `compile_step` for the arguments."""
    with tempfile.TemporaryDirectory() as folder, compiled_anew():
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        lower(step, params, state, H200).compile(compiler_options=options)
        return "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))


@contextlib.contextmanager
def compiled_anew() -> Generator[None]:
    """Disable JAX's persistent cache.

    A program from the cache is not compiled: it takes no time and writes no PTX.
    """
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else JAX keeps the setting of the first compilation
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def lower(step: Step, params: Any, state: Any, target: Target) -> jax.stages.Lowered:
    """Lower the step for its target; see `compile_step` for the arguments."""
    whole = target.sharding()
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or whole),
        (params, state, params),
    )
    # Since JAX 0.11, lowering for a GPU needs the kind of the device.
    device = AbstractDevice(device_kind=target.kind, platform=target.platform, num_cores=None)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)


def _cpu_seconds() -> float:
    """Return the user CPU time of this process and of its finished child processes."""
    times = os.times()
    return times.user + times.children_user
