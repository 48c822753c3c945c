"""Optimizer state and weights in fewer bits."""
