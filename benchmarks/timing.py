"""Measurement of steps that take turns in one process.

Each turn waits for its results before the next turn begins. If the machine is busy, or slows down
as it gets warm, this affects all steps equally. Ratios of times from the same turns are therefore
more reliable than single times.
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

# Runs a number of steps, and returns when the last one is complete.
Run = Callable[[int], object]
# Runs one turn, and returns the seconds per step.
Turn = Callable[[], float]

Name = TypeVar("Name")

# This is 8 times the last-level cache of a common server, and 5 times that of an H200.
COPIED_PARAMETERS = 2**26

# On a CPU, a step takes much longer than its call. On a GPU, training does not wait between steps.
STEPS_PER_TURN = {"cpu": 1, "gpu": 10}

# The bytes that a copy reads and writes for each float32.
BYTES_PER_COPIED = 2 * 4

# The first turn includes compilation, the second the first access to new memory.
DROPPED_TURNS = 2

# Idle threads may spin for some milliseconds, on cores that the next turn needs.
REST_SECONDS = 0.02


@dataclass(frozen=True)
class Times:
    """The times of one step.

    Attributes:
      seconds: the seconds per step, for each turn.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the turns."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range over the turns."""
        return interquartile_range(self.seconds)

    def relative_to(self, other: "Times") -> tuple[float, float]:
        """Return the median and the interquartile range of the ratios of the same turns."""
        ratios = [x / y for x, y in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), interquartile_range(ratios)

    def row(self, name: str = "") -> dict[str, Any]:
        """Return the median, the spread and all times in milliseconds, for a row of results."""
        return {
            f"{name or 'median_'}ms": 1e3 * self.median,
            f"{name}spread_ms": 1e3 * self.spread,
            f"{name}times_ms": [1e3 * seconds for seconds in self.seconds],
        }


def interquartile_range(values: Sequence[float]) -> float:
    """Return the width of the interval from the first to the third quartile."""
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
    """Time each run, in turns A B C A B C; the first turns don't count.

    Args:
      runs: the runs to time, in the order of their turns.
      repeats: the number of turns that count, at least 2.
      steps_per_turn: the number of steps before the results are waited for. On a GPU, several steps
        hide the latency of a launch, as in training.
      clock: returns the time in seconds.
      rest: waits for a number of seconds, before each turn.
    """

    def turn(run: Run) -> float:
        rest(REST_SECONDS)
        return stopwatch(run, steps_per_turn, clock) / steps_per_turn

    turns = {name: partial(turn, run) for name, run in runs.items()}
    return by_turns(turns, repeats=repeats, dropped=DROPPED_TURNS)


def by_turns(turns: Mapping[Name, Turn], *, repeats: int, dropped: int) -> dict[Name, Times]:
    """Time each of them, in turns A B C A B C; the first `dropped` turns don't count."""
    seconds: dict[Name, list[float]] = {name: [] for name in turns}
    for _ in range(dropped + repeats):
        for name, turn in turns.items():
            seconds[name].append(turn())
    return {name: Times(tuple(times[dropped:])) for name, times in seconds.items()}


def stopwatch(run: Run, steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the seconds of all these steps together."""
    begin = clock()
    run(steps)
    return clock() - begin


@dataclass
class InPlace:
    """A run of a compiled `program(params, state, grads) -> (params, state)`, a call per step.

    Attributes:
      program: the program, which donates its first two arguments.
      params: the parameters after the last call.
      state: the optimizer's state after the last call.
      grads: the gradients of every call.
    """

    program: Callable[..., tuple[Any, Any]]
    params: Any
    state: Any
    grads: Any

    def __call__(self, steps: int) -> None:
        """Run a number of steps and wait for the results."""
        for _ in range(steps):
            self.params, self.state = self.program(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))


def donated(step: Callable[..., tuple[Any, Any]], params: Any, state: Any, grads: Any) -> InPlace:
    """Return a run of `step(params, state, grads)` with donated parameters and state."""
    return InPlace(jax.jit(step, donate_argnums=(0, 1)), params, state, grads)


def in_loop(step: Callable[..., tuple[Any, Any]], steps: int) -> Callable[..., tuple[Any, Any]]:
    """Return a program that runs `step(params, state, grads)` a number of times in a loop.

    A call of a program takes time for each of its arguments. For the hundreds of arrays of a
    network, this is more than the step of a GPU takes. Training has this cost only once for
    gradient and step together, so it is not counted as part of a step.
    """

    def program(params, state, grads):
        def body(_, carried):
            params, state = carried
            # Otherwise XLA moves computation that depends on the gradients only out of the loop.
            params, varying = lax.optimization_barrier((params, grads))
            return step(params, state, varying)

        return lax.fori_loop(0, steps, body, (params, state))

    return program


def per_step(run: Run, steps_per_call: int, clock: Callable[[], float] = time.perf_counter) -> Turn:
    """Return a turn that times a program from `in_loop` without the overhead of its call.

    The turn subtracts the time of one call from the time of two calls.

    Args:
      run: runs a number of calls.
      steps_per_call: the number of steps in each call.
      clock: returns the time in seconds.
    """

    def turn() -> float:
        once = stopwatch(run, 1, clock)
        return (stopwatch(run, 2, clock) - once) / steps_per_call

    return turn


def copying() -> Run:
    """Return a run that reads and writes one large array, to measure the memory's bandwidth.

    The array is written in place, like the parameters. A copy to another array would be slower on
    a CPU, which also loads the memory that it overwrites.
    """
    return donated(copy_step, jnp.ones(COPIED_PARAMETERS), (), ())


def copy_step(x: jax.Array, state: Any, grads: Any) -> tuple[jax.Array, Any]:
    """Negate an array; this is the step of `copying`."""
    del grads
    return -x, state


def copied_bytes() -> int:
    """Return the bytes that a step of `copying` reads and writes."""
    return BYTES_PER_COPIED * COPIED_PARAMETERS
