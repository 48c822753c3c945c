"""Measurements on one GPU within minutes: numerics first, then times, in order of importance.

The command writes the files and watches the time. A separate process uses the GPU. If that process
fails, hangs or is killed, the command continues.
"""

from benchmarks.gpu.command import main

__all__ = ["main"]
