"""Pallas GPU kernels made from Optax chains: `fuse` runs one, `explain` says how."""

from pallas_kernels.fuse import FusedTransformation, fuse
from pallas_kernels.report import Report, explain

__all__ = ["FusedTransformation", "Report", "explain", "fuse"]
