"""The execution of a compiled step: the only place where a step's values flow.

Launches of kernels compute the leaves, and XLA computes everything else between them. On a mesh,
launches run inside of `shard_map` on each device's shards, where an all-reduce combines the
statistics of sharded leaves. XLA itself partitions what it computes between launches.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.backends import BACKENDS
from pallas_kernels.compile import Compiled
from pallas_kernels.graph import Kind, Node
from pallas_kernels.launches import Launch, Phase
from pallas_kernels.layout import PACKS
from pallas_kernels.ops import REDUCTIONS

_COLLECTIVES: Mapping[str, Callable[..., jax.Array]] = {
    "sum": lax.psum,
    "max": lax.pmax,
    "min": lax.pmin,
}
_COMBINE: Mapping[str, Callable[..., jax.Array]] = {
    "sum": jnp.add,
    "max": jnp.maximum,
    "min": jnp.minimum,
}

Values = Callable[[Node], Any]


def run(compiled: Compiled, *flat: jax.Array) -> list[jax.Array]:
    """Compute the step's results by kernels, from its arguments and constants."""
    graph = compiled.traced.graph
    values: dict[Node, Any] = dict(zip(graph.inputs, flat, strict=True))

    def value(node: Node) -> Any:
        # No recursion: a global norm is a chain of as many additions as there are leaves.
        pending = [node]
        while pending:
            top = pending[-1]
            if top in values:
                pending.pop()
            elif missing := [a for a in top.args if a not in values]:
                pending += missing
            else:
                values[top] = _by_xla(top, values)
        return values[node]

    run_phase = _run_phase if compiled.placement.mesh is None else _run_phase_on_shards
    for phase in compiled.plan.phases:
        values |= run_phase(compiled, phase, value)
    for effect in graph.effects:
        _bind(effect, [value(a) for a in effect.args])
    return [value(node) for node in graph.outputs]


def _by_xla(node: Node, values: Mapping[Node, Any]) -> Any:
    if node.kind is Kind.LITERAL:
        return jnp.asarray(node.number)
    if node.kind is Kind.BROADCAST:
        return jnp.broadcast_to(values[node.args[0]], node.shape)
    result = _bind(node, [values[a] for a in node.args])
    return result[node.output] if isinstance(result, list | tuple) else result


def _bind(node: Node, operands: Sequence[Any]) -> Any:
    assert node.primitive is not None
    with np.errstate(all="ignore"):  # JAX may convert a number by NumPy, which warns
        return node.primitive.bind(*operands, **node.primitive.get_bind_params(node.params))


def _run_phase(compiled: Compiled, phase: Phase, value: Values) -> dict[Node, jax.Array]:
    """Run a phase; return all its results."""
    found = _launch_all(compiled.backend, phase, value)
    return {node: x.astype(node.dtype).reshape(node.shape) for node, x in found.items()}


def _run_phase_on_shards(compiled: Compiled, phase: Phase, value: Values) -> dict[Node, jax.Array]:
    """Run a phase on every device's shards; return all results in their global shapes."""
    graph, placement = compiled.traced.graph, compiled.placement
    assert placement.mesh is not None
    programs = phase.programs
    inputs = [*dict.fromkeys(node for p in programs for node in p.inputs)]
    scalars = [*dict.fromkeys(node for p in programs for node in p.scalars)]
    stored = [node for p in programs for node in p.stored]
    whole = PartitionSpec()

    def specs(nodes: Sequence[Node]) -> list[PartitionSpec]:
        return [placement.spec(graph.component(node)) for node in nodes]

    def on_shards(shards: Sequence[Any], numbers: Sequence[Any]) -> Any:
        given = dict(zip([*inputs, *scalars], [*shards, *numbers], strict=True))
        found = _launch_all(compiled.backend, phase, given.__getitem__)
        total = _all_reduce(compiled, phase, found)
        shapes = [placement.shard(graph.component(n), n.shape) for n in stored]
        return (
            [found[n].astype(n.dtype).reshape(s) for n, s in zip(stored, shapes, strict=True)],
            [total[n].astype(n.dtype).reshape(n.shape) for n in phase.statistics],
        )

    launched = jax.shard_map(
        on_shards,
        mesh=placement.mesh,
        in_specs=(specs(inputs), [whole] * len(scalars)),
        out_specs=(specs(stored), [whole] * len(phase.statistics)),
        check_vma=False,
    )
    leaves = [
        _reshard(value(node), NamedSharding(placement.mesh, spec))
        for node, spec in zip(inputs, specs(inputs), strict=True)
    ]
    shards, totals = launched(leaves, [value(n) for n in scalars])
    return dict(zip([*stored, *phase.statistics], [*shards, *totals], strict=True))


def _all_reduce(
    compiled: Compiled, phase: Phase, found: Mapping[Node, jax.Array]
) -> Mapping[Node, jax.Array]:
    """Return the statistics of whole leaves, given those of the shards."""
    totals = dict(found)
    sums = compiled.placement.sums(compiled.traced.graph, phase.programs)
    for (axes, reduction), nodes in sums.items():
        vector = jnp.stack([found[node].reshape(()) for node in nodes])
        totals |= dict(zip(nodes, _COLLECTIVES[reduction](vector, axes), strict=True))
    return totals


def _launch_all(backend: str, phase: Phase, value: Values) -> dict[Node, jax.Array]:
    """Run the launches of a phase on one device; return all results, leaves as flat arrays."""
    kernels, interpret = BACKENDS[backend].load(), BACKENDS[backend].interpret
    found: dict[Node, jax.Array] = {}
    partials: list[jax.Array] = []
    for launch in phase.launches:
        results = kernels.launch(launch.layout, _operands(launch, value), interpret=interpret)
        found |= dict(zip(launch.stored, results, strict=False))
        if launch.layout.columns:
            partials.append(results[-1])
    if phase.reduction is not None:
        tiles = kernels.reduce_partials(phase.reduction, partials, interpret=interpret)
        index = itertools.count()
        for node, count in zip(phase.statistics, phase.reduction.tiles, strict=True):
            combine = _COMBINE[REDUCTIONS[node.operation]]
            found[node] = functools.reduce(combine, [tiles[next(index)] for _ in range(count)])
    return found


def _operands(launch: Launch, value: Values) -> list[jax.Array]:
    """Return the packs of scalars, then all leaves as flat arrays."""
    packs = [
        jnp.stack([jnp.asarray(value(n), dtype).reshape(()) for n in nodes])
        if nodes
        else jnp.zeros(1, dtype)
        for nodes, dtype in zip(launch.packs, PACKS, strict=True)
    ]
    return packs + [value(node).reshape(-1) for node in launch.inputs]


def _reshard(x: Any, sharding: NamedSharding) -> Any:
    """Reshard `x` on explicit axes; on other axes, `shard_map` does it."""
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, sharding)
