"""`explain`: reports how `fuse` would run an optimizer on given parameters."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext import _checks
from pallas_kernels import backends
from pallas_kernels.arguments import check_parameters
from pallas_kernels.compile import Compiled, Compiler, whole_step
from pallas_kernels.fuse import FusedTransformation
from pallas_kernels.graph import Kind, Node
from pallas_kernels.launches import Phase
from pallas_kernels.shardings import Shardings, of_parameters, of_value
from pallas_kernels.shardings import check as check_sharding
from pallas_kernels.trace import is_array, types


@dataclass(frozen=True)
class PhaseReport:
    """The work of one phase: launches that do not wait for each other.

    Attributes:
      work: "statistics" or "update". A phase for statistics may also write results that are known
        by then.
      leaves: number of leaves.
      bodies: number of different kernel bodies; leaves with the same computation share one.
      launches: number of kernels.
      bytes: bytes that all launches together read and write.
      skipped: those of these bytes that some steps skip, such as lookahead's slow weights.
      all_reduces: number of all-reduces over the devices. Leaves that are sharded over the same
        axes of the mesh share one for each kind of reduction.
    """

    work: str
    leaves: int
    bodies: int
    launches: int
    bytes: int
    skipped: int
    all_reduces: int


@dataclass(frozen=True)
class Report:
    """The work of a fused step on each device.

    Attributes:
      devices: number of devices.
      parameters: number of parameters per device.
      phases: the phases, in order of execution.
      floor: bytes that any step must move: it reads every array that it depends on once, and writes
        every array that changes once. A statistic may need an extra pass, which is not included.
      fallback_reasons: a line with leaf and reason for each component that falls back to XLA.
    """

    devices: int
    parameters: int
    phases: tuple[PhaseReport, ...]
    floor: int
    fallback_reasons: tuple[str, ...]

    @property
    def launches(self) -> int:
        """Number of Pallas kernels in a step; XLA adds a few for scalars."""
        return sum(phase.launches for phase in self.phases)

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes that the launches read and write, per parameter."""
        return sum(phase.bytes for phase in self.phases) / max(self.parameters, 1)

    @property
    def floor_per_parameter(self) -> float:
        """`floor`, per parameter."""
        return self.floor / max(self.parameters, 1)

    def __str__(self) -> str:
        """Return a line for each phase, the totals, and the leaves that fall back to XLA."""
        lines = ["phase       leaves  bodies  launches  bytes/parameter  skipped in some steps"]
        for phase in self.phases:
            per, skipped = (x / max(self.parameters, 1) for x in (phase.bytes, phase.skipped))
            lines.append(
                f"{phase.work:<10}  {phase.leaves:>6}  {phase.bodies:>6}  {phase.launches:>8}"
                f"  {per:>15.2f}  {skipped:>21.2f}"
            )
        lines.append(
            f"{self.launches} launches, {self.bytes_per_parameter:.2f} bytes/parameter,"
            f" floor {self.floor_per_parameter:.2f}"
        )
        if self.devices > 1:
            count = sum(phase.all_reduces for phase in self.phases)
            lines.append(f"on each of {self.devices} devices, all-reduces: {count}")
        return "\n".join([*lines, *(f"left to XLA: {line}" for line in self.fallback_reasons)])


def explain(
    tx: optax.GradientTransformation,
    params: Any,
    *,
    backend: str | None = None,
    **extra_args: Any,
) -> Report:
    """Plan the fused step of `tx` without running it.

    Args:
      tx: an optimizer, fused or not.
      params: the parameters (arrays or numbers), or their shapes. Gradients are assumed to have the
        same dtypes. The numbers are per device if parameters have a `NamedSharding`, or if `tx` was
        fused with `shardings`.
      backend: the backend whose kernels are planned. By default, it is the backend of a fused `tx`,
        and "auto" for other optimizers.
      **extra_args: further arguments of the optimizer's update, or their shapes.

    Raises:
      ValueError: `tx` is not a transformation, a parameter is neither an array nor a number,
        `backend` is unknown or has no kernels, or the shardings don't fit the parameters.

    >>> import jax.numpy as jnp, optax
    >>> print(explain(optax.adamw(1e-3), {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}))
    phase       leaves  bodies  launches  bytes/parameter  skipped in some steps
    update           2       1         1            28.00                   0.00
    1 launches, 28.00 bytes/parameter, floor 28.00
    """
    _checks.transformation(tx=tx)
    check_parameters(params)
    shapes = jax.tree.map(_shape, params)
    if isinstance(tx, FusedTransformation):
        compiler, chosen = tx.compiler, tx.backend
        shapes = shapes if tx.shardings is None else _sharded(shapes, tx.shardings)
    else:
        compiler, chosen = Compiler(whole_step(tx), in_place=2), "auto"
    if backend is None and chosen == backends.CHAIN:
        raise ValueError(f"tx must be fused with a backend that has kernels, got {chosen!r}")
    backend = chosen if backend is None else backend
    backends.check(backend, or_chain=False)
    arguments = (shapes, types(tx.init, shapes), shapes, extra_args)
    compiled, _ = compiler(arguments, backend, {})
    placement = compiled.placement
    phases = () if compiled.runs_chain else compiled.plan.phases
    return Report(
        devices=1 if placement.mesh is None else placement.mesh.size,
        parameters=sum(math.prod(_shard(x)) for x in jax.tree.leaves(shapes)),
        phases=tuple(_report(phase, compiled) for phase in phases),
        floor=_floor(compiled),
        fallback_reasons=compiled.fallback_reasons,
    )


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    x = x if is_array(x) else jnp.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of_value(x))


def _sharded(shapes: Any, shardings: Shardings) -> Any:
    """Return the shapes with the shardings that the user gave for them."""
    given = of_parameters(shapes, shardings)
    leaves, structure = jax.tree.flatten(shapes)
    sharded = []
    for (path, sharding), x in zip(given.items(), leaves, strict=True):
        check_sharding(path, x.shape, sharding)
        sharded.append(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))
    return jax.tree.unflatten(structure, sharded)


def _shard(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)


def _report(phase: Phase, compiled: Compiled) -> PhaseReport:
    reduces = phase.reduction is not None
    bytes_ = [program.bytes for program in phase.programs]
    return PhaseReport(
        work="statistics" if reduces else "update",
        leaves=len(phase.programs),
        bodies=len({program.body for program in phase.programs}),
        launches=len(phase.launches) + reduces,
        bytes=sum(moved for moved, _ in bytes_),
        skipped=sum(skipped for _, skipped in bytes_),
        all_reduces=len(compiled.placement.sums(compiled.traced.graph, phase.programs)),
    )


def _floor(compiled: Compiled) -> int:
    """Return the bytes of all results, and of all arguments that they depend on."""
    graph, placement = compiled.traced.graph, compiled.placement
    results = {node for node in graph.outputs if node.kind is not Kind.INPUT}
    pending, seen = list(results), set[Node]()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.args)
    read = [node for node in seen if node.kind is Kind.INPUT]
    return sum(
        placement.size(graph.component(node), node) * node.dtype.itemsize
        for node in (*read, *results)
    )
