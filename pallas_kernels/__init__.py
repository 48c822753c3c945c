"""Pallas GPU kernels for Optax chains: `fuse` runs a chain, `explain` shows how it will run."""

from pallas_kernels.fuse import FusedTransformation, fuse
from pallas_kernels.report import Report, explain

__all__ = ["FusedTransformation", "Report", "explain", "fuse"]
