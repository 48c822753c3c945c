"""Times steps that take turns in one process, each drained before the next begins.

A machine that is busy, or slows down as it warms, then does so to all of them alike: what is
compared was measured at the same time, and what is quoted alone is the less certain number.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# Does so many steps, and returns when the last of them is done.
Run = Callable[[int], object]

# Eight times the last cache of a common server, five times that of an H200.
COPIED_PARAMETERS = 2**26

# A CPU's step is long beside the call of it. A training never waits for a GPU between steps.
STEPS_PER_TURN = {"cpu": 1, "gpu": 10}

# The first pays for compiling, the second for memory that was never touched.
DROPPED_TURNS = 2

# Threads that wait for more work may spin for some milliseconds, on cores that the next one needs.
REST_SECONDS = 0.02


@dataclass(frozen=True)
class Times:
    """What one step took.

    Attributes:
      seconds: of a step, a number for each turn.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the turns took longer."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range over the turns."""
        return interquartile_range(self.seconds)


def interquartile_range(values: Sequence[float]) -> float:
    """Half of the values lie within one of this width."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def interleave(
    runs: Mapping[str, Run],
    *,
    repeats: int,
    steps_per_turn: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    rest: Callable[[float], object] = time.sleep,
) -> dict[str, Times]:
    """Times of each run, in turns A B C A B C; the first turns are not counted.

    Args:
      runs: what to time, in the order of their turns.
      repeats: turns that count, at least 2.
      steps_per_turn: steps between drains. On a GPU several, which hides the latency of a launch
        as a training does.
      clock: seconds since some time.
      rest: waits for so many seconds, before each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(DROPPED_TURNS + repeats):
        for name, run in runs.items():
            rest(REST_SECONDS)
            begin = clock()
            run(steps_per_turn)
            seconds[name].append((clock() - begin) / steps_per_turn)
    return {name: Times(tuple(times[DROPPED_TURNS:])) for name, times in seconds.items()}


def donated(step: Callable[..., tuple[Any, Any]], params: Any, state: Any, grads: Any) -> Run:
    """Runs `step(params, state, grads) -> (params, state)`, the first two in place."""
    jitted = jax.jit(step, donate_argnums=(0, 1))

    def run(steps: int) -> None:
        nonlocal params, state
        for _ in range(steps):
            params, state = jitted(params, state, grads)
        jax.block_until_ready((params, state))

    return run


def copying() -> Run:
    """Reads and writes one large array, in place as the parameters are: the machine's bandwidth.

    A copy to elsewhere would be slower on a CPU, which also loads what it will overwrite.
    """
    return donated(lambda x, state, _: (-x, state), jnp.ones(COPIED_PARAMETERS), (), ())


def copied_bytes() -> int:
    """Read and written by a step of `copying`."""
    return 2 * 4 * COPIED_PARAMETERS
