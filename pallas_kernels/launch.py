"""Who launches: the only place that knows the backends."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from pallas_kernels import mosaic, triton


class Backend(NamedTuple):
    """What runs programs.

    Attributes:
      run: all launches of a phase, see `triton.run`.
      supports: whether its kernels can compute a primitive.
    """

    run: Callable[..., Any]
    supports: Callable[[str], bool]


_TRITON = Backend(partial(triton.run, interpret=False), triton.supports)
_MOSAIC = Backend(partial(mosaic.run, interpret=False), mosaic.supports)

BACKENDS: Mapping[str, Backend] = {
    "auto": _TRITON,  # until JAX drops it, or Mosaic's kernels are measured to be faster
    "triton": _TRITON,
    "mosaic": _MOSAIC,
    "interpret": Backend(partial(triton.run, interpret=True), triton.supports),
    "interpret-mosaic": Backend(partial(mosaic.run, interpret=True), mosaic.supports),
}
# The one that has no kernels.
CHAIN = "xla"


def check(backend: str, *, or_chain: bool) -> None:
    """Refuses a name that stands for no backend."""
    known = [*BACKENDS, *([CHAIN] if or_chain else [])]
    if backend not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
