"""The optimizers to time: our methods, and what Optax has beside them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_ext
from benchmarks.leaf_sets import LEAF_SETS
from pallas_kernels import Report, explain

# Of all; it changes nothing about the time of a step.
RATE = 1e-3

# What runs a step, and the fuser's name for it.
CHAIN = "chain"
WAYS = {CHAIN: "xla", "triton": "triton", "mosaic": "mosaic"}

# What every other one is compared with.
REFERENCE = "adamw"

# Of all that have slow weights, Novak's default among them.
SYNC_PERIOD = 5


def _synced_pair(params: optax.Params) -> optax.LookaheadParams:
    """For `optax.lookahead`: both donated, so the slow weights need memory of their own."""
    return optax.LookaheadParams(params, jax.tree.map(jnp.copy, params))


def trained(held: Any) -> optax.Params:
    """The parameters that gradients are taken at, of what `Contender.hold` makes."""
    return held.fast if isinstance(held, optax.LookaheadParams) else held


@dataclass(frozen=True)
class Contender:
    """An optimizer.

    Attributes:
      tx: with the method's own defaults.
      package: whose it is.
      floor_of: the contender that must move as many bytes; `None`: itself.
      hold: makes of the parameters what the optimizer's step takes in their place.
    """

    tx: optax.GradientTransformation
    package: str = "optax_ext"
    floor_of: str | None = None
    hold: Callable[[optax.Params], Any] = lambda params: params


CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender(optax.adamw(RATE), "optax"),
    "clip + adamw": Contender(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)), "optax"
    ),
    "lamb": Contender(optax.lamb(RATE), "optax"),
    "lookahead(adamw)": Contender(
        optax_ext.lookahead(optax.adamw(RATE), sync_period=SYNC_PERIOD, slow_step_size=0.5)
    ),
    # Its gradients have another structure than its parameters, which `explain` can't be told.
    "optax.lookahead(adamw)": Contender(
        optax.lookahead(optax.adamw(RATE), sync_period=SYNC_PERIOD, slow_step_size=0.5),
        "optax",
        floor_of="lookahead(adamw)",
        hold=_synced_pair,
    ),
    "fame": Contender(optax_ext.fame(RATE)),
    "vradam": Contender(optax_ext.vradam(RATE)),
    "invadam": Contender(optax_ext.invadam(RATE)),
    "dualadam": Contender(optax_ext.dualadam(RATE)),
    "novak": Contender(optax_ext.novak(RATE)),
    "novak, rotating": Contender(optax_ext.novak(RATE, lookahead="rotating")),
    "novak, trust ratio": Contender(optax_ext.novak(RATE, trust_ratio=True)),
    "caadam": Contender(optax_ext.caadam(RATE)),
}


_FUSED = ", fused"


def backends(name: str, platform: str) -> dict[str, str]:
    """The ways in which a contender's step runs on a platform, and the fuser's backend of each."""
    chain = {name: WAYS[CHAIN]}
    return chain | {f"{name}{_FUSED}": "auto"} if platform == "gpu" else chain


def chain_of(way: str) -> str:
    """The contender of a way to run its step."""
    return way.removesuffix(_FUSED)


def floor(name: str, leaf_set: str) -> float:
    """Bytes per parameter that a contender's step must move at least.

    Every array once, and again what has to wait for a norm, as the fused step does it.
    """
    report = _report(name, leaf_set)
    return max(report.floor_per_parameter, report.bytes_per_parameter)


def skipped(name: str, leaf_set: str) -> float:
    """Those of them that a fused step does without on average, between synchronizations."""
    if CONTENDERS[name].floor_of is not None:
        return 0.0
    report = _report(name, leaf_set)
    predicated = sum(phase.predicated for phase in report.phases)
    return (1 - 1 / SYNC_PERIOD) * predicated / report.parameters


@functools.cache
def _report(name: str, leaf_set: str) -> Report:
    return explain(CONTENDERS[CONTENDERS[name].floor_of or name].tx, LEAF_SETS[leaf_set])
