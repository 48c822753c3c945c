"""Compiles a step for a device that is not there: an H200, or one chip of a TPU v5e.

The compilers need no device, only its description: the H200's is `h200.txtpb`, the TPU's comes with
libtpu. XLA's CUDA plugin, ptxas and libtpu are what the `aot` extra installs.
"""

import contextlib
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

from benchmarks.hlo import Kernel, live_bytes, read_entry, read_kernels

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Target:
    """What is compiled for.

    Attributes:
      name: in a sentence.
      platform: JAX's name for it.
      kind: JAX's name for the device.
      plugin: the package that compiles for it.
      devices: of the smallest machine that has one.
    """

    name: str
    platform: str
    kind: str
    plugin: str
    devices: Callable[[], Sequence[Any]]

    def missing(self) -> bool:
        """Whether the compiler is not installed."""
        return importlib.util.find_spec(self.plugin) is None

    def sharding(self) -> NamedSharding:
        """Everything on every device."""
        return NamedSharding(Mesh(np.array(self.devices()), ("device",)), PartitionSpec())


@functools.cache
def _h200() -> Sequence[Any]:
    description = resources.files("benchmarks").joinpath("h200.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=description, topology="1x1x1"
    )
    return topology.devices


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
def _v5e() -> Sequence[Any]:
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    # By default a host has 2 × 2 chips, and older versions insist on whole hosts.
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1)
    )
    return topology.devices


H200 = Target("an NVIDIA H200", "gpu", "NVIDIA H200", "jax_cuda13_plugin", _h200)
V5E = Target("one chip of a TPU v5e", "tpu", "TPU v5 lite", "libtpu", _v5e)


@dataclass(frozen=True)
class Program:
    """A compiled step.

    Attributes:
      kernels: in order of execution.
      temporary: bytes allocated beside arguments and results; a result that can't take the memory
        of a donated argument is allocated too.
      cpu_seconds: spent on tracing, lowering and compiling, by all threads and by ptxas.
      seconds: the same by the clock, which whatever else runs on the machine slows down.
    """

    kernels: tuple[Kernel, ...]
    temporary: int
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
      params: shapes of the parameters, and of the gradients.
      state: shapes of the optimizer's state.
      target: the device.
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
    kernels = tuple(read_kernels(entry, tpu=tpu))
    return Program(kernels, beside + moved_out, cpu_seconds, seconds)


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
    sharding = target.sharding()
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
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
