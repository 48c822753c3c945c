"""PyTorch's optimizers, and those of `pytorch_optimizer`, beside ours on the same device.

Both come with the extra `peers` and are imported only when they run. Where `pytorch_optimizer` has
no method of ours, it is timed beside what comes nearest: an optimizer with as many moments, or with
the same outer loop. Vradam, caadam and rotating lookahead have none.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.contenders import RATE
from benchmarks.history import cores
from benchmarks.timing import Run

# Ranger leaves the parameters alone until then.
STEPS_BEFORE_RECTIFICATION = 5


@dataclass(frozen=True)
class Peer:
    """An optimizer of PyTorch's kind.

    Attributes:
      near: the contender that it is nearest to, whose bytes it would move at least.
      package: where it comes from.
      make: takes the package and the parameters.
    """

    near: str
    package: str
    make: Callable[[Any, Sequence[Any]], Any]


def _adamw(*, foreach: bool, fused: bool) -> Callable[[Any, Sequence[Any]], Any]:
    return lambda torch, leaves: torch.optim.AdamW(leaves, RATE, foreach=foreach, fused=fused)


def _named(name: str) -> Callable[[Any, Sequence[Any]], Any]:
    return lambda package, leaves: getattr(package, name)(leaves, RATE)


def _lookahead(package: Any, leaves: Sequence[Any]) -> Any:
    return package.Lookahead(package.AdamW(leaves, RATE))


_OTHERS = "pytorch_optimizer"

PEERS: dict[str, Peer] = {
    "torch adamw, eager": Peer("adamw", "torch", _adamw(foreach=False, fused=False)),
    "torch adamw, foreach": Peer("adamw", "torch", _adamw(foreach=True, fused=False)),
    "torch adamw, fused": Peer("adamw", "torch", _adamw(foreach=False, fused=True)),
    f"{_OTHERS} lamb": Peer("lamb", _OTHERS, _named("Lamb")),
    f"{_OTHERS} lookahead": Peer("lookahead(adamw)", _OTHERS, _lookahead),
    f"{_OTHERS} ademamix": Peer("fame", _OTHERS, _named("AdEMAMix")),
    f"{_OTHERS} dualadam": Peer("dualadam", _OTHERS, _named("DualAdam")),
    f"{_OTHERS} ranger": Peer("novak", _OTHERS, _named("Ranger")),
}


def installed() -> list[str]:
    """Names of the peers that can run here."""
    there = {package for package in ("torch", _OTHERS) if importlib.util.find_spec(package)}
    return [name for name, peer in PEERS.items() if {"torch", peer.package} <= there]


def running(
    name: str, params: Sequence[np.ndarray], grads: Sequence[np.ndarray], device: str = "cpu"
) -> Run:
    """Runs a peer's steps: on a CPU on as many threads as JAX has, or on the GPU, "cuda"."""
    peer, torch = PEERS[name], _torch()
    leaves = [torch.nn.Parameter(torch.tensor(leaf, device=device)) for leaf in params]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = torch.tensor(grad, device=device)
    optimizer = peer.make(importlib.import_module(peer.package), leaves)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step()
        if device == "cuda":  # a CPU's are done when they return
            torch.cuda.synchronize()

    run(STEPS_BEFORE_RECTIFICATION)
    return run


def _torch() -> Any:
    # By default OpenMP's threads spin while they wait: on the cores that JAX needs next, and where
    # anything else runs, on each other's, which makes a step a hundred times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch = importlib.import_module("torch")
    torch.set_num_threads(cores())
    return torch
