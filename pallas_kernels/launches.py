"""The launches of a phase: which leaves share one, and how partial statistics are combined.

The code of a launch grows with the number of its leaves, and its compile time grows faster. But
launches of equal layouts are compiled once, and the layers of a network repeat. So equal leaves are
distributed over equal launches, and the remaining leaves get separate launches.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.graph import Node
from pallas_kernels.layout import PACKS, Form, Layout, PartialReduction, Slot
from pallas_kernels.program import Body, Program

LEAVES_PER_LAUNCH = 33
# We accept this many extra launches if fewer different kernels are compiled then.
EXTRA_LAUNCHES = 1

# One block for all partial statistics of a large leaf would leave the GPU idle, so they are split
# into tiles of at least this many. With many large leaves the GPU is busy anyway, so a phase has at
# most so many blocks more than statistics.
TILE = 4096
EXTRA_TILES = 64


@dataclass(frozen=True, eq=False)
class Launch:
    """A layout, and the nodes of its operands and results.

    Attributes:
      layout: the layout.
      programs: the programs of its leaves, in order.
      packs: the scalars of each pack.
    """

    layout: Layout
    programs: tuple[Program, ...]
    packs: tuple[tuple[Node, ...], ...]

    @property
    def inputs(self) -> list[Node]:
        """The operands after the packs."""
        return [node for program in self.programs for node in program.inputs]

    @property
    def stored(self) -> list[Node]:
        """The results that are leaves."""
        return [node for program in self.programs for node in program.stored]


@dataclass(frozen=True, eq=False)
class Phase:
    """Launches that do not wait for each other.

    Attributes:
      launches: the launches.
      reduction: the launch that combines their partial statistics, if they compute any.
      statistics: the statistics that its results contain, in order.
    """

    launches: tuple[Launch, ...]
    reduction: PartialReduction | None
    statistics: tuple[Node, ...]

    @property
    def programs(self) -> list[Program]:
        """The programs of all launches."""
        return [program for launch in self.launches for program in launch.programs]


def make_phase(programs: Sequence[Program], widths: tuple[int, ...]) -> Phase:
    """Return the phase that runs the programs (at least one), in blocks of these widths."""
    launches = tuple(_launch(group, widths) for group in share_launches(programs))
    reduction, statistics = _reduce_partials([x for x in launches if x.layout.columns])
    return Phase(launches, reduction, statistics)


def share_launches(programs: Sequence[Program]) -> list[list[Program]]:
    """Return the programs of each launch."""
    alike: dict[tuple[int, Body], list[Program]] = {}
    for program in programs:
        alike.setdefault((program.size, program.body), []).append(program)
    groups = list(alike.values())
    fewest = -(-len(programs) // LEAVES_PER_LAUNCH)

    def different_leaves(copies: int) -> int:
        return sum(len(group) // copies + len(group) % copies for group in groups)

    dealt = ([*_deal(groups, n)] for n in sorted(range(1, fewest + 1), key=different_leaves))
    return next(launches for launches in dealt if len(launches) <= fewest + EXTRA_LAUNCHES)


def _deal(groups: Sequence[Sequence[Program]], copies: int) -> Iterator[list[Program]]:
    """Yield launches that repeat `copies` times, then launches of the remaining leaves."""
    shares: list[list[Program]] = [[] for _ in range(copies + 1)]
    for group in groups:
        each = len(group) // copies
        for i in range(copies):
            shares[i] += group[i * each : (i + 1) * each]
        shares[-1] += group[copies * each :]
    for share in shares:
        for start in range(0, len(share), LEAVES_PER_LAUNCH):
            yield share[start : start + LEAVES_PER_LAUNCH]


def _launch(programs: Sequence[Program], widths: tuple[int, ...]) -> Launch:
    by_body: dict[Body, list[Program]] = {}
    for program in programs:
        by_body.setdefault(program.body, []).append(program)
    packs: tuple[list[Node], ...] = tuple([] for _ in PACKS)
    forms = tuple(
        Form(body, tuple(p.size for p in alike), tuple(_slots(body, alike, packs)))
        for body, alike in by_body.items()
    )
    ordered = tuple(itertools.chain(*by_body.values()))
    return Launch(Layout(forms, widths), ordered, tuple(map(tuple, packs)))


def _slots(body: Body, programs: Sequence[Program], packs: Sequence[list[Node]]) -> Iterator[Slot]:
    """Yield the slots of a form's scalars; add the scalars to the packs."""
    for i, dtype in enumerate(body.scalars):
        nodes = [program.scalars[i] for program in programs]
        shared = all(node is nodes[0] for node in nodes)
        pack = 0 if jnp.issubdtype(jnp.dtype(dtype), jnp.floating) else 1
        if shared and nodes[0] in packs[pack]:  # another body of the launch has it
            yield Slot(pack, packs[pack].index(nodes[0]), False, dtype)
        else:
            yield Slot(pack, len(packs[pack]), not shared, dtype)
            packs[pack].extend(nodes[:1] if shared else nodes)


class _Statistic(NamedTuple):
    """A statistic, and the position of its parts in the partial statistics of a launch."""

    node: Node
    reduction: str
    column: int  # its index among the statistics of its leaf
    first: int  # index of its first part
    parts: int


def _statistics(launch: Launch) -> list[_Statistic]:
    counts = launch.layout.blocks_of_leaves
    first = [0, *itertools.accumulate(counts)]
    return [
        _Statistic(node, reduction, column, column * first[-1] + first[leaf], counts[leaf])
        for leaf, program in enumerate(launch.programs)
        for column, (node, reduction) in enumerate(
            zip(program.reduced, program.body.reductions, strict=True)
        )
    ]


def _reduce_partials(
    launches: Sequence[Launch],
) -> tuple[PartialReduction | None, tuple[Node, ...]]:
    if not launches:
        return None, ()
    statistics = [_statistics(launch) for launch in launches]
    all_statistics = [*itertools.chain(*statistics)]
    tile = tile_length([s.parts for s in all_statistics])
    kinds = sorted({s.reduction for s in all_statistics})
    # XLA can read the results as whole slices in this order: by column, then by creation.
    ordered = sorted(all_statistics, key=lambda s: (s.column, s.node.index))
    tiles = [-(-s.parts // tile) for s in ordered]
    starts = itertools.accumulate(tiles, initial=0)
    index = {s.node: start for s, start in zip(ordered, starts, strict=False)}
    tables = [
        [
            (s.first + at, min(tile, s.parts - at), kinds.index(s.reduction), index[s.node] + i)
            for s in each
            for i, at in enumerate(range(0, s.parts, tile))
        ]
        for each in statistics
    ]
    rows = (0, *itertools.accumulate(map(len, tables)))
    table = tuple(itertools.chain(*tables))
    nodes = tuple(s.node for s in ordered)
    return PartialReduction(rows, table, tuple(kinds), tuple(tiles)), nodes


def tile_length(parts: Sequence[int]) -> int:
    """Return how many of a statistic's parts a block combines, given the parts of each."""
    length = TILE
    while sum((n - 1) // length for n in parts) > EXTRA_TILES:
        length *= 2
    return length
