"""The choice of leaves that share a launch: few launches, and as many equal ones as possible.

The code of a launch grows with the number of its leaves, and its compile time grows faster. But
launches of the same structure are compiled once, and the layers of a network repeat. So equal
leaves are distributed over equal launches, and the remaining leaves get separate launches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pallas_kernels.program import Program

LEAVES_PER_LAUNCH = 33
# How many launches more than the fewest possible we accept, to compile fewer different ones.
MORE_LAUNCHES = 1


def launches(programs: Sequence[Program]) -> list[list[Program]]:
    """Return the programs of each launch."""
    alike: dict[Any, list[Program]] = {}
    for program in programs:
        alike.setdefault((program.size, program.signature()), []).append(program)
    groups = list(alike.values())
    fewest = -(-len(programs) // LEAVES_PER_LAUNCH)

    def different_leaves(equal: int) -> int:
        return sum(len(group) // equal + len(group) % equal for group in groups)

    for equal in sorted(range(1, fewest + 1), key=different_leaves):
        dealt = [*_deal(groups, equal)]
        if len(dealt) <= fewest + MORE_LAUNCHES:
            return dealt
    return []


def _deal(groups: Sequence[Sequence[Program]], equal: int) -> Iterator[list[Program]]:
    """Yield launches that repeat `equal` times, then launches of the remaining leaves."""
    shares: list[list[Program]] = [[] for _ in range(equal + 1)]
    for group in groups:
        each = len(group) // equal
        for i in range(equal):
            shares[i] += group[i * each : (i + 1) * each]
        shares[-1] += group[equal * each :]
    for share in shares:
        for start in range(0, len(share), LEAVES_PER_LAUNCH):
            yield share[start : start + LEAVES_PER_LAUNCH]
