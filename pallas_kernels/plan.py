"""The plan of a step: phases of launches, cut from the graph at its reductions.

Leaves that are elementwise connected (a parameter, its gradient, its moments) form a component.
Each component has one `Program` for each phase. Programs of equal bodies share a kernel,
even on different leaves. A component that a kernel can't compute falls back to XLA, with a reason.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pallas_kernels import program
from pallas_kernels.graph import Graph, Kind, Node, dtype_name
from pallas_kernels.launches import Phase, make_phase
from pallas_kernels.ops import DTYPES, LONGEST_ROW, Target
from pallas_kernels.placement import Placement
from pallas_kernels.program import Program

_LARGEST = 2**31 - 1  # elements that a 32-bit index reaches


@dataclass(frozen=True, eq=False)
class Plan:
    """The launches of a step, in order.

    Attributes:
      phases: the launches. Each phase but the last computes statistics that later phases need.
      reasons: for each component that falls back to XLA, the reason.
    """

    phases: tuple[Phase, ...]
    reasons: Mapping[Node, str]


def plan(graph: Graph, in_place: int, target: Target, placement: Placement) -> Plan:
    """Decide what kernels compute, and in which phase; the rest falls back to XLA.

    Args:
      graph: the step.
      in_place: the number of leading results that may each reuse the memory of the argument with
        the same index.
      target: what the backend's kernels can compute.
      placement: the shardings of the leaves.
    """
    reachable = graph.reachable()
    largest = _largest(graph, reachable)
    reasons = _fallback_reasons(graph, reachable, largest, target, placement)
    # Only components with an argument become kernels: other arrays (a list of norms) are small.
    fused = {graph.component(n) for n in graph.inputs if n.on_leaf} - reasons.keys()

    def computed(nodes: Collection[Node], kind: Kind) -> dict[Node, list[Node]]:
        """Return the nodes of a kind that kernels compute, by component."""
        groups: dict[Node, list[Node]] = {}
        for node in nodes:
            if node.kind is kind and (component := _component(graph, node)) in fused:
                groups.setdefault(component, []).append(node)
        return groups

    statistics = computed(reachable, Kind.REDUCED)
    writes = computed(dict.fromkeys(graph.outputs), Kind.ELEMENTWISE)
    targets = _targets(graph, in_place)
    update = 1 + max((_level(n) for nodes in statistics.values() for n in nodes), default=-1)
    phases: list[list[Program]] = [[] for _ in range(update + 1)]
    for component in statistics | writes:
        reduced, written = statistics.get(component, []), writes.get(component, [])
        make = partial(
            program.make,
            size=placement.size(component, largest[component]),
            targets=targets,
            whole=largest[component].size,
        )
        passes = _passes(reduced, written, targets, make)
        for level, each in passes.items():
            phases[update if level is None else level].append(each)
    return Plan(tuple(make_phase(p, target.widths) for p in phases if p), reasons)


def _targets(graph: Graph, in_place: int) -> dict[Node, Node]:
    """Return the argument whose memory each result reuses."""
    targets: dict[Node, Node] = {}
    for result, argument in zip(graph.outputs[:in_place], graph.inputs, strict=False):
        same_form = (result.shape, result.dtype) == (argument.shape, argument.dtype)
        if argument.on_leaf and same_form and graph.component(result) is graph.component(argument):
            targets.setdefault(result, argument)
    return targets


def _passes(
    reduced: Sequence[Node],
    written: Sequence[Node],
    targets: Mapping[Node, Node],
    make: Callable[..., Program],
) -> dict[int | None, Program]:
    """Return a component's programs: one for each level of statistics, and the update (`None`).

    The last program for statistics also writes the results that are known by then, if that saves
    traffic. An example is Adam before a trust ratio: the update then reads the new moments, instead
    of the old moments and the gradient.
    """
    by_level: dict[int | None, list[Node]] = {}
    for node in reduced:
        by_level.setdefault(_level(node), []).append(node)
    passes: dict[int | None, Program] = {level: make(n) for level, n in by_level.items()}
    if written:
        passes[None] = make(written)
    if not reduced or not written:
        return passes

    last = max(map(_level, reduced))
    early = [n for n in written if n.level <= last and n in targets]
    late = [n for n in written if n not in early]
    if not early or not late:
        return passes
    sooner = {
        last: make([*by_level[last], *early]),
        None: make(late, given=early),
    }
    overwritten = {targets[n] for n in early}
    if overwritten.isdisjoint(sooner[None].inputs) and _moved(passes | sooner) < _moved(passes):
        return passes | sooner
    return passes


def _moved(passes: Mapping[int | None, Program]) -> int:
    return sum(each.bytes[0] for each in passes.values())


def _fallback_reasons(
    graph: Graph,
    reachable: Sequence[Node],
    largest: Mapping[Node, Node],
    target: Target,
    placement: Placement,
) -> dict[Node, str]:
    work = [n for n in reachable if n.kind in (Kind.ELEMENTWISE, Kind.REDUCED)]
    computed = {_component(graph, n) for n in work}
    reasons: dict[Node, str] = {}

    def fall_back(node: Node, why: str) -> None:
        if _component(graph, node) in computed:
            reasons.setdefault(_component(graph, node), why)

    reached, written = set(reachable), set(graph.outputs)
    for node, why in graph.escapes:
        if node in reached:
            fall_back(node, why)
    usable: set[Node] = set()  # most values have several readers
    for node in work:
        component = _component(graph, node)
        if component in reasons:
            continue
        why = _reason_against_operation(node, target)
        for value in (node, *node.args):
            if value not in usable and why is None:
                in_memory = value.kind is not Kind.ELEMENTWISE or value in written
                why = _reason_against_value(
                    value, component, largest[component], target, placement, in_memory=in_memory
                )
                if why is None:
                    usable.add(value)
        if why is not None:
            fall_back(node, why)
    return reasons


def _reason_against_operation(node: Node, target: Target) -> str | None:
    """Return why no kernel can compute the operation, or `None` if one can."""
    if node.kind is Kind.REDUCED:
        return None
    dtypes = [dtype_name(a.dtype) for a in node.args]
    if target.supports(node.operation, dtypes):
        return None
    return f"no kernel for {node.operation} of {' and '.join(dict.fromkeys(dtypes))}"


def _reason_against_value(
    node: Node,
    component: Node,
    largest: Node,
    target: Target,
    placement: Placement,
    *,
    in_memory: bool,
) -> str | None:
    """Return why no kernel of the component can use the value, or `None` if one can."""
    name = dtype_name(node.dtype)
    if node.kind is Kind.REDUCED:
        return None
    if name not in DTYPES:
        return f"no kernel for {name}"
    if not node.on_leaf:
        return None
    if in_memory and name not in target.in_memory:
        return f"no kernel reads or writes {name}"
    if (why := placement.reason(component, node)) is not None:
        return why
    if (size := placement.size(component, node)) > _LARGEST:
        return f"{size} elements are more than a 32-bit index reaches"
    return _reason_against_rows(node, largest)


def _reason_against_rows(node: Node, largest: Node) -> str | None:
    """Return why no kernel can compute a value that has one element for each row of a leaf."""
    if node.size == largest.size:
        return None
    row, rest = divmod(largest.size, node.size)
    if rest:
        return f"{largest.size} elements are not rows of {node.size} values"
    if row > LONGEST_ROW or row & (row - 1):
        return (
            f"no kernel for rows of {row}: their length must be a power of 2, {LONGEST_ROW} at most"
        )
    return None


def _largest(graph: Graph, reachable: Sequence[Node]) -> dict[Node, Node]:
    """Return for each component one of its largest values; the others have one element a row."""
    largest: dict[Node, Node] = {}
    for node in reachable:
        if node.on_leaf or node.kind is Kind.ELEMENTWISE:
            component = graph.component(node)
            if component not in largest or node.size > largest[component].size:
                largest[component] = node
    return largest


def _component(graph: Graph, node: Node) -> Node:
    """Return the component that computes the node; for a statistic, that of its operand."""
    return graph.component(node.args[0] if node.kind is Kind.REDUCED else node)


def _level(statistic: Node) -> int:
    """Return the level of a statistic's operand, which is the phase that can compute it."""
    return statistic.args[0].level
