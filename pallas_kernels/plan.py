"""A graph becomes phases of launches: programs over leaves, cut at their reductions.

Leaves that are elementwise connected (a parameter, its gradient, its moments) form a component.
Each component is one `Program` a phase; programs of the same form share one kernel body, whatever
leaf they run on. What a kernel can't do is left to XLA, one component at a time, with the reason.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.trace import REDUCTIONS, SAME_ORDER, Graph, Kind, Node

# A value inside a program: ("input" | "op" | "scalar", position) or ("number", value, dtype).
Ref = tuple[Any, ...]
# The scalar, and the value of it, for which something is needed.
Predicate = tuple[Ref, int]

DTYPES = frozenset(("float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool"))
_LARGEST = 2**31 - 1  # elements that a 32-bit index reaches


@dataclass(frozen=True)
class Root:
    """A result of a program.

    Attributes:
      value: the value to store or reduce.
      needed: when to store it; `None` is always.
      in_place: the input whose memory it takes, if any.
      dtype: of the result.
      reduction: "sum", "max" or "min" over the leaf; `None` stores the leaf.
    """

    value: Ref
    needed: Predicate | None
    in_place: int | None
    dtype: str
    reduction: str | None


@dataclass
class Program:
    """Straight-line code for the blocks of one leaf.

    Attributes:
      results: the nodes that the roots compute.
      inputs: arrays that are read block by block.
      loads: when each of them is needed; `None` is always.
      scalars: values that are the same for all blocks.
      ops: operations in order: primitive, parameters, operands.
      roots: what comes out.
    """

    results: list[Node]
    inputs: list[Node] = field(default_factory=list)
    loads: list[Predicate | None] = field(default_factory=list)
    scalars: list[Node] = field(default_factory=list)
    ops: list[tuple[Any, dict[str, Any], tuple[Ref, ...]]] = field(default_factory=list)
    roots: list[Root] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of elements of the leaf."""
        first = self.results[0]
        return (first.args[0] if first.kind is Kind.REDUCED else first).size

    def stored(self) -> list[tuple[Node, "Root"]]:
        """Results that are leaves, and their roots."""
        return [r for r in zip(self.results, self.roots, strict=True) if r[1].reduction is None]

    def reduced(self) -> list[tuple[Node, Any]]:
        """Results that are statistics, and their roots."""
        return [r for r in zip(self.results, self.roots, strict=True) if r[1].reduction is not None]

    def traffic(self) -> tuple[int, int]:
        """Bytes of a leaf read and written, and those among them that some steps skip."""
        moved = [*zip(self.inputs, self.loads, strict=True)]
        moved += [(node, root.needed) for node, root in self.stored()]
        skipped = sum(node.bytes for node, needed in moved if needed is not None)
        return sum(node.bytes for node, _ in moved), skipped

    def form(self) -> Any:
        """Equal for programs that one kernel body can serve."""
        ops = tuple(
            (p.name, tuple(sorted((k, str(v)) for k, v in q.items())), r) for p, q, r in self.ops
        )
        dtypes = tuple(str(n.dtype) for n in (*self.inputs, *self.scalars))
        return ops, tuple(self.roots), tuple(self.loads), dtypes, len(self.inputs)


@dataclass
class Plan:
    """What to launch, in order.

    Attributes:
      phases: programs that don't wait for each other; each phase but the last computes statistics
        that later ones wait for.
      reasons: why a component is left to XLA.
    """

    phases: list[list[Program]]
    reasons: dict[Node, str]


