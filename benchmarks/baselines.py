"""Baselines in PyTorch: its own optimizers and those of `pytorch_optimizer`.

The extra `baselines` installs both packages. They are imported only when they run. If
`pytorch_optimizer` lacks one of our methods, the baseline is its nearest optimizer: one with as
many moments, or with the same outer loop. VRAdam, CaAdam and rotating lookahead have no baseline
there.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.optimizers import RATE
from benchmarks.results import cores
from benchmarks.timing import Run

# Ranger does not update the parameters before this step.
STEPS_BEFORE_RECTIFICATION = 5


class Baseline(NamedTuple):
    """An optimizer in PyTorch.

    Attributes:
      nearest: the nearest of our optimizers. The baseline must move at least as many bytes.
      package: the package that it comes from.
      make: creates the optimizer from the package and the parameters.
    """

    nearest: str
    package: str
    make: Callable[[Any, Sequence[Any]], Any]


def _adamw(*, foreach: bool, fused: bool) -> Callable[[Any, Sequence[Any]], Any]:
    return lambda torch, leaves: torch.optim.AdamW(leaves, RATE, foreach=foreach, fused=fused)


def _named(name: str) -> Callable[[Any, Sequence[Any]], Any]:
    return lambda package, leaves: getattr(package, name)(leaves, RATE)


def _lookahead(package: Any, leaves: Sequence[Any]) -> Any:
    return package.Lookahead(package.AdamW(leaves, RATE))


_OTHERS = "pytorch_optimizer"

BASELINES: dict[str, Baseline] = {
    "torch adamw, eager": Baseline("adamw", "torch", _adamw(foreach=False, fused=False)),
    "torch adamw, foreach": Baseline("adamw", "torch", _adamw(foreach=True, fused=False)),
    "torch adamw, fused": Baseline("adamw", "torch", _adamw(foreach=False, fused=True)),
    f"{_OTHERS} lamb": Baseline("lamb", _OTHERS, _named("Lamb")),
    f"{_OTHERS} lookahead": Baseline("lookahead(adamw)", _OTHERS, _lookahead),
    f"{_OTHERS} ademamix": Baseline("fame", _OTHERS, _named("AdEMAMix")),
    f"{_OTHERS} dualadam": Baseline("dualadam", _OTHERS, _named("DualAdam")),
    f"{_OTHERS} ranger": Baseline("novak", _OTHERS, _named("Ranger")),
}


def installed() -> list[str]:
    """Return the names of the baselines whose packages are installed."""
    available = {package for package in ("torch", _OTHERS) if importlib.util.find_spec(package)}
    return [name for name, x in BASELINES.items() if {"torch", x.package} <= available]


def run(name: str, params: Sequence[np.ndarray], grads: Sequence[np.ndarray]) -> Run:
    """Return a function that runs a baseline's steps on the CPU, with as many threads as JAX."""
    baseline, torch = BASELINES[name], _torch()
    leaves = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in params]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = torch.tensor(grad)
    optimizer = baseline.make(importlib.import_module(baseline.package), leaves)

    def run_steps(steps: int) -> None:
        for _ in range(steps):
            optimizer.step()

    run_steps(STEPS_BEFORE_RECTIFICATION)
    return run_steps


def _torch() -> Any:
    # By default, OpenMP's threads spin while they wait. They would block the cores that JAX needs
    # next. If anything else runs, they also block each other: a step becomes 100 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch = importlib.import_module("torch")
    torch.set_num_threads(cores())
    return torch
