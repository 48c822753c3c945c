"""The backends: the names that users choose from, and modules that are loaded when first used."""

from collections.abc import Mapping
from dataclasses import dataclass

from pallas_kernels.backends.protocol import Kernels
from pallas_kernels.ops import MOSAIC, TRITON, Target

# The backend without kernels: it runs the chain.
CHAIN = "xla"


@dataclass(frozen=True)
class Backend:
    """A backend that has kernels.

    Attributes:
      target: what its kernels can compute.
      interpret: whether they run in Pallas' interpreter.
    """

    target: Target
    interpret: bool = False

    def load(self) -> Kernels:
        """Import the module that makes the kernels; this takes half a second."""
        if self.target is MOSAIC:
            from pallas_kernels.backends import mosaic

            return mosaic
        from pallas_kernels.backends import triton

        return triton


BACKENDS: Mapping[str, Backend] = {
    "auto": Backend(TRITON),  # until JAX removes Triton, or Mosaic is measured to be faster
    "triton": Backend(TRITON),
    "mosaic": Backend(MOSAIC),
    "interpret": Backend(TRITON, interpret=True),
    "interpret-mosaic": Backend(MOSAIC, interpret=True),
}


def check(backend: str, *, or_chain: bool) -> None:
    """Refuse a name that is not a backend's."""
    known = [*BACKENDS, *([CHAIN] if or_chain else [])]
    if backend not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