def plan(graph: Graph, in_place: Mapping[int, int], supports: Callable[[str], bool]) -> Plan:
    """Decides what runs where.

    Args:
      graph: the step.
      in_place: for results that may take the memory of an argument, the positions of both.
      supports: whether the backend knows a primitive.
    """
    reachable = _reachable(graph.outputs)
    reasons = _left_to_xla(graph, reachable, supports)

    # Arrays that come from no argument, such as the list of all leaves' norms, are small.
    leaves = {graph.component(node) for node in graph.inputs if node.on_leaf}

    def fused(node: Node) -> bool:
        component = graph.component(node)
        return component in leaves and component not in reasons

    targets: dict[Node, Node] = {}
    for i, j in in_place.items():
        result, argument = graph.outputs[i], graph.inputs[j]
        same_form = (result.shape, result.dtype) == (argument.shape, argument.dtype)
        if argument.on_leaf and same_form and graph.component(result) is graph.component(argument):
            targets.setdefault(result, argument)

    reduced = [n for n in reachable if n.kind is Kind.REDUCED and fused(n.args[0])]
    written = [n for n in dict.fromkeys(graph.outputs) if n.kind is Kind.BLOCK and fused(n)]
    statistics, writes = _by_component(graph, reduced), _by_component(graph, written)
    levels = 1 + max((n.args[0].level for n in reduced), default=-1)
    phases: list[list[Program]] = [[] for _ in range(levels + 1)]
    for component in statistics | writes:
        passes = _passes(statistics.get(component, []), writes.get(component, []), targets)
        for level, program in passes.items():
            phases[levels if level is None else level].append(program)
    return Plan([phase for phase in phases if phase], reasons)


def _passes(
    reduced: Sequence[Node], written: Sequence[Node], targets: Mapping[Node, Node]
) -> dict[int | None, Program]:
    """A component's programs: for each level with statistics, and for what comes last (`None`).

    What is known in the last pass for statistics is written there, if that saves traffic: Adam's
    moments before a trust ratio are then read once, new, instead of their old values and the
    gradient.
    """
    by_level: dict[int | None, list[Node]] = {}
    for node in reduced:
        by_level.setdefault(node.args[0].level, []).append(node)
    passes = {level: _program(nodes, targets) for level, nodes in by_level.items()}
    if written:
        passes[None] = _program(written, targets)
    if not reduced or not written:
        return passes

    last = max(node.args[0].level for node in reduced)
    early = [n for n in written if n.level <= last and n in targets]
    late = [n for n in written if n not in early]
    if not early or not late:
        return passes
    sooner = {
        last: _program([*by_level[last], *early], targets),
        None: _program(late, targets, given=early),
    }
    overwritten = {targets[n] for n in early}
    if overwritten.isdisjoint(sooner[None].inputs) and _cost(sooner) < _cost(
        {level: passes[level] for level in sooner}
    ):
        passes |= sooner
    return passes


def _cost(passes: Mapping[Any, Program]) -> int:
    return sum(program.traffic()[0] for program in passes.values())


def _reachable(outputs: Sequence[Node]) -> list[Node]:
    seen: set[Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.args)
    return sorted(seen, key=lambda n: n.index)


def _left_to_xla(graph, reachable, supports) -> dict[Node, str]:
    blocks = [n for n in reachable if n.kind is Kind.BLOCK]
    computed = {graph.component(n) for n in blocks}
    reasons: dict[Node, str] = {}

    def leave(node: Node, why: str) -> None:
        if graph.component(node) in computed:
            reasons.setdefault(graph.component(node), why)

    reached = set(reachable)
    for node, primitive in graph.foreign:
        if node in reached:
            leave(node, f"{primitive} is not elementwise")
    for node in blocks:
        if not supports(node.operation):
            leave(node, f"no kernel for {node.operation}")
        for value in (node, *node.args):
            if str(value.dtype) not in DTYPES:
                leave(node, f"no kernel for {value.dtype}")
        if node.size > _LARGEST:
            leave(node, f"{node.size} elements are more than a 32-bit index reaches")
    return reasons


