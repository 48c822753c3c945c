"""The optimizers to measure: the methods of `optax_ext` and their baselines in Optax."""

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

# The learning rate of all optimizers. It does not affect the time of a step.
RATE = 1e-3

# The ways to run a step, each with the backend of `fuse`.
CHAIN = "chain"
WAYS = {CHAIN: "xla", "triton": "triton", "mosaic": "mosaic"}

# The baseline of all other optimizers.
REFERENCE = "adamw"

# The period of all optimizers with slow weights; it is also the default of `novak`.
SYNC_PERIOD = 5


def _synced_pair(params: optax.Params) -> optax.LookaheadParams:
    """Return the parameters of `optax.lookahead`; as both are donated, the slow ones are a copy."""
    return optax.LookaheadParams(params, jax.tree.map(jnp.copy, params))


def trained(params: Any) -> optax.Params:
    """Return the parameters that gradients are taken at, from the result of `Contender.hold`."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


@dataclass(frozen=True)
class Contender:
    """An optimizer to measure.

    Attributes:
      tx: the optimizer, with the defaults of its method.
      package: the package that it comes from.
      floor_of: the name of another contender whose step must move the same number of bytes; `None`
        if the bytes can be counted for the optimizer itself.
      hold: converts the parameters to the form that the optimizer's step takes.
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
    # Its gradients and its parameters differ in structure, which `explain` does not support.
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
    "adamw, 8 bits": Contender(optax_ext.quantize_state(optax.adamw(RATE))),
    "adamw, 8 bits, bfloat16": Contender(
        optax_ext.master_weights(optax_ext.quantize_state(optax.adamw(RATE))),
        hold=optax_ext.bfloat16_weights,
    ),
    "lion, 8 bits": Contender(optax_ext.quantize_state(optax.lion(RATE))),
    "fame, 8 bits": Contender(optax_ext.quantize_state(optax_ext.fame(RATE))),
    "vradam, 8 bits": Contender(optax_ext.quantize_state(optax_ext.vradam(RATE))),
    "novak, 8 bits": Contender(optax_ext.quantize_state(optax_ext.novak(RATE))),
}

# The optimizers with quantized state.
QUANTIZED = [name for name in CONTENDERS if "8 bits" in name]

_FUSED = ", fused"


def backends(name: str, platform: str) -> dict[str, str]:
    """Return the ways to run a contender's step on a platform, each with the backend of `fuse`."""
    chain = {name: WAYS[CHAIN]}
    return chain | {f"{name}{_FUSED}": "auto"} if platform == "gpu" else chain


def chain_of(way: str) -> str:
    """Return the name of the contender from a way to run its step."""
    return way.removesuffix(_FUSED)


def floor(name: str, leaf_set: str) -> float:
    """Return the least number of bytes per parameter that a contender's step must move.

    A step moves every array once. It reads some arrays again after it has computed a norm, as the
    fused step does.
    """
    report = _report(name, leaf_set)
    return max(report.floor_per_parameter, report.bytes_per_parameter)


def skipped(name: str, leaf_set: str) -> float:
    """Return the average bytes per parameter that a fused step skips between synchronizations."""
    if CONTENDERS[name].floor_of is not None:
        return 0.0
    report = _report(name, leaf_set)
    skipped_at_most = sum(phase.skipped for phase in report.phases)
    return (1 - 1 / SYNC_PERIOD) * skipped_at_most / report.parameters


@functools.cache
def _report(name: str, leaf_set: str) -> Report:
    contender = CONTENDERS[CONTENDERS[name].floor_of or name]
    return explain(contender.tx, jax.eval_shape(contender.hold, LEAF_SETS[leaf_set]))
