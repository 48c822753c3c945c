"""Times of a step: with all kernels, with and without graphs, and in PyTorch."""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers, timing
from benchmarks.contenders import CHAIN, CONTENDERS, REFERENCE
from benchmarks.gpu.tasks import COPY, PYTORCH, Began, Case, Found, Job, Message, Task
from benchmarks.leaf_sets import count
from pallas_kernels import fuse

# This forbids CUDA graphs. Otherwise XLA uses them for five launches or more.
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}

# The approximate bandwidth of an H200, and the bytes of Adam. Only the length of a turn depends on
# them.
BYTES_PER_SECOND, BYTES_PER_PARAMETER = 4e12, 28
# A call takes CPU time for each leaf. Its steps must take longer than this, or the GPU would wait.
LEAVES_PER_CALL = 160
# The number of PyTorch's steps in a turn, each launched from Python.
PEERS_STEPS = 10

# The first turn includes the first access to new memory.
DROPPED_TURNS = 1

# The limit of the difference between the parameters and the chain's after one call, relative to the
# largest parameter of a leaf. All steps have the same gradient, so their errors add up.
DRIFT = 1e-3

Program = Callable[..., tuple[Any, Any]]


@dataclass(frozen=True)
class Lowering:
    """A program that is traced and lowered once, and compiled with or without graphs.

    Only one thread at a time can trace, so tracing is not repeated.

    Attributes:
      lowered: the lowered program.
      lock: a lock for compilation, because two compilers must not read one program at once.
    """

    lowered: jax.stages.Lowered
    lock: threading.Lock = field(default_factory=threading.Lock)

    def compile(self, *, graphs: bool, **options: str) -> Program:
        """Compile the program with or without graphs, and with further options of XLA."""
        chosen: dict[str, str | bool] = {**options, **({} if graphs else NO_GRAPHS)}
        with self.lock:
            return self.lowered.compile(compiler_options=chosen)


@dataclass(frozen=True)
class Bench:
    """The arrays and reference steps that all tasks of one set of leaves share.

    Attributes:
      host: parameters and gradients in host memory.
      device: parameters and gradients in device memory.
      beside: the references that take turns with every task, by the name of their optimizers.
    """

    host: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
    device: tuple[dict[str, jax.Array], dict[str, jax.Array]]
    beside: dict[str, timing.Turn]