def _by_component(graph: Graph, nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    groups: dict[Node, list[Node]] = {}
    for node in nodes:
        groups.setdefault(
            graph.component(node.args[0] if node.kind is Kind.REDUCED else node), []
        ).append(node)
    return groups


def _program(
    results: Sequence[Node], targets: Mapping[Node, Node], given: Sequence[Node] = ()
) -> Program:
    """Computes `results`, in the memory of their `targets`, from arguments and what is `given`."""
    program = Program(list(results))
    refs: dict[Node, Ref] = {}

    def visit(node: Node) -> Ref:
        if node not in refs:
            refs[node] = place(node)
        return refs[node]

    def place(node: Node) -> Ref:
        if node.kind is Kind.SPLAT:
            return visit(node.args[0])
        if node.kind is Kind.LITERAL:
            return "number", node.params["value"], str(node.dtype)
        if node.kind is Kind.BLOCK and node not in given:
            if node.operation in SAME_ORDER:
                return visit(node.args[0])
            operands = tuple(visit(a) for a in node.args)
            program.ops.append((node.primitive, node.params, operands))
            return "op", len(program.ops) - 1
        if node.on_leaf:
            program.inputs.append(node)
            return "input", len(program.inputs) - 1
        program.scalars.append(node)
        return "scalar", len(program.scalars) - 1

    for result in results:
        reduced, old = result.kind is Kind.REDUCED, targets.get(result)
        value, needed = (result.args[0] if reduced else result), None
        if old is not None and _keeps(value, old):
            kept = int(value.args[2] is old)  # the predicate's value for which nothing changes
            needed, value = (visit(value.args[0]), 1 - kept), value.args[2 - kept]
        place_of_old = None if old is None else visit(old)[1]
        reduction = REDUCTIONS[result.operation] if reduced else None
        program.roots.append(Root(visit(value), needed, place_of_old, str(result.dtype), reduction))
    program.loads = _needed_inputs(program)
    return program


def _keeps(value: Node, old: Node) -> bool:
    """Whether `value` selects between `old` itself and something new, by a scalar."""
    return (
        value.primitive is lax.select_n_p
        and len(value.args) == 3
        and value.args[0].kind in (Kind.SPLAT, Kind.OUTSIDE, Kind.INPUT)
        and not value.args[0].on_leaf
        and (value.args[1] is old) != (value.args[2] is old)
    )


def _needed_inputs(program: Program) -> list[Predicate | None]:
    """When each input is read: always, or where one scalar has one value."""
    never = object()
    needs: dict[Ref, Any] = {}

    def need(ref: Ref, when: Predicate | None) -> None:
        needs[ref] = when if needs.get(ref, never) in (never, when) else None

    for root in program.roots:
        need(root.value, root.needed)
    for i in reversed(range(len(program.ops))):
        primitive, _, operands = program.ops[i]
        when = needs.get(("op", i))
        if (
            primitive is lax.select_n_p
            and operands[0][0] == "scalar"
            and len(operands) == 3
            and when is None
        ):
            need(operands[1], (operands[0], 0))
            need(operands[2], (operands[0], 1))
        else:
            for operand in operands:
                need(operand, when)
    return [needs.get(("input", i)) for i in range(len(program.inputs))]


def evaluate(
    program: Program,
    blocks: Sequence[Any],
    scalars: Sequence[Any],
    shape: tuple[int, ...],
    rewritten: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> list[Any]:
    """The roots' values for one block: the only place where a kernel does arithmetic.

    Args:
      program: what to compute.
      blocks: its inputs, each of this `shape`.
      scalars: its scalars.
      shape: of a block; `()` for a single element.
      rewritten: what the backend lacks, in terms of what it has: of operands and parameters.
    """
    done: list[Any] = []

    def get(ref: Ref) -> Any:
        if ref[0] == "input":
            return blocks[ref[1]]
        if ref[0] == "op":
            return done[ref[1]]
        if ref[0] == "scalar":
            return scalars[ref[1]]
        return jnp.asarray(ref[1], ref[2])

    def wide(ref: Ref) -> Any:
        return jnp.broadcast_to(get(ref), shape)

    for primitive, params, operands in program.ops:
        values = [wide(ref) for ref in operands]
        plain = {k: None if k == "sharding" else v for k, v in params.items()}
        if primitive.name in rewritten:
            done.append(rewritten[primitive.name](*values, **plain))
        elif primitive.name in _REWRITTEN:
            done.append(_REWRITTEN[primitive.name](*values))
        else:
            done.append(primitive.bind(*values, **plain))
    return [wide(root.value) for root in program.roots]


# What all GPU lowerings lack, in terms of what they have.
_REWRITTEN: dict[str, Callable[..., Any]] = {
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "square": lambda x: x * x,
    "sign": lambda x: jnp.where(x > 0, 1, jnp.where(x < 0, -1, x)).astype(x.dtype),
    "copy": lambda x: x,
    "stop_gradient": lambda x: x,
}


def identity_of(reduction: str, dtype: Any = np.float32) -> Any:
    """What leaves a reduction as it is."""
    return np.asarray({"sum": 0.0, "max": -np.inf, "min": np.inf}[reduction], dtype)
