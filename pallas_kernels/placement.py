"""The shardings of a step's leaves on a mesh of devices.

A step is traced with the global shapes of the leaves. Only launches work on shards.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.graph import Graph, Node
from pallas_kernels.ops import REDUCTIONS
from pallas_kernels.program import Program
from pallas_kernels.shardings import check


@dataclass(frozen=True, eq=False)
class Placement:
    """The shardings of a step's leaves.

    Attributes:
      mesh: the mesh of devices; `None` means that all leaves are on one device.
      shardings: the shardings of components, by their representative. Other components are
        replicated.
      leaves: for each of these components, the leaf from which the sharding was taken.
    """

    mesh: Mesh | AbstractMesh | None = None
    shardings: Mapping[Node, NamedSharding] = field(default_factory=dict[Node, NamedSharding])
    leaves: Mapping[Node, Node] = field(default_factory=dict[Node, Node])

    @property
    def explicit(self) -> bool:
        """True if the mesh has explicit axes, so that all types contain shardings.

        A step is traced without a mesh, so arrays that XLA computes for a leaf have no sharding in
        their types. If there are such arrays, the chain must run instead.
        """
        return self.mesh is not None and AxisType.Explicit in self.mesh.axis_types

    def size(self, component: Node, node: Node) -> int:
        """Return the number of elements of `node` per device."""
        leaf = self.leaves.get(component)
        if leaf is None or not node.shape:
            return node.size
        # Values of rows are cut like their leaf, even if their own axes are too short.
        return -(-node.size * math.prod(self.shard(component, leaf.shape)) // leaf.size)

    def reason(self, component: Node, node: Node) -> str | None:
        """Return why a launch can't compute `node` on shards, or `None` if it can."""
        leaf = self.leaves.get(component)
        if leaf is None or node.shape in ((), leaf.shape):
            return None
        if not self._has_rows_along_last_axis(component, leaf, node):
            return f"sharded as {leaf.shape}, used as {node.shape}"
        return None

    def _has_rows_along_last_axis(self, component: Node, leaf: Node, node: Node) -> bool:
        """Return whether `node` is the leaf, cut into rows along its last axis, or their values.

        The result is false if a row lies on several devices.
        """
        *first, last = leaf.shape
        if node.shape[: len(first)] != tuple(first) or len(node.shape) == len(first):
            return False
        rows, *row = node.shape[len(first) :]
        if last % rows or tuple(row) not in ((), (1,), (last // rows,)):
            return False
        return self.shard(component, leaf.shape)[-1] % (last // rows) == 0

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

    def sums(
        self, graph: Graph, programs: Sequence[Program]
    ) -> dict[tuple[tuple[str, ...], str], list[Node]]:
        """Return the statistics that need an all-reduce, by axes and reduction."""
        alike: dict[tuple[tuple[str, ...], str], list[Node]] = {}
        for program in programs:
            for node in program.reduced:
                if axes := self.axes(graph.component(node.args[0])):
                    alike.setdefault((axes, REDUCTIONS[node.operation]), []).append(node)
        return alike

    def spec(self, component: Node) -> PartitionSpec:
        """Return the component's partition."""
        sharding = self.shardings.get(component)
        return PartitionSpec() if sharding is None else sharding.spec

    def shard(self, component: Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape per device of an array of the component."""
        sharding = self.shardings.get(component)
        return shape if sharding is None or not shape else sharding.shard_shape(shape)


def infer_placement(graph: Graph, shardings: Sequence[NamedSharding | None]) -> Placement:
    """Return the placement of a graph's components, each with the sharding of its first leaf.

    Args:
      graph: the step.
      shardings: the sharding of each input, if known.

    Raises:
      ValueError: two leaves are on different meshes, or a leaf can't be cut into equal shards.
    """
    found: dict[Node, NamedSharding] = {}
    leaves: dict[Node, Node] = {}
    mesh, first = None, ""
    for leaf, sharding in zip(graph.inputs, shardings, strict=True):
        if sharding is None:
            continue
        name, component = graph.names[leaf], graph.component(leaf)
        check(name, leaf.shape, sharding)
        if not leaf.on_leaf or component in found:
            continue
        if mesh is None:
            mesh, first = sharding.mesh, name
        elif _differ(sharding.mesh, mesh):
            raise ValueError(
                f"all leaves must lie on one mesh, but {first} lies on {mesh}, {name} on"
                f" {sharding.mesh}"
            )
        found[component], leaves[component] = sharding, leaf
    return Placement(mesh, found, leaves)


def _differ(a: Mesh | AbstractMesh, b: Mesh | AbstractMesh) -> bool:
    """Return whether two meshes differ; the mesh in a type has no devices to compare."""
    if isinstance(a, Mesh) and isinstance(b, Mesh):
        return a != b
    return a.abstract_mesh != b.abstract_mesh
