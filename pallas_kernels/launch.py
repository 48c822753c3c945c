"""The backends, and how a phase runs on one; other modules don't depend on a backend."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels import mosaic, triton
from pallas_kernels.layout import Layout, PartialReduction
from pallas_kernels.ops import Operations
from pallas_kernels.program import Program
from pallas_kernels.trace import Node

# For each backend, the module of its kernels, and whether they run in Pallas' interpreter.
BACKENDS: Mapping[str, tuple[Any, bool]] = {
    "auto": (triton, False),  # until JAX removes Triton, or Mosaic is measured to be faster
    "triton": (triton, False),
    "mosaic": (mosaic, False),
    "interpret": (triton, True),
    "interpret-mosaic": (mosaic, True),
}
# The backend without kernels: it runs the chain.
CHAIN = "xla"


def check(backend: str, *, or_chain: bool) -> None:
    """Refuse a name that is not a backend's."""
    known = [*BACKENDS, *([CHAIN] if or_chain else [])]
    if backend not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")


def operations(backend: str) -> Operations:
    """Return what the backend's kernels can compute."""
    return BACKENDS[backend][0].OPERATIONS


def run(
    backend: str,
    phase: Sequence[Sequence[Program]],
    array: Callable[[Node], jax.Array],
    scalar: Callable[[Node], Any],
    kernel_cache: dict[Any, Callable[..., Any]],
) -> dict[Node, jax.Array]:
    """Run the launches of one phase; return all results, leaves as flat arrays.

    Args:
      backend: one of `BACKENDS`.
      phase: for each launch, its programs (at least one).
      array: a function that returns a leaf's value as a flat array.
      scalar: a function that returns any other value.
      kernel_cache: kernels that this step has made so far.
    """
    kernels, interpret = BACKENDS[backend]
    found: dict[Node, jax.Array] = {}
    waiting: dict[Layout, jax.Array] = {}
    for programs in phase:
        layout = Layout(programs, scalar, kernels.WIDTHS)
        results = kernels.launch(layout, *layout.operands(array), kernel_cache, interpret=interpret)
        stored = [node for program in layout.programs for node, _ in program.stored()]
        found |= dict(zip(stored, results, strict=False))
        if layout.columns:
            waiting[layout] = results[-1]
    if waiting:
        work = PartialReduction(list(waiting))
        statistics = kernels.reduce_partials(
            work, list(waiting.values()), kernel_cache, interpret=interpret
        )
        found |= {node: statistics[place] for place, node in enumerate(work.nodes)}
    return found
