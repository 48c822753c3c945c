"""Comparison of fused steps with their chain, and of both with float64, on this device."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import CHAIN, CONTENDERS
from benchmarks.gpu.tasks import Began, Case, Found, Job, Message, Task
from benchmarks.leaf_sets import Leaves
from pallas_kernels import fuse

# The steps contain two rounds of lookahead.
STEPS = 10
# The parameters are about as large as their updates. In larger parameters, an error of the updates
# would be lost in rounding.
SIZE = 0.01

# Limits of errors, relative to the largest value of an array. The chain has the same scalars as the
# fused step, but it sums in another order and rounds roots and quotients differently.
FROM_CHAIN = 1e-5
# The error to float64 may exceed twice the chain's error by this.
FROM_FLOAT64 = 1e-6

Program = Callable[..., tuple[Any, Any]]


class Numerics:
    """The steps of all kernels, of the chain, and of the chain in float64 on the CPU."""

    def __init__(self, job: Job, submit: Callable[[Callable[[], Program]], Future[Program]]):
        self.job, self.submit = job, submit
        self.references: dict[str, tuple[Future[Program], Future[Program]]] = {}
        self.params, self.grads = arrays(job.ragged)

    def prepare(self, case: Case) -> Future[Program]:
        """Begin to compile the case's step, and once per optimizer its references."""
        if case.optimizer not in self.references:
            with in_float64():
                exact = self.submit(self.lower(case.optimizer, CHAIN).compile)
            chain = self.submit(self.lower(case.optimizer, CHAIN).compile)
            self.references[case.optimizer] = chain, exact
        return self.submit(self.lower(case.optimizer, case.kernels).compile)

    def lower(self, optimizer: str, kernels: str) -> jax.stages.Lowered:
        """Lower a step for the arrays that it will receive."""
        step = fuse(CONTENDERS[optimizer].tx, backend=self.job.kernels[kernels]).step
        return jax.jit(step).lower(*self.start(optimizer), on_device(self.grads[0]))

    def start(self, optimizer: str) -> tuple[Any, Any]:
        """Return parameters and state before the first step."""
        contender = CONTENDERS[optimizer]
        params = contender.hold(on_device(self.params))
        return params, contender.tx.init(params)

    def measure(self, task: Task, programs: Mapping[Case, Program]) -> Iterator[Message]:
        """Yield a row for each case."""
        yield Began(task.cases[0])
        chain, exact = (future.result() for future in self.references[task.optimizer])
        by_chain = self.run(task.optimizer, chain)
        with in_float64():
            by_exact = self.run(task.optimizer, exact)
        for case in task.cases:
            yield Began(case)
            fused = self.run(task.optimizer, programs[case])
            yield Found(case, compare(fused, by_chain, by_exact))

    def run(self, optimizer: str, program: Program) -> list[np.ndarray]:
        """Return all arrays of parameters and state after the steps."""
        params, state = self.start(optimizer)
        for grads in self.grads:
            params, state = program(params, state, on_device(grads))
        return [np.asarray(x) for x in jax.tree.leaves((params, state))]


@contextlib.contextmanager
def in_float64() -> Generator[None]:
    """Create and run everything inside of this context in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def on_device(tree: Any) -> Any:
    """Copy a tree to the device, in the default precision of floats."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), tree)


def arrays(leaves: Leaves) -> tuple[Any, list[Any]]:
    """Return parameters and a gradient for each step; the gradients grow from step to step."""
    random = np.random.default_rng(0)

    def normal(size: float) -> Any:
        return {
            name: np.float32(size) * random.standard_normal(leaf.shape, np.float32)
            for name, leaf in leaves.items()
        }

    return normal(SIZE), [normal(size) for size in np.geomspace(0.03, 1, STEPS)]


def compare(
    fused: Sequence[np.ndarray], chain: Sequence[np.ndarray], exact: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Return the differences between these results of the same steps, and whether they pass."""
    to_chain, to_exact, chain_to_exact = (
        max(difference(x, y) for x, y in zip(ours, expected, strict=True))
        for ours, expected in ((fused, chain), (fused, exact), (chain, exact))
    )
    passed = to_chain <= FROM_CHAIN and to_exact <= 2 * chain_to_exact + FROM_FLOAT64
    return {
        "to_chain": to_chain,
        "to_float64": to_exact,
        "chain_to_float64": chain_to_exact,
        "passed": passed,
    }


def difference(ours: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest expected value.

    The difference is infinite if a value is not finite, and for integers that are not equal.
    """
    if not np.issubdtype(expected.dtype, np.floating):
        return 0.0 if np.array_equal(ours, expected) else np.inf
    if not np.all(np.isfinite(ours)):
        return np.inf
    wide = expected.astype(np.float64)
    largest = np.max(np.abs(wide), initial=0)
    error = np.max(np.abs(ours - wide), initial=0)
    return float(error / largest) if largest else float(error and np.inf)
