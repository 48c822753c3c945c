"""Measurements of the optimizers' programs; see README.md for the commands."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
