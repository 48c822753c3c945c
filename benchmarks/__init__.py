"""Benchmarks of the optimizers; README.md lists the commands."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
