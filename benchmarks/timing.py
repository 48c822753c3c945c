"""Times steps that take turns in one process, each drained before the next begins.

A machine that is busy, or slows down as it warms, then does so to all of them alike: what is
compared was measured at the same time, and what is quoted alone is the less certain number.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

# Does so many steps, and returns when the last of them is done.
Run = Callable[[int], object]
# Takes its turn, and tells what a step of it took.
Turn = Callable[[], float]

Name = TypeVar("Name")

# Eight times the last cache of a common server, five times that of an H200.
COPIED_PARAMETERS = 2**26

# A CPU's step is long beside the call of it. A training never waits for a GPU between steps.
STEPS_PER_TURN = {"cpu": 1, "gpu": 10}

# Read and written, of float32.
BYTES_PER_COPIED = 2 * 4

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

    def turn(run: Run) -> float:
        rest(REST_SECONDS)
        return stopwatch(run, steps_per_turn, clock) / steps_per_turn

    turns = {name: partial(turn, run) for name, run in runs.items()}
    return by_turns(turns, repeats=repeats, dropped=DROPPED_TURNS)


def by_turns(turns: Mapping[Name, Turn], *, repeats: int, dropped: int) -> dict[Name, Times]:
    """Times of each, in turns A B C A B C; the first `dropped` are not counted."""
    seconds: dict[Name, list[float]] = {name: [] for name in turns}
    for _ in range(dropped + repeats):
        for name, turn in turns.items():
            seconds[name].append(turn())
    return {name: Times(tuple(times[dropped:])) for name, times in seconds.items()}


def stopwatch(run: Run, steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """The seconds of all these steps."""
    begin = clock()
    run(steps)
    return clock() - begin


@dataclass
class InPlace:
    """Runs a compiled `program(params, state, grads) -> (params, state)`, a call for each step.

    Attributes:
      program: takes the memory of its first two arguments for its results.
      params: of the last call, as is the state.
    """

    program: Callable[..., tuple[Any, Any]]
    params: Any
    state: Any
    grads: Any

    def __call__(self, steps: int) -> None:
        """Returns when the results are there."""
        for _ in range(steps):
            self.params, self.state = self.program(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))


def donated(step: Callable[..., tuple[Any, Any]], params: Any, state: Any, grads: Any) -> InPlace:
    """Runs `step(params, state, grads) -> (params, state)`, the first two in place."""
    return InPlace(jax.jit(step, donate_argnums=(0, 1)), params, state, grads)


def in_loop(step: Callable[..., tuple[Any, Any]], steps: int) -> Callable[..., tuple[Any, Any]]:
    """`step(params, state, grads)`, done so many times inside of one program.

    A call of a program takes time for each array that it is given, for a network's hundreds longer
    than a GPU's step. A training pays that once, for gradients and step together.
    """

    def program(params, state, grads):
        def body(_, carried):
            params, state = carried
            # Else XLA computes once, before the loop, what depends on the gradients alone.
            params, varying = lax.optimization_barrier((params, grads))
            return step(params, state, varying)

        return lax.fori_loop(0, steps, body, (params, state))

    return program


def per_step(run: Run, steps_per_call: int, clock: Callable[[], float] = time.perf_counter) -> Turn:
    """Times a program made by `in_loop` by two calls less one: what a call costs is no step's.

    Args:
      run: does so many calls.
      steps_per_call: the steps in each of them.
      clock: seconds since some time.
    """

    def turn() -> float:
        once = stopwatch(run, 1, clock)
        return (stopwatch(run, 2, clock) - once) / steps_per_call

    return turn


def copying() -> Run:
    """Reads and writes one large array, in place as the parameters are: the machine's bandwidth.

    A copy to elsewhere would be slower on a CPU, which also loads what it will overwrite.
    """
    return donated(copy_step, jnp.ones(COPIED_PARAMETERS), (), ())


def copy_step(x: jax.Array, state: Any, grads: Any) -> tuple[jax.Array, Any]:
    """The step of `copying`."""
    del grads
    return -x, state


def copied_bytes() -> int:
    """Read and written by a step of `copying`."""
    return BYTES_PER_COPIED * COPIED_PARAMETERS
