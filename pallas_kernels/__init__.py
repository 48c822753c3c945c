"""Pallas GPU kernels for Optax chains: `fuse` runs a chain, `explain` shows how it will run."""

from pallas_kernels.explain import Report, explain
from pallas_kernels.fuse import FusedTransformation, fuse

__all__ = ["FusedTransformation", "Report", "explain", "fuse"]
