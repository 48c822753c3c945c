"""Measurements of the optimizers' programs; see README.md for the commands."""
