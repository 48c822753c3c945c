"""The shardings of leaves on a mesh of devices, and launches on the shards of each device.

A step is traced with the global shapes of the leaves. Only launches work on shards: they run inside
`shard_map`, where an all-reduce adds up the statistics of sharded leaves. XLA itself partitions
what it computes between launches.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import launch
from pallas_kernels.program import Program
from pallas_kernels.shardings import check, of_value
from pallas_kernels.trace import Graph, Node

_COLLECTIVES: Mapping[str, Callable[..., jax.Array]] = {
    "sum": lax.psum,
    "max": lax.pmax,
    "min": lax.pmin,
}


@dataclass
class Placement:
    """The shardings of a step's leaves.

    Attributes:
      mesh: the mesh of devices; `None` means that all leaves are on one device.
      shardings: the shardings of components, by their representative. Other components are
        replicated.
      leaves: for each of these components, the leaf from which the sharding was taken.
    """

    mesh: Mesh | AbstractMesh | None = None
    shardings: dict[Node, NamedSharding] = field(default_factory=dict)
    leaves: dict[Node, Node] = field(default_factory=dict)

    @property
    def explicit(self) -> bool:
        """Whether the mesh has explicit axes, so that all types contain shardings.

        A step is traced without a mesh, so arrays that XLA computes for a leaf have no sharding in
        their types. If there are such arrays, the chain must run instead.
        """
        return self.mesh is not None and AxisType.Explicit in self.mesh.axis_types

    def size(self, component: Node, node: Node) -> int:
        """Return the number of elements of `node` per device."""
        return math.prod(self._shard(component, node.shape))

    def reason(self, component: Node, node: Node) -> str | None:
        """Return why a launch can't compute `node` on shards, or `None` if it can."""
        leaf = self.leaves.get(component)
        if leaf is not None and node.shape not in ((), leaf.shape):
            return f"sharded as {leaf.shape}, used as {node.shape}"
        return None

    def axes(self, component: Node) -> tuple[str, ...]:
        """Return the axes of the mesh over which the component is sharded, in the mesh's order.

        The result does not depend on which dimension is sharded over which axis, so that more
        leaves share an all-reduce.
        """
        if component not in self.shardings:
            return ()
        sharding = self.shardings[component]
        named = (axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec)
        cut = {*itertools.chain.from_iterable(named)}
        return tuple(axis for axis in sharding.mesh.axis_names if axis in cut)

    def run(
        self,
        graph: Graph,
        backend: str,
        phase: Sequence[Sequence[Program]],
        value: Callable[[Node], Any],
        kernel_cache: dict[Any, Callable[..., Any]],
    ) -> dict[Node, jax.Array]:
        """Run a phase on every device's shards; return all results in their global shapes."""
        if self.mesh is None:
            found = launch.run(backend, phase, lambda n: value(n).reshape(-1), value, kernel_cache)
            return {node: x.astype(node.dtype).reshape(node.shape) for node, x in found.items()}

        programs = [*itertools.chain(*phase)]
        arrays = [*dict.fromkeys(node for p in programs for node in p.inputs)]
        scalars = [*dict.fromkeys(node for p in programs for node in p.scalars)]
        stored = [node for p in programs for node, _ in p.stored()]
        reduced = [node for p in programs for node, _ in p.reduced()]

        def on_shards(given, numbers):
            leaf = dict(zip(arrays, given, strict=True))
            number = dict(zip(scalars, numbers, strict=True))
            found = launch.run(
                backend, phase, lambda n: leaf[n].reshape(-1), number.__getitem__, kernel_cache
            )
            shards = [
                found[n].astype(n.dtype).reshape(self._shard(graph.component(n), n.shape))
                for n in stored
            ]
            total = self._add_up(graph, programs, found)
            return shards, [total[n].astype(n.dtype).reshape(n.shape) for n in reduced]

        def specs(nodes):
            return [self._spec(graph.component(node)) for node in nodes]

        whole = PartitionSpec()
        launched = jax.shard_map(
            on_shards,
            mesh=self.mesh,
            in_specs=(specs(arrays), [whole] * len(scalars)),
            out_specs=(specs(stored), [whole] * len(reduced)),
            check_vma=False,
        )
        leaves = [
            _reshard(value(node), NamedSharding(self.mesh, spec))
            for node, spec in zip(arrays, specs(arrays), strict=True)
        ]
        shards, totals = launched(leaves, [value(n) for n in scalars])
        return dict(zip([*stored, *reduced], [*shards, *totals], strict=True))

    def sums(
        self, graph: Graph, programs: Sequence[Program]
    ) -> dict[tuple[tuple[str, ...], str], list[Node]]:
        """Return the statistics that need an all-reduce, by axes and reduction."""
        alike: dict[Any, list[Node]] = {}
        for program in programs:
            for node, root in program.reduced():
                if axes := self.axes(graph.component(node.args[0])):
                    alike.setdefault((axes, root.reduction), []).append(node)
        return alike

    def _add_up(self, graph, programs, found) -> dict[Node, jax.Array]:
        """Return the statistics of whole leaves: all-reduce those of the shards."""
        totals = dict(found)
        for (axes, reduction), nodes in self.sums(graph, programs).items():
            vector = jnp.stack([found[node].reshape(()) for node in nodes])
            totals |= dict(zip(nodes, _COLLECTIVES[reduction](vector, axes), strict=True))
        return totals

    def _spec(self, component: Node) -> PartitionSpec:
        sharding = self.shardings.get(component)
        return PartitionSpec() if sharding is None else sharding.spec

    def _shard(self, component: Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        sharding = self.shardings.get(component)
        return shape if sharding is None or not shape else sharding.shard_shape(shape)


def infer_placement(
    graph: Graph, values: Sequence[Any], given: Mapping[str, NamedSharding]
) -> Placement:
    """Return the placement of a graph's components, each with the sharding of its first leaf.

    Args:
      graph: the step.
      values: the step's inputs, or their shapes.
      given: shardings by the names of inputs. Other inputs have the shardings of their values.

    Raises:
      ValueError: two leaves are on different meshes, or a leaf can't be cut into equal shards.
    """
    placement, first = Placement(), ""
    for leaf, value in zip(graph.inputs, values, strict=False):
        component = graph.component(leaf)
        sharding = given.get(graph.names[leaf]) or of_value(value)
        if sharding is not None:
            check(graph.names[leaf], leaf.shape, sharding)
        if sharding is None or not leaf.on_leaf or component in placement.shardings:
            continue
        if placement.mesh is None:
            placement.mesh, first = sharding.mesh, graph.names[leaf]
        elif _differ(sharding.mesh, placement.mesh):
            raise ValueError(
                f"all leaves must lie on one mesh, but {first} lies on"
                f" {placement.mesh}, {graph.names[leaf]} on {sharding.mesh}"
            )
        placement.shardings[component] = sharding
        placement.leaves[component] = leaf
    return placement


def _differ(a: Mesh | AbstractMesh, b: Mesh | AbstractMesh) -> bool:
    """Return whether two meshes differ; the mesh in a type has no devices to compare."""
    if isinstance(a, Mesh) and isinstance(b, Mesh):
        return a != b
    return a.abstract_mesh != b.abstract_mesh


def _reshard(x: Any, sharding: NamedSharding) -> Any:
    """Reshard `x` on explicit axes; on other axes, `shard_map` does it."""
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, sharding)