class Times:
    """The times of tasks; consecutive tasks of one set of leaves share its arrays."""

    def __init__(self, job: Job, submit: Callable[[Callable[[], Program]], Future[Program]]):
        self.job, self.submit = job, submit
        self.references: dict[str, Future[Program]] = {}
        self.lowering = functools.lru_cache(maxsize=1)(self.lower)
        self.bench = functools.lru_cache(maxsize=1)(self.set_up)

    def prepare(self, case: Case) -> Future[Program]:
        """Begin to compile the case's program, and once per set the references."""
        for reference in references(case.leaf_set):
            if reference.leaf_set not in self.references:
                self.references[reference.leaf_set] = self.compile(reference)
        if case in references(case.leaf_set) or case.kernels == PYTORCH:
            return self.references[case.leaf_set]
        return self.compile(case)

    def compile(self, case: Case) -> Future[Program]:
        """Begin to compile the case with or without graphs, from one lowering."""
        lowering = self.lowering(replace(case, graphs=True))
        return self.submit(functools.partial(lowering.compile, graphs=case.graphs))

    def lower(self, case: Case) -> Lowering:
        """Lower a loop of the case's steps, with donated parameters and state."""
        if case.optimizer == COPY:
            step, grads = timing.copy_step, ()
            params, state = jax.ShapeDtypeStruct((self.job.copied,), jnp.float32), ()
        else:
            contender, grads = CONTENDERS[case.optimizer], self.job.sets[case.leaf_set]
            step = fuse(contender.tx, backend=self.job.kernels[case.kernels]).step
            params = jax.eval_shape(contender.hold, grads)
            state = jax.eval_shape(contender.tx.init, params)
        program = timing.in_loop(step, self.steps(case.leaf_set))
        return Lowering(jax.jit(program, donate_argnums=(0, 1)).lower(params, state, grads))

    def steps(self, leaf_set: str) -> int:
        """Return the number of steps per call, so that a call takes longer than its launch."""
        if leaf_set == COPY:
            leaves, moved = 1, timing.BYTES_PER_COPIED * self.job.copied
        else:
            shapes = self.job.sets[leaf_set]
            leaves, moved = len(shapes), BYTES_PER_PARAMETER * count(shapes)
        seconds = self.job.seconds_per_call * (1 + leaves / LEAVES_PER_CALL)
        return math.ceil(seconds * BYTES_PER_SECOND / moved)

    def set_up(self, leaf_set: str) -> Bench:
        """Create the arrays of a set of leaves, and the turns of its references."""
        random, shapes = np.random.default_rng(0), self.job.sets.get(leaf_set, {})

        def normal() -> dict[str, np.ndarray]:
            return {name: random.standard_normal(x.shape, np.float32) for name, x in shapes.items()}

        host = normal(), normal()
        bench = Bench(host, jax.tree.map(jnp.asarray, host), {})
        for case in references(leaf_set):
            program = self.references[case.leaf_set]
            if program.exception() is None:
                calls = self.calls(case, program.result(), bench)
                bench.beside[case.optimizer] = self.turn(case, calls)
        return bench

    def calls(self, case: Case, program: Program, bench: Bench) -> timing.InPlace:
        """Return a run of the program with its own copy of parameters and state."""
        if case.optimizer == COPY:
            return timing.InPlace(program, jnp.ones(self.job.copied), (), ())
        contender, (params, grads) = CONTENDERS[case.optimizer], bench.device
        params = contender.hold(jax.tree.map(jnp.copy, params))
        return timing.InPlace(program, params, contender.tx.init(params), grads)

    def turn(self, case: Case, calls: timing.InPlace) -> timing.Turn:
        """Return a turn of a program."""
        return timing.per_step(calls, self.steps(case.leaf_set))

    def measure(self, task: Task, programs: Mapping[Case, Program]) -> Iterator[Message]:
        """Yield a row for each case, after all cases have taken turns."""
        yield Began(task.cases[0])
        bench, turns, drifts, expected = self.bench(task.leaf_set), {}, {}, None
        for case in task.cases:
            yield Began(case)
            if case.kernels == PYTORCH:
                turns[case] = peer_turn(case, bench)
                continue
            calls = self.calls(case, programs[case], bench)
            calls(1)
            if expected is None and case.kernels == CHAIN:
                expected = jax.tree.map(jnp.copy, calls.params)
            if expected is not None:
                drifts[case] = drift(calls.params, expected)
            turns[case] = self.turn(case, calls)
        times: dict[Any, timing.Times] = timing.by_turns(
            {**bench.beside, **turns}, repeats=self.job.repeats, dropped=DROPPED_TURNS
        )
        for case in task.cases:
            yield Found(case, self.row(times, case, drifts.get(case)))

    def row(
        self, times: Mapping[Any, timing.Times], case: Case, moved_apart: float | None
    ) -> dict[str, Any]:
        """Return the measured numbers of a case; `figures` derives the others."""
        reference = times.get(REFERENCE)
        return {
            "seconds": times[case].seconds,
            "copy_bytes_per_second": timing.BYTES_PER_COPIED * self.job.copied / times[COPY].median,
            "reference_seconds": reference and reference.median,
            "drift": moved_apart,
            "passed": moved_apart is None or moved_apart <= DRIFT,
        }


def references(leaf_set: str) -> tuple[Case, ...]:
    """Return the cases that take turns with all tasks of a set: a copy, and adamw."""
    copy = Case(COPY, COPY, CHAIN)
    return (copy,) if leaf_set == COPY else (copy, Case(leaf_set, REFERENCE, CHAIN))


def peer_turn(case: Case, bench: Bench) -> timing.Turn:
    """Return a turn of a baseline in PyTorch, whose steps are launched from Python."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    params, grads = ([*leaves.values()] for leaves in bench.host)
    run = peers.running(case.optimizer, params, grads, device=device)
    return lambda: timing.stopwatch(run, PEERS_STEPS) / PEERS_STEPS


def drift(params: Any, expected: Any) -> float:
    """Return the largest relative difference from the expected parameters.

    The differences in a leaf are relative to its largest expected value.
    """
    differences = jax.tree.map(_difference, params, expected)
    return float(np.max(jax.tree.leaves(differences)))  # the result is NaN if any difference is


@jax.jit
def _difference(x: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x - expected)) / jnp.max(jnp.abs(expected))
