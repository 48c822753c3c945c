"""All that can be measured on one GPU in minutes: numerics first, then times, worth most first.

The command keeps the files and the time; what touches the GPU runs in a process of its own, which
may fail, hang or be cut off without taking the rest along.
"""

from benchmarks.gpu.command import main

__all__ = ["main"]
